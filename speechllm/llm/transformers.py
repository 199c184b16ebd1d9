"""Causal language models of Hugging Face transformers (Qwen2, Qwen3, Llama, Mistral, ...) behind the seam (`llm.py`).

    model = new_transformers_lm({"model_type": "qwen3", "hidden_size": 256, ...})
    model = load_transformers_lm("Qwen3-0.6B")                                   # a folder as it was downloaded

What a row has read is in a `TransformersState`: keys and values with the padding in FRONT of each row. So there is no
hole between what was read and what is read next, and a distance between two positions of the cache is one between two
tokens: what causal masks, sliding windows and position ids are about.

transformers takes seconds to import: only those who use such a model pay for it.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.errors import UserError
from speechllm.linear import linear_cross_entropy
from speechllm.llm.interface import IGNORE
from speechllm.llm.transformers_versions import (
    CACHE_ARGUMENTS,
    activation_checkpointing,
    cache_argument,
    no_init_weights,
    pretrained_config,
    readable_settings,
    tied_weights,
)
from speechllm.quiet import quiet

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

# Layers that keep keys and values of all that was read. Others keep a recurrent state, or cut the text into chunks.
_LAYER_TYPES = {"full_attention", "sliding_attention"}

# What some models do to logits behind the output layer, by the setting that asks for it, and its value without effect.
# The logits here are the output layer's own.
_LOGIT_SETTINGS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}

# Settings that transformers reads under older names, but does not list.
_OLDER_NAMES = {"rope_theta", "rope_scaling", "partial_rotary_factor"}

# What a configuration says about where it comes from.
_NOTES = {"model_type", "transformers_version", "_name_or_path", "architectures", "dtype", "auto_map"}


@dataclass(frozen=True)
class TransformersState:
    """Keys and values of N rows, those of row i at the last `lens[i]` of S places; what is before them is padding.

    Attributes:
      layers: of each layer, keys and values (N, heads, S, D).
      lens: (N,) how many positions each row has read, on the CPU.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    lens: Tensor

    def __len__(self) -> int:
        """The number of rows N."""
        return len(self.lens)

    @property
    def places(self) -> int:
        """S."""
        return self.layers[0][0].shape[2]

    def select(self, index: Tensor, overwrite: bool = False) -> TransformersState:
        """The rows at `index` (M,), in this order, without places that are padding in all of them."""
        lens = self.lens[index.cpu()]
        unused = self.places - int(lens.max())
        index = index.to(self.layers[0][0].device)
        layers = tuple(tuple(x[:, :, unused:].index_select(0, index) for x in layer) for layer in self.layers)
        return TransformersState(layers, lens)

    def repeat(self, n: int) -> TransformersState:
        """Every row n times in succession: N rows become N * n."""
        layers = tuple(tuple(x.repeat_interleave(n, dim=0) for x in layer) for layer in self.layers)
        return TransformersState(layers, self.lens.repeat_interleave(n))

    @staticmethod
    def cat(states: Sequence[TransformersState]) -> TransformersState:
        """The rows of all `states`, one state's after the other's."""
        places = max(state.places for state in states)
        parts = [[[_pad_front(x, places) for x in layer] for layer in state.layers] for state in states]
        layers = tuple(tuple(torch.cat(xs) for xs in zip(*layer, strict=True)) for layer in zip(*parts, strict=True))
        return TransformersState(layers, torch.cat([state.lens for state in states]))


def _pad_front(x: Tensor, places: int) -> Tensor:
    return F.pad(x, (0, 0, places - x.shape[2], 0))


class TransformersLM(nn.Module):
    """A causal language model of transformers, to be used as `speechllm.llm.interface.LanguageModel` says.

    Args:
      causal_lm: a model of transformers; `new_transformers_lm` and `load_transformers_lm` refuse those that cannot be
        served.

    Attributes:
      config: `model_type` and all settings, as `new_transformers_lm` takes them.
      checkpoint_blocks: in `loss`, keep only the inputs of each layer and compute it again for the gradient
        (activation checkpointing, arXiv 1604.06174).
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.config = _settings(causal_lm.config)
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

    def layers(self) -> list[nn.Module]:
        """What computes one after the other, most of the model."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]

    def untuned(self) -> TransformersLM:
        """A model of the same sizes, to be loaded: its values are not set."""
        with torch.device("meta"):
            return new_transformers_lm(self.config)

    def tied_weights(self) -> dict[str, str]:
        """Names of weights that are another one under a second name, and the first name (tied embeddings)."""
        names = tied_weights(self.causal_lm)
        return {f"causal_lm.{name}": f"causal_lm.{first}" for name, first in names.items()}

    def tie_weights(self) -> None:
        """Make one again what `tied_weights` names, after new tensors were assigned."""
        self.causal_lm.tie_weights()

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
        logits = self._head(hidden[wanted])
        if logits_mask is None:
            logits = logits.new_zeros(*valid.shape, logits.shape[-1]).masked_scatter(wanted[..., None], logits)
        return logits, after

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
        checkpointing = self.checkpoint_blocks and torch.is_grad_enabled()
        if checkpointing and state is not None:
            raise ValueError(f"TransformersLM: with checkpoint_blocks {self.name} cannot go on from a state")
        inputs_embeds, valid = self._inputs(input_ids, inputs_embeds, lens)
        mask = self._wanted(labels != IGNORE, valid, "labels have")
        with self._checkpointing() if checkpointing else nullcontext():
            hidden, _ = self._read(inputs_embeds, valid, state, keep=False)
        hidden, targets = hidden[mask], labels.to(hidden.device)[mask]
        head = self._head
        if type(head) is nn.Linear and head.bias is None:
            loss, correct = linear_cross_entropy(hidden, head.weight, targets)
        else:  # an adapter
            logits = head(hidden).float()
            loss = F.cross_entropy(logits, targets, reduction="sum")
            correct = (logits.detach().argmax(-1) == targets).sum()
        return (loss, mask.sum(), correct), None

    @torch.no_grad()
    def step(
        self, token_ids: Tensor, state: TransformersState, overwrite: bool = False
    ) -> tuple[Tensor, TransformersState]:
        """Reads one token a row, for decoding: (N,) -> logits (N, V), the next state; no gradients.

        The given state stays as it is, also with `overwrite`: the next one has one place more.
        """
        valid = torch.ones(len(token_ids), 1, dtype=torch.bool)
        hidden, after = self._read(self.embed(token_ids[:, None]), valid, state, keep=True)
        return self._head(hidden[:, 0]), after

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

    def _inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, lens: Tensor | None) -> tuple:
        """inputs_embeds (N, L, D), zero at padding; valid (N, L) bool, on the CPU."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("TransformersLM: give either input_ids or inputs_embeds")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
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
        return inputs if input_ids is None else self.embed(inputs), valid

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
        self, inputs_embeds: Tensor, valid: Tensor, state: TransformersState | None, keep: bool
    ) -> tuple[Tensor, TransformersState | None]:
        """inputs_embeds (N, L, D), valid (N, L) -> hidden (N, L, D), ready for the output layer; the next state."""
        from transformers import DynamicCache

        # Padding on the right needs no mask: nothing that counts comes behind it, and so every position sees one.
        where: dict[str, Any] = {}
        cache = DynamicCache() if keep else None
        if state is not None:
            N, L = valid.shape
            if len(state) != N:
                raise ValueError(f"TransformersLM: the state has {len(state)} rows, the input {N}")
            cache = DynamicCache(state.layers)
            where["position_ids"] = (state.lens[:, None] + torch.arange(L)).to(inputs_embeds.device)
            if state.lens.min() < state.places:
                seen = torch.arange(state.places + L) >= state.places - state.lens[:, None]
                where["attention_mask"] = seen.to(inputs_embeds.device)
        where[cache_argument(type(self.causal_lm.base_model))] = cache
        outputs = self.causal_lm.base_model(inputs_embeds=inputs_embeds, use_cache=keep, return_dict=True, **where)
        return outputs.last_hidden_state, _state_after(cache, valid, state) if keep else None


def _state_after(cache: DynamicCache, valid: Tensor, before: TransformersState | None) -> TransformersState:
    """The state with the places that `cache` has now: those of `before`, then L of which `valid` (N, L) count."""
    read = valid.sum(1)
    lens = read if before is None else before.lens + read
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    places, longest = layers[0][0].shape[2], int(lens.max())
    if valid.all():
        layers = [tuple(x[:, :, places - longest :] for x in layer) for layer in layers]
    else:  # the last position of each row moves to the last place
        behind = valid.shape[1] - read
        index = torch.arange(places - longest, places) - behind[:, None]
        index = index.clamp(min=0).to(layers[0][0].device)[:, None, :, None]
        layers = [tuple(x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in layer) for layer in layers]
    return TransformersState(tuple(layers), lens)


# ---- configuration and files --------------------------------------------------------------------------------------


@quiet()
def new_transformers_lm(config: dict[str, Any]) -> TransformersLM:
    """A model with new weights, initialised as transformers does; where the default device is `meta` their values are
    not set, because they are about to be loaded.

    Args:
      config: `model_type` and settings by the names that the model's configuration has in transformers, whose defaults
        hold for the others.

    Raises:
      UserError: as `transformers_config`.
    """
    from transformers import AutoModelForCausalLM

    if torch.get_default_device().type != "meta":
        return TransformersLM(AutoModelForCausalLM.from_config(transformers_config(config)))
    # Not on the meta device itself: there the tables of the position embedding, which no file holds, would be lost.
    with torch.device("cpu"), no_init_weights():
        return TransformersLM(AutoModelForCausalLM.from_config(transformers_config(config)))


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """`model_type` and settings, without those that every configuration has, where they are as always."""
    default = type(config)().to_dict()
    common = {name: value for name, value in pretrained_config()().to_dict().items() if default.get(name) == value}
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _NOTES and not (name in common and value == common[name])
    }
    return {"model_type": config.model_type, **settings}


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
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *vars(default), *default.attribute_map, *_OLDER_NAMES}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{name}: {model_type} has no such setting in transformers {__version__}{hint}")
    return _supported(lambda: AutoConfig.for_model(model_type, **settings), model_type)


def is_transformers_folder(path: str | Path) -> bool:
    """Whether `path` is a folder of a Hugging Face model other than RWKV-7.

    Raises:
      UserError: its config.json cannot be read.
    """
    config = Path(path) / "config.json"
    return config.is_file() and _read_settings(config).get("model_type") != "rwkv7"


@quiet()
def load_transformers_lm(path: str | Path) -> TransformersLM:
    """Loads a model folder to the CPU, in float32, in `eval` mode. Nothing is downloaded, no code of the folder is run.

    Args:
      path: `config.json` with `model.safetensors` or its shards, as they are on the Hugging Face hub.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: the folder is not of a causal language model that `TransformersLM` serves, is quantised, or weights are
        missing, unexpected or of another shape; the message lists the names.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path / 'config.json'}: no such file; a model folder has it beside its weights")
    settings = _read_settings(path / "config.json")
    _check_model_type(settings.get("model_type"), str(path / "config.json"))
    # what this version would pass over is given under the names that it reads
    renamed = {name: value for name, value in readable_settings(settings).items() if name not in settings}
    config = _supported(
        lambda: AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True, **renamed),
        str(path / "config.json"),
    )
    if not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise FileNotFoundError(
            f"{path}: neither model.safetensors nor model.safetensors.index.json; other formats are not read"
        )
    try:
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are listed below with the others
            output_loading_info=True,
        )
    except SafetensorError as e:
        raise UserError(f"{path}: not safetensors files, or truncated ones ({e})") from e
    except OSError as e:
        raise FileNotFoundError(f"{path}: {e}") from e
    problems = [f"missing: {name}" for name in sorted(found["missing_keys"])]
    problems += [f"unexpected: {name}" for name in sorted(found["unexpected_keys"])]
    problems += [f"another shape: {mismatch}" for mismatch in sorted(map(str, found["mismatched_keys"]))]
    if problems:
        raise UserError("\n  ".join([f"{path}: the weights do not fit config.json:", *problems[:20]]))
    return TransformersLM(causal_lm).requires_grad_().eval()


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
    from transformers import AutoModelForCausalLM

    try:
        config = make()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{source}: {e}") from e
    for name, default in type(config)().to_dict().items():  # which transformers 5 checks itself
        value = getattr(config, name, default)
        if type(default) in (int, float) and isinstance(value, str):
            raise UserError(f"{source}: {name}: expected {type(default).__name__}, got str {value!r}")

    def refuse(reason: str) -> None:
        raise UserError(f"{source}: {config.model_type} is not supported: {reason}")

    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        refuse("it is more than a decoder of text")
    if getattr(config, "quantization_config", None) is not None:
        refuse("its weights are quantised; take the model as it was before")
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES):
        refuse(f"layers of the type {', '.join(other)}; only {' and '.join(sorted(_LAYER_TYPES))} are")
    for name, without_effect in _LOGIT_SETTINGS.items():
        if getattr(config, name, None) not in (None, without_effect):
            refuse(f"it changes its logits behind the output layer ({name}: {getattr(config, name)})")
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    taken = set(inspect.signature(model_class.forward).parameters)
    lacking = sorted({"inputs_embeds", "position_ids"} - taken)
    if cache_argument(model_class) is None:
        lacking.append(" or ".join(CACHE_ARGUMENTS))
    if lacking:
        refuse(f"its forward does not take {', '.join(lacking)}")
    return config
