"""Statistics of a model's activations, gradients and parameters over a batch: what to look at when a loss is NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn


class _Sums:
    """Running sums over numbers, however many tensors they come in."""

    def __init__(self) -> None:
        self.count = self.zeros = self.non_finite = 0
        self.absolute = self.squares = self.largest = 0.0

    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        finite = x.isfinite()
        self.count += x.numel()
        self.non_finite += x.numel() - int(finite.sum())
        x = x.where(finite, 0.0).abs()
        if x.numel():
            self.zeros += int((finite & (x == 0)).sum())
            self.absolute += x.sum().item()
            self.squares += x.square().sum().item()
            self.largest = max(self.largest, x.max().item())

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / max(1, self.count))

    def cells(self) -> list[str]:
        n = max(1, self.count)
        values = [f"{v:.3g}" for v in (self.absolute / n, self.rms, self.largest)]
        return [*values, f"{100 * self.zeros / n:.1f}", str(self.non_finite)]


class ActivationStatistics:
    """Inside a `with`, collects statistics of every module's output, forward and backward; icefall's
    --print-diagnostics. Only sums are kept.

        with ActivationStatistics(model) as statistics:
            loss = model(...)
            loss.backward()
        print(statistics.report())
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = getattr(model, "module", model)  # what DDP wraps
        self._outputs: dict[str, _Sums] = {}
        self._gradients: dict[str, _Sums] = {}
        self._first_non_finite: str | None = None
        self._hooks: list = []

    def __enter__(self) -> ActivationStatistics:
        for name, module in self._model.named_modules():
            if name:
                self._hooks.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            for tensor in _float_tensors(output):
                sums = self._outputs.setdefault(name, _Sums())
                sums.add(tensor)
                if sums.non_finite and self._first_non_finite is None:
                    self._first_non_finite = name
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: self._gradients.setdefault(name, _Sums()).add(grad))

        return hook

    def report(self) -> str:
        """Tables of outputs, their gradients, and parameters, in the order in which they were made; what is not finite
        first."""
        lines = []
        if self._first_non_finite is not None:
            lines.append(f"first non-finite output: {self._first_non_finite}")
        backward = [name for name, sums in self._gradients.items() if sums.non_finite]
        if backward:
            lines.append(f"first non-finite gradient on the way back: of the output of {backward[0]}")
        head = ["mean |x|", "rms", "max |x|", "zeros %", "non-finite"]
        for title, table in (("output of", self._outputs), ("gradient of the output of", self._gradients)):
            lines += ["", *_table([title, *head], [[name, *sums.cells()] for name, sums in table.items()])]
        rows = []
        for name, p in self._model.named_parameters():
            if p.grad is not None:
                value, gradient = _Sums(), _Sums()
                value.add(p)
                gradient.add(p.grad)
                ratio = gradient.rms / value.rms if value.rms else math.inf
                rows.append([name, f"{value.rms:.3g}", f"{gradient.rms:.3g}", f"{ratio:.3g}", str(gradient.non_finite)])
        lines += ["", *_table(["parameter", "rms", "gradient's rms", "ratio", "non-finite"], rows)]
        return "\n".join(lines).strip()


def _float_tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _float_tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _float_tensors(value)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in [head, *rows]
    ]
