"""Tensors that the backward pass makes again instead of keeping them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Remade:
    """While it is entered, no operation keeps for the backward pass what this object has made; it is made again there.

    That is activation checkpointing (arXiv 1604.06174) of single tensors. It pays for those that take one pass over
    memory and come from tensors that are kept anyway::

        with Remade() as remade:
            c = remade(torch.mul, a, b)
            y = product(c, weight)  # keeps a and b, as the multiplication before it does, and not c

    Args:
      enabled: else everything is kept, as always.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled and torch.is_grad_enabled()
        self.recipes: dict[tuple, Callable[[], Tensor]] = {}
        self.made: list[Tensor] = []  # so that no other tensor takes their place in memory

    def __call__(self, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """make(*inputs), an elementwise function, which autocast leaves alone."""
        x = make(*inputs)
        return self.add(x, partial(make, *(z.detach() for z in inputs))) if self.enabled else x

    def add(self, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """x, that ``make`` makes again; neither it nor what it is made from may be written to."""
        if self.enabled and x.is_contiguous():  # of two that are not, the order may differ
            self.recipes[_place(x)] = make
            self.made.append(x)
        return x

    def __enter__(self) -> "Remade":
        if self.enabled:
            self.hooks = saved_tensors_hooks(self._pack, _unpack)
            self.hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self.hooks.__exit__(*exception)
            self.recipes.clear()
            self.made.clear()

    def _pack(self, x: Tensor) -> Any:
        make = self.recipes.get(_place(x))
        return x if make is None else (make, x.shape)


def _place(x: Tensor) -> tuple:
    """What a tensor and one that is contiguous have in common if they are the same memory read in the same order."""
    return x.data_ptr(), x.numel(), x.dtype, x.is_contiguous()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    make, shape = kept
    with torch.no_grad():
        return make().view(shape)
