"""Loading released encoders, saving ours, and initializing one from data."""

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speechllm.encoder import subsampling
from speechllm.encoder.scaling import swoosh_r
from speechllm.encoder.whisper import WRAPPERS, WhisperEncoder, WhisperEncoderConfig
from speechllm.encoder.zipformer import Zipformer
from speechllm.encoder.zipformer_config import ZipformerConfig
from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.hub import local_path
from speechllm.weights import foreign_format, load_state_dict_strict, meta_device

WEIGHT_FILES = ("model.safetensors", "pretrained.safetensors", "pretrained.pt", "model.pt", "pytorch_model.bin")
# The names a composite model gives its encoder; its config.json has "<name>_config", or "<name>".
COMPOSITE_NAMES = ("audio_encoder", "speech_encoder", "encoder")
# Whisper's model_type in the config.json of transformers and of Auden.
_WHISPER = ("whisper", "whisper-encoder")
# icefall's models do not have the count, and are fully trained: all schedules are past their end.
FULLY_TRAINED = 100000.0


def load_encoder(
    path: str | Path, sizes: ZipformerConfig | None = None, map_location: str | torch.device = "cpu"
) -> Zipformer | WhisperEncoder:
    """A released encoder, alone or out of a composite model, in eval mode and float32.

    A Zipformer may be under "state_dict" or "model" in its file, its names with "module.", "model." and the like in
    front or not, beside optimizer, decoder and heads, as in icefall's `pretrained.pt` and `epoch-N.pt` of transducers,
    CTC, CR-CTC and attention models, and in PyTorch Lightning's `.ckpt`. Of a Whisper (config.json with `model_type:
    whisper`, as openai/whisper-small on the Hugging Face Hub) only the encoder's weights are read. Of a composite model
    the encoder's config.json and weights may also be in a folder of that name (`COMPOSITE_NAMES`), as Auden writes them
    where its own file leaves the encoder out.

    Args:
        path: a folder with config.json and one of `WEIGHT_FILES`, or such a file with config.json beside it; or an id
            of the Hub (`speechllm.hub`).
        sizes: of a Zipformer, where there is no config.json, as in icefall's releases; the keys are named as the
            options of icefall's `zipformer/train.py`, and have the same defaults.
        map_location: the device it shall be on.

    Raises:
        FileNotFoundError: if the weights are missing, or config.json without `sizes`.
        UserError: if they do not belong together, with the names of all weights that are missing, left over
            or of another shape; `sizes` contradict config.json; a file cannot be read.
    """
    weights_path = _weights_path(local_path(path))
    config = _encoder_config(weights_path.parent / "config.json", sizes)
    with meta_device():
        encoder = WhisperEncoder(config) if isinstance(config, WhisperEncoderConfig) else Zipformer(config)
    if isinstance(encoder, WhisperEncoder):
        state_dict = encoder.state_dict_of(_read_weights(weights_path, encoder.is_in_released))
    else:
        state_dict = encoder_state_dict(_read_weights(weights_path), weights_path)
        state_dict.setdefault("model_batch_count", torch.tensor(FULLY_TRAINED))
    state_dict = {name: t.float() for name, t in state_dict.items()}
    load_state_dict_strict(encoder, state_dict, weights_path, assign=True)
    encoder.requires_grad_(True)
    return encoder.to(map_location).eval()


@torch.no_grad()
def mix_released(
    encoder: Zipformer | WhisperEncoder, path: str | Path, share: float, sizes: ZipformerConfig | None = None
) -> None:
    """Make an encoder that was trained on a released one `share` of that one, and 1 - `share` of itself.

    WiSE-FT, arXiv 2109.01903: what training on a small set took away comes back.

    Args:
        path: of the released encoder; `sizes` as for `load_encoder`.

    Raises:
        UserError: the released encoder is of another kind or size. Else as `load_encoder`.
    """
    released = dict(load_encoder(path, sizes).named_parameters())
    own = dict(encoder.named_parameters())
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in released.items()}:
        raise UserError(f"{path}: an encoder of another kind or size than the trained one: they cannot be mixed")
    for name, t in own.items():
        t.lerp_(released[name].to(t), share)


def is_whisper(path: str | Path) -> bool:
    """Whether a released encoder is a Whisper's, by the config.json of its folder."""
    path = local_path(path)
    folder = _encoder_folder(path) if path.is_dir() else path.parent
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # `load_encoder` says what is wrong
    return isinstance(values, dict) and _own_values(values).get("model_type") in _WHISPER


def save_encoder(encoder: Zipformer, folder: str | Path) -> None:
    """Writes config.json and model.safetensors for `load_encoder`; each appears complete or not at all."""
    folder = Path(folder)
    with replaced_file(folder / "model.safetensors") as tmp:
        save_file({name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}, tmp)
    with replaced_file(folder / "config.json") as tmp:
        tmp.write_text(json.dumps(encoder.config.to_dict(), indent=2) + "\n")


def _encoder_folder(folder: Path) -> Path:
    """The folder itself, or of a composite model's that of its encoder, if it has one."""
    return next((folder / name for name in COMPOSITE_NAMES if (folder / name / "config.json").is_file()), folder)


def _weights_path(path: Path) -> Path:
    """The file to read, of a folder or itself; an error that says what is there if it holds no weights."""
    if path.is_dir():
        folder = _encoder_folder(path)
        found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"{folder}: no encoder weights; expected one of {', '.join(WEIGHT_FILES)}{_what_is_there(folder)}"
            )
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an encoder needs its weights")
    if what := foreign_format(path):
        way_out = "git lfs pull fetches it" if "LFS" in what else _WAY_OUT
        raise UserError(f"{path}: is {what}, from which an encoder cannot be loaded: {way_out}")
    return path


_WAY_OUT = (
    "take the PyTorch checkpoint that it was made from, in icefall's releases exp/pretrained.pt, or write that with "
    "icefall's zipformer/export.py without --jit"
)


def _what_is_there(folder: Path) -> str:
    """Files that somebody may have meant, for an error message."""
    suffixes = (".pt", ".pth", ".ckpt", ".bin", ".onnx", ".ort", ".nemo", ".rknn", ".tflite", ".param", ".safetensors")
    found = [p for pattern in ("*", "exp/*") for p in sorted(folder.glob(pattern))]
    files = [p for p in found if p.suffix in suffixes and p.is_file()][:5]
    if not files:
        return ""
    kinds = [(p.relative_to(folder), foreign_format(p)) for p in files]
    foreign = any(kind for _, kind in kinds)
    listed = ", ".join(f"{name} ({kind})" if kind else str(name) for name, kind in kinds)
    return f"; it holds {listed}: {_WAY_OUT if foreign else 'give the file itself'}"


def _encoder_config(path: Path, sizes: ZipformerConfig | None) -> ZipformerConfig | WhisperEncoderConfig:
    if not path.is_file():
        if sizes is None:
            raise FileNotFoundError(
                f"{path}: no such file; weights without it, as icefall releases them, need the sizes that they were "
                "trained with: model.encoder.zipformer, whose keys are named as icefall's options (num_encoder_layers, "
                "encoder_dim, ..., causal) and have the same defaults; {} if none was given"
            )
        return sizes
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object")
    try:
        config = _config_of(_own_values(values))
    except ValueError as e:
        raise UserError(f"{path}: {e}") from e
    if sizes is not None and sizes != config:
        if not isinstance(config, ZipformerConfig):
            raise UserError(f"{path} is that of a Whisper, but model.encoder.zipformer gives a Zipformer's sizes")
        own, given = config.to_dict(), sizes.to_dict()
        other = "; ".join(f"{k}: {given[k]}, there {own[k]}" for k in own if own[k] != given[k])
        raise UserError(f"model.encoder.zipformer contradicts {path} ({other}): leave it out, or remove that file")
    return config


def _config_of(values: dict[str, Any]) -> ZipformerConfig | WhisperEncoderConfig:
    """An encoder's configuration; without sizes of a Zipformer only a Zipformer's says that it is one."""
    model_type = values.get("model_type", "zipformer")
    if model_type in _WHISPER:
        return WhisperEncoderConfig.from_released(values)
    if model_type != "zipformer" and "encoder_dim" not in values:
        raise ValueError(f"model_type: {model_type!r}; encoders are 'zipformer', or {' or '.join(map(repr, _WHISPER))}")
    return ZipformerConfig.from_dict(values)


def _own_values(values: dict[str, Any]) -> dict[str, Any]:
    """What a composite model's config.json says of its encoder; Auden means a Zipformer where its type is not said."""
    for name in COMPOSITE_NAMES:
        for key in (f"{name}_config", name):
            if isinstance(values.get(key), dict):
                values = {"model_type": "zipformer"} | values[key]
    return values


def _read_weights(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a file, those whose names are `wanted`."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
        # icefall's own checkpoints have paths beside the weights; their class is in another module in Python 3.13.
        paths: list[Any] = [(PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
        with torch.serialization.safe_globals(paths):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path}: is damaged, or holds more than tensors, numbers and text, which would have to be executed to be "
            f"read: write its weights alone, as icefall's zipformer/export.py does ({str(e).splitlines()[0]})"
        ) from e
    except Exception as e:
        raise UserError(f"{path}: cannot be read as model weights, is it complete? {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a state dict, from names to tensors")
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor) and wanted(k)}


def encoder_state_dict(weights: dict[str, Tensor], source: str | Path = "weights") -> dict[str, Tensor]:
    """The Zipformer's part of the weights of a model that has one, under the names it has alone.

    An encoder alone has "encoder_embed.*", "encoder.*" and perhaps "model_batch_count". A composite model has
    them behind a name of `COMPOSITE_NAMES`; icefall's have them bare, next to a decoder and a joiner, which
    are left out.

    Raises:
        UserError: if there is no Zipformer in them.
    """
    weights = {WRAPPERS.sub("", k, count=1): v for k, v in weights.items()}
    for prefix in (*(f"{name}." for name in COMPOSITE_NAMES), ""):
        if any(k.startswith(f"{prefix}encoder_embed.") for k in weights):
            own = tuple(f"{prefix}{part}" for part in ("encoder_embed.", "encoder.", "model_batch_count"))
            return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(own)}
    raise UserError(
        f"{source}: the weights hold no Zipformer: no name begins with encoder_embed., or one of {COMPOSITE_NAMES} "
        f"and encoder_embed.; the first names are {list(weights)[:5]}"
    )


@torch.no_grad()
def init_from_data(encoder: Zipformer, features: Tensor, feature_lens: Tensor) -> None:
    """Makes the front end of a new encoder fit for its data: each layer's outputs get mean 0 and std 1 per
    channel.

    Otherwise the signal of raw log-mel features, whose mean is far from 0, dies in the convolutions of a
    small model and for minutes nothing is learned. Nothing but weights and biases change, so the normalization
    of the features ends up in the first convolution. As in Salimans & Kingma (arXiv 1602.07868, section 3)
    and Mishkin & Matas (arXiv 1511.06422).

    Args:
        encoder: fresh from its constructor.
        features: of a typical batch, (N, T, F).
        feature_lens: (N,).
    """
    embed = encoder.encoder_embed
    convolutions = cast("Iterable[nn.Conv2d]", embed.conv.values())
    features = features[:, : int(feature_lens.min())]  # so that no padding enters the statistics

    def normalize(layer: nn.Conv2d | nn.Linear, out: Tensor) -> Tensor:
        """Gives `out` (..., C), computed by the layer, mean 0 and std 1, and so the layer from now on."""
        std, mean = torch.std_mean(out.flatten(0, -2), dim=0)
        std = std.clamp_min(1e-5)  # a channel that is constant in this batch
        layer.weight.div_(std.view(-1, *[1] * (layer.weight.dim() - 1)))
        cast(Tensor, layer.bias).sub_(mean).div_(std)
        return (out - mean) / std

    x = features.unsqueeze(-1)
    for conv in convolutions:
        x = swoosh_r(normalize(conv, subsampling.conv2d(conv, x)))
    convnext = embed.convnext
    hidden = normalize(convnext.depthwise_conv, subsampling.conv2d(convnext.depthwise_conv, x))
    normalize(convnext.pointwise_conv1, subsampling.conv2d(convnext.pointwise_conv1, hidden))
    training = encoder.training
    x = embed.eval().convolve(features, valid=None)
    embed.train(training)
    normalize(embed.out, embed.project(x))
