"""The program for machines with a GPU: all of it at tiny sizes on the CPU, and what it does when something is wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.recipes.test_digits_corpus import write_voice

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import check_gpu

        yield check_gpu


@pytest.fixture
def report(check_gpu, tmp_path):
    (tmp_path / "logs").mkdir()
    return check_gpu.Report(tmp_path, {"device": "a | card"}, minutes=8)


def read(folder):
    """The rows of both files."""
    table = [line for line in (folder / "check-gpu.md").read_text().splitlines() if line.startswith("| ")]
    rows = json.loads((folder / "check-gpu.json").read_text())["rows"]
    assert len(table) == 1 + len(rows)
    return rows


@pytest.mark.slow
def test_all_of_it_at_tiny_sizes(tmp_path):
    for language in ("en", "es", "fr", "it", "ru", "other/es", "other/fr", "other/it"):
        write_voice(tmp_path / "sounds" / language)
    command = [sys.executable, "tools/check_gpu.py", "--device", "cpu", "--minutes", "15", "--output", str(tmp_path)]
    command += ["--sounds-dir", str(tmp_path / "sounds")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        first = process.stdout.readline()  # of the first row: it is on disk while the others are still measured
        written = json.loads((tmp_path / "check-gpu.json").read_text())["rows"]
        assert process.poll() is None and first.startswith(f"tests: {written[0]['case']}: skipped")
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    rows = read(tmp_path)
    statuses = {
        part: {row["status"] for row in rows if row["part"] == part} for part in dict.fromkeys(r["part"] for r in rows)
    }
    assert statuses == {part: {"ok"} for part in ("wkv", "rwkv", "train", "digits")} | {"tests": {"skipped"}}
    figures = {(row["part"], row["case"]): row["figures"] for row in rows if row["status"] == "ok"}
    assert figures["wkv", "the machine"]["copy, GB/s"] > 0 and figures["wkv", "speechllm float32"]["GFLOP/s"] > 0
    assert figures["wkv", "speechllm float32"]["of gradients"] < 1e-5
    assert figures["rwkv", "2x128, train"]["tokens/s"] > 0
    assert figures["rwkv", "2x128, decode at batch 2"]["error of graphed"] == 0
    assert figures["train", "digits, all"]["audio s/s"] > 0
    digits = figures["digits", "configs/digits.yaml, bf16"]
    assert digits["steps"] == 4 and 0 < digits["test, greedy_search WER %"] <= 1000


def test_without_time_nothing_is_started(check_gpu, tmp_path, monkeypatch):
    options = ["--device", "cpu", "--minutes", "0.01", "--output", str(tmp_path), "--sounds-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", *options])
    assert check_gpu.main() == 0
    rows = read(tmp_path)
    assert [row["part"] for row in rows] == ["tests", "wkv", "rwkv", "train", "digits"]
    assert {row["status"] for row in rows} == {"no time"}


def part(check_gpu, code):
    """A program of these lines, with `row(case, status)`."""
    head = "import json, sys, time, pathlib\n"
    head += "def row(case, status='ok'):\n"
    head += (
        "    with open(sys.argv[-1], 'a') as file: file.write(json.dumps({'case': case, 'status': status}) + '\\n')\n"
    )
    return check_gpu.Part("part", 1.0, [sys.executable, "-c", head + code])


def cases(report):
    return [(row["case"], row["status"]) for row in read(report.folder)]


def test_a_part_that_breaks_has_its_rows_and_the_end_of_its_error(check_gpu, report):
    check_gpu.run_part(
        report, part(check_gpu, "row('a')\nprint('noise')\nraise RuntimeError('it | broke')"), time.monotonic() + 60
    )
    assert cases(report) == [("a", "ok"), ("the program", "failed")]
    assert report.rows[1]["error"].endswith("RuntimeError: it | broke")
    assert "RuntimeError: it \\| broke" in (report.folder / "check-gpu.md").read_text()


def test_a_part_that_has_told_of_its_failure_is_not_told_of_again(check_gpu, report):
    check_gpu.run_part(report, part(check_gpu, "row('a', 'failed')\nsys.exit(1)"), time.monotonic() + 60)
    assert cases(report) == [("a", "failed")]


def test_a_part_that_takes_too_long_is_stopped_with_all_that_it_has_started(check_gpu, report, tmp_path):
    sign = tmp_path / "sign"
    child = (
        f"import time, pathlib\nwhile True: pathlib.Path({str(sign)!r}).write_text(str(time.time())); time.sleep(0.05)"
    )
    code = f"import subprocess\nrow('a')\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)"
    start = time.monotonic()
    check_gpu.run_part(report, part(check_gpu, code), start + 5)
    assert time.monotonic() - start < 30
    assert cases(report) == [("a", "ok"), ("the rest", "no time")]
    last = sign.read_text()
    time.sleep(0.5)
    assert sign.read_text() == last
    check_gpu.run_part(report, part(check_gpu, "row('b')"), time.monotonic())
    assert cases(report)[-1] == ("all", "no time")


def test_half_a_line_is_left_for_later(check_gpu, report):
    code = "row('a')\nfile = open(sys.argv[-1], 'a')\nfile.write('{\"case\": ')\nfile.flush()\ntime.sleep(1)\n"
    code += 'file.write(\'"b", "status": "ok"}\\n\')\nfile.close()'
    check_gpu.run_part(report, part(check_gpu, code), time.monotonic() + 60)
    assert cases(report) == [("a", "ok"), ("b", "ok")]


def test_a_machine_without_a_gpu_is_told_so(check_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"PyTorch [\d.]+.* sees no GPU; --device cpu runs this program"):
        check_gpu.describe_environment("cuda")


def test_packages(check_gpu, monkeypatch):
    assert any(requirement.startswith("torch") for requirement in check_gpu.requirements())
    assert check_gpu.check_packages() == []
    monkeypatch.setattr(check_gpu, "requirements", lambda: ["numpy>=1000", "torch"])
    (outside,) = check_gpu.check_packages()
    assert outside.startswith("numpy ") and outside.endswith("(>=1000)")
    monkeypatch.setattr(check_gpu, "requirements", lambda: ["numpy", "no-such-package>=1", "nor-this"])
    with pytest.raises(SystemExit, match="not installed.*: no-such-package>=1, nor-this; tools/check_gpu.sh"):
        check_gpu.check_packages()


def test_error_rates_are_those_of_all_languages(check_gpu):
    printed = "log\n\ntest set    language  words  greedy_search WER %  greedy_search CER %  ctc_greedy_search WER %\n"
    printed += "test        en          270                 0.10                 0.20                     0.30\n"
    printed += "test        all        1350                 0.67                 0.50                     0.00\n"
    printed += "test_other  all         810                75.68                60.00                        -\n"
    with pytest.raises(RuntimeError, match="no error rates"):
        check_gpu.error_rates("test  all")
    assert check_gpu.error_rates(printed.replace("        -", "    80.86")) == {
        "test, greedy_search WER %": 0.67,
        "test, ctc_greedy_search WER %": 0.0,
        "test_other, greedy_search WER %": 75.68,
        "test_other, ctc_greedy_search WER %": 80.86,
    }


def test_the_results_of_tests_are_rows(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "@pytest.mark.skip(reason='no k2')\n"
        "def test_left(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no disk')\n"
        "def test_setup(broken): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import no_such_package\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_rows", str(tmp_path)]
    command += ["--rows", str(tmp_path / "rows"), "--continue-on-collection-errors", "-c", "/dev/null"]
    subprocess.run(command, cwd=ROOT / "tools", capture_output=True, check=False)
    rows = {
        row["case"].rpartition("/")[2].removeprefix("test_a.py::"): row
        for row in map(json.loads, (tmp_path / "rows").read_text().splitlines())
    }
    assert {case: row["status"] for case, row in rows.items()} == {
        "test_b.py": "failed",
        "test_good": "ok",
        "test_bad": "failed",
        "test_left": "skipped",
        "test_setup": "failed",
    }
    assert "not equal" in rows["test_bad"]["error"] and "no disk" in rows["test_setup"]["error"]
    assert rows["test_left"]["error"] == "no k2" and "no_such_package" in rows["test_b.py"]["error"]


def test_a_folder_of_wheels_that_is_not_there(tmp_path):
    result = subprocess.run(
        ["bash", str(ROOT / "tools/check_gpu.sh"), "--wheels", "missing"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2 and "error: --wheels missing: no such folder" in result.stderr
