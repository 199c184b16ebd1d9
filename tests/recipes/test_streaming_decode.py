"""recipes/streaming_decode.py: error rates and delays of streams."""

import importlib.util
import json
import sys

import pytest
import soundfile
import yaml

from speechllm.config import to_dict
from tests.decode.test_streaming import encoder_model, noise, speech_llm  # noqa: F401 (fixtures)
from tests.recipes.conftest import REPOSITORY
from tests.recipes.test_train import run


@pytest.fixture
def command(tmp_path):
    lines = []
    for i, (seconds, language) in enumerate(((1.0, "en"), (0.02, "en"), (1.7, None), (2.2, "es"))):
        soundfile.write(tmp_path / f"{i}.wav", noise(seconds, i), 16000)
        line = {"id": str(i), "audio_filepath": f"{i}.wav", "duration": seconds, "text": "one two"}
        line["alignment"] = {"word": [["one", 0.0, 0.1 * seconds], ["two", 0.2 * seconds, 0.3 * seconds]]}
        lines.append(json.dumps(line | ({"lang": language} if language else {})) + "\n")
    (tmp_path / "all.jsonl").write_text("".join(lines))

    def ran(model, *arguments):
        model.save_pretrained(tmp_path / "model")
        sources = [{"path": str(tmp_path / "all.jsonl")}]
        data = {"train": sources, "valid": sources, "test": {"all": sources}, "num_workers": 0}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": to_dict(model.config), "data": data}))
        script = [sys.executable, str(REPOSITORY / "recipes/streaming_decode.py"), "--device", "cpu"]
        files = ["--config", str(tmp_path / "c.yaml"), "--exp-dir", str(tmp_path), "--model", str(tmp_path / "model")]
        result = run(*script, *files, *arguments)
        assert result.returncode == 0, result.stderr
        return result

    return ran


def recogs(folder):
    return (folder / "recogs-all-model.txt").read_text()


def test_streams_of_a_language_model(command, speech_llm, tmp_path):  # noqa: F811
    result = command(speech_llm, "--chunk-seconds", "0.32", "0.64", "offline", "--streams", "2")
    assert "left out: 2: the prompt has a {lang} slot" in result.stderr
    rows = [line.split() for line in (tmp_path / "streaming-summary-model.txt").read_text().splitlines()]
    assert rows[0][:5] == ["2", "streams", "at", "a", "time,"]
    assert [row[:3] for row in rows[2:]] == [["all", "0.32", "4"], ["all", "0.64", "4"], ["all", "offline", "4"]]
    assert len({recogs(tmp_path / f"streaming_greedy_search_{chunk}") for chunk in ("0.32", "0.64", "offline")}) == 3
    one = recogs(tmp_path / "streaming_greedy_search_0.32")
    command(speech_llm, "--chunk-seconds", "0.32", "--streams", "7")
    assert recogs(tmp_path / "streaming_greedy_search_0.32") == one


def test_streams_of_an_encoder_alone(command, encoder_model, tmp_path):  # noqa: F811
    command(encoder_model, "--chunk-seconds", "0.32")
    assert "2:\thyp=" in recogs(tmp_path / "streaming_ctc_greedy_search_0.32")


def test_delays_and_their_plot(tmp_path):
    spec = importlib.util.spec_from_file_location("streaming_decode", REPOSITORY / "recipes/streaming_decode.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    measured = recipe.Measured(chunks=[0.01, 0.03], computing=0.5, audio=100.0, stream_bytes=2048)
    measured.delays.words, measured.delays.first = [0.3, 0.5, 0.4], [0.3]
    cells = recipe.row("set", "0.64", 30, 3.3333, measured)
    assert cells[:8] == ("set", "0.64", "30", "3.33", "400", "480", "498", "300")
    assert cells[8:11] == ("20", "29", "0.0050") and cells[12] == "2"
    recipe.plot_if_possible([("0.64", 3.3, measured)], tmp_path / "plot.png", "set")
    assert (tmp_path / "plot.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
