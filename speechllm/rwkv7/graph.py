"""A decoding step of RWKV-7 as one CUDA graph.

A step of few rows is dozens of small kernels in each layer, which the GPU runs faster than Python can launch them. A
graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) launches all of them at once.
"""

import torch
from torch import Tensor

from speechllm.rwkv7.model import RWKV7
from speechllm.rwkv7.state import RWKV7State

# Before the capture: libraries set themselves up in the first steps, which a graph must not contain.
_WARM_UP_STEPS = 3


class GraphedStep:
    """``RWKV7.step`` for a fixed number of rows, captured once and then replayed.

    Args:
      model: its weights may be changed in place afterwards, but not replaced. On the CPU there are no graphs: the same
        step runs as it is.
      rows: N, of every call.
    """

    @torch.no_grad()
    def __init__(self, model: RWKV7, rows: int):
        device = model.emb.weight.device
        self._model = model
        self._token_ids = torch.zeros(rows, dtype=torch.long, device=device)
        state = model.initial_state(rows)
        self._state = RWKV7State(*(x.detach().clone() for x in vars(state).values()))  # memory of its own
        self._graph = None
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)  # capture is not possible on the default one
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()

    def _step(self) -> Tensor:
        logits, state = self._model.step(self._token_ids, self._state, overwrite=True)  # wkv is overwritten there
        self._state.att_shift.copy_(state.att_shift)
        self._state.ffn_shift.copy_(state.ffn_shift)
        return logits

    @torch.no_grad()
    def __call__(self, token_ids: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        """Reads one token a row: (N,) -> logits (N, V), the next state.

        Both are overwritten by the next call. A ``state`` that is not what the last call returned is copied first, and
        stays as it is.
        """
        self._token_ids.copy_(token_ids)
        if state is not self._state:
            for own, given in zip(vars(self._state).values(), vars(state).values(), strict=True):
                own.copy_(given)
        if self._graph is None:
            return self._step(), self._state
        self._graph.replay()
        return self._logits, self._state
