"""Minimum word error rate training: the loss and its gradient by hand, and what it works with."""

import dataclasses

import pytest
import torch
from torch import nn

from speechllm.config import ConfigError, from_dict, override
from speechllm.decode.options import RecognizeOptions, SearchOptions
from speechllm.llm.adapters import TuneConfig
from speechllm.model.config import LLMSection
from speechllm.model.speech_llm import SpeechLLM
from speechllm.train.config import Experiment, MWERConfig, TrainConfig
from speechllm.train.monitor import Averages
from speechllm.train.mwer import expected_errors, mwer_losses
from speechllm.train.objective import build_objective, model_losses
from tests.llm.tiny_llms import TRANSFORMERS
from tests.train.reading import accelerator, batch_of, errors_of, reading

BEAM = RecognizeOptions(SearchOptions(method="beam", beam=4, nbest=4, length_penalty=0.0))
RISK = MWERConfig(cross_entropy=0.0)


def nbest(model, batch):
    """The hypotheses of each utterance, with tokens, log probability and text."""
    found = model.recognize(batch.features, batch.feature_lens, batch.requests, BEAM)
    return [list(zip(result.nbest, result.texts, strict=True)) for result in found]


def end_after(model, batch, row, tokens):
    """The log probability of the end of text after tokens that a guard has cut."""
    labels = [[[]] for _ in batch.texts]
    labels[row] = [[*tokens], [*tokens, model.tokenizer.eos_id]]
    found = model(*batch.inputs, hypotheses=labels)["hypothesis_log_probs"]
    return (found[row + 1] - found[row]).item()


def losses(model, batch, config=RISK, **options):
    return mwer_losses(accelerator(**options), model, batch, config, ())


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(gradients, others):
    assert gradients.keys() == others.keys()
    scale = max(float(g.abs().max()) for g in others.values())
    for name, gradient in others.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.fixture
def reader(model):
    return reading(model)


def test_training_gives_hypotheses_the_probabilities_that_the_search_gives_them(reader, batch):
    batch = batch_of(batch)
    hypotheses = [[h for h, _ in several if h.stopped == "end"] for several in nbest(reader, batch)]
    lengths = {len(h.tokens) for several in hypotheses for h in several}
    assert 0 in lengths and len(lengths) > 2
    labels = [[[*h.tokens, reader.tokenizer.eos_id] for h in several] for several in hypotheses]
    found = reader(*batch.inputs, hypotheses=labels)["hypothesis_log_probs"]
    expected = [sum(h.log_probs) for several in hypotheses for h in several]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)


def test_a_label_without_its_end(reader, batch):
    """The probability of its tokens alone; at a temperature that of the logits divided by it."""
    batch = batch_of(batch, slice(0, 1))
    label = reader.label_ids("one two")
    _, _, embeds, lens = reader.encode(batch.features, batch.feature_lens)
    inputs, _, _ = reader.prompted(embeds, lens, batch.requests, [label])
    logits, _ = reader.llm(inputs_embeds=inputs)
    for temperature in (1.0, 0.5):
        found = reader(*batch.inputs, hypotheses=[[label, []]], temperature=temperature)["hypothesis_log_probs"]
        log_probs = (logits[0, -len(label) - 1 : -1] / temperature).log_softmax(-1)
        assert found.tolist() == pytest.approx([log_probs[range(len(label)), label].sum().item(), 0.0], abs=1e-4)


def test_the_loss_by_hand(reader, batch):
    batch = batch_of(batch)
    loss = expected = 0.0
    lists = nbest(reader, batch)
    assert {h.stopped for several in lists for h, _ in several} == {"end", "length"}
    for i, (reference, several) in enumerate(zip(batch.texts, lists, strict=True)):
        ends = [0.0 if h.stopped == "end" else end_after(reader, batch, i, h.tokens) for h, _ in several]
        assert len(several) == 4
        weights = torch.tensor([sum(h.log_probs) + end for (h, _), end in zip(several, ends, strict=True)]).exp()
        errors = [errors_of(reference, text) for _, text in several]
        mean = sum(errors) / 4
        expected += sum(w * e for w, e in zip(weights / weights.sum(), errors, strict=True))
        loss += sum(w * (e - mean) for w, e in zip(weights / weights.sum(), errors, strict=True))
    usual = float(reader(*batch.inputs)["loss"])
    for share in (0.0, 0.1):
        out = losses(reader, batch, MWERConfig(cross_entropy=share))
        assert float(out["loss"]) == pytest.approx(float(loss) + share * usual, abs=1e-3)
        assert float(out["errors"]) == pytest.approx(float(expected), abs=1e-3)
        assert "hypothesis_log_probs" not in out and out["tokens"] > 0
    # log lines have it for each token of the labels
    assert Averages.of(out).items()["errors"] == pytest.approx(float(expected / out["tokens"]), abs=1e-3)


def test_the_gradient_by_hand(reader, batch):
    """That of the expected errors, each hypothesis read by itself, after an encoder pass of its own."""
    batch = batch_of(batch)
    found = gradients(reader, losses(reader, batch)["loss"])
    risks = []
    for i, several in enumerate(nbest(reader, batch)):
        row = batch_of((batch.features, batch.feature_lens, None, batch.requests), slice(i, i + 1), batch.texts)
        scores = []
        for hypothesis, _ in several:
            _, _, embeds, lens = reader.encode(row.features, row.feature_lens)
            inputs, lens, labels = reader.prompted(embeds, lens, row.requests, [hypothesis.tokens])
            (cross_entropy, *_), _ = reader.llm.loss(labels, inputs_embeds=inputs, lens=lens)
            scores.append(-cross_entropy)
        errors = [errors_of(row.texts[0], text) for _, text in several]
        risks.append((torch.stack(scores).softmax(0) * torch.tensor(errors)).sum())
    expected = gradients(reader, sum(risks) + 0.0 * reader(*batch.inputs)["loss"])
    assert float(expected["llm.head.bias"].abs().max()) > 1e-3
    assert float(expected["projector.out_proj.weight"].abs().max()) > 0
    assert_close(found, expected)


def test_a_batch_is_the_sum_of_its_rows(reader, batch):
    whole = losses(reader, batch_of(batch), MWERConfig())
    rows = [losses(reader, batch_of(batch, slice(i, i + 1)), MWERConfig()) for i in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(row[name] for row in rows), rtol=1e-3, atol=1e-3)


def test_in_half_precision_every_parameter_gets_a_gradient(model, batch):
    """What the search has converted without gradients is not what the step computes with."""
    model = reading(model).train()
    found = gradients(model, losses(model, batch_of(batch), MWERConfig(), dtype=torch.bfloat16)["loss"])
    assert found.keys() == {name for name, _ in model.named_parameters()} and model.training
    assert all(torch.isfinite(g).all() for g in found.values())
    assert found["llm.head.weight"].abs().max() > 0 and found["llm.blocks.0.att.key.weight"].abs().max() > 0


def test_a_language_model_of_transformers_with_an_adapter(model_config, batch, tmp_path):
    """Frozen but for the adapter, with and without activations that are computed again."""
    from tests.llm.tiny_llms import tiny_llm

    tiny_llm("qwen3", vocab_size=300).causal_lm.save_pretrained(tmp_path)
    assert TRANSFORMERS["qwen3"]["tie_word_embeddings"]
    found = []
    for checkpoint_blocks in (False, True):
        model_config.llm = LLMSection(
            path=str(tmp_path), tune=TuneConfig(method="lora", rank=2), checkpoint_blocks=checkpoint_blocks
        )
        torch.manual_seed(0)
        model = SpeechLLM.from_config(model_config).eval()
        with torch.no_grad():
            for name, p in model.llm.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        one = batch_of(batch)
        found.append(gradients(model, losses(model, one)["loss"]))
    assert all(".lora_" in name for name in found[0] if name.startswith("llm."))
    assert any(g.abs().max() > 0 for name, g in found[0].items() if name.startswith("llm."))
    assert_close(*found)


def test_a_search_that_fails_leaves_the_model_in_training(model, batch, monkeypatch):
    """So that a smaller batch, tried next, needs the memory that it needs in training."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.train(), "recognize", fail)
    with pytest.raises(torch.OutOfMemoryError):
        losses(model, batch_of(batch))
    assert model.training


def test_characters_are_counted_where_there_are_no_spaces(reader, batch):
    batch = batch_of(batch, texts=["on two", "tres", ""])
    errors = {unit: float(losses(reader, batch, MWERConfig(unit=unit))["errors"]) for unit in ("word", "char", "mixed")}
    assert errors["char"] > errors["word"] == errors["mixed"]


def test_one_hypothesis_teaches_nothing():
    log_probs = torch.tensor([-3.0], requires_grad=True)
    expected_errors(log_probs, torch.tensor([2.0])).backward()
    assert log_probs.grad.item() == 0


def test_streams_have_the_usual_loss(reader, batch):
    """They are no whole utterances, and the search is for these."""

    class Stream(nn.Module):
        def forward(self, *inputs):
            return inputs[-1]

    experiment = dataclasses.replace(experiment_of(), train=TrainConfig(loss="mwer"))
    stream = dataclasses.replace(batch_of(batch), chunk_seconds=0.32)
    assert build_objective(experiment)(accelerator(), Stream(), stream) == 0.32
    assert model_losses(accelerator(), Stream(), stream) == 0.32


def experiment_of(**train):
    return from_dict(
        Experiment,
        {
            "model": {
                "tokenizer": "t",
                "encoder": {"zipformer": {}},
                "llm": {"rwkv7": {"n_layer": 1, "n_embd": 64, "vocab_size": 10}},
                "ctc_weight": 0.3,
            },
            "data": {"train": [{"path": "a"}], "valid": [{"path": "a"}]},
            "train": train,
        },
    )


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"loss": "wer"}, "train.loss: expected one of cross_entropy, mwer, grpo, got 'wer'"),
        ({"loss": "mwer", "mwer": {"beam": 1}}, "train.mwer.*: beam must be at least 2, got 1"),
        ({"loss": "mwer", "mwer": {"nbest": 3}}, "unknown key train.mwer.nbest"),
        ({"loss": "grpo", "grpo": {"temperature": 0}}, "temperature must be above 0 and finite, got 0"),
        (
            {"loss": "grpo", "fsdp": True},
            "train.fsdp: the search of train.loss: grpo needs the whole language model",
        ),
        ({"loss": "mwer", "ctc_only_steps": 9}, "train.loss: mwer for one that reads already"),
    ],
)
def test_what_cannot_be_is_said(train, said):
    with pytest.raises(ConfigError, match=said):
        experiment_of(**train)


def test_an_encoder_alone_writes_no_list():
    for loss in ("mwer", "grpo"):
        with pytest.raises(ConfigError, match=f"train.loss: {loss} is about the language model, and model.llm is null"):
            override(experiment_of(), {"model.llm": None, "train.loss": loss}, "test")


def test_sums_of_an_earlier_version_have_no_errors():
    assert Averages(torch.arange(7.0)).values.tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
