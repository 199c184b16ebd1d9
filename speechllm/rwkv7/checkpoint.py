"""Reading and writing RWKV-7 weights: official ``.pth`` files and Hugging Face folders.

Official files (https://huggingface.co/BlinkDL) hold a state dict with the names of the model here; where RWKV-PEFT or
RWKV-LM merged a tuned state into one, also ``blocks.N.att.time_state``, which becomes ``initial_wkv``. Hugging Face
folders hold ``config.json`` and safetensors with the names of flash-linear-attention
(https://github.com/fla-org/flash-linear-attention, fla/models/rwkv7; 0.6.0), which rwkv7-hf (0.9.0) shares.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.hub import local_path
from speechllm.rwkv7.model import RWKV7, RWKV7Config
from speechllm.rwkv7.state import RWKV7State, time_state_names, tuned_wkv
from speechllm.weights import load_state_dict_strict, meta_device, read_rwkv_pth

# Present in released files, never used: the first layer has no earlier values to mix in.
_UNUSED = {f"blocks.0.att.v{i}" for i in range(3)}

# Parameters that only other versions have, by the end of their names in a block. The first that is found tells the
# version. From RWKV-LM: RWKV-v7/rwkv_v7a_demo.py, rwkv_v7b_demo.py, rwkv_v8_rc00_demo.py and its hybrid;
# RWKV-v8/260222_rosa4bitLM_L12.py; RWKV-v5/src/model.py (4 to 6).
_OTHER_VERSIONS = {
    "rosa.rosa_qkv.emb": "RWKV-8 (ROSA)",
    "ffn.enn.weight": "RWKV-8 (rc00, DeepEmbed)",
    "qkv.k_emb.weight": "RWKV-7b (DeepEmbed attention)",
    "ffn.s_emb.weight": "RWKV-7a (DeepEmbed)",
    "att.time_maa_x": "RWKV-6",
    "att.time_faaaa": "RWKV-5",
    "att.time_first": "RWKV-4",
    "att.time_decay": "RWKV-4, 5 or 6",
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Official name -> name in a Hugging Face folder; in a block, without blocks.N and model.layers.N.
_HF_NAMES = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_HF_BLOCK_NAMES = {
    **{
        f"{norm}.{x}": f"{hf}.{x}"
        for norm, hf in {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att.ln_x": "attn.g_norm"}.items()
        for x in ("weight", "bias")
    },
    **{f"att.{x}": f"attn.{x}" for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k")},
    **{
        f"att.{x}{i}": f"attn.{x}_lora.lora.{hf}"
        for x in "wavg"
        for i, hf in enumerate(("2.bias", "0.weight", "2.weight"))
    },
    "att.receptance.weight": "attn.r_proj.weight",
    "att.key.weight": "attn.k_proj.weight",
    "att.value.weight": "attn.v_proj.weight",
    "att.output.weight": "attn.o_proj.weight",
    **{f"ffn.{x}": f"ffn.{x}" for x in ("x_k", "key.weight", "value.weight")},
}
_OFFICIAL_NAMES = {hf: name for name, hf in (_HF_NAMES | _HF_BLOCK_NAMES).items()}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_HF_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_TRANSPOSED = re.compile(r"blocks\.\d+\.att\.[wavg][12]")
_FLAT = re.compile(r"blocks\.\d+\.(att\.([wav]0|k_k|k_a)|ffn\.x_k)")  # (D,) there, (1, 1, D) here


def load_rwkv7(path: str | Path, dtype: torch.dtype | None = torch.float32, wkv_backend: str = "auto") -> RWKV7:
    """Loads a model to the CPU, in ``eval`` mode, with the sizes found in the tensors.

    Args:
      path: an official ``.pth`` file, or a Hugging Face folder: ``config.json`` of ``model_type`` rwkv7 with
        ``model.safetensors`` or its shards, as flash-linear-attention, rwkv7-hf and ``save_rwkv7`` write it. Files
        are mapped, not read: at their own ``dtype`` the weights take no second copy in memory (but for the low-rank
        layers of a folder, some 3%), and at another one nothing but that copy.
      dtype: of the weights; None for that of the file, if it has several the narrowest that holds them all.
      wkv_backend: backend of ``wkv7``.

    Raises:
      FileNotFoundError: there is no such file or folder, or a file of the folder is missing.
      UserError: the file is not a checkpoint, is of another RWKV version or quantized, its names or shapes do not
        fit, or the configuration asks for what this model does not have; the message lists the names.
    """
    path = local_path(path)
    hf_config = None
    if path.is_dir():
        hf_config = _read_hf_config(path / "config.json")
        weights = dict(_from_hf(name, x) for name, x in _read_hf_weights(path).items())
        source = f"{path} (names as in official files)"
    else:
        weights, source = _read_pth(path), str(path)
    wkv = tuned_wkv(weights, path, remove=True)
    with meta_device():
        model = RWKV7(_infer_config(weights, source), wkv_backend)
    if hf_config is not None:
        _check_hf_config(hf_config, model, path / "config.json")
    for name in _UNUSED & weights.keys():
        del weights[name]
    odd = [f"{name} ({x.dtype})" for name, x in weights.items() if x.dtype not in _DTYPES]
    if odd:
        raise UserError(f"{source}: not floating-point weights (quantized?), not supported: {', '.join(odd[:5])}")
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, {x.dtype for x in weights.values()})
    for name in list(weights):  # one tensor after another, so that there is never a second copy of all
        weights[name] = weights[name].to(dtype).contiguous()
    load_state_dict_strict(model, weights, source, assign=True)
    if wkv is not None:
        try:
            model.add_initial_state(RWKV7State.of_wkv(wkv))
        except ValueError as e:
            raise UserError(f"{source}: does not fit the model: {e}") from e
    return model.requires_grad_().eval()


def save_rwkv7(model: RWKV7, path: str | Path) -> None:
    """Writes the weights in their own dtype: an official file if ``path`` ends in ``.pth``, else a folder for Hugging
    Face transformers with flash-linear-attention. Each file appears complete or not at all; what else is in the
    folder stays.

    Flash-linear-attention normalizes each head with an eps of 1e-5 times its channels, official models with 64e-5.
    The two agree for heads of 64 channels, as in all released models. For others, ``group_norm_eps`` in ``config.json``
    tells what the model was trained with; flash-linear-attention does not heed it.

    Raises:
      ValueError: the model has other parameters than its configuration says, such as adapters; or a tuned initial
        state, for which a folder has no place.
    """
    path = Path(path)
    with meta_device():
        expected = RWKV7(model.config).state_dict().keys()
    weights = {name: x.detach().cpu() for name, x in model.state_dict().items()}
    wkv = weights.pop("initial_wkv", None)
    if wkv is not None and path.suffix != ".pth":
        raise UserError(
            f"{path}: a Hugging Face folder has no place for the model's tuned initial state: write a name ending in "
            ".pth, which holds it as blocks.N.att.time_state"
        )
    other = sorted(weights.keys() ^ expected)
    if other:
        raise ValueError(f"save_rwkv7: not the parameters of a plain RWKV-7 model (merge adapters first): {other[:5]}")
    if path.suffix == ".pth":
        if wkv is not None:
            weights |= dict(zip(time_state_names(len(wkv)), wkv, strict=True))
        with replaced_file(path) as tmp:
            torch.save({name: x.contiguous() for name, x in weights.items()}, tmp)
        return
    config = {
        "architectures": ["RWKV7ForCausalLM"],
        **_hf_config(model),
        "num_heads": model.config.n_embd // model.config.head_size,
        "hidden_ratio": model.blocks[0].ffn.key.out_features / model.config.n_embd,
        "bos_token_id": 0,  # official vocabularies begin and end a text with token 0
        "eos_token_id": 0,
        "torch_dtype": str(model.emb.weight.dtype).removeprefix("torch."),
    }
    # weights first: while they belong to another configuration than config.json says, load_rwkv7 refuses the folder
    with replaced_file(path / "model.safetensors") as tmp:
        save_file(dict(_to_hf(name, x) for name, x in weights.items()), tmp, metadata={"format": "pt"})
    with replaced_file(path / "config.json") as tmp:
        tmp.write_text(json.dumps(config, indent=2) + "\n")


def _read_pth(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; expected an RWKV-7 .pth file or a model folder")
    weights = read_rwkv_pth(path)
    if "llm.emb.weight" in weights:  # a model of speech, such as rwkv_asr's
        weights = {name.removeprefix("llm."): x for name, x in weights.items() if name.startswith("llm.")}
    return weights


def _infer_config(weights: dict[str, Tensor], source: str) -> RWKV7Config:
    """Reads the sizes from the tensors: released models do not all follow one formula."""
    blocks = [match for match in map(_BLOCK.fullmatch, weights) if match]
    ends = {match[2]: match[0] for match in blocks}
    for end, version in _OTHER_VERSIONS.items():
        if end in ends:
            raise UserError(f"{source}: these are weights of {version} ({ends[end]}); only RWKV-7 (x070) is supported")
    n_layer = len({match[1] for match in blocks})
    ranks = {"decay": "blocks.0.att.w1", "a": "blocks.0.att.a1", "gate": "blocks.0.att.g1"}
    if n_layer > 1:  # a model of one layer has no use for v1
        ranks["v"] = "blocks.1.att.v1"
    needed = ["emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight", *ranks.values()]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise UserError(f"{source}: not an RWKV-7 (x070) checkpoint: it lacks {', '.join(missing)}")
    flat = [name for name in needed if weights[name].dim() != 2]
    if flat:
        raise UserError(f"{source}: not an RWKV-7 (x070) checkpoint: not matrices: {', '.join(flat)}")
    vocab_size, n_embd = weights["emb.weight"].shape
    try:
        return RWKV7Config(
            n_layer=n_layer,
            n_embd=n_embd,
            vocab_size=vocab_size,
            head_size=weights["blocks.0.att.r_k"].shape[1],
            ffn_size=weights["blocks.0.ffn.key.weight"].shape[0],
            lora_ranks={name: weights[key].shape[1] for name, key in ranks.items()},
        )
    except ValueError as e:
        raise UserError(f"{source}: not the shapes of an RWKV-7 model: {e}") from e


def _read_hf_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if config.get("model_type") != "rwkv7":
        raise UserError(f"{path}: model_type: {config.get('model_type')!r}; only 'rwkv7' is supported")
    return config


def _read_hf_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder, mapped, by the names they have there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            files = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
        except (KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{index}: weight_map: missing, or not a map of tensor names to files") from e
    else:
        raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name}; other formats are not read")
    weights = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, but {index.name} names it")
        try:
            weights.update(load_file(file))
        except SafetensorError as e:
            raise UserError(f"{file}: not a safetensors file, or a truncated one ({e})") from e
    old = [name for name in weights if name.endswith(".attn.x_x")]
    if old:
        raise UserError(
            f"{folder}: {old[0]}: the naming of an early flash-linear-attention, with x_r, x_w, x_k, x_v, x_a and x_g "
            "in one tensor; convert the official .pth file of this model instead"
        )
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model folder has config.json and model.safetensors")
    try:
        values = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def _hf_config(model: RWKV7) -> dict[str, Any]:
    """All that config.json says about what the model computes."""
    config = model.config
    return {
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
        "value_dim": [config.n_embd] * config.n_layer,
        **{f"{name}_low_rank_dim": rank for name, rank in config.lora_ranks.items()},
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": model.ln_out.eps,
        "group_norm_eps": model.blocks[0].att.ln_x.eps,
        "attn": None,
        "tie_word_embeddings": False,
    }


def _check_hf_config(given: dict[str, Any], model: RWKV7, path: Path) -> None:
    """Refuses a configuration that disagrees with the weights, or with what the model computes.

    Keys that are absent or null have flash-linear-attention's defaults. ``num_heads`` is not looked at: where
    ``head_dim`` is given it has no effect, and the converter of flash-linear-attention writes a wrong one.
    """
    config = model.config
    expected = _hf_config(model) | {"attention_hidden_size": config.n_embd, "quantization_config": None}
    if config.n_layer == 1:
        del expected["v_low_rank_dim"]  # no layer uses it
    given = {key: value for key, value in given.items() if value is not None}
    given.setdefault("group_norm_eps", round(config.head_size * model.ln_out.eps, 9))
    if isinstance(given.get("value_dim"), int):
        expected["value_dim"] = config.n_embd
    wrong = [
        f"  {key}: {given[key]!r}, supported with these weights: {value!r}"
        for key, value in expected.items()
        if key in given and given[key] != value
    ]
    if wrong:
        raise UserError("\n".join([f"{path}: a model that cannot be represented:", *wrong]))


def _to_hf(name: str, x: Tensor) -> tuple[str, Tensor]:
    """Name and tensor as in an official file -> as in a Hugging Face folder."""
    if _TRANSPOSED.fullmatch(name):
        x = x.t()
    elif _FLAT.fullmatch(name):
        x = x.flatten()
    block = _BLOCK.fullmatch(name)
    name = f"model.layers.{block[1]}.{_HF_BLOCK_NAMES[block[2]]}" if block else _HF_NAMES[name]
    return name, x.contiguous()


def _from_hf(name: str, x: Tensor) -> tuple[str, Tensor]:
    """The reverse, as a view; what is not of RWKV-7 stays as it is, and strict loading reports it."""
    block = _HF_BLOCK.fullmatch(name)
    if block and block[2] in _OFFICIAL_NAMES:
        name = f"blocks.{block[1]}.{_OFFICIAL_NAMES[block[2]]}"
    else:
        name = _OFFICIAL_NAMES.get(name, name)
    if _TRANSPOSED.fullmatch(name) and x.dim() == 2:
        x = x.t()
    elif _FLAT.fullmatch(name) and x.dim() == 1:
        x = x.view(1, 1, -1)
    return name, x
