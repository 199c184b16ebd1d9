"""BLEU and chrF of translations, by sacrebleu (Post, "A call for clarity in reporting BLEU scores", WMT 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from speechllm.errors import UserError
from speechllm.scoring.counting import Transcript


@dataclass(frozen=True)
class TranslationScores:
    """Of a whole set, from 0 to 100; the signatures say how they were computed, and belong beside published numbers."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def translation_scores(results: Sequence[Transcript]) -> TranslationScores | None:
    """BLEU and chrF2 of one or more results, with sacrebleu's tokenizer for the language that they are translated into.

    Returns:
        None where there are several such languages, and so no one tokenizer.

    Raises:
        UserError: sacrebleu, or what it needs for the language, is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise UserError("BLEU and chrF need sacrebleu: pip install 'speechllm[translation]'") from error
    targets = {(result.language or "").rpartition(">")[2] for result in results}
    if len(targets) > 1:
        return None
    (target,) = targets
    hyps, refs = [result.hyp for result in results], [[result.ref for result in results]]
    try:
        bleu, chrf = BLEU(trg_lang=target), CHRF()
    except RuntimeError as error:
        raise UserError(f"BLEU of {target}: {' '.join(str(error).split())}") from error
    return TranslationScores(
        bleu.corpus_score(hyps, refs).score,
        chrf.corpus_score(hyps, refs).score,
        str(bleu.get_signature()),
        str(chrf.get_signature()),
    )
