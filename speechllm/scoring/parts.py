"""Results of a test set that several processes decode together, each its share of the batches.

A process writes a file of JSON lines beside the others: one for each batch that is done, and one more when all are. One
that was killed goes on after its last whole line. Who finishes last finds all files complete, and puts them together.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speechllm.errors import UserError
from speechllm.files import describe_write_error
from speechllm.prompt.label import WordTime
from speechllm.scoring.counting import Transcript


def part_paths(folder: Path, name: str, world_size: int) -> list[Path]:
    """The files of all processes, by rank. What `name` says includes what the results follow from."""
    return [folder / f"part-{rank}-of-{world_size}-{name}.jsonl" for rank in range(world_size)]


@dataclass
class Part:
    """What one process has found.

    Attributes:
        path: where it is kept; what is there already has been read.
        batches: how many of this process's batches are done.
        finished: whether all are.
        results: what was there already, by number of the batch, and by search: fields of transcripts.
    """

    path: Path
    batches: int = field(default=0, init=False)
    finished: bool = field(default=False, init=False)
    results: dict[int, dict[str, list[dict[str, Any]]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        content = b""
        with suppress(FileNotFoundError):  # or no longer there, as another process has just written the results
            content = self.path.read_bytes()
        for line in content.splitlines():
            with suppress(ValueError):  # empty, or cut off when the process was killed
                record = json.loads(line)
                self.batches, self.finished = record["batches"], record["finished"]
                self.results[self.batches] = record["results"]

    def add(self, batches: int, results: Mapping[str, Sequence[Transcript]], finished: bool = False) -> None:
        """Write what was found in the last of so many batches.

        Raises:
            UserError: it cannot be written.
        """
        found = {search: [asdict(transcript) for transcript in of_search] for search, of_search in results.items()}
        record = {"batches": batches, "finished": finished, "results": found}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(f"\n{json.dumps(record)}\n".encode())  # the line before may be cut off
        except OSError as error:
            raise UserError(describe_write_error(self.path, error)) from error
        self.batches, self.finished = batches, finished

    def finish(self) -> None:
        """All batches are done.

        Raises:
            UserError: it cannot be written.
        """
        self.add(self.batches + 1, {}, finished=True)


def together(paths: Sequence[Path]) -> dict[str, list[Transcript]] | None:
    """What all processes have found, by search, in the order of ids; None while one of them is not finished."""
    results: dict[str, list[Transcript]] = defaultdict(list)
    for path in paths:
        part = Part(path)
        if not part.finished:
            return None
        for found in part.results.values():
            for search, of_search in found.items():
                results[search] += map(_transcript, of_search)
    return {search: sorted(found, key=lambda transcript: transcript.id) for search, found in results.items()}


def _transcript(fields: dict[str, Any]) -> Transcript:
    found = dict(fields)
    for name in ("words", "found_words"):
        found[name] = None if fields[name] is None else tuple(WordTime(*word) for word in fields[name])
    found["hotwords"] = None if fields["hotwords"] is None else tuple(fields["hotwords"])
    return Transcript(**found)
