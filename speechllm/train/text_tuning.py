"""Tuning a language model on text: what `speechllm tune` runs, and an example of a training loop over packed rows.

A language model that has read the texts of a domain writes its words; the speech side is trained on top of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from speechllm.train.text_options import TextTuning

logger = logging.getLogger(__name__)


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
    total = tokens = 0.0
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
        for pack in _packs(documents, options.segment):
            ids, labels, cu_seqlens = inputs_and_labels(pack, eos_id)
            if len(pack) > 1:
                parts = [model.loss(labels, ids, cu_seqlens=cu_seqlens)[0]]
            else:
                parts, state = [], None
                for part in torch.arange(ids.shape[1]).split(options.segment):
                    loss, state = model.loss(labels[:, part], ids[:, part], state=state)
                    parts.append(loss)
            total += sum(loss.loss.item() for loss in parts)
            tokens += sum(loss.tokens.item() for loss in parts)
    model.train()
    return total / tokens


def _packs(documents: Sequence[Document], positions: int) -> Iterator[list[Document]]:
    """Documents in their order, as many together as have so many positions; longer ones by themselves."""
    pack: list[Document] = []
    size = 0
    for document in documents:
        if pack and size + len(document) + 1 > positions:
            yield pack
            pack, size = [], 0
        pack.append(document)
        size += len(document) + 1
    if pack:
        yield pack


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
    run = _Run(model, documents, options, eos_id, unfinished)
    if not run.load():
        run.before = run.after = text_loss(model, valid_documents, options, eos_id)
        logger.info("before: loss of a token %.4f, perplexity %.2f", run.before, math.exp(run.before))
    progress = tqdm(total=options.steps, initial=run.step, unit="step", smoothing=0.05)
    with logging_redirect_tqdm(), progress:
        for batch in islice(batches(documents, options.tokens_per_step, options.seed), run.step, options.steps):
            train_loss = run.train(batch)
            progress.update()
            progress.set_postfix(loss=f"{train_loss:.3f}")
            if run.step % options.valid_every_n == 0 or run.step == options.steps:
                run.after = text_loss(model, valid_documents, options, eos_id)
                logger.info("step %d: loss of a token %.4f, perplexity %.2f", run.step, run.after, math.exp(run.after))
                save()
                run.save()
    run.finish()
    return run.before, run.after


class _Run:
    """What a step changes, and the file that a stopped run goes on from.

    Attributes:
      step: how many are done.
      before, after: the loss on the validation documents before the first step, and the last one measured.
    """

    def __init__(
        self,
        model: RWKV7,
        documents: Sequence[Document],
        options: TextTuning,
        eos_id: int,
        unfinished: Path | None,
    ) -> None:
        optim = OptimConfig(lr=options.lr, warmup_steps=options.warmup_steps, clip_grad_norm=1.0)
        self.model, self.options, self.eos_id, self.max_grad_norm = model, options, eos_id, optim.clip_grad_norm
        self.optimizer = build_optimizer(model, optim, part="llm")
        self.scheduler = build_scheduler(self.optimizer, optim, options.steps)
        self.ranks = RankAllocation(model, options.steps)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.step, self.before, self.after = 0, math.nan, math.nan
        self._unfinished = unfinished if self.ranks.tuner is None else None
        self._identity = _identity(options, self.trained, documents)

    def load(self) -> bool:
        """Go on from the file, if it is there.

        Raises:
          UserError: it is that of another run.
        """
        path = self._unfinished
        if path is None or not path.is_file():
            return False
        state = load_checkpoint(path)
        if state["run"] != self._identity:
            raise UserError(f"{path}: is of a run with other options or text; remove it to begin anew")
        for name, p in self.trained.items():
            p.data.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.before, self.after = state["step"], state["before"], state["after"]
        logger.info("goes on after step %d from %s", self.step, path)
        return True

    def save(self) -> None:
        if self._unfinished is not None:
            state = {
                "run": self._identity,
                "step": self.step,
                "before": self.before,
                "after": self.after,
                "model": {name: p.data for name, p in self.trained.items()},
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
            save_checkpoint(self._unfinished, state)

    def finish(self) -> None:
        """The file is of no use any more."""
        if self._unfinished is not None:
            self._unfinished.unlink(missing_ok=True)

    def train(self, batch: Sequence[Document]) -> float:
        """One step on some documents; their mean loss of a token.

        Raises:
          UserError: the gradient is not finite.
        """
        self.step += 1
        loss = self._backward(batch)
        if self.ranks.tuner is not None:
            self.ranks.loss().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise UserError(f"step {self.step}: the gradient is not finite; lower the learning rate")
        self.optimizer.step()
        self.scheduler.step_batch()
        self.ranks.step(self.step)
        self.optimizer.zero_grad()
        return loss

    def _backward(self, batch: Sequence[Document]) -> float:
        """The gradients of the mean loss of a token: of short documents packed, of long ones a segment at a time."""
        tokens = sum(len(document) + 1 - document.given for document in batch)  # to learn
        short = [document for document in batch if len(document) < self.options.segment]
        autocast = torch.autocast(self.model.emb.weight.device.type, torch.bfloat16, enabled=self.options.bf16)
        total = 0.0
        if short:
            ids, labels, cu_seqlens = inputs_and_labels(short, self.eos_id)
            with autocast:
                loss, _ = self.model.loss(labels, ids, cu_seqlens=cu_seqlens)
            (loss.loss / tokens).backward()
            total += loss.loss.item()
        for document in batch:
            if len(document) < self.options.segment:
                continue
            ids, labels, _ = inputs_and_labels([document], self.eos_id)
            # an initial state learns from later segments only by a gradient that goes through their borders
            truncate = self.model.initial_wkv is None
            with autocast:
                loss, _ = backward_in_segments(
                    self.model, self.options.segment, labels, ids, scale=1 / tokens, truncate=truncate
                )
            total += loss.loss.item()
        return total / tokens


def _identity(options: TextTuning, trained: Mapping[str, Tensor], documents: Sequence[Document]) -> str:
    """What makes two runs the same one: options, the parameters that are trained, and the text."""
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    return hashlib.sha256(repr((options, shapes, documents)).encode()).hexdigest()
