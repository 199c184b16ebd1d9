"""The transducer: its loss against a sum over all alignments, the recursion, and torchaudio's of all logits."""

import itertools
import math

import pytest
import torch
import torchaudio

from speechllm.encoder import transducer as transducer_module
from speechllm.encoder.transducer import Transducer, TransducerConfig, alignments_log_prob

TOKENS = 5


@pytest.fixture
def transducer():
    torch.manual_seed(0)
    config = TransducerConfig(decoder_dim=8, joiner_dim=12, context_size=2)
    model = Transducer(config, encoder_dim=6, num_tokens=TOKENS)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model


def audio(frames=(4, 3, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(frames), max(frames), 6, generator=generator), torch.tensor(frames)


LABELS = [[1, 3, 3], [], [0, 4]]


def by_all_alignments(model, encoder_out, label):
    """-log of the sum over all alignments, each of them written out and read token by token."""
    frames, total = len(encoder_out), 0.0
    # an alignment says at which frame each token is said: frames that do not decrease
    for places in itertools.combinations_with_replacement(range(frames), len(label)):
        context, log_prob = [model.blank_id] * model.context_size, 0.0
        for t in range(frames):
            for symbol in [label[i] for i, place in enumerate(places) if place == t] + [model.blank_id]:
                text = model.read(torch.tensor([context]))[0, 0]
                log_prob += model.join(model.encoder_proj(encoder_out[t]), text).log_softmax(-1)[symbol].item()
                if symbol != model.blank_id:
                    context = [*context[1:], symbol]
        total += math.exp(log_prob)
    return -math.log(total)


@pytest.mark.parametrize("logits_at_once", [1, 100, 2**24])
def test_the_loss_is_the_sum_over_all_alignments(transducer, monkeypatch, logits_at_once):
    monkeypatch.setattr(transducer_module, "_LOGITS_AT_ONCE", logits_at_once)
    encoder_out, lens = audio()
    with torch.no_grad():
        losses = transducer(encoder_out, lens, LABELS)
        expected = [
            by_all_alignments(transducer, row[:n], ids) for row, n, ids in zip(encoder_out, lens, LABELS, strict=True)
        ]
    torch.testing.assert_close(losses, torch.tensor(expected))


@pytest.mark.parametrize("context_size", [1, 3])
def test_other_contexts(context_size):
    torch.manual_seed(1)
    config = TransducerConfig(decoder_dim=8, joiner_dim=12, context_size=context_size)
    model = Transducer(config, encoder_dim=6, num_tokens=TOKENS)
    encoder_out, lens = audio()
    with torch.no_grad():
        losses = model(encoder_out, lens, LABELS)
        expected = [
            by_all_alignments(model, row[:n], ids) for row, n, ids in zip(encoder_out, lens, LABELS, strict=True)
        ]
    torch.testing.assert_close(losses, torch.tensor(expected))


def by_recursion(blank, label, frames, tokens):
    """The log probability of one row (T, U + 1), (T, U), place by place."""
    reached = [[None] * (tokens + 1) for _ in range(frames)]
    for t in range(frames):
        for u in range(tokens + 1):
            ways = [reached[t - 1][u] + blank[t - 1, u]] if t else []
            ways += [reached[t][u - 1] + label[t, u - 1]] if u else []
            reached[t][u] = torch.logsumexp(torch.stack(ways), 0) if ways else blank.new_zeros(())
    return reached[-1][-1] + blank[frames - 1, tokens]


def test_values_and_gradients_are_those_of_the_recursion():
    generator = torch.Generator().manual_seed(0)
    blank = -6 * torch.rand(3, 40, 8, generator=generator, dtype=torch.float64)
    label = -6 * torch.rand(3, 40, 7, generator=generator, dtype=torch.float64)
    lens, label_lens = torch.tensor([40, 21, 5]), torch.tensor([7, 3, 0])
    expected, found = [(blank.clone().requires_grad_(), label.clone().requires_grad_()) for _ in range(2)]
    log_probs = [
        by_recursion(b, y, n, u) for b, y, n, u in zip(*expected, lens.tolist(), label_lens.tolist(), strict=True)
    ]
    sum(log_probs).backward()
    values = alignments_log_prob(found[0], found[1], lens, label_lens)
    values.sum().backward()
    torch.testing.assert_close(values.double(), torch.stack(log_probs).detach(), rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        # beyond the lengths there is nothing to learn
        torch.testing.assert_close(
            ours.grad, torch.zeros_like(ours) if theirs.grad is None else theirs.grad, rtol=0, atol=1e-5
        )


def test_the_loss_is_torchaudios_of_all_logits(transducer):
    encoder_out, lens = audio()
    tokens = torch.tensor([[5, 5, *ids, *[5] * (3 - len(ids))] for ids in LABELS])
    logits = transducer.join(transducer.encoder_proj(encoder_out)[:, :, None], transducer.read(tokens)[:, None])
    expected = torchaudio.functional.rnnt_loss(
        logits, tokens[:, 2:].int(), lens.int(), torch.tensor([3, 0, 2]).int(), blank=5, reduction="none"
    )
    torch.testing.assert_close(transducer(encoder_out, lens, LABELS), expected)


def test_gradients_of_the_whole_in_slices(transducer, monkeypatch):
    encoder_out, lens = audio()
    gradients = []
    for logits_at_once in (1, 2**24):
        monkeypatch.setattr(transducer_module, "_LOGITS_AT_ONCE", logits_at_once)
        transducer.zero_grad()
        encoder_out.requires_grad_().grad = None
        transducer(encoder_out, lens, LABELS).sum().backward()
        gradients.append([encoder_out.grad, *(p.grad.clone() for p in transducer.parameters())])
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_padding_and_other_rows_have_no_influence(transducer):
    encoder_out, lens = audio()
    together = transducer(encoder_out, lens, LABELS)
    for i, n in enumerate(lens):
        torch.testing.assert_close(
            transducer(encoder_out[i : i + 1, :n], lens[i : i + 1], LABELS[i : i + 1]), together[i : i + 1]
        )
        encoder_out[i, n:] = 100.0
    torch.testing.assert_close(transducer(encoder_out, lens, LABELS), together)


def test_long_audio_keeps_its_precision():
    frames, tokens = 3000, 40
    generator = torch.Generator().manual_seed(0)
    blank = -5 * torch.rand(1, frames, tokens + 1, generator=generator)
    label = -5 * torch.rand(1, frames, tokens, generator=generator)
    found = alignments_log_prob(blank, label, torch.tensor([frames]), torch.tensor([tokens]))
    reached = [-math.inf] * (tokens + 1)
    reached[0] = 0.0
    blank_rows, label_rows = blank[0].double().tolist(), label[0].double().tolist()
    for t in range(frames):
        if t:
            reached = [r + b for r, b in zip(reached, blank_rows[t - 1], strict=True)]
        for u in range(tokens):
            a, b = reached[u] + label_rows[t][u], reached[u + 1]
            reached[u + 1] = max(a, b) + math.log1p(math.exp(-abs(a - b))) if b > -math.inf else a
    assert found.item() == pytest.approx(reached[-1] + blank_rows[-1][-1], rel=1e-6)


def test_half_precision_is_summed_in_float32(transducer):
    encoder_out, lens = audio()
    with torch.autocast("cpu", torch.bfloat16):
        losses = transducer(encoder_out, lens, LABELS)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, transducer(encoder_out, lens, LABELS), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"decoder_dim": 6}, "multiple of 4"), ({"context_size": 0}, "context_size"), ({"weight": 0.0}, "weight")],
)
def test_sizes_that_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        TransducerConfig(**changes)
