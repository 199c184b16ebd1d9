"""What is checked before the first step: lengths, the files that frozen weights come from, and memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule

from speechllm.config import ConfigError
from speechllm.data import DataConfig, SpeechLoader
from speechllm.errors import UserError
from speechllm.model.config import EncoderSection, LLMSection
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.train.build import training_data
from speechllm.train.checkpoint import rng_state, set_rng_state
from speechllm.train.monitor import peak_memory_gb
from speechllm.train.objective import Objective, model_losses
from speechllm.weights import file_hash

logger = logging.getLogger(__name__)


def check_lengths(data: DataConfig, model: SpeechLLM | EncoderModel) -> None:
    """Whether encoders and projectors fit the lengths of the utterances that are trained on.

    Raises:
      ConfigError: an encoder cannot hear the longest; all of them are shorter than a position of the language model, or
        the shortest leaves none for a label.
    """
    slowest = data.augment.slowest
    for name, section, encoder in model.encoders():
        if data.max_seconds > encoder.max_seconds * slowest:
            played = f", played {slowest:g} times as fast" if slowest != 1 else ""
            raise ConfigError(
                f"data.max_seconds: {data.max_seconds:g}{played}, is longer than the {encoder.max_seconds:g} s that "
                f"the encoder ({section.path or f'model.{name}.whisper'}) has positions for: set it to "
                f"{encoder.max_seconds * slowest:g}"
            )
    if model.llm is None:
        return
    seconds = model.seconds_per_position
    keys = ", ".join(f"model.{key}.downsample: {p.downsample}" for key, p in model.config.projectors.items())
    if seconds > data.max_seconds:
        raise ConfigError(
            f"{keys} makes one position of {seconds:g} s of audio, but no utterance is longer than "
            f"data.max_seconds: {data.max_seconds:g}"
        )
    shortest = math.ceil(data.min_seconds / seconds)
    if data.max_positions is not None and shortest + 2 > data.max_positions:
        raise ConfigError(
            f"data.max_positions: {data.max_positions} leaves no position for a label and its end of text: "
            f"with {keys} the shortest audio (data.min_seconds: {data.min_seconds:g}) takes {shortest}"
        )


def check_precision(mixed_precision: str | None, model: SpeechLLM | EncoderModel) -> None:
    """Whether the types that the model is kept in and computes in go together.

    Raises:
      ConfigError: the language model's weights are in the other half precision.
    """
    computes_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision or "no")
    if model.llm is None or computes_in is None or model.llm.dtype in (computes_in, torch.float32):
        return
    name, other = (str(dtype).removeprefix("torch.") for dtype in (model.llm.dtype, computes_in))
    raise ConfigError(
        f"train.mixed_precision: {mixed_precision} is another half precision than that of the language model's "
        f"weights, {name}: set model.llm.dtype: {other}"
    )


def frozen_base_weights(
    model: SpeechLLM | EncoderModel, from_stage_before: Collection[str]
) -> dict[str, dict[str, str]]:
    """Path and hash of the files that frozen weights are from: checkpoints do not have these.

    Args:
      from_stage_before: names of weights that were trained in a stage before: checkpoints have them.

    Raises:
      ConfigError: weights are frozen that come from no file.
    """
    bases: dict[str, dict[str, str]] = {}
    parts: list[tuple[str, EncoderSection | LLMSection, torch.nn.Module]] = [*model.encoders()]
    if isinstance(model, SpeechLLM):
        parts.append(("llm", model.llm_section, model.llm))
    for name, section, part in parts:
        frozen = [
            n for n, p in part.named_parameters(prefix=name) if not p.requires_grad and n not in from_stage_before
        ]
        if not frozen:
            continue
        if section.path is None:
            raise ConfigError(f"optim.freeze: {frozen[0]} comes from no file (model.{name}.path) and no stage before")
        bases[name] = {"path": section.path, "sha256": file_hash(section.path)}
    if isinstance(model, SpeechLLM) and (adapter := model.llm_section.adapter) is not None:
        bases["adapter"] = {"path": adapter, "sha256": file_hash(adapter)}
    return bases


def scan_largest_batches(
    accelerator: Accelerator, model: torch.nn.Module, loader: SpeechLoader, objective: Objective = model_losses
) -> None:
    """Forward and backward of the largest batches: if memory is to run out, then now (as icefall's
    scan_pessimistic_batches_for_oom). Nothing of it stays: no gradient, no random number.

    Raises:
      MemoryRanOut: the message names the settings to lower.
    """
    rng = rng_state()
    for batch in loader.largest_batches():
        batch = batch.to(accelerator.device)
        try:
            with accelerator.no_sync(model):  # if one process fails, the others do not wait for it
                out = objective(accelerator, model, batch)
                accelerator.backward(out["loss"] / out["tokens"])
        except torch.OutOfMemoryError as e:
            raise MemoryRanOut(
                f"memory ran out with a batch of {len(batch)} rows of {batch.features.shape[1] / 100:.1f} s: lower "
                "data.max_duration (or data.max_cuts, data.max_seconds, data.max_positions), or set "
                "model.llm.checkpoint_blocks or model.encoder.checkpoint_layers; with train.loss mwer or grpo also "
                "train.mwer.beam or train.grpo.samples"
            ) from e
        finally:
            model.zero_grad(set_to_none=True)
    set_rng_state(rng)
    logger.info("the largest batches fit: at most %.2f GB", peak_memory_gb(accelerator.device))


def largest_max_duration(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: DataConfig,
    seed: int,
    objective: Objective = model_losses,
) -> float:
    """The largest `data.max_duration` (seconds) whose largest batches fit into the memory of every process's GPU.

    Raises:
      UserError: there is no GPU, the language model is sharded, or not even one utterance of `data.max_seconds` fits.
    """
    bare = accelerator.unwrap_model(model)
    if isinstance(bare, FSDPModule):
        raise UserError("--max-duration auto: not with train.fsdp, where one process that fails holds up all")
    if accelerator.device.type != "cuda":
        raise UserError("--max-duration auto needs a GPU: a CPU's memory does not run out with a message")

    def fits(seconds: float) -> bool:
        loader = training_data(replace(data, max_duration=seconds), seed, bare, accelerator)
        return fits_in_memory(accelerator, model, loader, objective)

    largest = largest_that_fits(fits, data.max_seconds)
    logger.info("--max-duration auto: %g s", largest)
    return largest


class MemoryRanOut(UserError):
    """A batch is too large for the device; the message names the settings to lower."""


def fits_in_memory(
    accelerator: Accelerator, model: torch.nn.Module, loader: SpeechLoader, objective: Objective = model_losses
) -> bool:
    """Whether the largest batches fit into the memory of every process's device."""
    try:
        scan_largest_batches(accelerator, model, loader, objective)
        fits = True
    except MemoryRanOut:
        torch.cuda.empty_cache()
        fits = False
    return all(gather_object([fits]))


def largest_that_fits(fits: Callable[[float], bool], start: float, limit: float = 20000.0) -> float:
    """The largest of `start`, 1.25 * start, ... that fits, less a tenth for what fragments and fluctuates.

    Raises:
      UserError: not even `start` does.
    """
    seconds = start
    if not fits(seconds):
        raise UserError(f"not even {start:g} s of audio fit: use a smaller model, or lower data.max_seconds")
    while 1.25 * seconds <= limit and fits(1.25 * seconds):
        seconds *= 1.25
    return float(math.floor(max(0.9 * seconds, start)))
