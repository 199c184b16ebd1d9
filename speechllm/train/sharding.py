"""Training with the language model sharded over the processes: PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`).

For language models whose weights, gradients and optimizer state do not fit into one GPU's memory: each process keeps
its share of them, rows of every tensor, and the layers are gathered one by one when they compute. Encoder, projector
and CTC head are small beside it, and whole on every process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from speechllm.config import ConfigError

if TYPE_CHECKING:
    from speechllm.model.speech_llm import SpeechLLM


def shard_language_model(model: SpeechLLM, device: torch.device) -> None:
    """Shard `model.llm` over all processes, in place, and move everything to `device`.

    Trained weights are those of process 0 from here on; frozen ones are taken to be equal, as read from files. To be
    called before the optimizer is built. The forward pass is then a joint operation of all processes, and needs the
    same number of calls on each: `gathered` is for what they do by themselves.

    A process group of one process, as `torchrun --nproc-per-node 1` makes it, saves nothing but runs the same code: it
    is what one GPU can test.

    Raises:
      ConfigError: there is no process group, or the language model is quantized.
    """
    if not dist.is_initialized():
        raise ConfigError("train.fsdp: there is one process only, so nothing to share out; see --world-size")
    section = model.llm_section
    if section.tune is not None and section.tune.quantize != "none":
        raise ConfigError("train.fsdp: a quantized language model cannot be sharded; set model.llm.tune.quantize: none")
    for part in model.children():
        if part is not model.llm:
            part.to(device)
    for tensor in [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]:
        on_device = tensor.detach().to(device)
        dist.broadcast(on_device, 0)
        tensor.data.copy_(on_device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    elsewhere = {p for part in model.children() if part is not model.llm for p in part.parameters()}
    layers = model.llm.layers()
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=elsewhere)
    for before, layer in pairwise([model, *layers]):
        # Said once and for all: FSDP would follow the order of the last forward passes, also of those in `gathered`,
        # of which each process has another number; then each would wait for something else.
        cast(FSDPModule, layer).set_modules_to_backward_prefetch([cast(FSDPModule, before)])
    # The time mix returns views; a block adds its output, and does not write into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over the processes the gradients of what is whole on each; FSDP has averaged the others."""
    for p in parameters:
        if p.grad is not None and not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
            p.grad.div_(dist.get_world_size())


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """`torch.nn.utils.clip_grad_norm_` for parameters some of which may be sharded: scales the gradients so that the
    norm of all together is at most `max_norm`, and returns what it was."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    total = total_norm(grads)
    torch.nn.utils.clip_grads_with_norm_([p for p in parameters if not isinstance(p, DTensor)], max_norm, total)
    if shares := [local(grad) for grad in grads if isinstance(grad, DTensor)]:
        torch._foreach_mul_(shares, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total.item()


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together, a scalar; where some are sharded, all processes must call this."""
    whole: list[Tensor] = []
    shares: list[Tensor] = []
    for tensor in tensors:
        (shares if isinstance(tensor, DTensor) else whole).append(local(tensor.detach()))
    if not shares:
        return torch.nn.utils.get_total_norm(whole)
    square = torch.nn.utils.get_total_norm(shares).square()
    dist.all_reduce(square)
    if whole:
        square = square + torch.nn.utils.get_total_norm(whole).square()
    return square.sqrt()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights and may compute what and how often it likes, without gradients.

    All processes enter and leave together. Nothing happens for a model that is not sharded.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: every process writes its own share


def local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(own: Tensor, share: Tensor) -> Tensor:
    """The inverse of `local`: `share` as part of a tensor that is sharded as `own` is."""
    if not isinstance(own, DTensor):
        return share
    return DTensor.from_local(
        share.to(own.device), own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def rows_of(shares: Sequence[Tensor], rank: int, processes: int) -> Tensor:
    """What process `rank` of `processes` has of a tensor whose rows are in `shares`; as FSDP shares out, by
    `torch.chunk`. Only the rows that it has are read."""
    total = sum(map(len, shares))
    size = -(-total // processes)
    first, end = (min(number * size, total) for number in (rank, rank + 1))
    starts = accumulate(map(len, shares), initial=0)
    parts = [share[max(first - start, 0) : max(end - start, 0)] for share, start in zip(shares, starts, strict=False)]
    parts = [part for part in parts if len(part)]
    return torch.cat(parts) if parts else shares[0][:0]


def optimizer_shares(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with this process's shares of what is sharded."""
    content = optimizer.state_dict()
    shares = {i: {name: _local_value(v) for name, v in state.items()} for i, state in content["state"].items()}
    return {**content, "state": shares}


def load_optimizer_shares(optimizer: Optimizer, content: dict[str, Any]) -> None:
    """Load what `optimizer_shares` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {
            # what has a shape of its own, as Adam's count of steps, is not sharded
            name: like(parameters[i], v) if isinstance(v, Tensor) and v.dim() else v
            for name, v in values.items()
        }
        for i, values in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": state})


def _local_value(value: Any) -> Any:
    return local(value) if isinstance(value, Tensor) else value


def describe_shares(model: nn.Module, optimizer: Optimizer) -> dict[str, list] | None:
    """What is sharded, by `names` in the model's state dict and numbers in the `optimizer`'s; None if nothing is."""
    names = [name for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, DTensor)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for i, p in enumerate(parameters) if isinstance(p, DTensor)]
    return {"names": names, "optimizer": numbers} if names else None
