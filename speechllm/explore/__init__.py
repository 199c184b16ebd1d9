"""A page that shows where a model errs, and what a manifest holds: `speechllm explore`.

| | |
|---|---|
| `report.py` | results, manifests and a second system to the page and its data |
| `clips.py` | where the player finds the audio of an utterance, and its waveform |
| `page/` | the page itself: HTML, CSS and JavaScript without anything from elsewhere |
"""
