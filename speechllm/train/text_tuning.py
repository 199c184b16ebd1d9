"""Tuning a language model on text: what `speechllm tune` runs, and an example of a training loop over packed rows.

A language model that has read the texts of a domain writes its words; the speech side is trained on top of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from speechllm.errors import UserError
from speechllm.llm.adapters import RankAllocation
from speechllm.llm.interface import IGNORE
from speechllm.optim.optimizer import OptimConfig, build_optimizer, build_scheduler
from speechllm.rwkv7.model import RWKV7
from speechllm.rwkv7.segments import backward_in_segments
from speechllm.text.tokenizer import Tokenizer
from speechllm.train.checkpoint import load_checkpoint, save_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class TextTuning:
    """`steps` optimizer steps over documents of `tokens_per_step` tokens together, at a peak learning rate of `lr`.

    A document longer than `segment` tokens is read a segment at a time, the state carried from one to the next (without
    its gradient, but in state tuning); shorter ones are packed without padding.
    """

    steps: int = 1000
    tokens_per_step: int = 4096
    segment: int = 1024
    lr: float = 1e-4
    warmup_steps: int = 50
    valid_every_n: int = 200
    bf16: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "segment", "valid_every_n"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Document:
    """The token ids of a text; the first `given` of them are read and not learned."""

    ids: list[int]
    given: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def read_documents(paths: Sequence[str | Path], tokenizer: Tokenizer) -> list[Document]:
    """A document is a line of a text file, or `text` in a line of a .jsonl file, where `prompt` may say what comes
    before it and is not learned.

    Raises:
      FileNotFoundError: no such file.
      UserError: a line that cannot be read, with its number; no document at all.
    """
    documents = []
    for path in map(Path, paths):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 text ({e})") from e
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            prompt = ""
            if path.suffix == ".jsonl":
                try:
                    content = json.loads(line)
                    line, prompt = content["text"], content.get("prompt", "")
                    if not (isinstance(line, str) and isinstance(prompt, str)):
                        raise TypeError("text and prompt are strings")
                except (ValueError, KeyError, TypeError, AttributeError) as e:
                    raise UserError(f'{path}, line {number}: expected JSON like {{"text": "..."}} ({e!r})') from e
            given = tokenizer.encode(prompt) if prompt else []
            documents.append(Document([*given, *tokenizer.encode(line)], len(given)))
    if not documents:
        raise UserError(f"no text in {', '.join(map(str, paths))}")
    return documents


def batches(documents: Sequence[Document], tokens: int, seed: int) -> Iterator[list[Document]]:
    """Documents of about `tokens` tokens together, without end, in another order each time around."""
    order = random.Random(seed)
    batch: list[Document] = []
    size = 0
    while True:
        for document in order.sample(documents, len(documents)):
            if batch and size + len(document) + 1 > tokens:
                yield batch
                batch, size = [], 0
            batch.append(document)
            size += len(document) + 1


def inputs_and_labels(documents: Sequence[Document], eos_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Documents one after another: input_ids (1, L), labels (1, L), -100 where nothing is learned, cu_seqlens (M + 1,).

    A document begins after the end of the one before it, as in RWKV's pre-training.
    """
    ids = torch.tensor([[i for document in documents for i in (eos_id, *document.ids)]])
    labels = torch.tensor([[i for d in documents for i in (*[IGNORE] * d.given, *d.ids[d.given :], eos_id)]])
    return ids, labels, torch.tensor([0, *(len(document) + 1 for document in documents)]).cumsum(0)


def text_loss(model: RWKV7, documents: Sequence[Document], options: TextTuning, eos_id: int) -> float:
    """Mean loss of a token, in nats, over whole documents."""
    device = model.emb.weight.device
    total, tokens = 0.0, 0
    model.eval()
    for document in documents:
        ids, labels, _ = inputs_and_labels([document], eos_id)
        state = None
        for part in torch.arange(ids.shape[1]).split(options.segment):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                loss, state = model.loss(labels[:, part], ids[:, part], state=state)
            total, tokens = total + loss.loss.item(), tokens + loss.tokens.item()
    model.train()
    return total / tokens


def tune_on_text(
    model: RWKV7,
    documents: Sequence[Document],
    valid_documents: Sequence[Document],
    options: TextTuning,
    eos_id: int,
    save: Callable[[], None],
    unfinished: Path | None = None,
) -> tuple[float, float]:
    """Trains what `speechllm.llm.adapters.tune` left trainable.

    Args:
      save: called without arguments after each validation.
      unfinished: a file that has, from the first validation to the end of the run, what it needs to go on: where it is
        there, the run goes on from it as if it had never stopped. AdaLoRA, whose ranks depend on all steps, does not.

    Returns:
      the loss on `valid_documents` before and after.

    Raises:
      UserError: a gradient that is not finite; what was saved last stays. `unfinished` is that of another run.
    """
    device = model.emb.weight.device
    optim = OptimConfig(lr=options.lr, warmup_steps=options.warmup_steps, clip_grad_norm=1.0)
    optimizer = build_optimizer(model, optim, part="llm")
    scheduler = build_scheduler(optimizer, optim, options.steps)
    ranks = RankAllocation(model, options.steps)
    if ranks.tuner is not None:
        unfinished = None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run = _identity(options, trained, documents)
    first = 1
    if unfinished is not None and unfinished.is_file():
        state = load_checkpoint(unfinished)
        if state["run"] != run:
            raise UserError(f"{unfinished}: is of a run with other options or text; remove it to begin anew")
        for name, p in trained.items():
            p.data.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first, before, after = state["step"] + 1, state["before"], state["after"]
        logger.info("goes on after step %d from %s", state["step"], unfinished)
    else:
        before = after = text_loss(model, valid_documents, options, eos_id)
        logger.info("before: loss of a token %.4f, perplexity %.2f", before, math.exp(before))
    progress = tqdm(total=options.steps, initial=first - 1, unit="step", smoothing=0.05)
    with logging_redirect_tqdm():
        remaining = islice(batches(documents, options.tokens_per_step, options.seed), first - 1, options.steps)
        for step, batch in enumerate(remaining, start=first):
            tokens = sum(len(document) + 1 - document.given for document in batch)  # to learn
            short = [document for document in batch if len(document) < options.segment]
            long = [document for document in batch if len(document) >= options.segment]
            train_loss = 0.0
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.bf16)
            if short:
                ids, labels, cu_seqlens = inputs_and_labels(short, eos_id)
                with autocast:
                    loss, _ = model.loss(labels, ids, cu_seqlens=cu_seqlens)
                (loss.loss / tokens).backward()
                train_loss += loss.loss.item() / tokens
            for document in long:
                ids, labels, _ = inputs_and_labels([document], eos_id)
                # an initial state learns from later segments only by a gradient that goes through their borders
                truncate = model.initial_wkv is None
                with autocast:
                    loss, _ = backward_in_segments(
                        model, options.segment, labels, ids, scale=1 / tokens, truncate=truncate
                    )
                train_loss += loss.loss.item() / tokens
            if ranks.tuner is not None:
                ranks.loss().backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), optim.clip_grad_norm).item()
            if not math.isfinite(grad_norm):
                raise UserError(f"step {step}: the gradient is not finite; lower the learning rate")
            optimizer.step()
            scheduler.step_batch()
            ranks.step(step)
            optimizer.zero_grad()
            progress.update()
            progress.set_postfix(loss=f"{train_loss:.3f}")
            if step % options.valid_every_n == 0 or step == options.steps:
                after = text_loss(model, valid_documents, options, eos_id)
                logger.info("step %d: loss of a token %.4f, perplexity %.2f", step, after, math.exp(after))
                save()
                if unfinished is not None:
                    state = {
                        "run": run,
                        "step": step,
                        "before": before,
                        "after": after,
                        "model": {name: p.data for name, p in trained.items()},
                        "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(),
                    }
                    save_checkpoint(unfinished, state)
    progress.close()
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return before, after


def _identity(options: TextTuning, trained: dict[str, Tensor], documents: Sequence[Document]) -> str:
    """What makes two runs the same one: options, the parameters that are trained, and the text."""
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    return hashlib.sha256(repr((options, shapes, documents)).encode()).hexdigest()
