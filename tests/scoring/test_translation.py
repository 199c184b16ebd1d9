"""BLEU and chrF: those of sacrebleu, with the tokenizer of the language."""

import sys

import pytest
import sacrebleu

from speechllm.errors import UserError
from speechllm.scoring import Transcript
from speechllm.scoring.reports import translation_table
from speechllm.scoring.translation import translation_scores

CHINESE = [Transcript("a", "你好，大家今天好", "你好，大家今天不", "en>zh")]
GERMAN = [Transcript("b", "Das ist, wie immer, gut.", "Das ist, wie immer, gut!", "en>de")]


@pytest.mark.parametrize("results, tokenizer", [(CHINESE, "zh"), (GERMAN, "13a")])
def test_scores_are_those_of_sacrebleu(results, tokenizer):
    hyps, refs = [r.hyp for r in results], [[r.ref for r in results]]
    scores = translation_scores(results)
    assert scores.bleu == sacrebleu.corpus_bleu(hyps, refs, tokenize=tokenizer).score > 0
    assert scores.chrf == sacrebleu.corpus_chrf(hyps, refs).score
    assert f"tok:{tokenizer}" in scores.bleu_signature


def test_several_target_languages_have_no_common_score():
    lines = [line.split() for line in translation_table([*CHINESE, *GERMAN]).splitlines()]
    assert [line[0] for line in lines[:4]] == ["language", "en>de", "en>zh", "all"]
    assert lines[3][1:] == ["2", "-", "-"] and "-" not in lines[1] + lines[2]
    assert {line[0] for line in lines[4:]} == {"BLEU:", "chrF2:"}


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(UserError, match=r"speechllm\[translation\]"):
        translation_scores(GERMAN)
