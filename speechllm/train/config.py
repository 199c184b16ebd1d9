"""The configuration of an experiment: the sections of its YAML file, and what does not go together in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, Literal

from speechllm.config import ConfigError, check_limits, load_config, override, parse_overrides, setting, to_dict
from speechllm.data import DataConfig
from speechllm.model.config import ModelConfig
from speechllm.optim.optimizer import OptimConfig
from speechllm.train.trackers import tracker_names

CountedUnit = Literal["word", "char", "mixed"]  # the names of `speechllm.scoring.UNITS`


@dataclass
class MWERConfig:
    """`beam` of the search, all of whose results make the list; `cross_entropy`: the weight of the usual loss, the
    cross entropy and what the model has beside it, which keeps the model from what no list has shown it. `unit`: of the
    errors, `word`, `char` for languages without spaces, or `mixed`, Chinese characters and other words."""

    beam: int = setting(4, at_least=2)
    cross_entropy: float = setting(0.01, at_least=0, below=inf)
    unit: CountedUnit = "word"

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass
class GRPOConfig:
    """`samples` of each utterance, drawn at `temperature`; `cross_entropy`: the weight of the usual loss, the cross
    entropy and what the model has beside it. `unit`: of the errors, `word`, `char` for languages without spaces, or
    `mixed`, Chinese characters and other words."""

    samples: int = setting(8, at_least=2)
    temperature: float = setting(1.0, above=0, below=inf)
    cross_entropy: float = setting(0.01, at_least=0, below=inf)
    unit: CountedUnit = "word"

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass
class TrainConfig:
    """`num_steps` optimizer steps in all, each over `accumulate` batches per process; no more than `num_epochs` epochs.

    Every `valid_every_n` steps the validation set is decoded, every `save_every_n` steps a checkpoint written, of which
    the last `keep_last_k` are kept, and every `save_every_n_epochs` epochs one that stays. `average_period`: steps from
    one value to the next in the running average of the weights (tools/average_ckpt.py --use-averaged-model).
    `scan_largest_batches`: the largest batches are run before the first step, so that memory runs out then if it does.
    `fsdp`: the language model is sharded over the processes, for one whose training does not fit on one GPU
    (`speechllm.train.sharding`).
    `report_to`: where the numbers go besides the log, names with commas between them: tensorboard, wandb, trackio,
    mlflow, swanlab, comet_ml, clearml, aim; or none. `tensorboard: false` leaves that one out. `profile`: so many steps
    are traced, after the first ones (`speechllm.train.watch`). `peak_tflops`: what one of the GPUs could do at most,
    for the model FLOPs utilization (MFU) in the log; that of usual ones is known where training is in half precision.

    `loss`: `cross_entropy`, the model's own; or, for a model that reads already, one on the errors of what it writes,
    `mwer` (`speechllm.train.mwer`) or `grpo` (`speechllm.train.grpo`), with the options in the section of that name.

    In the first `ctc_only_steps` the CTC loss alone trains (the encoder): a language model that begins with an encoder
    that hears nothing learns to ignore the audio, and takes long to unlearn it. Validations in these steps have the CTC
    head's error rate only.
    """

    num_steps: int = setting(10000, at_least=1)
    num_epochs: int | None = setting(None, at_least=1)
    loss: Literal["cross_entropy", "mwer", "grpo"] = "cross_entropy"
    mwer: MWERConfig = field(default_factory=MWERConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ctc_only_steps: int = 0
    accumulate: int = setting(1, at_least=1)
    mixed_precision: str | None = None
    seed: int = 42
    log_every_n: int = setting(50, at_least=1)
    valid_every_n: int = setting(1000, at_least=1)
    save_every_n: int = setting(1000, at_least=1)
    save_every_n_epochs: int = setting(1, at_least=1)
    keep_last_k: int = setting(10, at_least=1)
    average_period: int = setting(200, at_least=1)
    max_bad_steps: int = 20
    scan_largest_batches: bool = True
    fsdp: bool = False
    tensorboard: bool = True
    report_to: str = "tensorboard"
    profile: int = setting(0, at_least=0)
    peak_tflops: float | None = setting(None, above=0)

    def __post_init__(self) -> None:
        tracker_names(self.report_to)
        if self.mixed_precision not in (None, "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be bf16, fp16 or null, got {self.mixed_precision!r}")
        check_limits(self)

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`, less what `tensorboard: false` leaves out."""
        return [name for name in tracker_names(self.report_to) if name != "tensorboard" or self.tensorboard]


@dataclass
class Experiment:
    """A whole experiment: one YAML file, as those in configs/.

    `stages`: what differs in each stage of the training, in order, as `{name: {section.key: value}}`.
    """

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.train.ctc_only_steps and not self.model.ctc_weight:
            raise ValueError("train.ctc_only_steps needs a CTC head: set model.ctc_weight above 0")
        on_errors = self.train.loss != "cross_entropy"
        if on_errors and self.train.ctc_only_steps:
            raise ValueError(
                f"train.ctc_only_steps is for a language model that begins, and train.loss: {self.train.loss} for one "
                "that reads already: train it with cross_entropy first, and leave out ctc_only_steps in this stage"
            )
        if on_errors and self.train.fsdp:
            raise ValueError(
                f"train.fsdp: the search of train.loss: {self.train.loss} needs the whole language model; leave out one"
            )
        if self.data.hotwords is not None and "hotwords" not in self.model.prompt.slots():
            raise ValueError(
                "data.hotwords draws lists for the prompt, and model.prompt has no {hotwords}: put the slot into "
                "prompt.asr, or leave out data.hotwords"
            )
        if self.model.llm is None:
            for name, given in (
                (f"train.loss: {self.train.loss}", on_errors),
                ("train.ctc_only_steps", self.train.ctc_only_steps),
                ("train.fsdp", self.train.fsdp),
                ("data.max_positions", self.data.max_positions is not None),
            ):
                if given:
                    raise ValueError(f"{name} is about the language model, and model.llm is null: leave out {name}")
        spec_augment = self.data.augment.spec_augment
        if self.model.cr_ctc is not None and (spec_augment is None or spec_augment.probability == 0):
            raise ValueError(
                "model.cr_ctc compares two views of an utterance, which differ by SpecAugment: set "
                "data.augment.spec_augment, with a probability above 0"
            )
        if self.model.streaming is not None and self.data.cache_encoder is not None:
            raise ValueError(
                "data.cache_encoder keeps what the encoder hears of whole utterances, and model.streaming trains on "
                "chunks of several sizes: leave out one of them"
            )
        if self.train.fsdp and self.optim.name != "adamw":
            raise ValueError(f"train.fsdp: optim.name: {self.optim.name} looks at whole tensors; use adamw")
        if self.train.fsdp and self.train.mixed_precision == "fp16":
            raise ValueError("train.fsdp: fp16's scaling of the loss is not shared between processes; use bf16")
        if (
            self.train.fsdp
            and self.model.llm is not None
            and self.model.llm.tune is not None
            and self.model.llm.tune.method == "adalora"
        ):
            raise ValueError("train.fsdp: AdaLoRA looks at whole matrices; use another model.llm.tune.method")


def load_experiment(path: str | Path, overrides: Sequence[str] | None = None) -> Experiment:
    """The configuration of a YAML file, checked as a whole, with all of its stages.

    Args:
        overrides: `--section.key value` pairs of a command line, see `speechllm.config.load_config`.

    Raises:
        ConfigError: it cannot be trained with; the message names the file, the key and what is allowed.
    """
    experiment = load_config(Experiment, path, overrides)
    stages_of(str(path), experiment, overrides or ())
    return experiment


def stages_of(path: str, config: Experiment, overrides: Sequence[str]) -> dict[str, Experiment]:
    """The configuration of each stage, in order, all of them checked before the first begins.

    Args:
      path: of the configuration file; overrides: of the command line, which count for all stages.

    Raises:
      ConfigError: a stage's changes are not right, or it cannot go on from the one before it.
    """
    base = load_config(Experiment, path)
    stages = {
        name: override(
            override(base, changes, source=f"{path}: stages.{name}"), parse_overrides(overrides), source="command line"
        )
        for name, changes in config.stages.items()
    }
    for (name, stage), (then, next_stage) in pairwise(stages.items()):
        check_same_projectors(path, f"stages.{name}", stage.model, f"stages.{then}", next_stage.model)
    return stages


def check_same_projectors(source: str, name: str, model: ModelConfig, then: str, next_model: ModelConfig) -> None:
    """A stage goes on with the projectors of the one before it; it may have encoders more.

    Raises:
      ConfigError: names both stages, the key and what differs.
    """
    for key, projector in model.projectors.items():
        if key not in next_model.projectors:
            raise ConfigError(f"{source}: {name} trains model.{key}, but {then} has no such encoder")
        before, after = to_dict(projector), to_dict(next_model.projectors[key])
        for field_name, value in before.items():
            if after[field_name] != value:
                raise ConfigError(
                    f"{source}: {then} has model.{key}.{field_name}: {after[field_name]}, but goes on from the "
                    f"projector of {name}, which has {value}; use one for both, or train them as two experiments"
                )
