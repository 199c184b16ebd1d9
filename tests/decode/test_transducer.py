"""Greedy search with a transducer against a search of one utterance at a time, written out."""

import pytest
import torch

from speechllm.decode.transducer import transducer_greedy
from speechllm.encoder.transducer import Transducer, TransducerConfig


@pytest.fixture
def transducer():
    torch.manual_seed(0)
    model = Transducer(TransducerConfig(decoder_dim=8, joiner_dim=16), encoder_dim=6, num_tokens=7)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def plainly(model, encoder_out, max_symbols):
    context, tokens, log_prob = [model.blank_id] * model.context_size, [], 0.0
    for frame in encoder_out:
        for _ in range(max_symbols):
            logits = model.join(model.encoder_proj(frame), model.read(torch.tensor([context]))[0, 0])
            score, best = logits.log_softmax(-1).max(-1)
            log_prob += score.item()
            if best == model.blank_id:
                break
            tokens.append(int(best))
            context = [*context[1:], int(best)]
    return tuple(tokens), log_prob


@pytest.mark.parametrize("max_symbols", [1, 3])
@torch.no_grad()
def test_it_is_what_each_utterance_gives_alone(transducer, max_symbols):
    lens = torch.tensor([9, 1, 5, 12])
    encoder_out = torch.randn(4, 12, 6)
    found = transducer_greedy(transducer, encoder_out, lens, max_symbols)
    for row, n, hypothesis in zip(encoder_out, lens, found, strict=True):
        tokens, log_prob = plainly(transducer, row[:n], max_symbols)
        assert hypothesis.tokens == tokens and len(hypothesis.log_probs) == len(tokens)
        assert hypothesis.log_prob == pytest.approx(log_prob, rel=1e-4)
    assert max(len(hypothesis.tokens) for hypothesis in found) > 2


def test_one_that_never_says_blank_ends(transducer):
    torch.nn.init.constant_(transducer.output.bias, 0.0)
    transducer.output.bias.data[transducer.blank_id] = -1e4
    (found,) = transducer_greedy(transducer, torch.randn(1, 3, 6), torch.tensor([3]), 4)
    assert len(found.tokens) == 12
