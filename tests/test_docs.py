"""The pages of docs/: what they show is what the program takes."""

import configparser
import re
from pathlib import Path

import pytest
import yaml

from speechllm.config import from_dict
from speechllm.data import DataConfig
from speechllm.model.config import ModelConfig
from tests.data.conftest import write_tone

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "coming-from").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configurations_of_the_pages_for_other_projects(page):
    """Each block is a model's configuration, but for an encoder alone, which has no language model to go with."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        tree = yaml.safe_load(block)
        from_dict(ModelConfig, {"ctc_weight": 1.0} | tree["model"])
    whole = {"tokenizer": "rwkv", "encoder": {"path": "encoder"}, "llm": {"path": "base"}}
    for section, value in re.findall(r"`model\.(\w+): (\{.*?\})`", text):
        from_dict(ModelConfig, whole | {section: yaml.safe_load(value.replace("...", "base"))})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_the_pages_name_are_here(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:configs|recipes|tools)/[\w./-]+\.(?:yaml|py))", text))
    theirs = {"configs/zipformer.yaml", "configs/train.yaml"}
    assert all((DOCS.parent / name).is_file() for name in named - theirs)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_no_page_holds_both_sides_of_a_merge(page):
    assert not re.search("^(<{7}|>{7}) ", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_extras_that_commands_install_are_there():
    """pip only warns of an extra that a package does not have."""
    root = DOCS.parent
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"].keys()
    kinds = ("*.md", "*.sh", "*.py", "*.yml", "*.yaml")
    folders = ("docs", "recipes", "speechllm", "tools")
    files = [*root.glob("*.md"), *(f for name in folders for kind in kinds for f in (root / name).rglob(kind))]
    named = {
        (file.name, extra)
        for file in files
        for extras_of_one in re.findall(
            r"(?:speechllm|['\" ]\.)\[([a-z,]+)\]|install_speechllm ([a-z,]+)", file.read_text(encoding="utf-8")
        )
        for extra in "".join(extras_of_one).split(",")
    }
    assert ("check_gpu.sh", "gpu") in named
    assert {(name, extra) for name, extra in named if extra not in extras} == set()


def _blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_configurations_of_the_page_on_data():
    for block in _blocks("guides/data.md", "yaml"):
        from_dict(DataConfig, yaml.safe_load(block)["data"])


def test_the_program_of_the_page_on_data_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("1", "2"):
        write_tone(tmp_path / f"wav/{name}.wav", 0.5, seed=int(name))
    (program,) = _blocks("guides/data.md", "python")
    exec(program, {})
    assert capsys.readouterr().out.splitlines() == ["one 0.5 (8000,)", "two 0.5 (8000,)"]
