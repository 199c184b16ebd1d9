"""A trained model behind the interfaces of OpenAI's audio API, and captions in a browser: `speechllm serve`.

    server      uvicorn, its limits on connections, and how it ends
    app         routes; `guard` in front of them: keys, other sites' pages, rates; `errors` as OpenAI's
    uploads     recordings: form -> segments -> texts, whole or as events;  `responses`: their formats
    realtime    live audio: messages -> words or segments -> events
    engine      the one thread with the model: all uploads and streams in one loop
    options     limits;  `service`: what routes share;  `metrics`: what Prometheus reads

The optional extra `[serve]` has what these need; `speechllm` itself does not import them.
"""
