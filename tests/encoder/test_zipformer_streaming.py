"""A causal Zipformer chunk by chunk: as the whole, as the reference, in any batch, from any saved state."""

import pytest
import torch
from safetensors.torch import load_file

from speechllm.encoder.zipformer_state import ZipformerState
from speechllm.errors import UserError
from speechllm.linear import pack_for_inference

from .test_zipformer import GOLDEN, golden, log_mel, seeded, tiny_config


def causal_encoder(**kwargs):
    """With convolutions that scale their chunks' edges, which those of a new encoder do not."""
    encoder = seeded(tiny_config(causal=True, chunk_size=[8, 16, -1], left_context_frames=[16, 32, -1], **kwargs))
    for name, parameter in encoder.named_parameters():
        if name.endswith("chunkwise_conv_scale"):
            torch.nn.init.normal_(parameter, std=0.3)
    encoder.set_batch_count(1e5)
    return encoder.eval()


@torch.no_grad()
def whole(encoder, features, chunk_size, left):
    lens = torch.tensor([len(features)])
    return encoder(features[None], lens, chunk_size=chunk_size, left_context_frames=left)[0][0]


@torch.no_grad()
def streamed(encoder, features, chunk_size, left, flush=True):
    state = encoder.initial_state(1, chunk_size, left)
    window, shift = encoder.step_frames(chunk_size)
    outs = []
    for start in range(0, len(features), shift):
        piece = features[start : start + window]
        if len(piece) < (encoder.min_frames if flush else window):
            break
        lens = torch.tensor([len(piece)])
        padded = torch.full((1, window, features.shape[1]), float("nan"))
        padded[0, : len(piece)] = piece
        out, state = encoder.step(padded, state, lens)
        outs.append(out[0, : int(encoder.output_lens(lens))])
    return torch.cat(outs)


def test_it_is_what_icefall_streams():
    encoder, _ = golden("causal")
    io = load_file(GOLDEN / "causal" / "streaming.safetensors")
    out = streamed(encoder, io["features"], 16, 64, flush=False)
    torch.testing.assert_close(out, io["encoder_out_streaming"], atol=1e-4, rtol=0)
    assert encoder.step_frames(16) == (32 + 13, 32)


def test_golden_whole_is_streamed_and_flushed():
    encoder, _ = golden("causal")
    io = load_file(GOLDEN / "causal" / "streaming.safetensors")
    out = streamed(encoder, io["features"], 16, 64)
    torch.testing.assert_close(out, whole(encoder, io["features"], 16, 64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk_size, left", [(8, 8), (8, 32), (16, 16), (16, 40), (32, 64)])
def test_chunk_by_chunk_is_the_whole(chunk_size, left):
    """At every place within a chunk where an utterance may end, one shorter than a chunk included."""
    encoder = causal_encoder()
    features = log_mel(1, 300)[0]
    for length in (9, 12, 2 * chunk_size, *range(170, 170 + 2 * chunk_size + 1, 3), 300):
        expected = whole(encoder, features[:length], chunk_size, left)
        out = streamed(encoder, features[:length], chunk_size, left)
        assert len(out) == int(encoder.output_lens(torch.tensor(length)))
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_streams_in_a_batch_are_each_as_alone_wherever_they_are():
    """They join one after the other, stop at different times, and change places."""
    encoder = causal_encoder()
    window, shift = encoder.step_frames(8)
    utterances = [log_mel(1, length)[0] for length in (230, 61, 145, 12, 190)]
    states = {i: encoder.initial_state(1, 8, 16) for i in range(len(utterances))}
    outs = {i: [] for i in states}
    done = dict.fromkeys(states, 0)
    for turn in range(40):
        rows = [i for i in states if 2 * i <= turn and len(utterances[i]) - done[i] >= encoder.min_frames]
        rows = rows[turn % max(len(rows), 1) :] + rows[: turn % max(len(rows), 1)]
        if not rows:
            continue
        pieces = [utterances[i][done[i] : done[i] + window] for i in rows]
        lens = torch.tensor([len(piece) for piece in pieces])
        features = torch.full((len(rows), window, 80), 1e30)
        for row, piece in zip(features, pieces, strict=True):
            row[: len(piece)] = piece
        out, state = encoder.step(features, ZipformerState.stack([states[i] for i in rows]), lens)
        for place, i in enumerate(rows):
            states[i] = state.select([place])
            outs[i].append(out[place, : int(encoder.output_lens(lens[place]))])
            done[i] += shift
    for i, utterance in enumerate(utterances):
        torch.testing.assert_close(torch.cat(outs[i]), streamed(encoder, utterance, 8, 16), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_state_is_saved_and_not_changed_by_a_step(tmp_path):
    encoder = causal_encoder()
    window, _ = encoder.step_frames(16)
    features = log_mel(2, window)
    _, state = encoder.step(features, encoder.initial_state(2, 16, 32))
    before = {name: x.clone() for name, x in state.tensors().items()}
    expected, after = encoder.step(features, state)
    assert all(torch.equal(x, before[name]) for name, x in state.tensors().items())
    state.save(tmp_path / "state.safetensors")
    loaded = ZipformerState.load(tmp_path / "state.safetensors")
    assert (loaded.chunk_size, loaded.left_context_frames, len(loaded)) == (16, 32, 2)
    out, after_loaded = encoder.step(features, loaded)
    assert torch.equal(out, expected)
    assert all(torch.equal(x, after.tensors()[name]) for name, x in after_loaded.tensors().items())
    assert after.nbytes == state.nbytes == encoder.initial_state(2, 16, 32).nbytes
    (tmp_path / "other").write_bytes((GOLDEN / "causal" / "streaming.safetensors").read_bytes())
    with pytest.raises(UserError, match="other: not the state of a Zipformer's stream"):
        ZipformerState.load(tmp_path / "other")


@torch.no_grad()
def test_autocast_leaves_the_state_in_its_type():
    encoder = causal_encoder()
    window, _ = encoder.step_frames(16)
    features, state = log_mel(1, window), encoder.initial_state(1, 16, 32)
    exact, _ = encoder.step(features, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, state = encoder.step(features, state)
    assert {x.dtype for x in state.tensors().values()} == {torch.float32, torch.int64}
    assert (exact - rough).norm() < 0.05 * exact.norm()


def test_what_cannot_be_streamed_is_refused():
    encoder = causal_encoder()
    state = encoder.initial_state(1)
    assert (state.chunk_size, state.left_context_frames) == (8, 16)
    assert encoder.initial_state(1, 16, 40).left_context_frames == 32
    assert encoder.initial_state(1, 16, 8).left_context_frames == 16
    with pytest.raises(ValueError, match="chunk_size is 10, but in a stream it must be a multiple of 4"):
        encoder.initial_state(1, 10)
    with pytest.raises(ValueError, match="left_context_frames is -1"):
        encoder.initial_state(1, 8, -1)
    with pytest.raises(ValueError, match="not causal"):
        seeded(tiny_config()).initial_state(1)
    with pytest.raises(ValueError, match=r"features must be \(1, 29, 80\) for 1 streams"):
        encoder.step(torch.zeros(1, 30, 80), state)
    with pytest.raises(ValueError, match="one chunk size and left context"):
        ZipformerState.stack([state, encoder.initial_state(1, 16)])
    with pytest.raises(ValueError, match=r"eval\(\)"):
        encoder.train().step(torch.zeros(1, 29, 80), state)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_packed_in_half_precision(weights):
    encoder, features = causal_encoder(), log_mel(1, 200)[0]
    expected = streamed(encoder, features, 8, 16)
    pack_for_inference(encoder, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = streamed(encoder, features, 8, 16)
    assert got.shape == expected.shape and (got - expected).norm() < 0.07 * expected.norm()
