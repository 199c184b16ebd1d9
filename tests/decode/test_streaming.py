"""Streams: any cuts, any company, any process give the same words, which are those of the whole."""

import copy
import dataclasses
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from speechllm.data.features import fbank
from speechllm.decode.encoder_recognizer import EncoderRecognizer
from speechllm.decode.interface import Speech
from speechllm.decode.options import RecognizeOptions, StreamingOptions
from speechllm.decode.result import streamed_text
from speechllm.decode.streaming import StreamingRecognizer
from speechllm.errors import UserError
from speechllm.model.config import LLMSection
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prompt.interleave import StreamingConfig, interleave
from speechllm.prompt.request import Request

RATE = 16000


def causal(config, **changes):
    zipformer = dataclasses.replace(
        config.encoder.zipformer, causal=True, chunk_size=[16, 32, -1], left_context_frames=[32, -1]
    )
    encoder = dataclasses.replace(config.encoder, zipformer=zipformer)
    return dataclasses.replace(config, encoder=encoder, **changes)


def talkative(model, end):
    """It writes different things for different audio, and ends more often the larger `end` is."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim == 2 and not name.startswith("encoder."):
            nn.init.normal_(p, std=0.5)
        if name.endswith("chunkwise_conv_scale"):
            nn.init.normal_(p, std=0.3)
    if model.ctc_head is not None:
        nn.init.normal_(model.ctc_head.weight, std=2.0)
    if model.llm is not None:
        begin_words = [i for i in range(model.tokenizer.vocab_size) if model.tokenizer.piece(i).startswith("\u2581")]
        with torch.no_grad():
            head = model.llm.head.weight if hasattr(model.llm, "head") else model.llm.causal_lm.lm_head.weight
            head[begin_words] *= 3.0
            head[model.tokenizer.eos_id] *= end
    model.encoder.set_batch_count(1e5)
    return model.eval()


@pytest.fixture
def speech_llm(model_config):
    torch.manual_seed(0)
    streaming = StreamingConfig(chunk_seconds=[0.32, 0.64])
    return talkative(SpeechLLM.from_config(causal(model_config, streaming=streaming)), end=6.0)


@pytest.fixture
def encoder_model(model_config):
    torch.manual_seed(0)
    return talkative(EncoderModel.from_config(causal(model_config, llm=None, ctc_weight=1.0)), end=1.0)


def noise(seconds, seed):
    """Loud and soft in turns, so that there is something to hear."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.1 * rng.standard_normal(len(time)) * np.sin(7 * time + seed) ** 2).astype(np.float32)


def streamed(recognizer, samples, step=None, seed=0):
    stream, words, at = recognizer.open(), [], 0
    rng = np.random.default_rng(seed)
    while at < len(samples):
        size = step or int(rng.integers(1, 20000))
        words += stream.accept(samples[at : at + size])
        at += size
    return words + stream.finish()


def assert_same(words, expected):
    """Numbers but for rounding."""
    assert [(w.text, w.segment, w.joined) for w in words] == [(w.text, w.segment, w.joined) for w in expected]
    for word, other in zip(words, expected, strict=True):
        for name in ("start", "end", "confidence", "written"):
            assert getattr(word, name) == pytest.approx(getattr(other, name), abs=1e-4), name


KINDS = {
    "greedy": (0.32, StreamingOptions()),
    "long chunks": (0.64, StreamingOptions()),
    "beam": (0.32, StreamingOptions(beam=3, stable_seconds=0.5)),
    "segments": (0.32, StreamingOptions(endpoint_seconds=0.6)),
    "fresh segments": (0.32, StreamingOptions(beam=2, endpoint_seconds=0.6, fresh_segments=True)),
    "forgetful": (0.32, StreamingOptions(beam=2, memory_seconds=0.6)),
    "ctc": (0.32, StreamingOptions(ctc=True)),
}


@pytest.fixture(params=KINDS)
def recognizer(request, speech_llm):
    chunk_seconds, options = KINDS[request.param]
    return StreamingRecognizer(speech_llm, chunk_seconds, "en", options=options)


def test_any_cuts_give_the_same_words(recognizer):
    samples = noise(4.3, seed=1)
    expected = streamed(recognizer, samples, step=len(samples))
    assert len(expected) > 4 and len({word.written for word in expected}) > 2
    for step in (112, RATE, None):
        assert_same(streamed(recognizer, samples, step), expected)
    short = samples[: RATE // 2]
    assert_same(streamed(recognizer, short, step=1), streamed(recognizer, short, step=len(short)))
    integers = (short * 32768).astype(np.int16)
    assert_same(streamed(recognizer, integers, 500), streamed(recognizer, integers.astype(np.float32) / 32768, 500))


def test_the_simulated_pass_is_the_stream(recognizer):
    utterances = [noise(seconds, seed) for seed, seconds in enumerate((3.1, 0.05, 0.3, 4.77, 2.0, 0.0))]
    features = [fbank(x) if len(x) >= 400 else torch.empty(0, 80) for x in utterances]
    lens = torch.tensor([len(x) for x in features])
    padded = nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=1e4)
    for words, samples in zip(recognizer.simulate(padded, lens), utterances, strict=True):
        expected = streamed(recognizer, samples)
        near = [dataclasses.replace(word, written=min(word.written, len(samples) / RATE)) for word in words]
        assert [w.text for w in near] == [w.text for w in expected]
        assert [w.written for w in near] == pytest.approx([w.written for w in expected], abs=0.006)


def test_streams_in_a_batch_have_the_words_that_they_have_alone(recognizer):
    """They join one after the other, in steps of their own, and leave when they end."""
    utterances = {i: noise(1.1 + 0.83 * i, seed=i) for i in range(5)}
    steps = {i: (400, 3000, 9000, 20000, 11111)[i] for i in utterances}
    expected = {i: streamed(recognizer, samples) for i, samples in utterances.items()}
    streams, words, at = {}, {i: [] for i in utterances}, dict.fromkeys(utterances, 0)
    for turn in range(300):
        if turn % 4 == 0 and len(streams) < len(utterances):
            streams[len(streams)] = recognizer.open()
        going = [i for i, stream in streams.items() if not stream.finished and at[i] < len(utterances[i])]
        pieces = [utterances[i][at[i] : at[i] + steps[i]] for i in going]
        for i, found in zip(going, recognizer.accept([streams[i] for i in going], pieces), strict=True):
            words[i] += found
            at[i] += steps[i]
        ending = [i for i in going if at[i] >= len(utterances[i])]
        for i, found in zip(ending, recognizer.finish([streams[i] for i in ending]), strict=True):
            words[i] += found
    for i in utterances:
        assert_same(words[i], expected[i])


def test_a_saved_stream_goes_on(recognizer, tmp_path):
    samples = noise(4.0, seed=3)
    expected = streamed(recognizer, samples)
    stream, words = recognizer.open(), []
    for at in range(0, len(samples), 5000):
        words += stream.accept(samples[at : at + 5000])
        stream.save(tmp_path / "stream.safetensors")
        stream = recognizer.load(tmp_path / "stream.safetensors")
    assert_same(words + stream.finish(), expected)
    with pytest.raises(UserError, match="the stream was saved with .*chunk_seconds"):
        options = dataclasses.replace(recognizer.options, endpoint_seconds=3.0)
        StreamingRecognizer(recognizer.model, recognizer.chunk.seconds, options=options).load(
            tmp_path / "stream.safetensors"
        )
    recognizer.open().encoder.save(tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match="encoder.safetensors: not a stream"):
        recognizer.load(tmp_path / "encoder.safetensors")


def test_a_saved_stream_goes_on_in_another_process(speech_llm, tmp_path):
    speech_llm.save_pretrained(tmp_path / "model")
    recognizer = StreamingRecognizer(speech_llm, 0.32)
    samples = noise(3.0, seed=4)
    np.save(tmp_path / "rest.npy", samples[20000:])
    expected = streamed(recognizer, samples)
    stream = recognizer.open()
    words = stream.accept(samples[:20000])
    stream.save(tmp_path / "stream.safetensors")
    code = (
        "import numpy as np, sys; from speechllm.model.build import load_model; "
        "from speechllm.decode.streaming import StreamingRecognizer; "
        "stream = StreamingRecognizer(load_model('model'), 0.32).load('stream.safetensors'); "
        "words = stream.accept(np.load('rest.npy')) + stream.finish(); print([w.text for w in words])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [word.text for word in words] + eval(result.stdout) == [word.text for word in expected]


def test_greedy_search_is_the_row_that_the_model_was_trained_on(speech_llm):
    """Written again, all in one row, every token and every `next` is the most probable."""
    recognizer = StreamingRecognizer(speech_llm, 0.32, "en")
    samples = noise(2.5, seed=5)
    chunk, eos = recognizer.chunk, speech_llm.tokenizer.eos_id
    written = []

    class Spy(type(recognizer.decoder)):
        def _take(self, text, ended):
            written.append(list(ended[0].hypothesis.tokens))
            super()._take(text, ended)

    recognizer.decoder.__class__ = Spy
    streamed(recognizer, samples)
    features = fbank(samples)
    lens = torch.tensor([len(features)])
    assert len(written) == int(chunk.count(lens)) + 1 and any(written)
    with torch.no_grad():
        _, _, audio, audio_lens = speech_llm.encode(features[None], lens, chunk)
        spliced = interleave(
            speech_llm.config.prompt,
            speech_llm.tokenizer,
            audio_lens.tolist(),
            [Request(language="en")],
            [written],
            0.32,
            chunk.positions,
        )
        logits, _ = speech_llm.llm(inputs_embeds=speech_llm.embed(spliced, audio, audio_lens))
    has_loss = spliced.labels[0] >= 0
    best, labels = logits[0].argmax(-1)[has_loss], spliced.labels[0][has_loss]
    # the longest texts are cut by their limit, where another token would be more probable than `next`
    cut = [len(tokens) == recognizer.decoder._max_tokens - 1 for tokens in written]
    ends = (labels == eos).nonzero().flatten()
    wrong = (best != labels).nonzero().flatten().tolist()
    assert wrong == [int(end) for end, is_cut in zip(ends, cut, strict=True) if is_cut and best[end] != eos]
    assert len(wrong) < len(written)


def test_a_language_model_of_transformers(model_config, tmp_path):
    """Its cache grows with what it remembers; all else is the same."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = LLMSection(transformers={"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 300, **sizes})
    streaming = StreamingConfig(chunk_seconds=[0.32])
    model = talkative(SpeechLLM.from_config(causal(model_config, llm=llm, streaming=streaming)), end=3.0)
    recognizer = StreamingRecognizer(model, 0.32, options=StreamingOptions(beam=2))
    utterances = [noise(seconds, seed) for seed, seconds in enumerate((3.0, 1.1))]
    expected = [streamed(recognizer, samples) for samples in utterances]
    assert len(expected[0]) > 3
    streams = [recognizer.open(), recognizer.open()]
    words, sizes = [[], []], []
    for at in range(0, len(utterances[0]), 4000):
        for found, new in zip(words, recognizer.accept(streams, [x[at : at + 4000] for x in utterances]), strict=True):
            found += new
        streams[0].save(tmp_path / "stream.safetensors")
        streams[0] = recognizer.load(tmp_path / "stream.safetensors")
        sizes.append(streams[0].nbytes)
    for i, found in enumerate(recognizer.finish(streams)):
        assert_same(words[i] + found, expected[i])
    assert sizes[-1] > sizes[1] + 20_000
    stream = StreamingRecognizer(model, 0.32, options=StreamingOptions(beam=2, memory_seconds=0.32)).open()
    stream.accept(utterances[0])
    assert stream.nbytes < sizes[-1] - 20_000


def test_what_is_forgotten(speech_llm):
    """The state is that of the prompt and the last chunks; with time enough nothing is forgotten."""
    samples = noise(4.0, seed=7)
    recognizer = StreamingRecognizer(speech_llm, 0.32, "en", options=StreamingOptions(memory_seconds=0.64))
    stream, llm = recognizer.open(), speech_llm.llm
    seen = set()
    for at in range(0, len(samples), 1600):
        stream.accept(samples[at : at + 1600])
        text = stream.text
        (hypothesis,), prompt = text.hypotheses, recognizer.open().text.llm
        assert len(text.remembered) == len(hypothesis.remembered) <= 3
        seen.add(len(text.remembered))
        if len(text.remembered) and text.chunks >= 4:
            eos = [speech_llm.tokenizer.eos_id]
            rows = [(audio, llm.embed(torch.tensor([*tokens, *eos]))) for audio, tokens in
                    zip(text.remembered, hypothesis.remembered, strict=True)]  # fmt: skip
            read = torch.cat([part for row in rows for part in row])[:-1]
            with torch.no_grad():
                _, expected = llm(inputs_embeds=read[None], state=prompt)
            for name, x in expected.tensors().items():
                torch.testing.assert_close(text.llm.tensors()[name], x, rtol=1e-4, atol=1e-5)
    assert seen == {0, 1, 2, 3}
    greedy = streamed(StreamingRecognizer(speech_llm, 0.32, "en"), samples)
    for seconds in (2.0, math.inf):
        options = StreamingOptions(memory_seconds=seconds)
        assert_same(streamed(StreamingRecognizer(speech_llm, 0.32, "en", options=options), samples), greedy)
    assert speech_llm.config.streaming.memory_seconds == 10.0


def test_ctc_of_a_stream_is_that_of_the_whole(encoder_model):
    """Texts, times and confidences."""
    recognizer = StreamingRecognizer(encoder_model, 0.32)
    offline = copy.deepcopy(encoder_model)
    context = {"chunk_size": 16, "left_context_frames": 32}
    forward = offline.encoder.forward
    offline.encoder.forward = lambda features, lens: forward(features, lens, **context)
    for seed, seconds in enumerate((5.0, 1.3, 0.4)):
        samples = noise(seconds, seed)
        features = fbank(samples)
        speech = Speech(features[None], torch.tensor([len(features)]), [Request()])
        ((expected,),) = EncoderRecognizer(offline, RecognizeOptions(timestamps=True))([speech])
        words = streamed(recognizer, samples)
        assert streamed_text(words) == " ".join(expected.text.split())
        assert len(words) == len(expected.words)
        for word, other in zip(words, expected.words, strict=True):
            assert (word.text, word.start, word.end) == (other.text, other.start, other.end)
            assert word.confidence == pytest.approx(other.confidence, abs=1e-4)
            assert word.written >= word.end - 1e-6


def test_nothing_is_taken_back_and_a_beam_of_all_is_no_worse(speech_llm):
    """What is unstable may change; the words so far, and it, are a text of the beam."""
    options = StreamingOptions(beam=4, stable_seconds=10.0)
    recognizer = StreamingRecognizer(speech_llm, 0.32, options=options)
    samples, stream, texts, words = noise(4.0, seed=6), recognizer.open(), [], []
    for at in range(0, len(samples), 4000):
        words += stream.accept(samples[at : at + 4000])
        texts.append((streamed_text(words), stream.unstable))
        hypotheses = stream.text.hypotheses
        assert len(hypotheses) == len(stream.text.llm) <= 4
        assert [h.score for h in hypotheses] == sorted([h.score for h in hypotheses], reverse=True)
    assert any(unstable for _, unstable in texts)
    final = streamed_text(words + stream.finish())
    assert all(final.startswith(text) for text, _ in texts)
    # with time, what the hypotheses do not agree on is written all the same
    hasty = StreamingRecognizer(speech_llm, 0.32, options=StreamingOptions(beam=4, stable_seconds=0.0))
    stream = hasty.open()
    for at in range(0, len(samples), 4000):
        stream.accept(samples[at : at + 4000])
        assert not stream.unstable.strip()


def test_memory_does_not_grow(recognizer):
    stream = recognizer.open()
    sizes = []
    for i in range(24):
        stream.accept(noise(0.5, seed=i))
        sizes.append(stream.nbytes)
    # features and frames that wait for their chunk come and go
    assert max(sizes[12:]) <= max(sizes[:12]) + 40 * 80 * 4
    assert sizes[-1] < 400_000


@pytest.mark.cuda
def test_words_on_a_gpu(speech_llm):
    """In float32 those of the CPU."""
    utterances = [noise(seconds, seed) for seed, seconds in enumerate((3.0, 1.1))]
    expected = [streamed(StreamingRecognizer(speech_llm, 0.32), samples) for samples in utterances]
    recognizer = StreamingRecognizer(speech_llm.cuda(), 0.32)
    streams = [recognizer.open(), recognizer.open()]
    words = recognizer.accept(streams, utterances)
    for found, rest, other in zip(words, recognizer.finish(streams), expected, strict=True):
        assert [word.text for word in found + rest] == [word.text for word in other]


def test_segments(speech_llm):
    """A new one begins after silence, the words stay those that they were."""
    samples = np.concatenate([noise(1.5, 1), np.zeros(3 * RATE, np.float32), noise(1.5, 2)])
    plain = streamed(StreamingRecognizer(speech_llm, 0.32, options=StreamingOptions(ctc=True)), samples)
    options = StreamingOptions(ctc=True, endpoint_seconds=0.4)
    words = streamed(StreamingRecognizer(speech_llm, 0.32, options=options), samples)
    assert [w.text for w in words] == [w.text for w in plain]
    assert {w.segment for w in plain} == {0} and len({w.segment for w in words}) > 1
    assert [w.segment for w in words] == sorted(w.segment for w in words)
    for before, after in pairwise(words):
        assert after.segment == before.segment or (after.written - before.written >= 0.4 and not after.joined)


def test_hotwords_and_what_is_in_vain(speech_llm, encoder_model, tmp_path):
    (tmp_path / "hotwords").write_text("tres\t9\nuno dos\t9\n")
    samples = noise(4.0, seed=1)
    plain = streamed_text(streamed(StreamingRecognizer(speech_llm, 0.32), samples))
    options = StreamingOptions(hotwords=str(tmp_path / "hotwords"))
    boosted = streamed_text(streamed(StreamingRecognizer(speech_llm, 0.32, options=options), samples))
    assert boosted.count("tres") + boosted.count("uno dos") > plain.count("tres") + plain.count("uno dos")
    for options, message in (
        (StreamingOptions(beam=2), "beam: is for the language model's search"),
        (StreamingOptions(hotwords="file"), "hotwords: is for the language model's search"),
    ):
        with pytest.raises(UserError, match=message):
            StreamingRecognizer(encoder_model, 0.32, options=options)
    with pytest.raises(UserError, match="stable_seconds: is for a beam"):
        StreamingOptions(stable_seconds=2.0)
    with pytest.raises(UserError, match="fresh_segments: is for segments"):
        StreamingOptions(fresh_segments=True)


def test_what_cannot_be_streamed_is_refused(model, speech_llm, encoder_model, model_config):
    with pytest.raises(UserError, match="cannot hear a stream.*causal"):
        StreamingRecognizer(model.eval())
    with pytest.raises(UserError, match="1 is none of those that the model was trained with: 0.32, 0.64"):
        StreamingRecognizer(speech_llm, 1)
    with pytest.raises(UserError, match="0.5 is none of the encoder's chunks, in seconds 0.32, 0.64"):
        StreamingRecognizer(encoder_model, 0.5)
    offline = SpeechLLM.from_config(causal(model_config)).eval()
    with pytest.raises(UserError, match="trained without model.streaming; the CTC head can"):
        StreamingRecognizer(offline)
    stream = StreamingRecognizer(encoder_model, 0.32).open()
    for samples in (np.zeros((2, 100), np.float32), np.zeros(100, np.int32)):
        with pytest.raises(UserError, match="give one channel"):
            stream.accept(samples)
    with pytest.raises(UserError, match="not finite"):
        stream.accept(np.array([np.nan], np.float32))
    assert stream.finish() == [] and stream.finish() == []
    with pytest.raises(UserError, match="finished"):
        stream.accept(np.zeros(100, np.float32))
