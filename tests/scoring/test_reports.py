"""Reports: the files as icefall lays them out, and tables whose rows add up."""

import pytest

from speechllm.scoring import Transcript, characters, error_table, errs_text, score, write_reports
from speechllm.scoring.reports import grouped

RESULTS = [
    Transcript("b", "the association of edison", "the association of addison", "en"),
    Transcript("a", "for the first day sir i think", "for the first day i think", "en"),
    Transcript("c", "", "uno dos", "es"),
    Transcript("d", "tres  cuatro", "tres cuatro", "es"),
]


def test_errs_file_is_icefalls():
    """The layout of icefall.utils.write_error_stats, written out by hand for these results."""
    assert errs_text(sorted(RESULTS[:3], key=lambda r: r.id)).splitlines() == [
        "%WER = 36.36",
        "Errors: 2 insertions, 1 deletions, 1 substitutions, over 11 reference words (9 correct)",
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, "
        "PER-WORD STATS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)  ",
        "a:\tfor the first day (sir->*) i think",
        "b:\tthe association of (edison->addison)",
        "c:\t(*->uno dos)",
        "",
        "SUBSTITUTIONS: count ref -> hyp",
        "1   edison -> addison",
        "",
        "DELETIONS: count ref",
        "1   sir",
        "",
        "INSERTIONS: count hyp",
        "1   uno",
        "1   dos",
        "",
        "PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp",
        "uno   0 1 0 1",
        "sir   0 1 1 0",
        "edison   0 1 1 0",
        "dos   0 1 0 1",
        "addison   0 1 0 1",
        "think   1 0 1 1",
        "the   2 0 2 2",
        "of   1 0 1 1",
        "i   1 0 1 1",
        "for   1 0 1 1",
        "first   1 0 1 1",
        "day   1 0 1 1",
        "association   1 0 1 1",
    ]


def test_files(tmp_path):
    report = write_reports(tmp_path / "greedy", "test", "epoch-3-avg-2", RESULTS, "greedy_search")
    write_reports(tmp_path / "greedy", "test", "epoch-3-avg-2", RESULTS[3:], "beam_size_4")
    folder = tmp_path / "greedy"
    assert report == score(RESULTS)
    assert sorted(p.name for p in folder.iterdir()) == [
        "errs-test-epoch-3-avg-2.txt",
        "recogs-test-epoch-3-avg-2.txt",
        "wer-by-language-test-epoch-3-avg-2.txt",
        "wer-summary-test-epoch-3-avg-2.txt",
    ]
    summary = (folder / "wer-summary-test-epoch-3-avg-2.txt").read_text()
    assert summary == "settings\tWER\nbeam_size_4\t0.00\ngreedy_search\t30.77\n"
    recogs = (folder / "recogs-test-epoch-3-avg-2.txt").read_text()
    assert recogs == "d:\tref=['tres', 'cuatro']\nd:\thyp=['tres', 'cuatro']\n"


def test_summaries_keep_only_rates_of_the_same_unit(tmp_path):
    for unit, setting in (("word", "greedy_search"), ("char", "beam_4"), ("char", "beam_8")):
        write_reports(tmp_path, "test", "avg-2", RESULTS, setting, unit)
    heading, *lines = (tmp_path / "wer-summary-test-avg-2.txt").read_text().splitlines()
    rate = f"{100 * score(RESULTS, characters).rate:.2f}"
    assert [heading, *lines] == ["settings\tCER", f"beam_4\t{rate}", f"beam_8\t{rate}"]
    assert (tmp_path / "errs-test-avg-2.txt").read_text().startswith(f"%WER = {rate}\n")


def rows(table):
    return [line.split() for line in table.splitlines()]


def test_table():
    lines = rows(error_table(RESULTS))
    assert [line[0] for line in lines] == ["language", "en", "es", "all"]
    assert lines[1][1:4] == ["2", "11", "18.18%"]
    assert lines[2][1:4] == ["2", "2", "100.00%"]
    assert lines[3][1:4] == ["4", "13", "30.77%"]


@pytest.mark.parametrize("unit", ["word", "char", "mixed"])
@pytest.mark.parametrize("by", ["language", "speaker", "duration"])
def test_rows_add_up(by, unit):
    known = [
        Transcript(f"{i}{r.id}", r.ref, r.hyp, r.language, f"s{i % 3}", duration=7.0 * i)
        for i in range(6)
        for r in RESULTS
    ]
    heading, *groups, total = rows(error_table([*known, Transcript("z", "one", "two")], by, unit))
    assert total[0] == "all" and groups[0][0] == "-" and len(groups) > 2
    for name in ("utterances", "ins", "del", "sub"):
        # from the right, as "0-2 s" is two words; the last two columns have a heading of four
        place = heading.index(name) - len(heading) + 2
        assert sum(int(row[place]) for row in groups) == int(total[place])


def test_durations_are_in_order():
    results = [Transcript(str(seconds), "a", "a", duration=seconds) for seconds in (31.0, 1.9, 2.0, 12.0, 30.0)]
    names = {name: [results[i].duration for i in group] for name, group in grouped(results, "duration").items()}
    assert list(names.items()) == [("0-2 s", [1.9]), ("2-5 s", [2.0]), ("10-20 s", [12.0]), ("30+ s", [31.0, 30.0])]


def test_without_groups_there_is_one_row():
    assert [row[0] for row in rows(error_table([Transcript("a", "x", "x")]))] == ["language", "all"]
