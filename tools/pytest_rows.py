"""A pytest plugin: `-p pytest_rows --rows FILE` appends the result of each test to FILE, as the benches do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LAST_LINES = 8  # of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE", help="append each result to this file, as a line of JSON")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.rows is not None:
        config.pluginmanager.register(Rows(config.option.rows))


class Rows:
    def __init__(self, path: Path):
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row for a test, and another if it fails in its teardown."""
        if report.when == "setup" and report.passed or report.when == "teardown" and not report.failed:
            return
        row: dict[str, object] = {"case": report.nodeid}
        if report.passed:
            row |= {"status": "ok", "figures": {"s": round(report.duration, 1)}}
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            row |= {"status": "skipped", "error": reason.removeprefix("Skipped: ")}
        else:
            row |= {"status": "failed", "error": "\n".join(report.longreprtext.splitlines()[-LAST_LINES:])}
        self._write(row)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has no tests to report."""
        if report.failed:
            error = "\n".join(report.longreprtext.splitlines()[-LAST_LINES:])
            self._write({"case": report.nodeid, "status": "failed", "error": error})

    def _write(self, row: dict[str, object]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
