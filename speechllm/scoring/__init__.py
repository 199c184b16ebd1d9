"""How good transcripts and translations are: error rates, the files that icefall users look for, and what is chance.

| | |
|---|---|
| `counting.py` | transcripts, their units (words, characters, both), alignment, error counts |
| `reports.py` | tables, and the `recogs`, `errs`, `wer-summary` files |
| `significance.py` | confidence intervals, and the comparison of two systems |
| `translation.py` | BLEU and chrF |
| `hotwords.py` | errors on hotwords and on the rest |
| `reading.py`, `text_files.py` | the files that `speechllm score` reads, and the forms of other programs |
| `command.py` | what it does with them |
"""

from speechllm.scoring.counting import (
    UNITS,
    ErrorReport,
    Transcript,
    align,
    characters,
    count_errors,
    exact_match,
    language_accuracy,
    mixed,
    score,
    transcripts,
    word_time_error,
    words,
)
from speechllm.scoring.reports import error_table, errs_text, recogs_text, write_reports
from speechllm.scoring.significance import Comparison, compare, confidence_interval, matched_pairs_test

__all__ = [
    "UNITS",
    "Comparison",
    "ErrorReport",
    "Transcript",
    "align",
    "characters",
    "compare",
    "confidence_interval",
    "count_errors",
    "error_table",
    "errs_text",
    "exact_match",
    "language_accuracy",
    "matched_pairs_test",
    "mixed",
    "recogs_text",
    "score",
    "transcripts",
    "word_time_error",
    "words",
    "write_reports",
]
