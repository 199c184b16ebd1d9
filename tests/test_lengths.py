"""Functions that are read in one go, and a training script that is; ruff.toml has the limits on what is tangled."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 80
LONGER: dict[str, str] = {}  # FILE:FUNCTION, and why it is not split


def functions(folder: str) -> Iterator[tuple[str, int]]:
    """FILE:FUNCTION and its lines."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_a_page() -> None:
    lengths = [found for folder in ("speechllm", "recipes", "tools") for found in functions(folder)]
    assert {name: lines for name, lines in lengths if lines > LONGEST and name not in LONGER} == {}
    assert LONGER.keys() <= {name for name, lines in lengths if lines > LONGEST}


def test_the_training_script_is_read_in_one_go() -> None:
    assert len((ROOT / "recipes" / "train.py").read_text(encoding="utf-8").splitlines()) <= 350
