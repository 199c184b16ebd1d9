"""Where a non-finite value came from, and how large activations, parameters and gradients are, layer by layer.

The purpose of icefall's `--print-diagnostics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from speechllm.data import Batch
from speechllm.files import replaced_file


@dataclass
class _Sums:
    """Running sums over the values of tensors: those that are finite, and how many are not."""

    finite: int = 0
    total_abs: float = 0.0
    total_square: float = 0.0
    max_abs: float = 0.0
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    def add(self, values: Tensor) -> bool:
        """Whether all `values` are finite."""
        values = values.detach()
        if hasattr(values, "to_local"):  # sharded by FSDP
            values = values.to_local()
        total_abs = torch.linalg.vector_norm(values, 1, dtype=torch.float64)
        all_finite = bool(total_abs.isfinite())
        if not all_finite:
            self.nan += int(values.isnan().sum())
            self.inf += int(values.isinf().sum())
            values = values[values.isfinite()]
            total_abs = torch.linalg.vector_norm(values, 1, dtype=torch.float64)
        if values.numel():
            self.finite += values.numel()
            self.total_abs += total_abs.item()
            self.total_square += torch.linalg.vector_norm(values, 2, dtype=torch.float64).item() ** 2
            self.max_abs = max(self.max_abs, torch.linalg.vector_norm(values, math.inf).item())
            self.zeros += values.numel() - int(values.count_nonzero())
        return all_finite

    @property
    def non_finite(self) -> int:
        return self.nan + self.inf

    @property
    def rms(self) -> float:
        return math.sqrt(self.total_square / self.finite) if self.finite else math.nan

    def cells(self) -> tuple[str, ...]:
        """Mean |x|, rms, max |x|, share of zeros."""
        if not self.finite:
            return ("-",) * 4
        mean_abs, zero_share = self.total_abs / self.finite, self.zeros / self.finite
        return _number(mean_abs), _number(self.rms), _number(self.max_abs), f"{zero_share:.1%}"

    def gradient_cells(self) -> tuple[str, ...]:
        return (_number(self.rms), _number(self.max_abs)) if self.finite else ("-", "-")

    def describe_non_finite(self) -> str:
        return f"{self.nan} nan, {self.inf} inf of {self.finite + self.non_finite}"


@dataclass
class _ModuleSums:
    name: str
    kind: str
    output: _Sums = field(default_factory=_Sums)
    gradient: _Sums = field(default_factory=_Sums)


class ActivationStatistics:
    """Watches the outputs of all modules of `model`, and their gradients, while the block runs:

        with ActivationStatistics(model) as statistics:
            model(...)["loss"].backward()
        print(statistics.report())

    Only sums are kept, over all calls, padding included. Where activation checkpointing computes an output twice, it
    counts twice. A module that was not called has no row. `model` may be wrapped for DDP; of a parameter that FSDP
    has sharded, this process's shard is looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._modules = [
            _ModuleSums(name or "(model)", type(module).__name__) for name, module in self._model.named_modules()
        ]
        self._input_is_finite = True
        self._last_output: _ModuleSums | None = None
        self._last_gradient: _ModuleSums | None = None
        self._first_bad_output: str | None = None
        self._first_bad_gradient: str | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> ActivationStatistics:
        self._hooks.append(self._model.register_forward_pre_hook(self._check_input, with_kwargs=True))
        for sums, module in zip(self._modules, self._model.modules(), strict=True):
            self._hooks.append(module.register_forward_hook(self._forward_hook(sums), with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _check_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._input_is_finite &= _all_finite((args, kwargs))

    def _forward_hook(self, sums: _ModuleSums) -> Callable[[nn.Module, tuple, dict, Any], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            finite = True
            for tensor in _floating_tensors(output):
                finite &= sums.output.add(tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._add_gradient(sums, gradient))
            if not finite and self._first_bad_output is None:
                self._first_bad_output = self._describe_output(sums, _all_finite((args, kwargs)))
            self._last_output = sums

        return hook

    def _describe_output(self, sums: _ModuleSums, input_is_finite: bool) -> str:
        if input_is_finite:
            origin = "its input is finite: the layer itself makes it"
        elif not self._input_is_finite:
            origin = "it comes from the model's input"
        else:
            # no module gave it: children return before their parents, and all outputs so far are finite
            before = f"after the output of {self._last_output.name}" if self._last_output else "before the first layer"
            origin = f"its input is not: made {before}, in the code between the layers"
        return f"{sums.name} ({sums.kind}): {sums.output.describe_non_finite()}; {origin}"

    def _add_gradient(self, sums: _ModuleSums, gradient: Tensor) -> None:
        if not sums.gradient.add(gradient) and self._first_bad_gradient is None:
            last = self._last_gradient
            before = f"the last finite one is that of {last.name} ({last.kind})" if last else "it is the first of all"
            self._first_bad_gradient = f"{sums.name} ({sums.kind}): {sums.gradient.describe_non_finite()}; {before}"
        self._last_gradient = sums

    def report(self) -> str:
        """What is not finite first and where it began, then a table of outputs and one of trained parameters.

        The rows are in the model's order, those with values that are not finite before the others; the numbers are over
        the finite values. The parameters and their gradients are read now: call it before clipping and zeroing.
        """
        outputs = [
            (m.name, m.kind, m.output, m.gradient) for m in self._modules if m.output.finite or m.output.non_finite
        ]
        parameters = [
            (name, _sums_of(parameter), _sums_of(parameter.grad))
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        ]
        output_rows = [
            (name, kind, *output.cells(), *gradient.gradient_cells(), _note(output, gradient))
            for name, kind, output, gradient in sorted(outputs, key=_is_finite)
        ]
        parameter_rows = [
            (name, *value.cells(), *gradient.gradient_cells(), _ratio(gradient, value), _note(value, gradient))
            for name, value, gradient in sorted(parameters, key=_is_finite)
        ]
        numbers = ("mean |x|", "rms", "max |x|", "zeros", "grad rms", "grad max")
        lines = [
            *self._findings(parameters),
            "",
            *_table(("output of", "type", *numbers, ""), output_rows),
            "",
            *_table(("parameter", *numbers, "grad/value", ""), parameter_rows),
        ]
        return "\n".join(lines)

    def _findings(self, parameters: Sequence[tuple[str, _Sums, _Sums]]) -> list[str]:
        bad_values = [name for name, value, _ in parameters if value.non_finite]
        bad_gradients = [name for name, _, gradient in parameters if gradient.non_finite]
        findings = []
        if not self._input_is_finite:
            findings.append("the model's input is not finite: look at the features of this batch")
        if bad_values:
            findings.append(
                f"first non-finite parameter: {bad_values[0]}, {len(bad_values)} of {len(parameters)} in all: damaged "
                "by an earlier step"
            )
        if self._first_bad_output:
            findings.append(f"first non-finite output: {self._first_bad_output}")
        if self._first_bad_gradient:
            findings.append(f"first non-finite gradient of an output, in backward order: {self._first_bad_gradient}")
        if bad_gradients:
            findings.append(
                f"first non-finite gradient of a parameter: {bad_gradients[0]}, {len(bad_gradients)} of "
                f"{len(parameters)} in all"
            )
        return findings or ["all outputs, parameters and gradients are finite"]


def statistics_of(accelerator: Accelerator, model: nn.Module, batch: Batch) -> str:
    """A table of activations, gradients and parameters over one batch; the gradients stay."""
    bare = accelerator.unwrap_model(model)
    for _, _, encoder in bare.encoders():  # what is computed twice would be counted twice
        encoder.checkpoint_layers = False
    if bare.llm is not None:
        bare.llm.checkpoint_blocks = False
    with ActivationStatistics(model) as statistics:
        with accelerator.autocast():
            out = model(*batch.to(accelerator.device).inputs)
        accelerator.backward(out["loss"] / out["tokens"])
    return statistics.report()


def save_batches(path: Path, batches: Sequence[Batch]) -> None:
    """Write batches, as dicts of tensors and lists, for a look at them with `torch.load`."""
    with replaced_file(path) as tmp:
        torch.save([asdict(batch.to("cpu")) for batch in batches], tmp)


def _floating_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _floating_tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floating_tensors(item)


def _all_finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _floating_tensors(value))


def _sums_of(values: Tensor | None) -> _Sums:
    sums = _Sums()
    if values is not None:
        sums.add(values)
    return sums


def _is_finite(row: tuple) -> bool:
    *_, values, gradient = row
    return not (values.non_finite or gradient.non_finite)


def _ratio(gradient: _Sums, value: _Sums) -> str:
    return _number(gradient.rms / value.rms) if gradient.finite and value.rms else "-"


def _number(value: float) -> str:
    return f"{value:.2e}"


def _note(values: _Sums, gradient: _Sums) -> str:
    notes = [values.describe_non_finite()] if values.non_finite else []
    if gradient.non_finite:
        notes.append(f"gradient: {gradient.describe_non_finite()}")
    return "; ".join(notes)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Lines of columns, words to the left and numbers to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = {"output of", "type", "parameter", ""}
    for line in lines:
        cells = [
            cell.ljust(width) if name in words else cell.rjust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()
