"""Greedy search: equal to the plain loop that reads the whole sequence again for each token."""

import torch

from speechllm.decode import greedy_search
from speechllm.rwkv7 import RWKV7, RWKV7Config


def plain_greedy(llm, inputs_embeds, eos_id, max_tokens):
    tokens = []
    for _ in range(max_tokens):
        embeds = torch.cat([inputs_embeds, llm.embed(torch.tensor(tokens, dtype=torch.long))])
        token = llm(inputs_embeds=embeds[None])[0][0, -1].argmax().item()
        if token == eos_id:
            break
        tokens.append(token)
    return tokens


@torch.no_grad()
def test_equals_the_plain_loop_in_any_batch():
    torch.manual_seed(0)
    llm = RWKV7(RWKV7Config(n_layer=2, n_embd=32, head_size=16, vocab_size=12)).eval()
    llm.head.weight.mul_(8)  # at initialisation the output hardly depends on the input
    lens, limits = torch.tensor([5, 9, 2, 7]), torch.tensor([6, 12, 12, 0])
    x = torch.randn(4, 9, 32)
    for i, n in enumerate(lens):
        x[i, n:] = float("nan")
    # The token that some row emits early serves as the end of text, so that rows finish at different times.
    eos_id = plain_greedy(llm, x[0, :5], -1, 3)[2]
    expected = [plain_greedy(llm, x[i, : lens[i]], eos_id, limits[i].item()) for i in range(4)]
    assert len({len(tokens) for tokens in expected}) > 2
    assert greedy_search(llm, x, lens, eos_id, limits) == expected
    order = torch.tensor([2, 0, 3, 1])
    assert greedy_search(llm, x[order], lens[order], eos_id, limits[order]) == [expected[i] for i in order]
