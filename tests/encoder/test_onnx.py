"""Encoders as ONNX files, run by onnxruntime: as PyTorch has it, in any batch, streamed as the whole."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from speechllm.encoder import WhisperEncoder
from speechllm.encoder import onnx as encoder_onnx
from speechllm.encoder.onnx import export_onnx, export_streaming_onnx, quantize_onnx
from speechllm.errors import UserError

from .test_whisper import TINY, whisper_features
from .test_zipformer import golden, log_mel, seeded, tiny_config, utterances
from .test_zipformer_streaming import causal_encoder, whole

CLASSES = 7


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def new_head(encoder):
    torch.manual_seed(1)
    return nn.Linear(encoder.output_dim, CLASSES)


@torch.no_grad()
def scores(head, encoder_out):
    """As an exported model has them: the blank, the last class here, is the first one there."""
    return head(encoder_out).log_softmax(-1).roll(1, -1)


def run(model, x, x_lens):
    return model.run(None, {"x": x.numpy(), "x_lens": x_lens.numpy()})


@pytest.mark.parametrize("name", ["offline", "causal"])
def test_it_is_what_icefall_gives(name, tmp_path):
    """A batch with anything in its padding, of which each row is icefall's output for it alone."""
    encoder, io = golden(name)
    export_onnx(encoder, None, tmp_path / "encoder.onnx")
    rows = utterances(io)
    x_lens = torch.tensor([len(row) for row in rows])
    x = torch.full((len(rows), int(x_lens.max()) + 5, 80), float("nan"))
    for padded, row in zip(x, rows, strict=True):
        padded[: len(row)] = row
    encoder_out, lens = run(session(tmp_path / "encoder.onnx"), x, x_lens)
    for i, (out, n) in enumerate(zip(encoder_out, lens, strict=True)):
        np.testing.assert_allclose(out[:n], io[f"encoder_out.{i}"].numpy(), atol=1e-4, rtol=0)
        assert n == len(io[f"encoder_out.{i}"])


def zipformer():
    encoder = seeded(tiny_config())
    encoder.set_batch_count(1e5)
    return encoder.eval(), lambda n, t: log_mel(n, t)


def in_chunks():
    """Never without: by default an utterance is heard in the largest of them."""
    encoder, features = causal_encoder(), log_mel
    encoder.config.chunk_size, encoder.config.left_context_frames = [8, 16], [16]
    return encoder, features


def whisper():
    torch.manual_seed(0)
    return WhisperEncoder(TINY).eval(), whisper_features


def whisper_with_silence():
    encoder, features = whisper()
    encoder.pad_to_max_seconds = True
    return encoder, features


@pytest.mark.parametrize("make", [zipformer, in_chunks, whisper, whisper_with_silence])
def test_any_batch_is_what_pytorch_gives(make, tmp_path):
    """Batches and lengths that it was not traced with, down to the shortest."""
    encoder, features_of = make()
    head = new_head(encoder)
    export_onnx(encoder, head, tmp_path / "model.onnx")
    model = session(tmp_path / "model.onnx")
    assert [i.name for i in model.get_inputs()] == ["x", "x_lens"]
    assert [o.name for o in model.get_outputs()] == ["log_probs", "log_probs_len"]
    assert model.get_outputs()[0].shape[2] == CLASSES  # sherpa-onnx reads it there
    least = encoder.min_frames
    for x_lens in ([least], [least + 1], [50], [131, least, 64, 97], [200, 199]):
        lens = torch.tensor(x_lens)
        x = features_of(len(lens), int(lens.max()))
        log_probs, log_probs_len = run(model, x, lens)
        for row, alone, n, t in zip(log_probs, x, log_probs_len, lens, strict=True):
            with torch.no_grad():
                encoder_out, (expected_len,) = encoder(alone[None, :t], t[None])
            assert n == expected_len
            np.testing.assert_allclose(row[:n], scores(head, encoder_out)[0].numpy(), atol=1e-4, rtol=0)


def state_of(model, n):
    """Zeros, of which there are N."""
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    inputs = [i for i in model.get_inputs() if i.name != "x"]
    return {i.name: np.zeros([n if d == "N" else d for d in i.shape], types[i.type]) for i in inputs}


@pytest.mark.parametrize("chunk_size, left", [(8, 16), (16, 32)])
def test_streams_are_the_whole(chunk_size, left, tmp_path):
    """Three streams, of which one begins when the others are under way."""
    encoder = causal_encoder()
    head = new_head(encoder)
    export_streaming_onnx(encoder, head, tmp_path / "model.onnx", chunk_size, left)
    model = session(tmp_path / "model.onnx")
    window, shift = encoder.step_frames(chunk_size)
    metadata = model.get_modelmeta().custom_metadata_map
    assert (metadata["model_type"], metadata["T"], metadata["decode_chunk_len"]) == (
        "zipformer2",
        str(window),
        str(shift),
    )
    assert metadata["num_encoder_layers"] == "1,2,1,1"
    assert metadata["left_context_len"] == ",".join(str(left // factor) for factor in (1, 2, 4, 2))
    names = [o.name.removeprefix("new_") for o in model.get_outputs()]
    assert names == ["log_probs", *(i.name for i in model.get_inputs() if i.name != "x")]
    features = log_mel(3, 250)
    starts = torch.tensor([0, 0, 2 * shift])
    state = state_of(model, 2)
    outs = [[], [], []]
    for k in range(0, 250 - window - 2 * shift, shift):
        rows = 2 if k < starts[2] else 3
        if k == starts[2]:
            new = state_of(model, 1)
            axis = {name: x.shape.index(1, int(name.startswith("cached_nonlin"))) for name, x in new.items()}
            state = {name: np.concatenate([x, new[name]], axis[name]) for name, x in state.items()}
        x = torch.stack([f[k - s : k - s + window] for f, s in zip(features[:rows], starts[:rows], strict=True)])
        results = dict(zip(names, model.run(None, {"x": x.numpy(), **state}), strict=True))
        for out, row in zip(outs[:rows], results.pop("log_probs"), strict=True):
            out.append(row)
        state = results
    assert state["processed_lens"].tolist() == [len(out) * chunk_size for out in outs]
    for out, row in zip(outs, features, strict=True):
        got = np.concatenate(out)
        expected = scores(head, whole(encoder, row, chunk_size, left))[: len(got)]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4, rtol=0)


def test_eight_bits_are_near(tmp_path):
    encoder, features_of = zipformer()
    export_onnx(encoder, new_head(encoder), tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "model.int8.onnx")
    products = [node.op_type for node in onnx.load(tmp_path / "model.int8.onnx").graph.node]
    assert products.count("MatMulInteger") > 20
    x, x_lens = features_of(2, 100), torch.tensor([100, 80])
    exact, quantized = (run(session(tmp_path / name), x, x_lens)[0] for name in ("model.onnx", "model.int8.onnx"))
    assert 0 < np.abs(exact - quantized)[0].max() < 0.1  # 0.34 where products of 8 bits overflow
    metadata = session(tmp_path / "model.int8.onnx").get_modelmeta().custom_metadata_map
    assert metadata["model_type"] == "zipformer2_ctc" and metadata["features"] == "fbank"


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch):
    encoder, _ = zipformer()
    with pytest.raises(ValueError, match="not causal"):
        export_streaming_onnx(encoder, None, tmp_path / "model.onnx")
    monkeypatch.setattr(encoder_onnx, "_MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"model.onnx: the model has 0.0 GB in float32"):
        export_onnx(encoder, None, tmp_path / "model.onnx")
    monkeypatch.setattr(encoder_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need onnx: pip install 'speechllm\[onnx\]'"):
        export_onnx(encoder, None, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
