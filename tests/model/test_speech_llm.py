"""SpeechLLM: loss, batch invariance, frozen parts, saving and loading."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import WhisperConfig, WhisperModel

from speechllm.config import ConfigError, from_dict, to_dict
from speechllm.data import DataError
from speechllm.data.features import extract_features, extract_features_padded
from speechllm.decode.interface import RecognizeOptions
from speechllm.decode.recognizer import SpeechLLMRecognizer
from speechllm.decode.result import Hypothesis
from speechllm.decode.search import SearchOptions
from speechllm.encoder import WhisperEncoderConfig, ZipformerConfig, init_from_data, save_encoder
from speechllm.errors import UserError
from speechllm.llm.adapters import TuneConfig, load_adapter
from speechllm.model.config import EncoderSection, LLMSection, ModelConfig, MoreEncoder
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import OptimConfig, build_optimizer
from speechllm.projector import ProjectorConfig
from speechllm.prompt.label import WordTime
from speechllm.prompt.request import Request, requests_of
from speechllm.prompt.template import PromptConfig
from speechllm.rwkv7 import RWKV7Config, RWKV7State, load_rwkv7, save_rwkv7
from speechllm.train.checkpoint import average_state_dicts, load_trained, save_checkpoint, trained_state_dict
from speechllm.transcribe.formats import Recording, Segment, format_json
from speechllm.weights import CheckpointError


def test_loss_of_a_batch_is_the_sum_of_its_rows(model, batch):
    model.eval()
    features, lens, texts, requests = batch
    whole = model(*batch)
    rows = [
        model(features[i : i + 1, : lens[i]], lens[i : i + 1], texts[i : i + 1], requests[i : i + 1]) for i in range(3)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(row[name] for row in rows), rtol=1e-5, atol=1e-4)
    assert whole["tokens"] == sum(len(model.label_ids(text)) + 1 for text in texts)


def test_loss_is_on_the_label_only(model, batch):
    """Computed by hand from all logits of one row."""
    model.eval()
    features, lens, texts, requests = (x[:1] for x in batch)
    _, _, audio_embeds, audio_lens = model.encode(features, lens)
    inputs_embeds, _, _ = model.prompted(audio_embeds, audio_lens, requests, [model.label_ids(texts[0])])
    label = [*model.label_ids(texts[0]), model.tokenizer.eos_id]
    logits, _ = model.llm(inputs_embeds=inputs_embeds)
    log_probs = logits[0, -len(label) :].log_softmax(-1)
    expected = -log_probs[range(len(label)), label].sum()
    torch.testing.assert_close(model(features, lens, texts, requests)["llm_loss"], expected)


def transcripts_of(requests):
    return [dataclasses.replace(request, target_language=None) for request in requests]


@pytest.fixture
def mixed_batch(batch):
    """The first and the last row are transcribed, the one between is translated."""
    features, lens, texts, _ = batch
    return features, lens, [texts[0], "one", texts[2]], requests_of(["en", "es", "en"], [None, "en", None])


def test_the_loss_of_transcripts_and_translations_is_the_sum_of_its_rows(model, mixed_batch):
    model.eval()
    features, lens, *columns = mixed_batch
    rows = [model(features[i : i + 1, : lens[i]], lens[i : i + 1], *(c[i : i + 1] for c in columns)) for i in range(3)]
    for name, value in model(*mixed_batch).items():
        torch.testing.assert_close(value, sum(row[name] for row in rows), rtol=1e-5, atol=1e-4)
    transcribed = model(*mixed_batch[:3], transcripts_of(mixed_batch[3]))
    assert rows[1]["ctc_loss"] == 0 and transcribed["ctc_loss"] > sum(row["ctc_loss"] for row in rows)
    ones = torch.ones(3, dtype=torch.long)
    prompts = [model.spliced(ones, asked).token_ids for asked in (mixed_batch[3], transcripts_of(mixed_batch[3]))]
    assert prompts[0].shape != prompts[1].shape or not torch.equal(*prompts)


def test_every_parameter_gets_a_gradient_from_translations_alone(model, batch):
    model.train()
    model(*batch[:3], requests_of(["en", "es", "en"], ["es", "en", "es"]))["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert not model.ctc_head.weight.grad.any()


def test_every_parameter_gets_a_gradient(model, batch):
    model.train()
    model(*batch)["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_wkv_backend_is_a_setting(model_config):
    section = {"wkv_backend": "reference", "rwkv7": to_dict(model_config.llm.rwkv7)}
    model_config.llm = from_dict(LLMSection, section)
    assert SpeechLLM.from_config(model_config).llm.wkv_backend == "reference"
    with pytest.raises(ValueError, match="unknown 'fast', choose from auto, reference, chunked, fla"):
        LLMSection(rwkv7=model_config.llm.rwkv7, wkv_backend="fast")


def test_checkpointed_blocks_give_the_same_gradients(model_config, batch):
    grads = []
    for model_config.llm.checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        model = SpeechLLM.from_config(model_config).eval()
        model(*batch)["loss"].backward()
        grads.append([p.grad for p in model.parameters()])
    assert model.llm.checkpoint_blocks
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_checkpointed_encoder_layers_give_the_same_gradients(model_config, batch):
    grads = []
    for checkpoint_layers in (False, True):
        section = {"checkpoint_layers": checkpoint_layers, "zipformer": to_dict(model_config.encoder.zipformer)}
        model_config.encoder = from_dict(EncoderSection, section)
        random.seed(0)
        torch.manual_seed(0)
        model = SpeechLLM.from_config(model_config).train()
        assert model.encoder.checkpoint_layers == checkpoint_layers
        model(*batch)["loss"].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_recognize_is_batch_invariant(model, batch):
    model.eval()
    features, lens, _, requests = batch
    found = model.recognize(features, lens, requests)
    for i in range(3):
        (alone,) = model.recognize(features[i : i + 1, : lens[i]], lens[i : i + 1], requests[i : i + 1])
        assert (alone.text, alone.tokens, alone.ctc_text) == (found[i].text, found[i].tokens, found[i].ctc_text)
        assert alone.log_probs == pytest.approx(found[i].log_probs, abs=1e-4)


@pytest.mark.cuda
def test_a_gpu_gives_what_the_cpu_gives(model, batch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions in 11 bits, by default
    model.eval()
    features, lens, texts, requests = batch
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad(set_to_none=True)
        out = model(features.to(device), lens.to(device), texts, requests)
        out["loss"].backward()
        results.append((
            out["loss"].item(),
            torch.cat([p.grad.flatten() for p in model.parameters()]).cpu(),
            model.recognize(features.to(device), lens.to(device), requests),
        ))  # fmt: skip
    (loss, gradient, found), (gpu_loss, gpu_gradient, gpu_found) = results
    assert gpu_loss == pytest.approx(loss, rel=1e-4)
    assert (gpu_gradient - gradient).norm() <= 1e-3 * gradient.norm()
    for on_cpu, on_gpu in zip(found, gpu_found, strict=True):
        assert (on_gpu.text, on_gpu.tokens, on_gpu.ctc_text) == (on_cpu.text, on_cpu.tokens, on_cpu.ctc_text)


def test_recognize_translates_by_the_language_model_alone(model, mixed_batch):
    model.eval()
    features, lens, _, requests = mixed_batch
    for p in model.llm.parameters():  # an untrained model writes the same whatever it reads
        if p.ndim == 2:
            nn.init.normal_(p, std=0.5)
    found = model.recognize(features, lens, requests)
    transcribed = model.recognize(features, lens, transcripts_of(requests))
    assert [i for i in range(3) if found[i].text != transcribed[i].text] == [1]
    assert [r.ctc_text for r in found] == [transcribed[0].ctc_text, None, transcribed[2].ctc_text]


def test_transcribe_takes_files_arrays_and_tensors_of_any_length(model, tmp_path):
    torch.manual_seed(0)
    samples = 0.1 * torch.randn(40 * 16000)
    samples[20 * 16000 : 21 * 16000] = 0  # a pause
    soundfile.write(tmp_path / "a.wav", samples.numpy(), 16000, subtype="FLOAT")
    found = model.train().transcribe([tmp_path / "a.wav", samples.numpy(), samples, torch.zeros(16000)], "en")
    assert model.training
    assert found[0].text == found[1].text == found[2].text and len(found[0].segments) == 2
    assert found[3].text == "" and not found[3].segments
    (translated,) = model.transcribe([samples[:16000]], "en", "es")
    assert translated.segments[0].recognition.ctc_text is None
    with pytest.raises(DataError, match="missing.wav"):
        model.transcribe([tmp_path / "missing.wav"], "en")


CUT = RecognizeOptions(fallback="cut")


def test_one_bad_input_is_raised_or_returned_and_the_others_are_kept(model, tmp_path):
    samples = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    bad = [tmp_path / "missing.wav", torch.full((16000,), torch.nan), "https://example.org/a.wav", samples[:0]]
    found = model.transcribe([samples, *bad, samples], "English", on_error="return")
    assert found[0].text == found[5].text and [type(x) for x in found[1:5]] == [DataError] * 4
    for error, message in zip(found[1:5], ["missing.wav", "audio[2]: ", "example.org", "audio[4]: no"], strict=True):
        assert message in str(error)
    with pytest.raises(DataError, match=r"missing.wav \(and 1 more of 3 inputs\)") as caught:
        model.transcribe([*bad[:2], samples], "en")
    assert caught.value.results[2].text == found[0].text
    with pytest.raises(UserError, match="on_error: unknown 'ignore'"):
        model.transcribe([samples], "en", on_error="ignore")


@pytest.mark.parametrize("audio", [None, 3, b"RIFF", {"array": torch.zeros(16000), "sampling_rate": 16000}])
def test_what_is_no_audio_at_all_is_said_at_once(model, audio):
    with pytest.raises(UserError, match="audio: .*: give a path or samples, or a list of them"):
        model.transcribe(audio, "en")


def test_a_path_or_samples_alone_are_one_input(model, tmp_path):
    samples = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / "a.wav", samples.numpy(), 16000, subtype="FLOAT")
    expected = model.transcribe([samples], "en")[0].text
    for alone in (str(tmp_path / "a.wav"), tmp_path / "a.wav", samples, samples.numpy()):
        assert [found.text for found in model.transcribe(alone, "en")] == [expected]
    with pytest.raises(UserError, match="put it into a list"):
        model.transcribe(samples[None], "en")
    assert model.transcribe([samples[None]], "en")[0].text == expected


def test_samples_at_another_rate_and_too_few_of_them(model):
    samples = 0.1 * torch.randn(48000, generator=torch.Generator().manual_seed(0))
    (found,) = model.transcribe([samples], "en", sampling_rate=48000)
    assert found.duration == 1.0
    for few in (samples[:1], samples[:400]):
        (found,) = model.transcribe([few], "en")
        assert (found.text, found.segments) == ("", [])


def test_a_loop_falls_back_to_ctc_as_on_the_command_line(model, monkeypatch):
    loop = (Hypothesis((5,) * 3, (-1.0,) * 3, -3.0, "loop"),)
    monkeypatch.setattr("speechllm.decode.recognizer.search", lambda llm, prompts, *_: enumerate(loop for _ in prompts))
    samples = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    for options, fallback in ((None, "ctc"), (RecognizeOptions(SearchOptions("beam")), "ctc"), (CUT, "cut")):
        (found,) = model.transcribe([samples], "en", options=options)
        assert found.segments[0].recognition.fallback == fallback


def test_a_sample_is_the_same_whatever_else_is_transcribed(model):
    generator = torch.Generator().manual_seed(0)
    audio = [0.1 * torch.randn(n * 8000, generator=generator) for n in (2, 3, 4)]

    def tokens(audio, seed=3):
        options = RecognizeOptions(SearchOptions("sample", seed=seed))
        return [found.segments[0].recognition.tokens for found in model.transcribe(audio, "en", options=options)]

    together = tokens(audio)
    assert tokens(audio[::-1]) == together[::-1]
    assert [tokens(x)[0] for x in audio] == together
    assert tokens(audio, seed=4) != together


@pytest.mark.parametrize("frames", [1, 3, 8])
def test_an_utterance_too_short_for_the_encoder_has_no_text(model, batch, frames):
    features, lens, _, requests = batch
    expected = model.recognize(features, lens, requests)
    found = model.recognize(features, torch.tensor([120, frames, 50]), requests)
    assert (found[1].text, found[1].ctc_text, found[1].tokens) == ("", "", ())
    assert [found[i].tokens for i in (0, 2)] == [expected[i].tokens for i in (0, 2)]
    assert model.recognize(features[:1], torch.tensor([frames]), [Request(language="en")])[0].text == ""


def test_what_the_data_side_asks(model, model_config):
    texts = ["one two three", "", "tres unheard-of 三"]
    assert model.label_lengths(texts) == [len(model.label_ids(text)) for text in texts]
    assert model.label_lengths([]) == []
    audio_embeds, audio_lens = model.encode(torch.randn(1, 1009, 80), torch.tensor([1009]))[2:]
    assert audio_lens.item() * model.seconds_per_position == pytest.approx(10, abs=2 * model.seconds_per_position)

    prompt = dataclasses.replace(model_config.prompt, before_label="")
    other = SpeechLLM.from_config(dataclasses.replace(model_config, prompt=prompt))
    assert other.label_identity() != model.label_identity() == SpeechLLM.from_config(model_config).label_identity()


@pytest.fixture
def tasks_config(model_config):
    """The prompt tells the language to translate into, the label that of the speech, and when words are said."""
    prompt = PromptConfig(asr="User: {audio}\n\nAssistant:", ast="User: {audio}<|{target_lang}|>\n\nAssistant:")
    return dataclasses.replace(model_config, prompt=prompt, label="<|{lang}|>{timed_text}")


def test_a_small_model_learns_tasks_languages_and_times(tasks_config, batch, tmp_path):
    torch.manual_seed(0)
    model = SpeechLLM.from_config(tasks_config)
    features, lens, texts, requests = batch
    # the last utterance twice, to be transcribed and to be translated
    features, lens = features[[0, 1, 2, 2]], lens[[0, 1, 2, 2]]
    texts, requests = [*texts, "dos"], [*requests, Request(language="en", target_language="es")]
    times = [[(0.08, 0.24), (0.32, 0.56), (0.56, 0.96)], [(0.16, 0.4)], [(0.0, 0.24)]]
    words = [
        [WordTime(w, *time) for w, time in zip(text.split(), spans, strict=True)]
        for text, spans in zip(texts[:3], times, strict=True)  # a translation has no times
    ]
    labels = [model.label_template.fill(*row) for row in zip(texts, requests, [*words, None], strict=True)]
    init_from_data(model.encoder, features, lens)
    optimizer = build_optimizer(model, OptimConfig(lr=5e-3))
    for step in range(150):
        model.encoder.set_batch_count(step)
        out = model(features, lens, texts, requests, labels)
        (out["loss"] / out["tokens"]).backward()
        assert step > 0 or all(p.grad is not None for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    model = SpeechLLM.from_pretrained(tmp_path)
    unknown = [dataclasses.replace(request, language=None) for request in requests]
    found = model.recognize(features, lens, unknown)
    assert [(r.text, r.texts, r.language) for r in found] == [
        (text, (text,), request.language) for text, request in zip(texts, requests, strict=True)
    ]
    assert [[(w.text, w.start, w.end) for w in r.words] for r in found[:3]] == words and found[3].words is None
    assert {r.fallback for r in found} == {None} and "<" not in found[0].ctc_text
    assert json.loads(format_json(Recording("a", "a", 1.0, [Segment(0.0, 1.0, found[1])])))["language"] == "es"
    for i, result in enumerate(found):
        (alone,) = model.recognize(features[i : i + 1, : lens[i]], lens[i : i + 1], unknown[i : i + 1])
        assert (alone.text, alone.tokens, alone.language) == (result.text, result.tokens, result.language)


def test_the_label_is_for_the_language_model_alone(tasks_config, batch):
    tagged, plain = (
        SpeechLLM.from_config(dataclasses.replace(tasks_config, label=label)).eval()
        for label in ("<|{lang}|>{text}", "{text}")
    )
    tagged.load_state_dict(plain.state_dict())
    one, other = tagged(*batch), plain(*batch)
    assert one["tokens"] > other["tokens"]
    assert one["ctc_loss"] == other["ctc_loss"] and one["llm_loss"] != other["llm_loss"]
    assert tagged.label_identity() != plain.label_identity()
    with pytest.raises(UserError, match="no language"):
        tagged(*batch[:3], requests_of([None] * 3))
    for option in ("ctc_weight", "hotwords", "ngram"):
        with pytest.raises(UserError, match=rf"{option}: .* model.label: '<\|\{{lang"):
            SpeechLLMRecognizer(tagged, RecognizeOptions(**{option: 1}))


def test_a_prompt_that_tells_what_the_label_asks_is_an_error(model_config):
    section = to_dict(model_config) | {"label": "<|{lang}|>{text}"}
    with pytest.raises(ConfigError, match=r"label '<\|\{lang.* the prompt 'User: .*<\|\{lang"):
        from_dict(ModelConfig, section)
    with pytest.raises(ConfigError, match=r"label: unknown slot \{txt\}"):
        from_dict(ModelConfig, section | {"label": "{txt}"})


def test_a_small_model_learns_to_transcribe_and_to_translate(model, batch):
    torch.manual_seed(0)
    features, lens, texts, requests = batch
    # the last utterance twice, to be transcribed and to be translated
    features, lens = features[[0, 1, 2, 2]], lens[[0, 1, 2, 2]]
    texts, requests = [*texts, "dos"], [*requests, Request(language="en", target_language="es")]
    init_from_data(model.encoder, features, lens)
    optimizer = build_optimizer(model, OptimConfig(lr=5e-3))
    for step in range(100):
        model.encoder.set_batch_count(step)
        out = model(features, lens, texts, requests)
        (out["loss"] / out["tokens"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert [r.text for r in model.recognize(features, lens, requests)] == texts


def test_frozen_means_frozen(model, model_config, batch, tmp_path):
    save_encoder(model.encoder, tmp_path / "encoder")
    config = dataclasses.replace(model_config, encoder=EncoderSection(path=str(tmp_path / "encoder"), freeze=True))
    frozen = SpeechLLM.from_config(config).train()
    assert not frozen.encoder.training and frozen.projector.training
    frozen(*batch)["loss"].backward()
    assert all(p.grad is None for p in frozen.encoder.parameters())
    assert all(p.grad is not None for n, p in frozen.named_parameters() if not n.startswith("encoder."))
    trained = sum(len(group["params"]) for group in build_optimizer(frozen, OptimConfig()).param_groups)
    assert trained == sum(p.requires_grad for p in frozen.parameters())


@pytest.fixture(params=["zipformer", "whisper"])
def partly_frozen(request, model, model_config, whisper_config, tmp_path):
    """A model whose encoder's front end and lowest stack are frozen, in training mode."""
    if request.param == "zipformer":
        save_encoder(model.encoder, tmp_path / "encoder")
    else:
        layers = WhisperConfig(
            **to_dict(whisper_config.encoder.whisper), decoder_layers=1, vocab_size=60, pad_token_id=0
        )
        WhisperModel(layers).save_pretrained(tmp_path / "encoder")
    section = EncoderSection(path=str(tmp_path / "encoder"), freeze_stacks=1)
    return SpeechLLM.from_config(dataclasses.replace(model_config, encoder=section)).train()


def test_partly_frozen_means_frozen(partly_frozen, batch):
    encoder = partly_frozen.encoder
    bottom = encoder.bottom(1)
    assert encoder.training and not any(m.training for module in bottom for m in module.modules())
    outputs = []
    for module in bottom:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    partly_frozen(*batch)["loss"].backward()
    frozen = {id(p) for module in bottom for p in module.parameters()}
    for name, p in partly_frozen.named_parameters():
        assert (p.grad is None) == (id(p) in frozen), name
    optimized = [p for group in build_optimizer(partly_frozen, OptimConfig()).param_groups for p in group["params"]]
    assert len(optimized) == sum(id(p) not in frozen for p in partly_frozen.parameters())
    # Nothing of them is kept for the gradient, and they compute what they do in evaluation mode.
    assert not any(output.requires_grad for output in outputs)
    partly_frozen.eval()
    partly_frozen(*batch)
    trained, evaluated = outputs[: len(bottom)], outputs[len(bottom) :]
    assert all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))


def test_only_the_projector_is_trained_between_frozen_parts(model, model_config, batch, tmp_path):
    save_encoder(model.encoder, tmp_path / "encoder")
    save_rwkv7(model.llm, tmp_path / "llm")
    config = dataclasses.replace(
        model_config,
        encoder=EncoderSection(path=str(tmp_path / "encoder"), freeze=True),
        llm=LLMSection(path=str(tmp_path / "llm"), freeze=True),
        ctc_weight=0.0,
    )
    frozen = SpeechLLM.from_config(config).train()
    frozen(*batch)["loss"].backward()
    with_gradient = {n.split(".")[0] for n, p in frozen.named_parameters() if p.grad is not None}
    assert with_gradient == {"projector"}
    stored = trained_state_dict(frozen)
    assert {n for n in stored if n.startswith("projector.")} == {
        f"projector.{n}" for n in frozen.projector.state_dict()
    }
    assert not any(n in stored for n, p in frozen.named_parameters() if not p.requires_grad)


def test_saved_and_loaded_is_the_same(model, batch, tmp_path):
    model.eval()
    model.save_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    for name, value in loaded(*batch).items():
        assert torch.equal(value, model(*batch)[name])
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.yaml",
        "model.safetensors",
        "tokenizer.model",
    ]


@pytest.fixture
def whisper_config(model_config):
    whisper = WhisperEncoderConfig(d_model=24, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32)
    return dataclasses.replace(model_config, encoder=EncoderSection(whisper=whisper))


def test_a_whisper_encoder_takes_the_place_of_a_zipformer(whisper_config, batch, tmp_path):
    """It learns, a batch has what each utterance has alone, and it is the same after saving and loading."""
    torch.manual_seed(0)
    features, lens, texts, requests = batch
    model = SpeechLLM.from_config(whisper_config)
    assert model.encoder.feature_kind == "whisper80"
    assert model.seconds_per_position == pytest.approx(0.02 * model.projector.downsample)
    optimizer = build_optimizer(model, OptimConfig(lr=5e-3))
    for _ in range(100):
        out = model(*batch)
        (out["loss"] / out["tokens"]).backward()
        assert all(p.grad is not None for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert [r.text for r in model.recognize(features, lens, requests)] == texts
    whole = model(*batch)["loss"]
    rows = [model(features[i, None, :n], lens[i, None], [texts[i]], [requests[i]])["loss"] for i, n in enumerate(lens)]
    torch.testing.assert_close(whole, sum(rows), rtol=1e-4, atol=1e-4)
    for model.encoder.pad_to_max_seconds in (False, True):
        model.save_pretrained(tmp_path / "model")
        loaded = SpeechLLM.from_pretrained(tmp_path / "model")
        assert torch.equal(loaded(*batch)["loss"], model(*batch)["loss"])
        assert loaded.encoder.pad_to_max_seconds == model.encoder.pad_to_max_seconds
    assert "| Whisper encoder |" in (tmp_path / "model/README.md").read_text()


def test_transcribe_computes_the_features_of_the_encoder(whisper_config, monkeypatch):
    model = SpeechLLM.from_config(whisper_config).eval()
    samples = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    heard = []
    monkeypatch.setattr(model.encoder, "forward", lambda features, lens: heard.append(features) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.transcribe([samples], language="en")
    torch.testing.assert_close(heard[0][0], extract_features(samples, "whisper80"))


def test_encoders_of_two_kinds_side_by_side(model_config, whisper_config, tmp_path):
    """Each reads its own features; of Whisper here the weighted layers."""
    more = MoreEncoder(whisper_config.encoder, ProjectorConfig(layer_weights=True))
    model = SpeechLLM.from_config(dataclasses.replace(model_config, more_encoders=[more]))
    assert model.feature_kind == "fbank+whisper80"
    samples = 0.1 * torch.randn(2, 24000, generator=torch.Generator().manual_seed(0))
    lens = torch.tensor([24000, 17000])
    features, feature_lens = extract_features_padded(samples, lens, model.feature_kind)
    heard = [model.features_of(encoder, features) for _, _, encoder in model.encoders()]
    for got, kind in zip(heard, ("fbank", "whisper80"), strict=True):
        assert torch.equal(got, extract_features_padded(samples, lens, kind)[0])
    out = model(features, feature_lens, ["one two", "tres"], ["en", "es"])
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    _, _, embeds, embed_lens = model.encode(features, feature_lens)
    for i, n in enumerate(lens):
        alone = extract_features(samples[i, :n], model.feature_kind)[None]
        _, _, expected, _ = model.encode(alone, torch.tensor([alone.shape[1]]))
        torch.testing.assert_close(embeds[i, : embed_lens[i]], expected[0], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    (recording,) = loaded.transcribe([samples[0]], language="en")
    assert recording.text == model.transcribe([samples[0]], language="en")[0].text


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "give path .* or zipformer or whisper"),
        ({"zipformer": {}, "whisper": {}}, "zipformer and whisper: give the sizes of one"),
        ({"path": "x", "whisper": {}}, "path and whisper: .* config.json"),
        ({"zipformer": {}, "freeze": True}, "freeze without path"),
        ({"whisper": {}, "freeze_stacks": 1}, "freeze_stacks without path"),
        ({"path": "x", "freeze_stacks": -1}, "freeze_stacks must be at least 0, got -1"),
        ({"path": "x", "freeze": True, "freeze_stacks": 1}, "freeze .* and freeze_stacks: 1: give one"),
        ({"zipformer": {}, "pad_to_30s": True}, "pad_to_30s is for Whisper, but zipformer"),
        ({"whisper": {}, "schedule_speed": 2.0}, "schedule_speed: 2 .*: Whisper has no schedules"),
        ({"path": "x", "zipformer": {}, "schedule_speed": 2.0}, "schedule_speed: 2 .*: the schedules of x are past"),
        ({"whisper": {"num_mel_bins": 64}}, "whisper: .*num_mel_bins is 64, but must be 80 or 128"),
    ],
)
def test_encoder_settings_that_contradict_each_other(section, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(EncoderSection, section, "my.yaml")


def test_encoder_settings_that_the_encoder_is_not_for(model, model_config, tmp_path):
    path = str(tmp_path / "encoder")
    save_encoder(model.encoder, path)
    for change, message in (
        ({"freeze_stacks": 2}, r"freeze_stacks: 2, but .*/encoder has 2: give at most 1, or freeze: true"),
        ({"pad_to_30s": True}, r"pad_to_30s is for Whisper, but .*/encoder is a Zipformer"),
        ({"zipformer": ZipformerConfig()}, r"model.encoder.zipformer contradicts .*config.json \(.*encoder_dim: "),
    ):
        with pytest.raises(UserError, match=message):
            SpeechLLM.from_config(dataclasses.replace(model_config, encoder=EncoderSection(path=path, **change)))
    # weights alone, with the sizes beside their path
    (tmp_path / "encoder/config.json").unlink()
    section = from_dict(EncoderSection, {"path": path, "zipformer": to_dict(model.encoder.config), "freeze_stacks": 1})
    loaded = SpeechLLM.from_config(dataclasses.replace(model_config, encoder=section))
    assert torch.equal(loaded.encoder.encoder_embed.out.weight, model.encoder.encoder_embed.out.weight)


def test_a_causal_encoder_is_a_setting(model_config, batch):
    """What comes after a chunk has no influence on it, but for the few frames that the front end looks ahead."""
    sizes = to_dict(model_config.encoder.zipformer) | {
        "causal": True, "chunk_size": [8], "left_context_frames": [16]
    }  # fmt: skip
    model_config.encoder = from_dict(EncoderSection, {"zipformer": sizes})
    torch.manual_seed(0)
    encoder = SpeechLLM.from_config(model_config).eval().encoder
    features, lens = batch[0][:1], batch[1][:1]
    later = features.clone()
    later[:, 80:] += 3.0
    with torch.no_grad():
        (out, _), (other, _) = encoder(features, lens), encoder(later, lens)
    same = (out == other).all(-1)[0].tolist()
    assert sum(same) >= 12 and all(same[:12]) and not any(same[20:])  # of 28 frames of 40 ms, 4 to a chunk


@pytest.fixture
def tune_config(model, model_config, tmp_path):
    """A function of a method: the configuration of a model whose language model is tuned by it."""
    for name, p in model.llm.named_parameters():
        if name.endswith(("output.weight", "value.weight")):  # zero in an untrained model
            nn.init.normal_(p, std=0.2)
    save_rwkv7(model.llm, tmp_path / "llm.pth")

    def configured(method: str, **options):
        llm = LLMSection(path=str(tmp_path / "llm.pth"), tune=TuneConfig(method, **options))
        return dataclasses.replace(model_config, llm=llm)

    return configured


def train(model, batch, steps=3):
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    for _ in range(steps):
        out = model(*batch)
        (out["loss"] / out["tokens"]).backward()
        optimizer.step()
        optimizer.zero_grad()


METHODS = ["full", "lora", "dora", "pissa", "miss", "adalora", "state"]


@pytest.mark.parametrize("method", METHODS)
def test_a_tuned_model_is_saved_merged_and_as_an_adapter(method, tune_config, batch, tmp_path):
    config = from_dict(ModelConfig, to_dict(tune_config(method)))
    model = SpeechLLM.from_config(config).train()
    train(model, batch)
    model.eval()
    model.save_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    expected = model(*batch)
    for name, value in loaded(*batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    features, lens, _, requests = batch
    first, second = ([r.text for r in m.recognize(features, lens, requests)] for m in (loaded, model))
    assert first == second
    adapter = tmp_path / "model" / "adapter"
    assert adapter.exists() == (method != "full")
    assert "RWKV-7 language model" in (tmp_path / "model" / "README.md").read_text()
    if method != "full":
        model.save_pretrained(tmp_path / "unmerged", merged=False)
        assert not any(k.startswith("llm.") for k in load_file(tmp_path / "unmerged" / "model.safetensors"))
        unmerged = SpeechLLM.from_pretrained(tmp_path / "unmerged")
        torch.testing.assert_close(unmerged(*batch)["loss"], expected["loss"], rtol=1e-4, atol=1e-4)
        unmerged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(
            SpeechLLM.from_pretrained(tmp_path / "merged")(*batch)["loss"], expected["loss"], rtol=1e-4, atol=1e-4
        )
        Path(config.llm.path).rename(tmp_path / "moved.pth")
        with pytest.raises(FileNotFoundError, match="an adapter without its base.*set llm.path"):
            SpeechLLM.from_pretrained(tmp_path / "unmerged")
        (tmp_path / "moved.pth").rename(config.llm.path)
        model.llm = load_adapter(load_rwkv7(config.llm.path), adapter)
        torch.testing.assert_close(model(*batch)["loss"], expected["loss"], rtol=1e-4, atol=1e-4)
    if method == "state":
        state = RWKV7State.load(adapter / "initial_state.safetensors")
        ids = torch.arange(10).view(2, 5)
        logits, _ = load_rwkv7(config.llm.path)(input_ids=ids, state=state.repeat(2))
        torch.testing.assert_close(logits, model.llm(input_ids=ids)[0])


def test_an_adapter_of_rwkv_peft_on_the_language_model(tune_config, batch, tmp_path):
    """As `llm.adapter`: a LoRA with its alpha, a tuned state, and a checkpoint that a state was merged into."""
    path = tune_config("full").llm.path
    weights, shape = torch.load(path, weights_only=True), (32, 32)
    lora = {
        f"blocks.{i}.att.key.lora_{x}": torch.randn(*(2, 32) if x == "A" else (32, 2)) for i in (0, 1) for x in "AB"
    }
    torch.save(lora, tmp_path / "lora.pth")
    state = {f"blocks.{i}.att.time_state": torch.randn(2, 16, 16) for i in (0, 1)}
    torch.save(state, tmp_path / "state.pth")
    torch.save(weights | state, tmp_path / "merged.pth")
    merged = {f"blocks.{i}.att.key.weight": torch.zeros(shape) for i in (0, 1)}
    for name in merged:
        stem = name.removesuffix(".weight")
        merged[name] = weights[name] + 2 * lora[f"{stem}.lora_B"] @ lora[f"{stem}.lora_A"]
    torch.save(weights | merged, tmp_path / "by-hand.pth")

    def logits(**llm):
        section = from_dict(LLMSection, {"path": path, "freeze": True} | llm)
        model = SpeechLLM.from_config(dataclasses.replace(tune_config("full"), llm=section)).eval()
        model.save_pretrained(tmp_path / "model")  # all of it, whatever it was put together from
        loaded = SpeechLLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(loaded(*batch)["loss"], model(*batch)["loss"], rtol=1e-4, atol=1e-4)
        return model.llm(input_ids=torch.arange(1, 9)[None])[0].detach()

    with_lora = logits(adapter=str(tmp_path / "lora.pth"), adapter_alpha=4)
    torch.testing.assert_close(with_lora, logits(path=str(tmp_path / "by-hand.pth")), rtol=1e-4, atol=1e-4)
    with_state = logits(adapter=str(tmp_path / "state.pth"))
    torch.testing.assert_close(with_state, logits(path=str(tmp_path / "merged.pth")))
    assert not any(torch.allclose(logits(), other, atol=1e-2) for other in (with_lora, with_state))
    with pytest.raises(UserError, match="lora.pth: the scale of a LoRA is not in its file"):
        logits(adapter=str(tmp_path / "lora.pth"))
    with pytest.raises(ConfigError, match="adapter_alpha is the alpha of a LoRA in a file of RWKV-PEFT"):
        from_dict(LLMSection, {"path": path, "adapter_alpha": 4})


@pytest.mark.parametrize("method", METHODS)
def test_a_tuned_model_trains_what_it_should(method, tune_config, batch):
    model = SpeechLLM.from_config(tune_config(method)).train()
    assert model.llm.training
    model(*batch)["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    stored = {name for name in trained_state_dict(model) if name.startswith("llm.")}
    assert (stored == {f"llm.{name}" for name in model.llm.state_dict()}) == (method == "full")
    assert stored.isdisjoint(name for name, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("method", ["lora", "pissa", "adalora", "state"])
def test_checkpoints_of_a_tuned_model_are_averaged(method, tune_config, batch, tmp_path):
    from tools.average_ckpt import average

    config = tune_config(method)
    model = SpeechLLM.from_config(config).train()
    paths, states = [], []
    for i in range(2):
        train(model, batch)
        states.append({name: t.clone() for name, t in trained_state_dict(model).items()})
        paths.append(tmp_path / f"checkpoint-{i}.pt")
        save_checkpoint(paths[-1], {"model": states[-1], "config": {"model": to_dict(config)}})
    average(paths, tmp_path / "average")
    load_trained(model, average_state_dicts(states), "average")
    model.eval()
    loss = SpeechLLM.from_pretrained(tmp_path / "average")(*batch)["loss"]
    torch.testing.assert_close(loss, model(*batch)["loss"], rtol=1e-4, atol=1e-4)


def test_tuning_that_makes_no_sense(model_config):
    with pytest.raises(ValueError, match="tune without path"):
        LLMSection(rwkv7=model_config.llm.rwkv7, tune=TuneConfig("lora"))
    with pytest.raises(ValueError, match="either freeze .* or tune"):
        LLMSection(path="x", freeze=True, tune=TuneConfig("lora"))
    with pytest.raises(ValueError, match="llm: tune: rank: method state does not have it"):
        from_dict(LLMSection, {"path": "x", "tune": {"method": "state", "rank": 8}}, "llm")
    assert [LLMSection(path="x", tune=TuneConfig(m)).freezes_base for m in ("full", "state")] == [False, True]


def test_parts_that_do_not_fit(model, model_config, tmp_path):
    llm = LLMSection(rwkv7=RWKV7Config(n_layer=1, n_embd=32, head_size=16, vocab_size=100))
    with pytest.raises(ValueError, match="vocabulary of 100, the tokenizer .* of "):
        SpeechLLM.from_config(dataclasses.replace(model_config, llm=llm))
    with pytest.raises(ValueError, match="freeze without path"):
        LLMSection(freeze=True, rwkv7=RWKV7Config(n_layer=1, n_embd=64, vocab_size=100))
    with pytest.raises(FileNotFoundError, match="no config.yaml"):
        SpeechLLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model/config.yaml").read_text()
    (tmp_path / "model/config.yaml").write_text(text.replace("n_embd: 32", "n_embd: 48"))
    with pytest.raises(CheckpointError, match=r"llm.emb.weight: \(300, 32\) in the file, \(300, 48\) in the model"):
        SpeechLLM.from_pretrained(tmp_path / "model")
