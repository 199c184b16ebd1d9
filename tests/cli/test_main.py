"""The command line: what is taken apart here, and handed on."""

import subprocess
import sys

import pytest

from speechllm.cli.main import main, split_overrides


def test_overrides_are_taken_out_with_their_values():
    argv = ["data", "--a.b", "1", "check", "--config", "x.yaml", "--c.d=[2, 3]", "--e.f", "--g"]
    assert split_overrides(argv) == (
        ["data", "check", "--config", "x.yaml"],
        ["--a.b", "1", "--c.d=[2, 3]", "--e.f", "--g"],
    )
    assert split_overrides(["--a.b"]) == ([], ["--a.b"])


def test_overrides_without_a_configuration_are_an_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", "check", "m.jsonl", "--data.train", "[]"])
    assert caught.value.code == 2
    assert "unknown option --data.train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["transcribe"],
        ["score"],
        ["export"],
        ["data", "check"],
        ["data", "convert"],
        ["data", "preview"],
        ["prompt", "show"],
    ],
)
def test_help_does_not_load_the_library(command):
    script = (
        "import sys, speechllm.cli.main\n"
        f"try: speechllm.cli.main.main({[*command, '--help']!r})\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'lhotse', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_score_prints_the_table(tmp_path, capsys):
    (tmp_path / "ref").write_text("a One two\n")
    (tmp_path / "hyp").write_text("a one too\n")
    with pytest.raises(SystemExit) as caught:
        main(["score", str(tmp_path / "ref"), str(tmp_path / "hyp"), "--unit", "char", "--normalise", "lowercase"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["all", "1", "6", "16.67%"]
    with pytest.raises(SystemExit) as caught:
        main(["score", str(tmp_path / "ref")])
    assert caught.value.code == 1
    assert "references only" in capsys.readouterr().err
