"""State files: what the language model has read before every prompt, or has been tuned to."""

from __future__ import annotations

from pathlib import Path

import torch

from speechllm.errors import UserError
from speechllm.llm.interface import LanguageModel
from speechllm.rwkv7 import RWKV7, RWKV7State

_TOKENS_AT_ONCE = 1024  # memory does not grow with the text


@torch.no_grad()
def state_of_text(llm: LanguageModel, token_ids: list[int]) -> RWKV7State:
    """The state of one row that has read `token_ids`, of which there is one at least.

    Raises:
      UserError: the language model is no RWKV-7: what others remember grows with the text.
    """
    if not isinstance(llm, RWKV7):
        raise UserError(f"state files are for RWKV-7; the language model is {llm.name}")
    device = llm.emb.weight.device
    state = llm.initial_state(1)
    for piece in torch.tensor([token_ids], device=device).split(_TOKENS_AT_ONCE, dim=1):
        is_last = torch.arange(piece.shape[1], device=device)[None] == piece.shape[1] - 1
        _, state = llm(input_ids=piece, state=state, logits_mask=is_last)
    return state


def load_state(path: str | Path, llm: LanguageModel) -> RWKV7State:
    """The state of one row in a file (`RWKV7State.save`, or RWKV-PEFT's tuned state), on the model's device.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is no state, or one of several rows, or of a model of another size; the language model is no RWKV-7.
    """
    expected = state_of_text(llm, [0])
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such state file")
    state = RWKV7State.load(path)
    shapes = {name: [list(getattr(x, name).shape) for x in (state, expected)] for name in vars(state)}
    wrong = [f"`{name}` has shape {has}, not {needs}" for name, (has, needs) in shapes.items() if has != needs]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}, which the language model needs: it is not its state")
    dtype = expected.att_shift.dtype
    found = RWKV7State(state.att_shift.to(dtype), state.ffn_shift.to(dtype), state.wkv)
    return found.to(expected.wkv.device)
