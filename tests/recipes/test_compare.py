"""The comparison of variants: what is compared is valid, and the table says what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from speechllm.config import load_config
from speechllm.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compare():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes/digits")
        import compare

        yield compare


@pytest.fixture(scope="module")
def train():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        import train

        yield train


def test_shipped_variants_are_valid(compare, train):
    common, variants = compare.read_variants(ROOT / "recipes/digits/compare.yaml", [])
    assert len(variants) > 8 and variants["baseline"] == {}
    seen = []
    for settings in variants.values():
        overrides = [
            part for key, value in (common | settings).items() for part in (f"--{key}", compare.yaml_text(value))
        ]
        config = load_config(train.Config, ROOT / "configs/digits.yaml", overrides)
        assert config.train.num_steps == common["train.num_steps"]
        assert config not in seen  # each differs from all others
        seen.append(config)


def test_variants_are_chosen_by_name(compare, tmp_path):
    path = tmp_path / "variants.yaml"
    path.write_text(yaml.safe_dump({"common": {"a.b": 1}, "variants": {"x": None, "y": {"a.c": [1]}}}))
    assert compare.read_variants(path, ["y"]) == ({"a.b": 1}, {"y": {"a.c": [1]}})
    with pytest.raises(UserError, match="no variant 'z'; there are x, y"):
        compare.read_variants(path, ["z"])
    path.write_text("variants: {}")
    with pytest.raises(UserError, match="needs `common` and `variants`"):
        compare.read_variants(path, [])


@pytest.mark.parametrize("value", [None, True, 4, "conv", {"model_type": "qwen3", "sizes": [1, 2]}, {}])
def test_settings_arrive_as_they_are_written(compare, value):
    assert yaml.safe_load(compare.yaml_text(value)) == value


def test_cells_of_the_table(compare, tmp_path):
    (tmp_path / "wer-summary-test-model.txt").write_text("settings\tWER\ngreedy_search\t1.70\n")
    assert compare.word_error_rate(tmp_path, "test", "model") == "1.70"
    assert compare.word_error_rate(tmp_path, "other", "model") == "-"
    weights = {"a": torch.zeros(3, 4), "b": torch.zeros(5), "count": torch.tensor(7)}
    torch.save({"model": weights}, tmp_path / "checkpoint-1.pt")
    assert compare.trained_parameters(tmp_path / "checkpoint-1.pt") == 17
    assert compare.markdown([("variant", "WER"), ("x", "1.70")]) == "| variant | WER |\n| --- | ---: |\n| x | 1.70 |\n"


def test_a_variant_that_fails_is_named(tmp_path):
    (tmp_path / "v.yaml").write_text("common: {train.num_steps: 1}\nvariants: {x: {model.projector.kind: nonsense}}\n")
    command = [sys.executable, str(ROOT / "recipes/digits/compare.py"), "--variants", str(tmp_path / "v.yaml")]
    result = subprocess.run([*command, "--exp-dir", str(tmp_path / "exp")], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "got 'nonsense'" in result.stderr and "error: this failed, see above: " in result.stderr
