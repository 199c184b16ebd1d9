"""A model as a pipeline of transformers: what goes in and comes out is as of a model of theirs."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import transformers

from speechllm.decode.result import Recognition, Word
from speechllm.integrations.transformers import _result, pipeline
from speechllm.transcribe.formats import Recording, Segment
from tests.model.test_export import heard, sound  # noqa: F401 (a fixture)

RATE = 16000


@pytest.fixture
def ours(heard):  # noqa: F811
    return pipeline(heard, batch_size=2)


@pytest.fixture
def theirs(tmp_path):
    """Random weights: what matters is the form."""
    vocabulary = ["<pad>", "|", "a", "b", "<unk>", "<s>", "</s>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.pipeline(
        "automatic-speech-recognition",
        model=transformers.Wav2Vec2ForCTC(config).eval(),
        tokenizer=transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")),
        feature_extractor=transformers.Wav2Vec2FeatureExtractor(),
    )


def shape(result):
    """The keys and types of a result, of lists those of their first entries."""
    if isinstance(result, dict):
        return {key: shape(value) for key, value in result.items()}
    return [type(result), *(shape(x) for x in result[:1])] if isinstance(result, list) else type(result)


def test_results_have_the_form_of_theirs(ours, theirs):
    samples = sound()
    assert ours.task == theirs.task
    for make in (
        lambda: samples,
        lambda: {"raw": samples, "sampling_rate": RATE},
        lambda: {"array": samples, "sampling_rate": RATE, "path": "a.wav", "id": "a"},
        lambda: [samples, samples[:RATE]],
    ):
        assert shape(ours(make())) == shape(theirs(make()))
        assert shape(ours(make(), return_timestamps="word")) == shape(theirs(make(), return_timestamps="word"))


def test_every_input_has_the_text_that_transcribe_gives(ours, tmp_path):
    samples = sound()
    (found,) = ours.model.transcribe([samples])
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(file.getvalue())
    decoder = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(samples)[None], sample_rate=RATE)
    )
    inputs = [str(tmp_path / "a.wav"), tmp_path / "a.wav", file.getvalue(), samples, torch.from_numpy(samples), decoder]
    assert found.text and all(ours(one) == {"text": found.text} for one in inputs)
    mixed = [*inputs, {"raw": samples[::2], "sampling_rate": RATE // 2}, samples[:RATE]]
    ours.model.save_pretrained(tmp_path / "model")
    assert pipeline(tmp_path / "model", device="cpu")(samples) == {"text": found.text}
    results = ours(mixed, batch_size=3)
    assert [r["text"] for r in results[:-2]] == [found.text] * len(inputs)
    assert results == ours(mixed, batch_size=1) and results[-1] == ours(samples[:RATE])


def test_a_generator_is_read_as_results_are_asked_for(ours):
    read = []

    def inputs():
        for i in range(5):
            read.append(i)
            yield sound()[: RATE + 1000 * i]

    results = ours(inputs())
    assert read == []
    first = next(results)
    assert read == [0, 1] and first["text"]
    assert len(list(results)) == 4


def test_chunks_make_up_the_text():
    def segment(offset, text, *words):
        words = tuple(Word(word, start, start + 0.5, 1.0) for word, start in words)
        return Segment(offset, 2.0, Recognition(text, (), (), words=words))

    segments = [
        segment(0, "One, two", ("One,", 0), ("two", 1)),
        segment(2, ""),
        segment(5, "三四", ("三", 0), ("四", 1)),
    ]
    recording = Recording("a", "a.wav", 7.0, segments)
    assert _result(recording, None) == {"text": "One, two 三四"}
    assert _result(recording, True)["chunks"] == [
        {"text": "One, two", "timestamp": (0, 2)},
        {"text": " 三四", "timestamp": (5, 7)},
    ]
    words = _result(recording, "word")["chunks"]
    assert [word["text"] for word in words] == ["One,", " two", " 三", "四"]
    assert words[-1]["timestamp"] == (6, 6.5)


def test_languages_are_asked_for_as_of_whisper(ours, monkeypatch):
    asked = []
    monkeypatch.setattr(ours.model, "transcribe", lambda audio, **options: asked.append(options) or [])
    samples = np.zeros(RATE, np.float32)
    for kwargs in ({"language": "french"}, {"task": "translate"}, {"target_language": "de", "task": "translate"}):
        with pytest.raises(ValueError, match="shorter"):  # no result
            ours(samples, generate_kwargs=kwargs, chunk_length_s=30)
    languages = [{k: v for k, v in options.items() if "language" in k} for options in asked]
    assert languages == [{"language": "french"}, {"target_language": "en"}, {"target_language": "de"}]
    for options, message in (
        ({"generate_kwargs": {"num_beams": 5}}, "generate_kwargs: unknown num_beams; known are language, task"),
        ({"generate_kwargs": {"task": "sing"}}, "task: 'sing', choose from 'transcribe' and 'translate'"),
        ({"return_timestamps": "char"}, "return_timestamps: 'char', choose from True and 'word'"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(samples, **options)
    with pytest.raises(ValueError, match="needs sampling_rate, and raw or array; there is raw"):
        ours({"raw": samples})
