"""A model's folder of ONNX files, as sherpa-onnx, which is not ours, recognizes with it."""

import dataclasses

import numpy as np
import pytest
import sherpa_onnx
import torch

from speechllm.cli.main import main
from speechllm.data.features import fbank
from speechllm.encoder import WhisperEncoderConfig, init_from_data
from speechllm.errors import UserError
from speechllm.model.build import build_model
from speechllm.model.config import EncoderSection
from speechllm.model.export import export_model, tokens_text
from speechllm.text.tokenizer import LexiconTokenizer, RWKVTokenizer

RATE = 16000


@pytest.fixture
def heard(model_config):
    """A causal encoder with a CTC head that writes many letters of `sound`, and anything else never."""
    torch.manual_seed(0)
    causal = dataclasses.replace(
        model_config.encoder.zipformer, causal=True, chunk_size=[8, 16, -1], left_context_frames=[16, 32, -1]
    )
    model = build_model(dataclasses.replace(model_config, llm=None, encoder=EncoderSection(zipformer=causal)))
    model.encoder.set_batch_count(1e5)
    model.eval()
    features = fbank(sound())
    init_from_data(model.encoder, features[None], torch.tensor([len(features)]))
    never = [-1e4 * (not model.tokenizer.piece(i).isalpha()) for i in range(model.blank_id)]
    with torch.no_grad():
        encoder_out, _ = model.encoder(features[None], torch.tensor([len(features)]))
        std, mean = torch.std_mean(encoder_out[0], 0)
        weight = model.ctc_head.weight.normal_().div_(std)
        model.ctc_head.bias.copy_(torch.tensor([*never, 0.0]) - weight @ mean)
    return model


def sound():
    """Two seconds of tones that come and go."""
    time = np.arange(2 * RATE) / RATE
    tones = [np.sin(2 * np.pi * f * time) * np.sin(2 * np.pi * rate * time) for f, rate in ((300, 3), (1700, 2))]
    return (0.2 * sum(tones)).astype(np.float32)


@torch.no_grad()
def pieces_of(model, samples, **context):
    """What the head hears greedily, in PyTorch."""
    features = fbank(samples)
    encoder_out, _ = model.encoder(features[None], torch.tensor([len(features)]), **context)
    classes = model.ctc_head(encoder_out)[0].argmax(-1).unique_consecutive().tolist()
    return [model.tokenizer.piece(i) for i in classes if i != model.blank_id]


def test_sherpa_onnx_hears_what_we_hear(heard, tmp_path):
    files = export_model(heard, tmp_path / "whole", int8=True)
    assert [file.name for file in files] == ["model.onnx", "model.int8.onnx", "tokens.txt"]
    samples = sound()
    for name in ("model.onnx", "model.int8.onnx"):
        recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
            model=str(tmp_path / "whole" / name), tokens=str(tmp_path / "whole" / "tokens.txt"), num_threads=1
        )
        streams = [recognizer.create_stream() for _ in range(2)]
        for stream, length in zip(streams, (2 * RATE, RATE), strict=True):
            stream.accept_waveform(RATE, samples[:length])
        recognizer.decode_streams(streams)
        if name == "model.onnx":
            expected = [pieces_of(heard, samples[:length]) for length in (2 * RATE, RATE)]
            assert len(expected[0]) > 5
            assert [stream.result.tokens for stream in streams] == expected
        assert all(stream.result.text for stream in streams)


def test_sherpa_onnx_hears_streams_as_we_do(heard, tmp_path):
    export_model(heard, tmp_path, streaming=True, chunk_size=16, left_context_frames=32)
    recognizer = sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(
        model=str(tmp_path / "model.onnx"), tokens=str(tmp_path / "tokens.txt"), num_threads=1
    )
    samples = sound()
    stream = recognizer.create_stream()
    for block in np.array_split(samples, 7):
        stream.accept_waveform(RATE, block)
        while recognizer.is_ready(stream):
            recognizer.decode_stream(stream)
    expected = pieces_of(heard, samples, chunk_size=16, left_context_frames=32)
    found = recognizer.tokens(stream)
    assert len(found) > 5 and found == expected[: len(found)]  # but for the last chunk, which is not whole


def test_the_command_and_what_it_refuses(heard, tmp_path, capsys):
    heard.save_pretrained(tmp_path / "model")

    def export(*options):
        with pytest.raises(SystemExit) as caught:
            main(["export", str(tmp_path / "model"), str(tmp_path / "out"), *options])
        return caught.value.code, capsys.readouterr()

    for options, files in (
        (("--int8",), ["model.int8.onnx", "model.onnx", "tokens.txt"]),
        (("--streaming", "--overwrite"), ["model.onnx", "tokens.txt"]),
    ):
        status, output = export(*options)
        assert status == 0 and f"wrote {tmp_path / 'out' / 'tokens.txt'}" in output.out
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    for options, message in (
        ((), "model.onnx: exists; --overwrite overwrites it"),
        (("--chunk-size", "16"), "--chunk-size: is of streams; give --streaming too"),
        (("--streaming", "--chunk-size", "7", "--overwrite"), "chunk_size is 7, but in a stream it must be a multiple"),
    ):
        status, output = export(*options)
        assert status == 1 and message in output.err


def test_without_a_head_it_is_the_encoder_alone(model_config, tmp_path):
    whisper = WhisperEncoderConfig(80, 16, 2, 2, 32, 1500)
    config = dataclasses.replace(model_config, ctc_weight=0.0, encoder=EncoderSection(whisper=whisper))
    model = build_model(config)
    assert [file.name for file in export_model(model, tmp_path)] == ["model.onnx"]
    with pytest.raises(UserError, match="--streaming: the encoder is a Whisper"):
        export_model(model, tmp_path, streaming=True)


def test_tokens_are_one_word_each(tmp_path):
    """As what reads them takes a line apart at its white space."""
    rwkv = tokens_text(RWKVTokenizer()).split("\n")
    assert rwkv[1 + 11] == "<0x0A> 12" and rwkv[1 + 33] == "\u2581 34" and rwkv[-1] == ""
    assert rwkv[:2] == ["<blk> 0", "<0> 1"]
    assert [line.rpartition(" ")[2] for line in rwkv[:-1]] == [str(i) for i in range(65537)]
    assert all(len(line.split()) == 2 for line in rwkv[:-1])
    (tmp_path / "lexicon.txt").write_text("one W AH N\n")
    assert tokens_text(LexiconTokenizer(tmp_path)).split("\n")[:5] == ["<blk> 0", "<eos> 1", "<unk> 2", "_ 3", "AH 4"]
