"""Results of several processes: written batch by batch, and put together."""

from speechllm.prompt.label import WordTime
from speechllm.scoring import Transcript
from speechllm.scoring.parts import Part, part_paths, together

FULL = Transcript(
    "a/1", "one two", "one “zwei”", "en>de", "s1", 1.1, "en", (WordTime("one", 0.1, 0.3),), (), ("two", "three")
)


def test_results_come_back_as_they_were_put_together_by_search_in_order(tmp_path):
    paths = part_paths(tmp_path, "test-model", 2)
    parts = [Part(path) for path in paths]
    plain = [Transcript(id, "one", "two") for id in ("c", "b", "d")]
    parts[0].add(1, {"greedy": plain[:1], "ctc": [FULL]})
    parts[0].add(2, {"greedy": plain[1:2]})
    parts[0].finish()
    assert together(paths) is None
    parts[1].add(1, {"greedy": [FULL, plain[2]]})
    assert together(paths) is None
    parts[1].finish()
    assert together(paths) == {"greedy": [FULL, *sorted(plain, key=lambda t: t.id)], "ctc": [FULL]}


def test_a_process_that_was_killed_goes_on_after_its_last_whole_line(tmp_path):
    (path,) = part_paths(tmp_path / "new", "test-model", 1)
    part = Part(path)
    assert (part.batches, part.finished) == (0, False)
    for number in (1, 3):  # of the second there was nothing to keep
        part.add(number, {"greedy": [Transcript(str(number), "one", "two")]})
    path.write_bytes(path.read_bytes()[:-20])
    part = Part(path)
    assert (part.batches, part.finished) == (1, False)
    part.add(3, {"greedy": [Transcript("3", "one", "three")]})
    part.finish()
    assert Part(path).finished
    assert [t.hyp for t in (together([path]) or {})["greedy"]] == ["two", "three"]


def test_a_process_without_a_batch_is_finished_too(tmp_path):
    paths = part_paths(tmp_path, "test-model", 2)
    for path in paths:
        Part(path).finish()
    assert together(paths) == {}
