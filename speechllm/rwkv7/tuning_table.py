"""What each method of tuning would train and store of an RWKV-7 model: the table of ``speechllm tune --dry-run``."""

from __future__ import annotations

from collections.abc import Sequence

from speechllm.llm.adapters import METHODS, TuneConfig, options_of, tune
from speechllm.rwkv7.model import RWKV7, RWKV7Config
from speechllm.weights import meta_device


def tuning_table(
    config: RWKV7Config, rank: int | None = None, targets: Sequence[str] | None = None, methods: Sequence[str] = METHODS
) -> str:
    """What each method would train and store, in float32; no weights are made.

    Returns:
      a table in Markdown: the method; parameters trained and their share of the model's; size of the saved adapter;
      memory for what trains: the parameters, their gradients and AdamW's two averages.

    Raises:
      UserError: targets that match nothing; ValueError: an unknown method.
    """
    lines = ["| method | trained | share % | saved | in training |", "|---|---:|---:|---:|---:|"]
    for method in methods:
        has = options_of(method)
        tuned = TuneConfig(
            method,
            rank=rank if "rank" in has else None,
            targets=list(targets) if targets is not None and "targets" in has else None,
        )
        with meta_device():
            model = RWKV7(config)
        total = sum(p.numel() for p in model.parameters())
        tune(model, tuned)
        trained = saved = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if method == "pissa":
            saved = 2 * trained  # its start is stored too
        elif method == "state":
            saved += 2 * config.n_layer * config.n_embd  # the shifts, which are zero
        share = f"{100 * trained / total:.3f}"
        lines.append(f"| {method} | {trained:,} | {share} | {_size(4 * saved)} | {_size(16 * trained)} |")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
