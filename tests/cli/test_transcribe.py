"""`speechllm transcribe`: its options, and a whole model."""

import argparse

import pytest
import torch

from speechllm.cli.options import prompt_context
from speechllm.cli.transcribe import add_transcribe, run_transcribe
from speechllm.errors import UserError
from speechllm.transcribe.inputs import Inputs
from speechllm.transcribe.output import Output, transcribe_all
from speechllm.transcribe.segments import SegmentOptions
from tests.data.conftest import write_manifest
from tests.transcribe.conftest import Listener, audio_folder  # noqa: F401 (the fixture `audio`)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_transcribe(parser.add_subparsers())
    return parser.parse_args(["transcribe", *arguments, "--model", "no-such-model"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "--top-k", "3"], "method sample"),
        (["a.wav", "--task", "ast"], "--target-language"),
        (["a.wav", "--task", "asr", "--target-language", "de"], "--target-language"),
        (["a.wav", "--batch-duration", "0"], "more than 0"),
        (["a.wav", "--max-segment", "2"], "at least 5"),
        (["a.wav", "b.wav", "--format", "srt"], "--output"),
        (["a.wav", "--overwrite"], "--output"),
        (["a.wav", "--output", __file__], "not a folder"),
        (["a.wav", "--device", "gpu"], "--device gpu: cannot be used"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(UserError, match=message):
        run_transcribe(parsed(*arguments))


@pytest.mark.parametrize("precision", [[], ["--dtype", "bfloat16", "--device", "cpu"]])
def test_a_whole_model_transcribes(precision, model, audio, tmp_path, monkeypatch):
    monkeypatch.setattr("speechllm.model.build.load_model", lambda folder: model.eval())
    arguments = [str(audio), "--language", "en", "--format", "ctm", "--search", "beam", "--beam", "2"]
    assert run_transcribe(parsed(*arguments, *precision, "--output", str(tmp_path / "out"))) == 1
    assert model.llm.dtype == (torch.bfloat16 if precision else torch.float32)
    assert sorted(path.stem for path in (tmp_path / "out").rglob("*.ctm")) == ["a", "b", "c", "d"]


def test_manifests_and_options_say_what_the_prompt_needs(audio, tmp_path):
    said = [{}, {"previous": "before"}, {"hotwords": ["x", "y"]}]
    lines = [{"audio_filepath": str(audio / "a.wav"), "duration": 1.2, "id": str(i)} | x for i, x in enumerate(said)]
    manifest = write_manifest(tmp_path / "m.jsonl", lines)
    (tmp_path / "phrases").write_text("New York\n\nBoston \n", encoding="utf-8-sig")
    options = ["--previous", "given", "--prompt-hotwords", str(tmp_path / "phrases")]
    for given, expected in (([], (None, None)), (options, ("given", ("New York", "Boston")))):
        context = prompt_context(parsed("a.wav", *given))
        listener = Listener()
        inputs = Inputs([manifest, audio / "a.wav"], context=context)
        assert transcribe_all(inputs, listener, SegmentOptions(), Output()) == 0
        found = {c.id: (c.previous, c.hotwords) for batch in listener.batches for c in batch.contexts}
        assert found.pop(str(audio / "a.wav")) == expected
        assert found == {"0": expected, "1": ("before", expected[1]), "2": (expected[0], ("x", "y"))}
    with pytest.raises(FileNotFoundError, match="--prompt-hotwords: .*nothing: no such file"):
        prompt_context(parsed("a.wav", "--prompt-hotwords", str(tmp_path / "nothing")))
