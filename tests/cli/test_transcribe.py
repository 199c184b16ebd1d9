"""`speechllm transcribe`: its options, and a whole model."""

import argparse
import dataclasses
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from speechllm.cli.main import main
from speechllm.cli.options import command_line_request, share_of
from speechllm.cli.transcribe import add_transcribe, run_transcribe
from speechllm.data.share import Share
from speechllm.errors import UserError
from speechllm.model.encoder_model import EncoderModel
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
        (["a.wav", "--rank", "1"], "--world-size and --rank: give both"),
        (["a.wav", "--rank", "2", "--world-size", "2"], "--rank 2 with --world-size 2: ranks are counted from 0"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(UserError, match=message):
        run_transcribe(parsed(*arguments))


def test_which_share_of_the_inputs_a_process_has(monkeypatch):
    """torchrun says it; SLURM's variables are there in an interactive allocation too, and RANK in other places."""
    for name in ("SLURM_PROCID", "RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("SLURM_NTASKS", "WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    assert share_of(parsed("a.wav")) == Share(0, 1)
    assert share_of(parsed("a.wav", "--rank", "2", "--world-size", "3")) == Share(2, 3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert share_of(parsed("a.wav")) == Share(1, 4)
    assert share_of(parsed("a.wav", "--rank", "0", "--world-size", "1")) == Share(0, 1)


@pytest.fixture
def folder(model, tmp_path):
    """Of a model that was trained to transcribe English and Spanish."""
    model.config.languages = ["en", "es"]
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def ran(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["transcribe", *map(str, arguments)])
    return caught.value.code


def test_a_whole_model_transcribes(folder, audio, tmp_path, capsys):
    arguments = [audio, "--model", folder, "--language", "English", "--search", "beam", "--beam", "2"]
    arguments += ["--format", "ctm", "--output", tmp_path / "out"]
    assert ran(*arguments) == 1
    assert sorted(path.stem for path in (tmp_path / "out").rglob("*.ctm")) == ["a", "b", "c", "d"]
    capsys.readouterr()
    assert ran(*arguments, "--batch-duration", "5", "--max-rows", "8") == 1
    assert "4 of 5 were done before" in capsys.readouterr().err
    assert ran(*arguments, "--length-penalty", "0.5") == 1
    assert "were done before" not in capsys.readouterr().err


def test_what_takes_seconds_to_import_is_imported_when_needed(folder, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16000) / 5), 16000)
    script = (
        "import sys\n"
        "def check(*names): assert not set(names) & set(sys.modules), set(names) & set(sys.modules)\n"
        "import speechllm\n"
        "check('torch', 'numpy')\n"
        "from speechllm import SpeechLLM\n"
        "later = 'transformers peft accelerate tensorboard matplotlib pandas scipy torchaudio av langcodes'.split()\n"
        "later += ['torch.utils.tensorboard', 'torch._dynamo']\n"  # the compiler: `speechllm.weights.meta_device`
        "check('lhotse', 'soundfile', 'sentencepiece', *later)\n"
        "from speechllm.cli.main import main\n"
        f"try: main(['transcribe', {str(tmp_path / 'a.wav')!r}, '--model', {str(folder)!r}, '--language', 'en'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "check(*later)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beam", "8"], "beam: is for method beam alone"),
        (["--beam", "4"], "--beam: is for method beam alone"),
        (["--seed", "0"], "--seed: is for method sample alone"),
        (["--length-penalty", "1.0"], "--length-penalty: is for method beam"),
        (["--hotword-weight", "1"], "--hotword-weight: is the weight of hotwords, and none are given"),
        (["--ngram-weight", "0.5"], "ngram_weight: is the weight of an n-gram model"),
        (["--search", "sample", "--ctc-weight", "0.3"], "ctc_weight: has no part in sampling"),
        (["--search", "beam", "--nbest", "2"], "--nbest 2: only the best result is written"),
        (["--previous", "and so"], "no {previous} slot"),
        (["--target-language", "German"], "target language de: the model was trained on transcripts alone, en, es"),
        (["--language", "French"], "language fr: the model was trained with en, es"),
        (["--task", "ast", "--target-language", "en"], "trained on transcripts alone"),
        (["--channel", "-1"], "--channel: they are counted from 0"),
    ],
)
def test_options_without_effect_are_errors(folder, arguments, message, capsys):
    assert ran("a.wav", "--model", folder, *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "en"], "language 'en': the model takes no notice of it, as it is an encoder alone"),
        (["--target-language", "de"], "target language de: the model is an encoder alone"),
        (["--max-repeats", "10"], "--max-repeats: is for a language model"),
        (["--initial-state", "x"], "--initial-state: is for a language model"),
        (["--llm-weights", "int8"], "--llm-weights int8: the model has no language model"),
    ],
)
def test_options_without_effect_on_an_encoder_alone(model_config, tmp_path, arguments, message, capsys):
    EncoderModel.from_config(dataclasses.replace(model_config, llm=None)).save_pretrained(tmp_path / "model")
    assert ran("a.wav", "--model", tmp_path / "model", *arguments) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_does_not_say_its_languages_is_asked_for_any(model, tmp_path, audio):
    model.save_pretrained(tmp_path / "model")
    assert ran(audio / "a.wav", "--model", tmp_path / "model", "--language", "French", "--target-language", "es") == 0


def test_a_channel_and_a_track_that_a_file_does_not_have(folder, audio, capsys):
    for option in ("--channel", "--track"):
        assert ran(audio / "a.wav", "--model", folder, "--language", "en", option, "7") == 1
        assert f"no such {option[2:]}" in capsys.readouterr().err


def test_a_reader_that_has_gone_and_a_full_disk(folder, audio):
    command = [sys.executable, "-m", "speechllm.cli", "transcribe", audio / "a.wav"]
    command += ["--model", folder, "--language", "en"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "error: standard output: No space left on device\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_program_that_is_interrupted_is_quiet(number, status):
    script = (
        "import time\nfrom speechllm.cli.exits import run_to_exit\n"
        "run_to_exit(lambda: (print('ready', flush=True), time.sleep(60)))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert (process.stderr.read(), process.wait()) == (b"", status)


@pytest.mark.parametrize("precision", [[], ["--dtype", "bfloat16", "--device", "cpu"]])
def test_a_model_transcribes_in_the_precision_that_is_asked_for(precision, folder, model, audio, monkeypatch):
    monkeypatch.setattr("speechllm.model.build.load_model", lambda folder: model.eval())
    assert ran(audio / "a.wav", "--model", folder, "--language", "en", *precision) == 0
    assert model.llm.dtype == (torch.bfloat16 if precision else torch.float32)


def test_manifests_and_options_say_what_the_prompt_needs(audio, tmp_path):
    said = [{}, {"previous": "before"}, {"hotwords": ["x", "y"]}]
    lines = [{"audio_filepath": str(audio / "a.wav"), "duration": 1.2, "id": str(i)} | x for i, x in enumerate(said)]
    manifest = write_manifest(tmp_path / "m.jsonl", lines)
    (tmp_path / "phrases").write_text("New York\n\nBoston \n", encoding="utf-8-sig")
    options = ["--previous", "given", "--prompt-hotwords", str(tmp_path / "phrases")]
    for given, expected in (([], (None, None)), (options, ("given", ("New York", "Boston")))):
        request = command_line_request(parsed("a.wav", *given))
        listener = Listener()
        inputs = Inputs([manifest, audio / "a.wav"], request)
        assert transcribe_all(inputs, listener, SegmentOptions(), Output()) == 0
        found = {c.id: (c.previous, c.hotwords) for batch in listener.batches for c in batch.requests}
        assert found.pop(str(audio / "a.wav")) == expected
        assert found == {"0": expected, "1": ("before", expected[1]), "2": (expected[0], ("x", "y"))}
    with pytest.raises(FileNotFoundError, match="--prompt-hotwords: .*nothing: no such file"):
        command_line_request(parsed("a.wav", "--prompt-hotwords", str(tmp_path / "nothing")))
