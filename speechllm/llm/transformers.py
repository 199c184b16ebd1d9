"""Causal language models of Hugging Face transformers (Qwen2, Qwen3, Llama, Mistral, ...) behind the seam (`llm.py`).

    model = new_transformers_lm({"model_type": "qwen3", "hidden_size": 256, ...})
    model = load_transformers_lm("Qwen3-0.6B")                                   # a folder as it was downloaded

What a row has read is in a `TransformersState` (`transformers_cache.py`).

transformers takes seconds to import: only those who use such a model pay for it.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.errors import UserError
from speechllm.hub import local_path
from speechllm.linear import linear_cross_entropy
from speechllm.llm.interface import IGNORE, LAYER_NAME, TunableModel, is_matrix, stacked_matrices
from speechllm.llm.transformers_cache import (
    ATTENTION_LAYERS,
    RECURRENT_LAYERS,
    STATELESS_LAYERS,
    LayerState,
    TransformersState,
    cached,
    has_recurrence,
    new_cache,
    state_after,
)
from speechllm.llm.transformers_cpu import autocast_on_cpu
from speechllm.llm.transformers_files import (
    TEXT_NAMES,
    gguf_details,
    gguf_source,
    gpu_kernels_only_on_gpus,
    is_gguf,
    is_of_text,
    no_gguf_bar,
    text_part,
    weight_names,
)
from speechllm.llm.transformers_versions import (
    CACHE_ARGUMENTS,
    activation_checkpointing,
    cache_argument,
    is_encoder,
    no_init_weights,
    pretrained_config,
    readable_settings,
    tied_weights,
    update_needed,
)
from speechllm.quiet import quiet
from speechllm.weights import meta_device

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

# What models do to the logits of their output layer, by the settings that say so: multiply them, multiply or divide
# them (by model type, the exponent), bound them by a hyperbolic tangent.
_MULTIPLY = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
_SCALING = {"granite": -1, "minicpm3": -1, "hyperclovax": 1}  # of `logits_scaling`
_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma, Recurrent Gemma

# Models whose layers do not go on as the seam asks, and why.
_REFUSED = {
    "ctrl": "it writes into the embeddings that it is given",
    "inkling_text": "it leaves out a part of its vocabulary after the output layer",
    "jamba": "its layers go on from what they have read one token at a time only",
    "minimax": "it keeps what it has read in a cache of its own",
    "recurrent_gemma": "its layers keep what they have read in themselves, so that rows cannot be reordered",
}

ATTENTION = ("sdpa", "flash_attention_2", "eager")  # as transformers calls its implementations

# Settings that transformers reads under older names, but does not list.
_OLDER_NAMES = {"rope_theta", "rope_scaling", "partial_rotary_factor"}

# What a configuration says about where it comes from.
_NOTES = {"model_type", "transformers_version", "architectures", "dtype", "auto_map", "quantization_config"}


class TransformersLM(TunableModel[TransformersState]):
    """A causal language model of transformers, to be used as `speechllm.llm.interface.LanguageModel` says.

    Args:
      causal_lm: a model of transformers; `new_transformers_lm` and `load_transformers_lm` refuse those that cannot be
        served.

    Attributes:
      config: `model_type` and all settings, as `new_transformers_lm` takes them.
      checkpoint_blocks: in `loss`, keep only the inputs of each layer and compute it again for the gradient
        (activation checkpointing, arXiv 1604.06174).

    Raises:
      UserError: the model has more after its layers than an output layer, such as BERT.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        _check_head(causal_lm)
        self.causal_lm = causal_lm
        self.config = _settings(causal_lm.config)
        self._scale, self._cap = _scale_and_cap(causal_lm.config)
        self._recurrent = has_recurrence(causal_lm.config)
        self.checkpoint_blocks = False

    @property
    def name(self) -> str:
        return self.causal_lm.config.model_type

    @property
    def hidden_size(self) -> int:
        return self.causal_lm.get_input_embeddings().embedding_dim

    @property
    def vocab_size(self) -> int:
        return self.causal_lm.get_input_embeddings().num_embeddings

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return self.causal_lm.get_input_embeddings().weight.dtype

    def layers(self) -> list[nn.Module]:
        """What computes one after the other, most of the model."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]

    def untuned(self) -> TransformersLM:
        """A model of the same sizes, to be loaded: its values are not set."""
        with meta_device():
            return new_transformers_lm(self.config)

    def tied_weights(self) -> dict[str, str]:
        """Names of weights that are another one under a second name, and the first name (tied embeddings)."""
        names = tied_weights(self.causal_lm)
        return {f"causal_lm.{name}": f"causal_lm.{first}" for name, first in names.items()}

    def tie_weights(self) -> None:
        """Make one again what `tied_weights` names, after new tensors were assigned."""
        self.causal_lm.tie_weights()

    def kept_in_float32(self) -> set[str]:
        """Parts of the names of weights that are float32 whatever `dtype` is, as transformers loads them."""
        model = self.causal_lm
        return {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}

    def adapter_root(self) -> nn.Module:
        """What `peft` puts an adapter on: the model of transformers, so that the names are those of its own files."""
        return self.causal_lm

    def default_targets(self) -> list[str]:
        """The matrices that take an adapter when none are named: all of the layers, by their names in one.

        Of mixtures of experts, all outside the module that has the experts: these are stacks of matrices, and `peft`
        takes the names of a dense or shared expert for theirs. A gate of one row has no rank to adapt.
        """

        def in_layer(kind: Callable[[nn.Module], bool]) -> list[str]:
            matches = (LAYER_NAME.fullmatch(name) for name, module in self.named_modules() if kind(module))
            return list(dict.fromkeys(match[1] for match in matches if match))

        experts = tuple(
            f"{name.rpartition('.')[0]}." for name in in_layer(lambda m: next(stacked_matrices(m), None) is not None)
        )
        return [
            name
            for name in in_layer(lambda m: is_matrix(m) and min(m.get_parameter("weight").shape) > 1)
            if not (experts and name.startswith(experts))
        ]

    def embed(self, token_ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., D)."""
        return self.causal_lm.get_input_embeddings()(token_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: TransformersState | None = None,
        logits_mask: Tensor | None = None,
    ) -> tuple[Tensor, TransformersState]:
        """Reads L positions in parallel.

        Args:
          input_ids: (N, L) token ids; or
          inputs_embeds: (N, L, D) embeddings, of tokens (`embed`) or of anything else.
          lens: (N,) positions that count in each row, all if None; the others, on the right, have no influence.
          state: where each row goes on from; from nothing if None. It stays as it is. Gradients flow to it.
          logits_mask: (N, L) bool, the positions to compute logits at, all if None.

        Returns:
          logits (N, L, V), zero at padding, or (K, V) for the K positions of `logits_mask` in row-major order;
          the state at each row's own length.

        Raises:
          ValueError: both or none of input_ids and inputs_embeds; no position; shapes or lens that do not fit; logits
            asked for at padding.
        """
        inputs_embeds, valid = self._inputs(input_ids, inputs_embeds, lens)
        wanted = self._wanted(valid if logits_mask is None else logits_mask, valid, "logits_mask has")
        hidden, after = self._read(inputs_embeds, valid, state, keep=True)
        logits = self._logits(hidden[wanted])
        if logits_mask is None:
            logits = logits.new_zeros(*valid.shape, logits.shape[-1]).masked_scatter(wanted[..., None], logits)
        return logits, cast(TransformersState, after)

    def loss(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: TransformersState | None = None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], None]:
        """Summed cross entropy of `labels` (N, L): what each position should predict, -100 where there is no loss; how
        many labels there are, and how many of them are the best guess.

        The other arguments, and what is raised, are those of `forward`. Logits are computed at the labels only, and
        never all at once; the loss can be differentiated once. No state is kept.

        Raises:
          ValueError: also, a state and `checkpoint_blocks`, with which transformers reads from the start alone.
        """
        hidden, targets = self._read_labels(labels, input_ids, inputs_embeds, lens, state)
        head = self._head
        if type(head) is nn.Linear and head.bias is None:
            loss, correct = linear_cross_entropy(self._scaled(hidden), head.weight, targets, self._cap)
        else:  # an adapter
            logits = self._logits(hidden).float()
            loss = F.cross_entropy(logits, targets, reduction="sum")
            correct = (logits.detach().argmax(-1) == targets).sum()
        return (loss, (labels != IGNORE).sum(), correct), None

    def log_probs(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """The log probability of each of the K `labels` (N, L) that are not -100, in row-major order, float32 (K,).

        The other arguments, and what is raised, are those of `forward`; logits are divided by `temperature`.
        """
        hidden, targets = self._read_labels(labels, input_ids, inputs_embeds, lens)
        return -F.cross_entropy(self._logits(hidden).float() / temperature, targets, reduction="none")

    def _read_labels(
        self,
        labels: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        lens: Tensor | None,
        state: TransformersState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden (K, D) at the K positions that have a label, ready for the output layer, and the labels (K,)."""
        checkpointing = self.checkpoint_blocks and torch.is_grad_enabled()
        if checkpointing and state is not None:
            raise ValueError(f"TransformersLM: with checkpoint_blocks {self.name} cannot go on from a state")
        inputs_embeds, valid = self._inputs(input_ids, inputs_embeds, lens)
        mask = self._wanted(labels != IGNORE, valid, "labels have")
        # where layers are computed again, they must be as they were at first
        with self._checkpointing() if checkpointing else autocast_on_cpu(self._device):
            hidden, _ = self._read(inputs_embeds, valid, state, keep=False)
        return hidden[mask], labels.to(hidden.device)[mask]

    @torch.no_grad()
    def step(
        self, token_ids: Tensor, state: TransformersState, overwrite: bool = False
    ) -> tuple[Tensor, TransformersState]:
        """Reads one token a row, for decoding: (N,) -> logits (N, V), the next state; no gradients.

        The given state stays as it is; with `overwrite` the next one takes its memory, and keys and values are copied
        only once in many steps, when there is no more room behind them.
        """
        valid = torch.ones(len(token_ids), 1, dtype=torch.bool)
        hidden, after = self._read(self.embed(token_ids[:, None]), valid, state, keep=True, overwrite=overwrite)
        return self._logits(hidden[:, 0]), cast(TransformersState, after)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Inside, layers are computed with activation checkpointing, those of a frozen model too."""
        layers = self.layers()
        training = [layer.training for layer in layers]
        enable, disable = activation_checkpointing(self.causal_lm)
        enable()
        for layer in layers:
            layer.training = True  # what transformers asks; what is in a layer stays as it is
        try:
            yield
        finally:
            disable()
            for layer, was_training in zip(layers, training, strict=True):
                layer.training = was_training

    @property
    def _head(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()

    def _scaled(self, hidden: Tensor) -> Tensor:
        """What multiplies the logits, on what the output layer reads."""
        return hidden if self._scale == 1.0 else hidden * self._scale

    def _logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        logits = self._head(self._scaled(hidden))
        return logits if self._cap is None else self._cap * torch.tanh(logits.float() / self._cap).to(logits.dtype)

    def _inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, lens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """inputs_embeds (N, L, D), zero at padding; valid (N, L) bool, on the CPU."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("TransformersLM: give either input_ids or inputs_embeds")
        N, L = inputs.shape[:2]
        if L == 0:
            raise ValueError("TransformersLM: no position to read (L = 0)")
        lens = torch.full((N,), L) if lens is None else lens.cpu()
        if lens.shape != (N,) or lens.min() < 0 or lens.max() > L:
            raise ValueError(f"TransformersLM: lens {lens.tolist()} do not fit an input of {N} rows of {L} positions")
        valid = torch.arange(L) < lens[:, None]
        inputs = inputs.to(self._device)
        if not valid.all():  # whatever is there would reach other positions as 0 * nan
            padding = ~valid.to(self._device)
            inputs = inputs.masked_fill(padding if input_ids is not None else padding[..., None], 0)
        return inputs.to(self.dtype) if input_ids is None else self.embed(inputs), valid

    def _wanted(self, mask: Tensor, valid: Tensor, what: str) -> Tensor:
        if mask.shape != valid.shape:
            raise ValueError(f"TransformersLM: {what} shape {tuple(mask.shape)}, expected {tuple(valid.shape)}")
        if beyond := int((mask.cpu() & ~valid).sum()):
            raise ValueError(f"TransformersLM: logits or labels are asked for at {beyond} positions of padding")
        return mask.to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.causal_lm.get_input_embeddings().weight.device

    def _read(
        self,
        inputs_embeds: Tensor,
        valid: Tensor,
        state: TransformersState | None,
        keep: bool,
        overwrite: bool = False,
    ) -> tuple[Tensor, TransformersState | None]:
        """inputs_embeds (N, L, D), valid (N, L) -> hidden (N, L, D), ready for the output layer; the next state."""
        N, L = valid.shape
        if state is not None and len(state) != N:
            raise ValueError(f"TransformersLM: the state has {len(state)} rows, the input {N}")
        if self._recurrent and not valid.all():
            if state is None:
                return self._read_padded_in_front(inputs_embeds, valid.sum(1), keep)
            return self._read_by_length(inputs_embeds, valid.sum(1), state, keep)
        # Padding on the right needs no mask: nothing that counts comes after it, and so every position sees one.
        where: dict[str, Any] = {}
        cache = new_cache(self.causal_lm.config, state, overwrite) if keep or state is not None else None
        if state is not None:
            where["position_ids"] = (state.lens[:, None] + torch.arange(L)).to(inputs_embeds.device)
            if state.lens.min() < state.places:
                seen = torch.arange(state.places + L) >= state.places - state.lens[:, None]
                where["attention_mask"] = seen.to(inputs_embeds.device)
        hidden = self._hidden(inputs_embeds, cache, keep, where)
        return hidden, state_after(cache, valid, state) if keep else None

    def _hidden(self, inputs_embeds: Tensor, cache: Cache | None, keep: bool, where: dict[str, Any]) -> Tensor:
        if (name := cache_argument(type(self.causal_lm.base_model))) is not None:
            where = {**where, name: cache}
        outputs = self.causal_lm.base_model(inputs_embeds=inputs_embeds, use_cache=keep, return_dict=True, **where)
        return outputs.last_hidden_state

    def _read_padded_in_front(
        self, inputs_embeds: Tensor, lens: Tensor, keep: bool
    ) -> tuple[Tensor, TransformersState | None]:
        """`_read` from nothing for layers with a recurrence, in which padding in front leaves no trace."""
        L, device = inputs_embeds.shape[1], inputs_embeds.device
        behind = L - lens[:, None]
        places = (torch.arange(L) - behind).to(device)  # negative at padding
        back = (torch.arange(L) + behind).clamp(max=L - 1).to(device)

        def moved(x: Tensor, index: Tensor) -> Tensor:
            return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

        inputs_embeds = moved(inputs_embeds, places.clamp(min=0)).masked_fill((places < 0)[..., None], 0)
        where = {"position_ids": places.clamp(min=0), "attention_mask": places >= 0}
        cache = new_cache(self.causal_lm.config) if keep else None
        hidden = moved(self._hidden(inputs_embeds, cache, keep, where), back)
        state = None
        if keep:
            unused = L - int(lens.max())
            layers = (LayerState(tuple(x[:, :, unused:] for x in kv), parts) for kv, parts, _ in cached(cache))
            state = TransformersState(tuple(layers), lens)
        return hidden, state

    def _read_by_length(
        self, inputs_embeds: Tensor, lens: Tensor, state: TransformersState, keep: bool
    ) -> tuple[Tensor, TransformersState | None]:
        """`_read` from a state for layers with a recurrence, in which padding would leave a trace: the rows of one
        length at a time.
        """
        hidden = torch.zeros_like(inputs_embeds)
        order, states = [], []
        for n in lens.unique().tolist():
            rows = (lens == n).nonzero().squeeze(1)
            after = state.select(rows)
            if n > 0:
                valid = torch.ones(len(rows), n, dtype=torch.bool)
                at = rows.to(inputs_embeds.device)
                read, kept = self._read(inputs_embeds[at, :n], valid, after, keep)
                after = after if kept is None else kept
                hidden = hidden.index_put((at[:, None], torch.arange(n, device=at.device)), read)
            order.append(rows)
            states.append(after)
        return hidden, TransformersState.cat(states).select(torch.cat(order).argsort()) if keep else None


# ---- configuration and files --------------------------------------------------------------------------------------


@quiet()
def new_transformers_lm(config: dict[str, Any], attention: str | None = None) -> TransformersLM:
    """A model with new weights, initialized as transformers does; where the default device is `meta` their values are
    not set, because they are about to be loaded.

    Args:
      config: `model_type` and settings by the names that the model's configuration has in transformers, whose defaults
        hold for the others.
      attention: see `load_transformers_lm`.

    Raises:
      UserError: as `transformers_config`; the implementation of attention cannot be used.
    """
    from transformers import AutoModelForCausalLM

    # Not on the meta device itself: there the tables of the position embedding, which no file holds, would be lost.
    is_meta = torch.get_default_device().type == "meta"
    with torch.device("cpu") if is_meta else nullcontext(), no_init_weights() if is_meta else nullcontext():
        try:
            return TransformersLM(
                AutoModelForCausalLM.from_config(transformers_config(config), attn_implementation=attention)
            )
        except UserError:
            raise
        except (ImportError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{config.get('model_type')}: transformers cannot make such a model: {e}") from e


def _check_head(causal_lm: PreTrainedModel) -> None:
    """That the logits are those of an output layer on what the layers give."""
    parts = {id(causal_lm.base_model), id(causal_lm.get_output_embeddings())}
    children = [child for child in causal_lm.children() if next(child.parameters(), None) is not None]
    if len(parts) != 2 or {id(child) for child in children} != parts:
        name = causal_lm.config.model_type
        raise UserError(f"{name} is not supported: it has more after its layers than an output layer")


def _scale_and_cap(config: PreTrainedConfig) -> tuple[float, float | None]:
    """What becomes of the logits of the output layer: they are multiplied, then bounded by a hyperbolic tangent.

    Raises:
      ValueError: it is not known what this model does with such a setting.
    """
    scale = 1.0
    for name in _MULTIPLY:
        if (value := getattr(config, name, None)) is not None:
            scale *= value
    if (value := getattr(config, "logits_scaling", None)) not in (None, 1.0):
        exponent = next((e for prefix, e in _SCALING.items() if config.model_type.startswith(prefix)), None)
        if exponent is None:
            raise ValueError(f"it is not known whether its logits_scaling ({value}) multiplies or divides the logits")
        scale *= value**exponent
    return scale, next((cap for name in _CAPS if (cap := getattr(config, name, None)) is not None), None)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """`model_type` and settings, without those that every configuration has, where they are as always, and without what
    a released config.json says that this transformers has no setting for."""
    default = type(config)()
    known = _known_settings(default) - _NOTES
    values = default.to_dict()
    common = {name: value for name, value in pretrained_config()().to_dict().items() if values.get(name) == value}
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name in known and name[0] != "_" and not (name in common and value == common[name])
    }
    return {"model_type": config.model_type, **settings}


def _known_settings(default: PreTrainedConfig) -> set[str]:
    return {*default.to_dict(), *vars(default), *default.attribute_map, *_OLDER_NAMES}


@quiet()
def transformers_config(settings: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model from its `model_type` and settings.

    Raises:
      UserError: an unknown type or setting, a value of the wrong type, a model that `TransformersLM` does not serve.
    """
    from transformers import AutoConfig, __version__

    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    _check_model_type(model_type, "model_type")
    settings = readable_settings(settings)
    known = _known_settings(AutoConfig.for_model(model_type))
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{name}: {model_type} has no such setting in transformers {__version__}{hint}")
    return _supported(lambda: AutoConfig.for_model(model_type, **settings), model_type)


def is_transformers_model(path: str | Path) -> bool:
    """Whether `path` is a folder of a Hugging Face model other than RWKV-7, or a GGUF file.

    Raises:
      UserError: its config.json cannot be read.
    """
    path = local_path(path)
    config = path / "config.json"
    return is_gguf(path) or (config.is_file() and _read_settings(config).get("model_type") != "rwkv7")


@quiet()
def load_transformers_lm(
    path: str | Path, dtype: torch.dtype | None = torch.float32, attention: str | None = None
) -> TransformersLM:
    """Loads a model to the CPU, in `eval` mode. No code of the folder is run.

    Args:
      path: a folder with `config.json` and `model.safetensors` or its shards, as they are on the Hugging Face hub; of a
        model that also sees or hears, the text part is loaded. Or a GGUF file, whose weights are dequantized. Either
        may be an id of the Hub (`speechllm.hub`).
      dtype: of the weights; None for that of the checkpoint.
      attention: an implementation of `ATTENTION`; None for the choice of transformers, which is sdpa where the model
        has it.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: it is not a causal language model that `TransformersLM` serves, is quantized in another format than
        GGUF, or weights are missing, unexpected or of another shape; the message lists the names.
    """
    path = local_path(path)
    if is_gguf(path):
        return _load_gguf(path, dtype, attention)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path / 'config.json'}: no such file; a model folder has it beside its weights")
    config, is_part = _folder_config(path)
    if not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise FileNotFoundError(
            f"{path}: neither model.safetensors nor model.safetensors.index.json; other formats are not read"
        )
    names = {"key_mapping": TEXT_NAMES} if is_part else {}
    source = {"pretrained_model_name_or_path": path, "use_safetensors": True, "local_files_only": True, **names}
    causal_lm, found = _from_pretrained(path, source, config, "auto" if dtype is None else dtype, attention)
    unexpected = sorted(name for name in found["unexpected_keys"] if not is_part or is_of_text(name))
    return _checked(path, causal_lm, found, unexpected)


def _folder_config(path: Path) -> tuple[PreTrainedConfig, bool]:
    """The configuration of a folder's language model, and whether that is a part of the model that the folder holds."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    source = str(path / "config.json")
    settings = _read_settings(path / "config.json")
    if (model_type := settings.get("model_type")) not in CONFIG_MAPPING_NAMES:
        _check_model_type(model_type, source)
    is_part = False

    def read() -> PreTrainedConfig:
        nonlocal is_part
        # what this version would pass over is given under the names that it reads
        renamed = {name: value for name, value in readable_settings(settings).items() if name not in settings}
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True, **renamed)
        if config.is_encoder_decoder or config.get_text_config(decoder=True) is config:
            _check_model_type(model_type, source)
            return config
        is_part = True
        if (need := update_needed(config, is_part)) is not None:
            raise UserError(f"{source}: {config.model_type} is not supported: {need}")
        text = text_part(config)
        text.tie_word_embeddings = not any("lm_head." in name for name in weight_names(path))
        if (quantized := getattr(config, "quantization_config", None)) is not None:
            text.quantization_config = quantized
        return text

    return _supported(read, source), is_part


def _load_gguf(path: Path, dtype: torch.dtype | None, attention: str | None) -> TransformersLM:
    from transformers import AutoConfig

    source = gguf_source(path)
    try:
        config = AutoConfig.from_pretrained(**source)
        own_dtype, head_dim = gguf_details(path)
        if head_dim is not None and hasattr(config, "head_dim"):
            config.head_dim = head_dim
        _supported(lambda: config, str(path))
        with no_gguf_bar():
            causal_lm, found = _from_pretrained(path, source, config, dtype or own_dtype, attention)
    except UserError:
        raise
    except Exception as e:  # a damaged file fails in many ways
        raise UserError(f"{path}: transformers cannot read it, is it whole? ({type(e).__name__}: {e})") from e
    return _checked(path, causal_lm, found, sorted(found["unexpected_keys"]))


def _from_pretrained(
    path: Path, source: dict[str, Any], config: PreTrainedConfig, dtype: torch.dtype | str, attention: str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of the names of the weights."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with gpu_kernels_only_on_gpus():
            return AutoModelForCausalLM.from_pretrained(
                **source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are listed with the others
                output_loading_info=True,
            )
    except SafetensorError as e:
        raise UserError(f"{path}: not safetensors files, or truncated ones ({e})") from e
    except OSError as e:
        raise FileNotFoundError(f"{path}: {e}") from e
    except (ImportError, ValueError) as e:
        if attention is None:
            raise
        raise UserError(f"{path}: attention: {attention}: {e} (leave it out for what always works)") from e


def _checked(path: Path, causal_lm: PreTrainedModel, found: dict[str, Any], unexpected: list[str]) -> TransformersLM:
    problems = [f"missing: {name}" for name in sorted(found["missing_keys"])]
    problems += [f"unexpected: {name}" for name in unexpected]
    problems += [f"another shape: {mismatch}" for mismatch in sorted(map(str, found["mismatched_keys"]))]
    if problems:
        raise UserError("\n  ".join([f"{path}: the weights do not fit its configuration:", *problems[:20]]))
    # Loading loses the mark of what trains in another way than by gradients, such as the balance of experts.
    with meta_device():
        fresh = type(causal_lm)(causal_lm.config)
    for name, parameter in fresh.named_parameters():
        causal_lm.get_parameter(name).requires_grad_(parameter.requires_grad)
    return TransformersLM(causal_lm).eval()


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not a JSON object: {e}") from e
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not a JSON object: {type(settings).__name__}")
    return settings


def _check_model_type(model_type: Any, source: str) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if model_type not in KNOWN:
        near = difflib.get_close_matches(str(model_type), KNOWN, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; for example: llama, mistral, qwen2, qwen3"
        raise UserError(
            f"{source}: {model_type!r} is no type of a causal language model in transformers "
            f"{transformers.__version__} (code that comes with a model is not run){hint}"
        )


def _supported(make: Callable[[], PreTrainedConfig], source: str) -> PreTrainedConfig:
    """The configuration that `make` gives, of a model that `TransformersLM` serves."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = make()
    except UserError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{source}: {e}") from e
    for name, default in type(config)().to_dict().items():  # which transformers 5 checks itself
        value = getattr(config, name, default)
        if type(default) in (int, float) and isinstance(value, str):
            raise UserError(f"{source}: {name}: expected {type(default).__name__}, got str {value!r}")
    if (reason := _not_served(config) or _lacking_in_forward(config)) is not None:
        raise UserError(f"{source}: {config.model_type} is not supported: {reason}")
    return config


def _not_served(config: PreTrainedConfig) -> str | None:
    """Why a model's layers or weights cannot be served, if so."""
    import transformers.cache_utils

    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        return "it is more than a decoder of text"
    if is_encoder(config):
        return "it is an encoder (is_decoder: false)"
    if config.model_type in _REFUSED:
        return _REFUSED[config.model_type]
    if getattr(config, "hidden_size_per_layer_input", None):
        return "its layers read token ids besides embeddings, and audio has none (hidden_size_per_layer_input)"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized; take the model as it was before"
    if (need := update_needed(config, is_part=False)) is not None:
        return need
    served = ATTENTION_LAYERS | RECURRENT_LAYERS | STATELESS_LAYERS
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - served):
        return f"layers of the type {', '.join(other)}; those of the types {', '.join(sorted(served))} are"
    if has_recurrence(config) and not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        return f"transformers {transformers.__version__} has no cache for its recurrent layers that can be reordered"
    try:
        _scale_and_cap(config)
    except ValueError as e:
        return str(e)
    return None


def _lacking_in_forward(config: PreTrainedConfig) -> str | None:
    """What the model's `forward` does not take of what it is called with, if anything."""
    from transformers import AutoModelForCausalLM

    with gpu_kernels_only_on_gpus():  # imports the model's code
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    taken = set(inspect.signature(model_class.forward).parameters)
    lacking = sorted({"inputs_embeds", "position_ids"} - taken)
    if cache_argument(model_class) is None:
        lacking.append(" or ".join(CACHE_ARGUMENTS))
    return f"its forward does not take {', '.join(lacking)}" if lacking else None
