"""`speechllm prompt show`: what is printed is what training reads."""

import json
import re

import pytest
import yaml

from speechllm.cli.main import main
from speechllm.config import to_dict
from speechllm.data.dataset import instruction_draw
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prompt.template import PromptConfig


@pytest.fixture
def experiment(model_config, tmp_path):
    """A configuration with two lines of data (without audio), and a stage without instructions."""
    said = [{"text": "One two", "previous": "tres"}, {"text": "uno", "previous": "", "lang": "es"}]
    lines = [{"audio_filepath": f"{i}.wav", "duration": 0.5 + i, "lang": "en"} | line for i, line in enumerate(said)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model_config.prompt = PromptConfig(
        asr="{previous}{audio}<|{lang}|>{instruction}", instructions=list("abcd"), soft_tokens=2, boundary=True
    )
    tree = {
        "model": to_dict(model_config),
        "data": {"train": [{"path": str(tmp_path / "m.jsonl")}], "text": ["lowercase"]},
        "train": {"seed": 7},
        "stages": {"plain": {"model.prompt.asr": "{audio}>", "model.prompt.instructions": None}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "c.yaml"


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["prompt", "show", *map(str, arguments)])
    out, err = capsys.readouterr()
    return caught.value.code, out if caught.value.code == 0 else err


def test_utterances_of_the_training_data(experiment, model_config, capsys):
    code, out = shown(capsys, "--config", experiment, "--n", "2")
    assert code == 0
    model = SpeechLLM.from_config(model_config)
    for i, (text, previous, tag) in enumerate([("one two", "tres", "<|en|>"), ("uno", "", "<|es|>")]):
        block = out.split("\n\n")[i].splitlines()
        assert re.fullmatch(rf".*{i}: {0.5 + i:.2f} s, \d+ positions", block[0])
        rows = [re.fullmatch(r" *(\d+)(?:-(\d+))? +(.*?)(?:  -> (\d+) .*)?", line).groups() for line in block[1:]]
        # the positions go on without a gap
        ends = [int(end or start) for start, end, *_ in rows]
        assert [int(start) for start, *_ in rows] == [0, *(end + 1 for end in ends[:-1])]
        assert block[0].endswith(f"{ends[-1] + 1} positions")
        whats = [what for *_, what, _ in rows]
        assert whats[0] == "[soft x 2]" and whats.count("[boundary x 1]") == 2
        ids = [int(what.split()[0]) for what in whats if not what.startswith("[")]
        instruction = "abcd"[int(4 * instruction_draw(7, 1, 0, block[0].partition(":")[0]))]
        encode = model.tokenizer.encode
        assert ids == [*encode(previous), *encode(tag + instruction), *model.label_ids(text)]
        assert [int(loss) for *_, loss in rows if loss] == [*model.label_ids(text), model.tokenizer.eos_id]
        assert rows[-1][3] == str(model.tokenizer.eos_id) and f"{tag!r}" in out


def test_one_that_is_made_up_and_stages_and_models(experiment, model_config, capsys, tmp_path):
    code, out = shown(capsys, "--config", experiment, "--stage", "plain", "--language", "en", "--text", "two")
    assert code == 0 and "[audio x 62]" in out and "<|en|>" not in out and "'\u2581two'" in out
    SpeechLLM.from_config(model_config).save_pretrained(tmp_path / "model")
    for options in (["--config", experiment], ["--model", tmp_path / "model"]):
        code, out = shown(capsys, *options, "--language", "en", "--previous", "")
        assert code == 0 and "<|en|>" in out and out.count("->") == 2  # a space and the end of text


@pytest.fixture
def streaming(experiment, model_config, tmp_path):
    """The first line has word times, the second has none."""
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    lines[0]["alignment"] = {"word": [["One", 0.0, 0.1], ["two", 0.1, 0.3]]}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = yaml.safe_load(experiment.read_text())
    tree["model"]["encoder"]["zipformer"] |= {"causal": True, "chunk_size": [8, -1], "left_context_frames": [16]}
    tree["model"]["streaming"] = {"chunk_seconds": [0.16]}
    experiment.write_text(yaml.safe_dump(tree))
    return experiment


def test_streams(streaming, capsys):
    code, out = shown(capsys, "--config", streaming, "--n", "2", "--chunk-seconds", "0.16")
    assert code == 0
    first, second = out.split("\n\n")[:2]
    # "one" is said in the first 0.16 s, "two" in the next but one, which is not whole
    said = re.findall(r"\[audio x (\d)\]  -> \d+ (.*)", first)
    assert said == [("2", "'\u2581'"), ("2", "end of text")] and first.count("end of text") == 3
    assert "[audio x 2]\n" in first and "'<0x36>'" in first  # of 0.16
    assert second.count("[audio x 2]  ->") == 8 and "'\u2581uno'" in second.split("[audio")[-1]
    code, err = shown(capsys, "--config", streaming, "--chunk-seconds", "0.2")
    assert code == 1 and "--chunk-seconds 0.2: the model's chunks are (in seconds): 0.16" in err


def test_errors(experiment, capsys):
    for arguments, message in (
        ([], "give a configuration with --config, or a trained model with --model"),
        (["--model", "x", "--stage", "plain"], "--stage is of a configuration"),
        (["--config", experiment, "--stage", "x"], "--stage: x is none of plain"),
        (["--config", experiment, "--language", "en"], "{previous} slot but the utterance has no previous text"),
        (["--config", experiment, "--model.prompt.ast", "x"], "model.prompt: ast: the slot {audio} must be there"),
    ):
        code, err = shown(capsys, *arguments)
        assert code == 1 and message in err
