"""Every import of the library, also those in functions and under TYPE_CHECKING, goes down, or stays in its package."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

FLOORS = [  # the ground first; packages on one floor do not know each other
    {"errors"},
    {"allocator", "files", "hub", "log", "quiet", "threads", "torchaudio_import"},
    {"config", "linear", "weights"},
    {"text"},
    {"encoder", "llm", "optim"},
    {"prompt"},
    {"data"},
    {"rwkv7"},
    {"projector", "decode"},
    {"scoring", "transcribe"},
    {"model", "explore"},
    {"train", "serve", "integrations"},
    {"cli"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
ROOT = Path(__file__).parents[1] / "speechllm"
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
ARGPARSE = {"cli"}
LHOTSE = {"data", "transcribe", "explore"}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name


def own_package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = own_package(path)
    others = [(line, name.split(".")[1]) for line, name in imported(path) if name.startswith("speechllm.")]
    wrong = [f"line {line}: speechllm.{o}" for line, o in others if o != own and FLOOR[o] >= FLOOR[own]]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_argparse_and_lhotse_are_where_they_belong(path: Path) -> None:
    names = {name.partition(".")[0] for _, name in imported(path)}
    assert "argparse" not in names or own_package(path) in ARGPARSE
    assert "lhotse" not in names or own_package(path) in LHOTSE


def test_files_import_each_other_in_no_circle() -> None:
    modules = {path.relative_to(ROOT.parent).with_suffix(""): path for path in FILES}
    files = {".".join(module.parts).removesuffix(".__init__"): path for module, path in modules.items()}
    graph = {
        own: {name if name in files else name.rpartition(".")[0] for _, name in imported(path)}
        for own, path in files.items()
    }
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_every_package_has_a_floor() -> None:
    assert {own_package(path) for path in FILES} == set(FLOOR)
