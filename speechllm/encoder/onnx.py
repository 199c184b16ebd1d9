"""Encoders as ONNX files, with their CTC heads: whole utterances, or streams chunk by chunk.

Names, shapes and metadata are those of icefall's `zipformer/export-onnx-ctc.py` and `export-onnx-streaming-ctc.py`, so
that sherpa-onnx and what else reads those files reads these.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.encoder.whisper import WhisperEncoder
from speechllm.encoder.zipformer import Zipformer
from speechllm.encoder.zipformer_state import LAYER_PARTS, LayerCache, ZipformerState
from speechllm.errors import UserError
from speechllm.files import replaced_file

OPSET = 17
# icefall's names of a layer's caches, in the order of `LAYER_PARTS`.
_CACHES = ("cached_key", "cached_nonlin_attn", "cached_val1", "cached_val2", "cached_conv1", "cached_conv2")
_NONLIN = LAYER_PARTS.index("nonlin_value")
# Channels of the front end's cache: sherpa-onnx begins a stream with zeros of this shape, whatever a model has.
_FRONT_CHANNELS = 128
# Of a file; what is larger would need files beside it.
_MAX_BYTES = 2**31 - 2**24


def export_onnx(encoder: Zipformer | WhisperEncoder, head: nn.Linear | None, path: str | Path) -> None:
    """Write an encoder for whole utterances, in batches of any size and length; a row is as it is alone.

    Inputs are x (N, T, F) float32 and x_lens (N,) int64; what is beyond a length does not count. Outputs are log_probs
    (N, T', V) float32 and log_probs_len (N,) int64; without a head encoder_out (N, T', D) and encoder_out_lens.

    Args:
        encoder: on the CPU, in float32; it is in evaluation mode afterwards.
        head: of CTC, (D) to (V); None for the encoder alone. The blank is class 0 in the file, whatever its place here
            (the last): see `blank_first`.

    Raises:
        UserError: packages are missing, or the model is too large for a file.
    """
    x = torch.zeros(2, 4 * encoder.min_frames + 64, encoder.feature_dim)
    x_lens = torch.tensor([x.shape[1], x.shape[1] - 2])
    outputs = ("encoder_out", "encoder_out_lens") if head is None else ("log_probs", "log_probs_len")
    axes = {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}, outputs[0]: {0: "N", 1: "T_out"}, outputs[1]: {0: "N"}}
    kind = "zipformer2" if isinstance(encoder, Zipformer) else "whisper"
    metadata = {
        "model_type": f"{kind}_{'encoder' if head is None else 'ctc'}",
        "comment": f"non-streaming {kind} {'encoder' if head is None else 'CTC'}",
        **_about(encoder),
    }
    _export(_Utterances(encoder, head), (x, x_lens), ("x", "x_lens"), outputs, axes, metadata, path)


def export_streaming_onnx(
    encoder: Zipformer,
    head: nn.Linear | None,
    path: str | Path,
    chunk_size: int | None = None,
    left_context_frames: int | None = None,
) -> None:
    """Write a causal encoder that hears a chunk of N streams at a time, as `Zipformer.step` does.

    Inputs are x (N, W, F) and the state: of each layer cached_key, cached_nonlin_attn, cached_val1, cached_val2,
    cached_conv1 and cached_conv2 with _0, _1, ... behind, then embed_states and processed_lens. Outputs are log_probs
    (N, T', V), or encoder_out, and the state after it, `new_` before the names. A stream begins with zeros. The
    metadata has W as `T`, and how many frames later the next chunk begins as `decode_chunk_len`.

    Args:
        encoder, head: see `export_onnx`.
        chunk_size, left_context_frames: see `Zipformer.initial_state`.

    Raises:
        ValueError: the encoder is not causal, or cannot have the chunk size.
        UserError: packages are missing, or the model is too large for a file.
    """
    module = _Chunks(encoder, head, encoder.initial_state(2, chunk_size, left_context_frames))
    state, config = module.example, encoder.config
    window, shift = encoder.step_frames(state.chunk_size)
    states = module.to_icefall(state)
    out = "encoder_out" if head is None else "log_probs"
    names = [f"{cache}_{i}" for i in range(len(state.layers)) for cache in _CACHES] + ["embed_states", "processed_lens"]
    axes = {"x": {0: "N"}, out: {0: "N"}}
    for name in names:
        axes[name] = axes[f"new_{name}"] = {_batch_axis(name): "N"}
    left = [state.left_context_frames // factor for factor in config.downsampling_factor]
    metadata = {
        "model_type": "zipformer2",
        "comment": f"streaming zipformer2 {'encoder' if head is None else 'CTC'}",
        "decode_chunk_len": shift,
        "T": window,
        "num_encoder_layers": config.num_encoder_layers,
        "encoder_dims": config.encoder_dim,
        "cnn_module_kernels": config.cnn_module_kernel,
        "left_context_len": left,
        "query_head_dims": config.query_head_dim,
        "value_head_dims": config.value_head_dim,
        "num_heads": config.num_heads,
        **_about(encoder),
    }
    example = (torch.zeros(2, window, encoder.feature_dim), *states)
    _export(module, example, ("x", *names), (out, *(f"new_{name}" for name in names)), axes, metadata, path)


def quantize_onnx(path: str | Path, target: str | Path) -> None:
    """Write a model that has the weights of its matrix products in 8 bits, and computes these in 8 bits.

    Raises:
        UserError: onnxruntime is missing.
    """
    _require("onnx", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with replaced_file(target) as tmp, _quiet():
        # With reduce_range weights have 7 bits: processors without AVX-VNNI add two products in 16 bits, which overflow
        # with 8, and the error is ten times as large.
        quantize_dynamic(path, tmp, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, reduce_range=True)


def blank_first(head: nn.Linear) -> nn.Linear:
    """A CTC head with its last class, the blank, as class 0, where icefall and what reads its models have it."""
    first = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        first.weight.copy_(head.weight.roll(1, 0))
        first.bias.copy_(head.bias.roll(1, 0))
    return first


class _Utterances(nn.Module):
    def __init__(self, encoder: Zipformer | WhisperEncoder, head: nn.Linear | None):
        super().__init__()
        self.encoder = encoder
        self.head = None if head is None else blank_first(head)

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        encoder_out, lens, *_ = self.encoder.encode(x, x_lens, padded=True)
        return _scored(self.head, encoder_out), lens


class _Chunks(nn.Module):
    """`Zipformer.encode_chunk` with the state in icefall's shapes."""

    def __init__(self, encoder: Zipformer, head: nn.Linear | None, example: ZipformerState):
        super().__init__()
        self.encoder = encoder
        self.head = None if head is None else blank_first(head)
        self.example = example

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        lens = torch.full_like(states[-1], x.shape[1])  # processed_lens
        encoder_out, state = self.encoder.encode_chunk(x, self.from_icefall(states), lens)
        return _scored(self.head, encoder_out), *self.to_icefall(state)

    def to_icefall(self, state: ZipformerState) -> tuple[Tensor, ...]:
        """The attention's (P, N, C), of nonlin_attn (1, N, P, C), convolutions' (N, C, P), the front end's (N, 128, 3,
        F'); and (N,) frames."""
        caches = [_turned(part, layer[part]) for layer in state.layers for part in LAYER_PARTS]
        caches = [x.unsqueeze(0) if i % len(LAYER_PARTS) == _NONLIN else x for i, x in enumerate(caches)]
        front = state.front.permute(0, 3, 1, 2)
        front = F.pad(front, (0, 0, 0, 0, 0, max(_FRONT_CHANNELS - front.shape[1], 0)))
        return *caches, front, state.frames

    def from_icefall(self, states: Sequence[Tensor]) -> ZipformerState:
        """What `to_icefall` gave, as a state."""
        *caches, front, frames = states
        count = len(LAYER_PARTS)
        caches = [x.squeeze(0) if i % count == _NONLIN else x for i, x in enumerate(caches)]
        layers = tuple(
            LayerCache({p: _turned(p, x) for p, x in zip(LAYER_PARTS, caches[i : i + count], strict=True)})
            for i in range(0, len(caches), count)
        )
        front = front[:, : self.example.front.shape[3]].permute(0, 2, 3, 1)
        return ZipformerState(self.example.chunk_size, self.example.left_context_frames, frames, front, layers)


def _turned(part: str, x: Tensor) -> Tensor:
    """A cache between (N, P, C) and icefall's order, to and fro; that of nonlin_attn stays in its order."""
    if part == "nonlin_value":
        return x
    return x.transpose(1, 2) if part.startswith("conv") else x.transpose(0, 1)


def _batch_axis(name: str) -> int:
    return int(name.startswith(("cached_key", "cached_nonlin", "cached_val")))


def _scored(head: nn.Linear | None, encoder_out: Tensor) -> Tensor:
    return encoder_out if head is None else head(encoder_out).log_softmax(-1)


def _about(encoder: Zipformer | WhisperEncoder) -> dict[str, Any]:
    """What a program has to know that computes the features, and gives times."""
    return {
        "version": 1,
        "model_author": "speechllm",
        "features": encoder.feature_kind,
        "feature_dim": encoder.feature_dim,
        "frame_seconds": encoder.frame_seconds,
    }


def _export(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: dict[str, dict[int, str]],
    metadata: dict[str, Any],
    path: str | Path,
) -> None:
    _require("onnx")
    import onnx

    size = sum(x.nbytes for x in module.state_dict().values())
    if size > _MAX_BYTES:
        raise UserError(f"{path}: the model has {size / 1e9:.1f} GB in float32, and an ONNX file holds 2 GB")
    with replaced_file(path) as tmp:
        with torch.no_grad(), _quiet():
            # Traced: torch.export takes minutes to solve what lengths there may be.
            torch.onnx.export(
                module.eval(),
                example,
                str(tmp),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
        model = onnx.load(str(tmp))
        for key, value in metadata.items():
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            model.metadata_props.add(key=key, value=text)
        onnx.save(model, str(tmp))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of every tensor whose shape is known, of their own future, and of quantization."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _require(*packages: str) -> None:
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise UserError(f"ONNX files need {' and '.join(missing)}: pip install 'speechllm[onnx]'")
