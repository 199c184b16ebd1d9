"""Group relative policy optimization: the loss and its gradient by hand."""

import pytest
import torch

from speechllm.decode.options import RecognizeOptions, SearchOptions
from speechllm.train.config import GRPOConfig
from speechllm.train.grpo import advantages, grpo_losses
from tests.train.reading import accelerator, batch_of, errors_of, reading
from tests.train.test_mwer import assert_close, gradients

GROUP = GRPOConfig(samples=4, temperature=0.8, cross_entropy=0.0)


def losses(model, batch, config=GROUP, **options):
    torch.manual_seed(7)
    return grpo_losses(accelerator(**options), model, batch, config, ())


@pytest.fixture
def reader(model):
    return reading(model)


def test_advantages():
    assert advantages(torch.tensor([0.0, -1.0, -2.0, -1.0])).tolist() == pytest.approx([2**0.5, 0, -(2**0.5), 0])
    assert advantages(torch.tensor([-2.0, -2.0])).tolist() == [0, 0]


def test_loss_and_gradient_by_hand(reader, batch):
    """Each sample is read by itself, after an encoder pass of its own."""
    batch = batch_of(batch)
    out = losses(reader, batch)
    torch.manual_seed(7)
    seed = int(torch.randint(2**31, ()))
    search = SearchOptions(method="sample", nbest=4, temperature=0.8, seed=seed)
    samples = reader.recognize(batch.features, batch.feature_lens, batch.requests, RecognizeOptions(search))
    loss, errors_of_all, ended = 0.0 * reader(*batch.inputs)["loss"], 0.0, set()
    for i, result in enumerate(samples):
        row = batch_of((batch.features, batch.feature_lens, None, batch.requests), slice(i, i + 1), batch.texts)
        errors = torch.tensor([float(errors_of(row.texts[0], text)) for text in result.texts])
        errors_of_all += float(errors.mean())
        spread = ((errors - errors.mean()) ** 2).mean().sqrt()
        for hypothesis, number in zip(result.nbest, errors, strict=True):
            _, _, embeds, lens = reader.encode(row.features, row.feature_lens)
            inputs, _, _ = reader.prompted(embeds, lens, row.requests, [hypothesis.tokens])
            logits, _ = reader.llm(inputs_embeds=inputs)
            tokens = [*hypothesis.tokens, *([reader.tokenizer.eos_id] if hypothesis.stopped == "end" else [])]
            first = logits.shape[1] - len(hypothesis.tokens) - 1
            log_probs = (logits[0, first : first + len(tokens)] / 0.8).log_softmax(-1)
            if spread > 0:
                loss = loss - (errors.mean() - number) / spread * log_probs[range(len(tokens)), tokens].sum() / 4
            ended.add(hypothesis.stopped)
    assert "end" in ended and float(loss) != 0
    assert float(out["loss"]) == pytest.approx(float(loss), abs=1e-3)
    assert float(out["errors"]) == pytest.approx(errors_of_all)
    assert_close(gradients(reader, out["loss"]), gradients(reader, loss))


def test_a_batch_is_the_sum_of_its_rows(reader, batch):
    """The samples of an utterance depend on the seed and itself."""
    whole = losses(reader, batch_of(batch))
    rows = [losses(reader, batch_of(batch, slice(i, i + 1))) for i in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(row[name] for row in rows), rtol=1e-3, atol=1e-3)


def test_the_usual_loss_beside_it(reader, batch):
    batch = batch_of(batch)
    alone, usual = losses(reader, batch), reader(*batch.inputs)["loss"]
    both = losses(reader, batch, GRPOConfig(samples=4, temperature=0.8, cross_entropy=0.5))
    torch.testing.assert_close(both["loss"], alone["loss"] + 0.5 * usual, rtol=1e-3, atol=1e-3)


def test_in_half_precision_every_parameter_gets_a_gradient(model, batch):
    model = reading(model).train()
    found = gradients(model, losses(model, batch_of(batch), dtype=torch.bfloat16)["loss"])
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.isfinite(g).all() for g in found.values()) and found["llm.head.weight"].abs().max() > 0
