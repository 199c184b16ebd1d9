"""EncoderModel: losses, gradients, learning, saving, decoding; and its encoder in a SpeechLLM."""

import dataclasses

import pytest
import torch

from speechllm.config import from_dict, to_dict
from speechllm.decode.ctc import forced_align
from speechllm.decode.recognizer import RecognizeOptions
from speechllm.decode.search import SearchOptions
from speechllm.encoder import WhisperEncoderConfig, init_from_data, load_encoder
from speechllm.encoder.ctc import CRCTCConfig
from speechllm.encoder.transducer import TransducerConfig
from speechllm.errors import UserError
from speechllm.model.build import build_model, load_model
from speechllm.model.config import EncoderSection, ModelConfig
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import OptimConfig, build_optimizer
from speechllm.projector import ProjectorConfig
from speechllm.prompt.request import Request, requests_of

TRANSDUCER = TransducerConfig(decoder_dim=16, joiner_dim=16)
WHISPER = WhisperEncoderConfig(80, 16, 2, 2, 32, 1500)
KINDS = {
    "ctc": {"ctc_weight": 1.0},
    "cr-ctc": {"ctc_weight": 1.0, "cr_ctc": CRCTCConfig()},
    "transducer": {"ctc_weight": 0.0, "transducer": TRANSDUCER},
    "both": {"ctc_weight": 1.0, "transducer": TransducerConfig(decoder_dim=32, joiner_dim=64)},
    "whisper": {"ctc_weight": 1.0, "transducer": TRANSDUCER, "encoder": EncoderSection(whisper=WHISPER)},
    "all": {"ctc_weight": 0.3, "cr_ctc": CRCTCConfig(0.1), "transducer": TRANSDUCER},
}


def config_of(model_config, kind):
    return dataclasses.replace(model_config, llm=None, **KINDS[kind])


@pytest.fixture(params=["ctc", "cr-ctc", "transducer", "whisper", "all"])
def encoder_model(request, model_config):
    torch.manual_seed(0)
    return build_model(config_of(model_config, request.param))


def views_of(model, batch):
    """The batch as it is trained on: where two views are compared, the second is masked."""
    features, lens, texts, requests = batch
    if model.needs_two_views:
        second = features.clone()
        second[:, 20:40] = 0.0
        features, lens = torch.cat([features, second]), lens.repeat(2)
    return features, lens, texts, requests


def test_loss_of_a_batch_is_the_sum_of_its_rows(encoder_model, batch):
    """Also of two views, which no row of another utterance takes part in."""
    encoder_model.eval()
    features, lens, texts, requests = views_of(encoder_model, batch)
    together = encoder_model(features, lens, texts, requests)
    rows = []
    for i in range(3):
        own = [i, i + 3] if encoder_model.needs_two_views else [i]
        rows.append(encoder_model(features[own, : lens[i]], lens[own], texts[i : i + 1], requests[i : i + 1]))
    for name, value in together.items():
        torch.testing.assert_close(sum(row[name] for row in rows), value, rtol=1e-4, atol=1e-3)


def test_the_loss_is_made_of_its_parts(encoder_model, batch):
    encoder_model.eval()
    features, lens, texts, requests = views_of(encoder_model, batch)
    config, out = encoder_model.config, encoder_model(features, lens, texts, requests)
    weights = {
        "ctc_loss": config.ctc_weight,
        "cr_ctc_loss": config.cr_ctc.weight if config.cr_ctc else 0.0,
        "transducer_loss": config.transducer.weight if config.transducer else 0.0,
    }
    assert all((out[name] > 0) == (weight > 0) for name, weight in weights.items())
    torch.testing.assert_close(out["loss"], sum(weight * out[name] for name, weight in weights.items()))
    assert out["tokens"] == sum(n + 1 for n in encoder_model.label_lengths(texts))
    if encoder_model.needs_two_views:  # the mean over both views
        one, two = (encoder_model(features[rows], lens[rows], texts, requests) for rows in (slice(3), slice(3, 6)))
        for name in ("ctc_loss", "transducer_loss"):
            torch.testing.assert_close(out[name], (one[name] + two[name]) / 2, rtol=1e-4, atol=1e-3)


def test_every_parameter_gets_a_gradient(encoder_model, batch):
    out = encoder_model(*views_of(encoder_model, batch))
    out["loss"].backward()
    assert [name for name, p in encoder_model.named_parameters() if p.grad is None] == []


def test_the_number_of_views_in_training(encoder_model, batch):
    features, lens, texts, requests = batch
    if encoder_model.needs_two_views:
        with pytest.raises(ValueError, match=r"3 rows of features for 3 texts: it takes 2 .*with model.cr_ctc"):
            encoder_model(*batch)
    else:
        with pytest.raises(ValueError, match=r"6 rows of features for 3 texts: it takes 1 .*without model.cr_ctc"):
            encoder_model(torch.cat([features, features]), lens.repeat(2), texts, requests)


def test_translations_are_refused(encoder_model, batch):
    with pytest.raises(UserError, match="translation into de"):
        encoder_model(*views_of(encoder_model, batch)[:3], requests_of([None] * 3, [None, "de", None]))
    with pytest.raises(UserError, match="de is asked for"):
        encoder_model.eval().recognize(batch[0], batch[1], requests_of([None] * 3, [None, "de", None]))


@pytest.mark.parametrize("kind", ["cr-ctc", "both"])
def test_a_small_model_learns(model_config, batch, kind):
    """It writes what it was trained on, in a batch and alone."""
    torch.manual_seed(0)
    model = build_model(config_of(model_config, kind))
    features, lens, texts, requests = views_of(model, batch)
    init_from_data(model.encoder, features, lens)
    optimizer = build_optimizer(model, OptimConfig(lr=5e-3))
    model.encoder.set_batch_count(1e5)  # no dropout, no layer skip
    for _ in range(100):
        out = model(features, lens, texts, requests)
        (out["loss"] / out["tokens"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    found = model.recognize(batch[0], batch[1], requests)
    assert [r.text for r in found] == texts
    assert all(0.5 < r.confidence <= 1 and r.nbest[0].stopped == "end" for r in found)
    assert [r.ctc_text for r in found] == (texts if kind == "both" else [None] * 3)
    for i, n in enumerate(batch[1]):
        (alone,) = model.recognize(batch[0][i : i + 1, :n], batch[1][i : i + 1], [Request()])
        assert alone.tokens == found[i].tokens
        torch.testing.assert_close(alone.log_probs, found[i].log_probs, rtol=1e-3, atol=1e-3)


def test_saved_and_loaded_is_the_same(encoder_model, batch, tmp_path):
    features, lens, texts, requests = batch
    encoder_model.eval().save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert isinstance(loaded, EncoderModel) and not loaded.training
    assert loaded(*batch) == encoder_model(*batch)
    assert loaded.recognize(features, lens, requests) == encoder_model.recognize(features, lens, requests)
    assert "EncoderModel.from_pretrained" in (tmp_path / "model" / "README.md").read_text()


def test_transcribe_takes_audio_of_any_length(model_config):
    model = EncoderModel.from_config(config_of(model_config, "both"))
    (found,) = model.transcribe([0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))])
    assert found.duration == 1.0 and model.training


def test_a_speech_llm_takes_the_encoder(encoder_model, model_config, batch, tmp_path):
    encoder_model.save_pretrained(tmp_path / "model")
    section = EncoderSection(path=str(tmp_path / "model"), freeze=True)
    whole = SpeechLLM.from_config(dataclasses.replace(model_config, encoder=section))
    assert whole.label_ids("one") == encoder_model.label_ids("one")
    encoder_model.eval()
    torch.testing.assert_close(whole.encode(*batch[:2])[0], encoder_model.encode(*batch[:2])[0])


def test_a_released_whisper_is_trained(model_config, batch, tmp_path):
    """Its lowest layer stays as it was; what is saved is a Whisper's encoder to others."""
    kind = config_of(model_config, "whisper")
    EncoderModel.from_config(kind).save_pretrained(tmp_path / "released")
    section = EncoderSection(path=str(tmp_path / "released"), freeze_stacks=1)
    model = EncoderModel.from_config(dataclasses.replace(kind, encoder=section))
    model(*batch)["loss"].backward()
    trained = {name for name, p in model.encoder.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith(("layers.1.", "layer_norm.")) for name in trained)
    model.save_pretrained(tmp_path / "model")
    assert load_encoder(tmp_path / "model").config == WHISPER
    assert "| Whisper encoder | " in (tmp_path / "model" / "README.md").read_text()


def test_a_frozen_encoder_stays_as_it_is(model_config, batch, tmp_path):
    EncoderModel.from_config(config_of(model_config, "ctc")).save_pretrained(tmp_path / "model")
    section = EncoderSection(path=str(tmp_path / "model"), freeze=True)
    model = EncoderModel.from_config(dataclasses.replace(config_of(model_config, "transducer"), encoder=section))
    model(*batch)["loss"].backward()
    assert not model.encoder.training and model.transducer.training
    assert all((p.grad is None) == name.startswith("encoder.") for name, p in model.named_parameters())


@pytest.mark.parametrize("beam", [1, 4])
def test_words_have_times_where_ctc_hears_them(model_config, batch, beam):
    torch.manual_seed(0)
    model = EncoderModel.from_config(config_of(model_config, "ctc")).eval()
    torch.nn.init.normal_(model.ctc_head.weight, std=2.0)
    options = RecognizeOptions(timestamps=True, ctc_beam=beam)
    found = model.recognize(batch[0], batch[1], requests_of([None] * 3), options)
    encoder_out, lens = model.encode(*batch[:2])
    log_probs = model.ctc_head(encoder_out).log_softmax(-1)
    for i, result in enumerate(found):
        assert result.tokens and "".join(word.text for word in result.words) == "".join(result.text.split())
        assert all(0 <= w.start < w.end <= lens[i] * model.seconds_per_position + 1e-6 for w in result.words)
        (spans,) = forced_align(log_probs[i : i + 1], lens[i : i + 1], [result.tokens], model.blank_id)
        torch.testing.assert_close(result.log_probs, tuple(span.score for span in spans), rtol=1e-4, atol=1e-4)
    if beam == 1:  # the best path: no other alignment of the same length is more probable
        assert found[2].nbest[0].score == pytest.approx(log_probs[2, : lens[2]].amax(-1).sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("ctc", {"search": SearchOptions("beam", beam=2)}, "method: beam is for a language model"),
        ("ctc", {"search": SearchOptions(tokens_per_second=5.0)}, "tokens_per_second: 5.0 is for a language model"),
        ("ctc", {"hotwords": "words.txt"}, "hotwords: words.txt is for a language model"),
        ("ctc", {"ctc_weight": 0.3}, "ctc_weight: 0.3 is for a language model"),
        ("transducer", {"ctc_beam": 4}, "ctc_beam: the model has no CTC head"),
        ("transducer", {"timestamps": True}, "timestamps: the model has no CTC head"),
    ],
)
def test_options_without_effect(model_config, kind, options, said):
    model = EncoderModel.from_config(config_of(model_config, kind))
    with pytest.raises(UserError, match=said):
        model.recognizer(RecognizeOptions(**options))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llm": None, "ctc_weight": 0.0}, "nothing to train the encoder with"),
        ({"cr_ctc": CRCTCConfig()}, "cr_ctc trains an encoder without a language model, and llm is given"),
        ({"transducer": TRANSDUCER}, "transducer trains an encoder without a language model, and llm is given"),
        ({"llm": None, "ctc_weight": 0.0, "transducer": TRANSDUCER, "cr_ctc": CRCTCConfig()}, "ctc_weight is 0"),
        ({"llm": None, "projector": ProjectorConfig(downsample=4)}, "projector leads to the language model"),
    ],
)
def test_combinations_that_make_no_sense(model_config, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(model_config, **changes)


def test_the_other_kind_of_model_is_named(model, model_config, tmp_path):
    alone = EncoderModel.from_config(config_of(model_config, "ctc"))
    alone.save_pretrained(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "whole")
    assert isinstance(load_model(tmp_path / "whole"), SpeechLLM)
    with pytest.raises(UserError, match="holds an encoder without a language model"):
        SpeechLLM.from_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="it is a SpeechLLM, not an EncoderModel"):
        EncoderModel.from_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="it is an EncoderModel, not a SpeechLLM"):
        SpeechLLM.from_config(alone.config)
    with pytest.raises(FileNotFoundError, match="no config.yaml"):
        load_model(tmp_path / "nothing")


def test_a_configuration_is_read_back(model_config):
    config = config_of(model_config, "all")
    assert from_dict(ModelConfig, to_dict(config)) == config
