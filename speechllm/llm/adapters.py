"""Parameter-efficient tuning of language models: adapters of the ``peft`` package, a trained initial state where the
model has one, on bases that may be quantized (``speechllm.llm.quantize``).

    model = tune(load_rwkv7(path), TuneConfig(method="lora", rank=16))   # prepared in place: only the adapter trains
    ...                                                                  # train it like any model
    save_adapter(model, "adapter", base=path)                            # a standard PEFT folder
    model = load_adapter(load_rwkv7(path), "adapter")                    # for decoding, or to train on
    merge(model)                                                         # as fast as the base; unmerge(model) undoes it

Methods: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948), MiSS (2409.15371), AdaLoRA
(2303.10512), and state tuning, where the initial state of every layer is all that trains (RWKV-PEFT).

An adapter of a transformers model has the names that ``peft`` itself would give it on that model.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechllm.errors import UserError
from speechllm.files import replaced_folder
from speechllm.hub import local_path
from speechllm.llm import rwkv_peft
from speechllm.llm.interface import LAYER_NAME, TunableModel, Tuning, is_conv1d, is_matrix
from speechllm.llm.quantize import QUANTIZED, dequantized, quantize
from speechllm.quiet import quiet

if TYPE_CHECKING:  # peft imports transformers, which takes seconds: only those who tune pay for it
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

_ADAPTER = ("rank", "dropout", "targets")
_OPTIONS = {  # those of TuneConfig that each method has
    "full": (),
    "lora": (*_ADAPTER, "alpha", "quantize"),
    "rslora": (*_ADAPTER, "alpha", "quantize"),
    "dora": (*_ADAPTER, "alpha"),
    "pissa": (*_ADAPTER, "alpha"),
    "miss": _ADAPTER,
    "adalora": (*_ADAPTER, "alpha", "initial_rank"),
    "state": ("quantize",),
}
METHODS = tuple(_OPTIONS)


def options_of(method: str) -> tuple[str, ...]:
    """The options of ``TuneConfig`` that a method has; none of an unknown one."""
    return _OPTIONS.get(method, ())


_STATE_FILE = "initial_state.safetensors"
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# peft's names of the adapter that trains, and of PiSSA's own start, which is subtracted.
_TRAINED, _INITIAL = "default", "initial"


@dataclass
class TuneConfig:
    """What of a language model trains, and how.

    Attributes:
      method: one of ``METHODS``. ``full`` trains everything, as a model without a TuneConfig does: it is there to be
        compared with by changing one key.
      rank: 8 if None; for AdaLoRA the average rank that is left at the end.
      alpha: the adapter counts alpha / rank times (rsLoRA: alpha / sqrt(rank)). 2 * rank if None, rank for PiSSA.
      dropout: on the adapter's input; 0 if None.
      targets: names of matrices, each with or without its parents: ``key`` is ``att.key`` and ``ffn.key``. If None,
        receptance, key, value, output of RWKV-7, and of other models every matrix of their layers; of mixtures of
        experts, every matrix outside the module that has the experts.
      initial_rank: AdaLoRA's rank at the start, 1.5 * rank if None.
      quantize: keep the frozen matrices of the layers in ``int8`` or ``nf4``: by bitsandbytes where there is CUDA (when
        the model is moved there), else by torchao, whose weights DistributedDataParallel does not take.

    Raises:
      ValueError: an unknown method, an option that the method does not have, a value out of range.
    """

    method: str
    rank: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    targets: list[str] | None = None
    initial_rank: int | None = None
    quantize: str = "none"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is unknown; choose from {', '.join(METHODS)}")
        if self.quantize not in QUANTIZED:
            raise ValueError(f"quantize: {self.quantize!r} is unknown; choose from {', '.join(QUANTIZED)}")
        given = {name for name in (*_ADAPTER, "alpha", "initial_rank") if getattr(self, name) is not None}
        if self.quantize != "none":
            given.add("quantize")
        has = _OPTIONS[self.method]
        if unused := sorted(given - set(has)):
            raise ValueError(
                f"{unused[0]}: method {self.method} does not have it; it has {', '.join(has) or 'no options'}"
            )
        if "rank" in has:
            rank = self.rank = 8 if self.rank is None else self.rank
            self.dropout = 0.0 if self.dropout is None else self.dropout
            if rank < 1:
                raise ValueError(f"rank must be at least 1, got {rank}")
            if not 0 <= self.dropout < 1:
                raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
            if self.targets is not None and not self.targets:
                raise ValueError("targets: name at least one matrix")
        if "alpha" in has:
            if self.alpha is None:
                self.alpha = rank if self.method == "pissa" else 2 * rank
            if self.alpha < 1:
                raise ValueError(f"alpha must be at least 1, got {self.alpha}")
        if "initial_rank" in has:
            self.initial_rank = math.ceil(1.5 * rank) if self.initial_rank is None else self.initial_rank
            if self.initial_rank <= rank:
                raise ValueError(f"initial_rank must be above rank ({rank}), got {self.initial_rank}")

    @property
    def freezes_base(self) -> bool:
        """Whether the weights that the model was loaded with stay as they are."""
        return self.method != "full"


def tune(model: TunableModel, config: TuneConfig) -> TunableModel:
    """Prepares a model for training, in place: freezes it, quantizes it and adds what trains.

    Without training it computes what it did before (quantized ones nearly so).

    Returns:
      the model itself; ``forward``, ``step`` and all else are called as before.

    Raises:
      UserError: targets that match nothing, a rank above that of a target, a model that is tuned already, a package
        that is not installed, DoRA on a matrix with rows of zeros, which have no direction, an option that is for
        RWKV-7 alone.
    """
    if model.tuning is not None:
        raise UserError("tune: the model is tuned already; load the base anew, or load its adapter with load_adapter")
    if config.method == "state" and not model.has_initial_state:
        raise UserError(f"tune.method: state: is for RWKV-7; the language model is {model.name}")
    if "targets" in _OPTIONS[config.method]:
        config = replace(config, targets=config.targets or model.default_targets())
        _check_targets(model, config)
    if config.method == "dora":
        for name, weight in _matrices(model).items():
            inputs = 0 if is_conv1d(model.get_submodule(name)) else 1
            if not _is_target(name, config.targets) or weight.is_meta:
                continue
            if not weight.any(dim=inputs).all():
                raise UserError(f"tune: {name} has rows of zeros, which DoRA cannot scale: leave it out of the targets")
    if config.freezes_base:
        model.requires_grad_(False)
    if config.quantize != "none":
        quantize(model, config.quantize)
    adapter = None
    if config.method == "state":
        model.tune_initial_state()
    elif config.method != "full":
        try:
            adapter = _inject(model, _peft_config(config))
        except (TypeError, ValueError) as e:  # what a method does not take: Conv1D, the experts of a layer
            raise UserError(f"tune.method: {config.method} of {model.name}: {e}; name other targets") from e
        if config.method == "pissa" and not next(model.parameters()).is_meta:
            _start_with_principal_components(model, adapter)
    model.tuning = Tuning(adapter, quantized=config.quantize != "none")
    return model


def save_adapter(model: TunableModel, folder: str | Path, base: str | Path | None = None) -> None:
    """Writes what was tuned, without the base; replaces ``folder`` in one move.

    An adapter becomes a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``) that
    ``peft.PeftModel.from_pretrained`` puts on the base as it was before tuning. PiSSA is written as the LoRA of twice
    the rank that makes the same difference. A tuned state becomes ``initial_state.safetensors``, which
    ``RWKV7State.load`` reads too, for use with any call that takes a state.

    Args:
      base: the checkpoint that the model came from, to be noted in the folder.

    Raises:
      UserError: the model has neither an adapter nor a tuned state, or it has an adapter of RWKV-PEFT whose file also
        replaced weights of the base.
    """
    tuning = _tuning(model)
    if tuning.replaces_base:
        raise UserError(
            "save_adapter: the adapter came with weights that were trained in full (RWKV-PEFT's norms), for which an "
            "adapter's folder has no place: save the merged model"
        )
    if tuning.peft is None and not model.initial_state_is_tuned:
        raise UserError("save_adapter: there is no adapter, all of the model was trained: save the model itself")
    with replaced_folder(folder) as tmp:
        if tuning.peft is None:
            model.save_initial_state(tmp / _STATE_FILE)
            return
        config, weights = _export(tuning.peft)
        config.base_model_name_or_path = None if base is None else str(base)
        config.inference_mode = True
        config.save_pretrained(str(tmp))
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, tmp / _WEIGHTS_FILE)


def load_adapter(
    model: TunableModel, folder: str | Path, trainable: bool = False, alpha: float | None = None
) -> TunableModel:
    """Puts what ``save_adapter`` or ``peft`` wrote on a base, in place; or, of RWKV-7, what RWKV-PEFT did.

    Args:
      model: the base, as ``load_rwkv7`` or ``load_transformers_lm`` gives it.
      folder: of an adapter; or a .pth file of RWKV-PEFT (``speechllm.llm.rwkv_peft``), whose weights that were trained
        in full replace the model's.
      trainable: the adapter goes on training; else nothing of the model trains.
      alpha: of a LoRA in a file of RWKV-PEFT, which counts alpha / rank times.

    Raises:
      FileNotFoundError: the folder holds neither an adapter nor a state.
      UserError: it does not fit the model, whose weights are as before; the message lists the names.
    """
    folder = local_path(folder)
    if model.tuning is not None:
        raise UserError(f"{folder}: the model is tuned already; load the base anew")
    if alpha is not None and folder.is_dir():
        raise UserError(f"{folder}: alpha: a folder says itself how its adapter counts; it is for files of RWKV-PEFT")
    is_file = folder.is_file() or folder.suffix in (".pth", ".safetensors")
    if is_file and not model.has_initial_state:
        raise UserError(f"{folder}: files of RWKV-PEFT are for RWKV-7; the language model is {model.name}")
    if (state_file := _state_file(folder)) is not None:
        if not model.has_initial_state:
            raise UserError(f"{state_file}: is for RWKV-7; the language model is {model.name}")
        if alpha is not None:
            raise UserError(f"{folder}: alpha: is LoRA's; this is a tuned state")
        model.requires_grad_(False)
        model.load_initial_state(state_file, trainable)
        model.tuning = Tuning(None)
    elif is_file:
        read = rwkv_peft.read(folder, model.state_dict(), alpha)
        adapter = _put_on(model, read.config, read.weights, folder, trainable)
        _replace(model, read.replaced)
        model.tuning = Tuning(adapter, replaces_base=bool(read.replaced))
    else:
        model.tuning = Tuning(_put_on(model, *_read_peft(folder), folder, trainable))
    return model


def _state_file(path: Path) -> Path | None:
    """The file of a tuned state that `path` is, or has in it; None if it is an adapter."""
    if path.suffix == ".safetensors":
        return path
    if path.is_file() or path.suffix == ".pth":
        return path if rwkv_peft.is_state(path) else None
    return path / _STATE_FILE if (path / _STATE_FILE).is_file() else None


def merge(model: TunableModel) -> None:
    """Adds the adapter to the weights it belongs to, so that it takes no time in decoding.

    The original of each weight is kept until ``unmerge`` puts it back, bit for bit.

    Raises:
      UserError: there is no adapter (a tuned state needs no merging), it is merged, or the base is quantized:
        rounding the sum to the quantized type would lose most of the adapter.
    """
    tuning = _tuning(model)
    if tuning.peft is None:
        raise UserError("merge: the model has no adapter")
    if tuning.originals:
        raise UserError("merge: the adapter is merged already")
    if tuning.quantized:
        raise UserError("merge: the base is quantized; merged_state_dict gives the merged weights in floating point")
    tuning.originals = _merge_layers(model)


def unmerge(model: TunableModel) -> None:
    """Undoes ``merge`` exactly: the base has the weights it had, and the adapter can go on training.

    Raises:
      UserError: the adapter is not merged.
    """
    tuning = _tuning(model)
    if not tuning.originals:
        raise UserError("unmerge: the adapter is not merged")
    for name, layer in _adapter_layers(model):
        layer.unmerge()  # clears peft's marks; its W + d - d is not quite W
        _adapted(layer).data = tuning.originals[name]
    tuning.originals = {}


@torch.no_grad()
def merged_state_dict(model: TunableModel) -> dict[str, Tensor]:
    """The state dict of an untuned model that computes the same; the model stays as it is.

    A tuned initial state is part of it (``initial_wkv``). Of a quantized base these are the weights that the adapter
    was trained with, in floating point, not those of the file that was quantized. (The 8-bit products of bitsandbytes
    round their inputs too, so there "the same" is within some percent.)
    """
    tuning = model.tuning
    # peft puts the parameters of a base layer one level deeper, those of experts once for each of their stacks
    weights = {
        re.sub(r"(\.base_layer)+(?=\.)", "", name): dequantized(model, name, t)
        for name, t in model.state_dict().items()
        if not ADAPTER_PARTS & set(name.split("."))
    }
    if tuning is None or tuning.peft is None or tuning.originals:
        return weights
    plain = model.untuned()
    plain.load_state_dict(weights, assign=True)
    config, adapter = _export(tuning.peft)
    _load_weights(_inject(plain, config), adapter)
    _merge_layers(plain)
    return merged_state_dict(plain)


def convert_adapter(source: str | Path, target: str | Path, alpha: float | None = None) -> float | None:
    """A .pth file of RWKV-PEFT as a folder of PEFT, or a folder as such a file. No base is needed.

    Args:
      alpha: of a LoRA in the file.

    Returns:
      the alpha of the LoRA that was written, None for MiSS.

    Raises:
      FileNotFoundError: there is no adapter at ``source``.
      UserError: the other form has no place for what is in it.
    """
    source, target = Path(source), Path(target)
    if source.is_dir():
        if target.suffix != ".pth":
            raise UserError(f"{target}: {source} is a folder of PEFT already; give a name ending in .pth for RWKV-PEFT")
        if alpha is not None:
            raise UserError(f"{source}: alpha: a folder says itself how its adapter counts")
        return rwkv_peft.write(*_read_peft(source), target)
    if target.suffix == ".pth":
        raise UserError(f"{target}: {source} is RWKV-PEFT's already; give a name without .pth for a folder of PEFT")
    read = rwkv_peft.read(source, alpha=alpha)
    if read.replaced:
        raise UserError(
            f"{source}: holds weights that were trained in full besides ({', '.join(sorted(read.replaced)[:3])}, ...), "
            "for which a folder of PEFT has no place: merge all of it into its base (--adapter)"
        )
    read.config.inference_mode = True
    with replaced_folder(target) as tmp:
        read.config.save_pretrained(str(tmp))
        save_file({name: x.contiguous() for name, x in read.weights.items()}, tmp / _WEIGHTS_FILE)
    return getattr(read.config, "lora_alpha", None)


class RankAllocation:
    """What AdaLoRA does besides the gradient steps: less rank for the matrices that need less. Nothing for others.

    The ranks stay as they are for the first tenth of the steps, fall to their average of ``TuneConfig.rank``, and stay
    for the last three tenths.

    Args:
      model: a tuned model, or any other.
      num_steps: optimizer steps in the whole training.
    """

    ORTHOGONALITY = 0.1  # weight of its loss, as in the paper's experiments

    def __init__(self, model: nn.Module | None, num_steps: int) -> None:
        tuning = model.tuning if isinstance(model, TunableModel) else None
        tuner = None if tuning is None or tuning.peft is None else tuning.peft.base_model
        self.allocator: Any = getattr(tuner, "rankallocator", None)
        self.tuner: Any = None if self.allocator is None else tuner
        if self.tuner is not None:
            config = self._config
            config.total_step, config.tinit, config.tfinal = num_steps, num_steps // 10, 3 * num_steps // 10

    @property
    def _config(self) -> PeftConfig:
        return self.tuner.peft_config[_TRAINED]

    def loss(self) -> Tensor:
        """A scalar to add to the mean loss of a step: how far the singular vectors are from orthogonal ones."""
        if self.tuner is None:
            return torch.zeros(())
        vectors = []
        for _, layer in _adapter_layers(self.tuner.model):
            vectors += [layer.lora_A[_TRAINED], layer.lora_B[_TRAINED].T]
        distances = [torch.dist(x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)) for x in vectors]
        return self.ORTHOGONALITY * torch.stack(distances).mean()

    def step(self, step: int) -> None:
        """To be called after the optimizer's step number ``step`` (from 1), with the gradients still there."""
        if self.tuner is not None:
            self.tuner.update_and_allocate(step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on as if it had never stopped."""
        if self.tuner is None:
            return {}
        return {
            "sensitivity": dict(self.allocator.exp_avg_ipt),
            "uncertainty": dict(self.allocator.exp_avg_unc),
            "rank_pattern": self._config.rank_pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.tuner is None:
            return
        device = next(self.tuner.model.parameters()).device
        self.allocator.exp_avg_ipt = {name: x.to(device) for name, x in state["sensitivity"].items()}
        self.allocator.exp_avg_unc = {name: x.to(device) for name, x in state["uncertainty"].items()}
        self.allocator.ipt = {name: torch.zeros_like(x) for name, x in self.allocator.exp_avg_ipt.items()}
        self._config.rank_pattern = state["rank_pattern"]


def _tuning(model: TunableModel) -> Tuning:
    tuning = model.tuning
    if tuning is None:
        raise UserError("the model was not tuned: call tune or load_adapter first")
    return tuning


# ---- adapters ---------------------------------------------------------------------------------------------------

# The names of what peft adds to a layer.
ADAPTER_PARTS = {"lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "miss_block", "ranknum"}


def _is_target(name: str, targets: Collection[str] | None) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets or ())


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all linear layers, by the names of these."""
    return {name: module.get_parameter("weight") for name, module in model.named_modules() if is_matrix(module)}


def _check_targets(model: TunableModel, config: TuneConfig) -> None:
    matrices = _matrices(model)
    unknown = [target for target in config.targets or () if not any(_is_target(name, [target]) for name in matrices)]
    if unknown:
        there = dict.fromkeys(LAYER_NAME.sub(r"\1", name) for name in matrices)
        raise UserError(
            f"tune.targets: no matrix of {model.name} is called {', '.join(unknown)}; there are {', '.join(there)} "
            "(without what is before a dot: all of that name)"
        )
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    rank = config.initial_rank or config.rank
    for name, weight in matrices.items():
        if not _is_target(name, config.targets):
            continue
        if id(weight) in embeddings:
            raise UserError(f"tune.targets: {name} of {model.name} is its embedding too, and takes no adapter")
        if rank is not None and rank > min(weight.shape):
            raise UserError(
                f"tune.rank: {rank} is too high: the target {name} of {model.name} is a matrix of "
                f"{' x '.join(map(str, weight.shape))}; lower it, or name other targets"
            )


@quiet()
def _peft_config(config: TuneConfig) -> PeftConfig:
    import peft

    targets = list(config.targets or ())
    if config.method == "miss":
        return peft.MissConfig(r=config.rank, miss_dropout=config.dropout, target_modules=targets)
    lora = {"lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": targets}
    if config.method == "adalora":  # total_step: until RankAllocation knows
        return peft.AdaLoraConfig(init_r=config.initial_rank, target_r=config.rank, total_step=1, **lora)
    variant = {"use_rslora": config.method == "rslora", "use_dora": config.method == "dora"}
    return peft.LoraConfig(r=config.rank, **variant, **lora)


@quiet()
def _inject(model: TunableModel, config: PeftConfig) -> PeftModel:
    """Puts an adapter into the model, in place."""
    import peft

    from speechllm.llm.lora import fuse

    with warnings.catch_warnings():
        # said of quantized bases, which are not merged here
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")
        # of Conv1D, whose weight is transposed: peft says that it heeds that
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        adapter = peft.get_peft_model(model.adapter_root(), config)
    for _, layer in _adapter_layers(model):
        fuse(layer)
        for constant in getattr(layer, "ranknum", {}).values():
            constant.requires_grad_(False)  # which it lost if it was moved to the device of the base
    model.train(model.training)  # also what was added
    return adapter


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


@torch.no_grad()
def _start_with_principal_components(model: TunableModel, adapter: PeftModel) -> None:
    """PiSSA: the adapter starts as the largest singular components of its matrix, which are taken from the matrix.

    Here they are taken by a second, constant adapter (A0, -B0), so that the base stays what it was. Its weights are
    buffers: a checkpoint holds them, and a resumed run does not depend on a decomposition giving the same again.
    """
    config = replace(adapter.peft_config[_TRAINED], lora_dropout=0.0)
    adapter.add_adapter(_INITIAL, config)
    for name, layer in _adapter_layers(model):
        base = layer.get_base_layer()
        if not is_matrix(base):
            raise UserError(
                f"tune.method: pissa decomposes matrices, and {name} is a stack of them: name other targets"
            )
        original = base.weight.data
        layer.pissa_init(_TRAINED, "pissa_niter_16")
        base.weight.data = original
        for part, sign in ((layer.lora_A, 1), (layer.lora_B, -1)):
            start = sign * part[_TRAINED].weight
            del part[_INITIAL].weight
            part[_INITIAL].register_buffer("weight", start)
    adapter.base_model.set_adapter([_TRAINED, _INITIAL])


def _merge_layers(model: TunableModel) -> dict[str, Tensor]:
    """Merges all active adapters; returns the weights as they were, by layer.

    The sum is made in float32, and rounded once to the type of the base.
    """
    originals = {}
    for name, layer in _adapter_layers(model):
        weight = _adapted(layer)
        originals[name] = weight.data
        weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        layer.merge()
        weight.data = weight.data.to(originals[name].dtype)
    return originals


def _adapted(layer: BaseTunerLayer) -> nn.Parameter:
    """The parameter of the base that an adapter's layer is for: a matrix, or the experts' stack of one."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def _export(adapter: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Configuration and weights of the adapter as PEFT stores them, for the base as it was before tuning."""
    import peft

    live = adapter.peft_config[_TRAINED]
    config = replace(live, base_model_name_or_path=None)
    if config.peft_type == peft.PeftType.ADALORA:
        # The ranks that were taken away are stored as the zeros they are: in the compact form peft takes a matrix
        # that is left without any for a damaged one.
        config.rank_pattern = None
    adapter.peft_config[_TRAINED] = config
    try:
        weights = peft.get_peft_model_state_dict(adapter, adapter_name=_TRAINED, save_embedding_layers=False)
    finally:
        adapter.peft_config[_TRAINED] = live
    if _INITIAL in adapter.peft_config:
        start = peft.get_peft_model_state_dict(adapter, adapter_name=_INITIAL, save_embedding_layers=False)
        weights = {name: torch.cat((x, start[name]), dim=int("lora_B" in name)) for name, x in weights.items()}
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    return config, weights


def _load_weights(adapter: PeftModel, weights: dict[str, Tensor]) -> None:
    import peft

    peft.set_peft_model_state_dict(adapter, weights, adapter_name=_TRAINED)


@quiet()
def _read_peft(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Configuration and weights in a folder of PEFT."""
    import peft

    for name in (_CONFIG_FILE, _WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file; expected a PEFT folder ({_CONFIG_FILE}, {_WEIGHTS_FILE}), one with "
                f"{_STATE_FILE}, or a .pth file of RWKV-PEFT"
            )
    try:
        return peft.PeftConfig.from_pretrained(str(folder)), load_file(folder / _WEIGHTS_FILE)
    except (SafetensorError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"{folder}: not an adapter that this version of peft reads ({type(e).__name__}: {e})") from e


def _put_on(
    model: TunableModel, config: PeftConfig, weights: dict[str, Tensor], folder: Path, trainable: bool
) -> PeftModel:
    """Puts an adapter that was read from `folder` on its base, in place."""
    import peft

    if trainable and getattr(config, "rank_pattern", None):
        raise UserError(f"{folder}: rank_pattern: an adapter whose ranks were cut down cannot go on training")
    config.base_model_name_or_path = None  # it is the model given, whatever its path
    config.task_type = None  # whose class in peft asks for methods of transformers, and is not what computes here
    config.inference_mode = not trainable
    try:
        adapter = _inject(model, config)
    except (TypeError, ValueError) as e:  # peft found none of its target modules, or does not know their kind
        raise UserError(f"{folder}: the adapter does not fit the model: {e}") from e
    own = peft.get_peft_model_state_dict(adapter, adapter_name=_TRAINED, save_embedding_layers=False)
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in own]
    if not problems:
        try:
            _load_weights(adapter, weights)
        except RuntimeError as e:  # shapes
            problems = [line.strip() for line in str(e).splitlines()[1:]]
    if problems:
        adapter.unload()
        shown = "\n  ".join(problems[:20])
        raise UserError(f"{folder}: the adapter does not fit the model:\n  {shown}")
    return adapter


@torch.no_grad()
def _replace(model: TunableModel, weights: dict[str, Tensor]) -> None:
    """Copies weights over the model's, by the names that they have without an adapter."""
    own = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    for name, weight in weights.items():
        own[name].copy_(weight)
