#!/usr/bin/env python3
"""Decode test sets with a trained model and score them: the decode loop of every recipe.

    python recipes/decode.py --config configs/digits.yaml --exp-dir recipes/digits/exp --model recipes/digits/exp/AVG
    torchrun --nproc-per-node 8 recipes/decode.py ...               # on 8 GPUs; elsewhere --world-size 8 --rank K

--model is a folder written by tools/average_ckpt.py, or an id of the Hugging Face Hub. An encoder alone (trained with
model.llm: null) is decoded by its transducer's greedy search, if it has one, and by CTC, if it has that. Each set under
`data.test` is decoded by the search that is asked for and, where the model has a CTC head, by CTC as well.
EXP_DIR/greedy_search (or beam_search_4, ...) and EXP_DIR/ctc_greedy_search receive, as in icefall,
recogs-SET-MODEL.txt, errs-SET-MODEL.txt, wer-summary-SET-MODEL.txt and wer-by-language-SET-MODEL.txt. By language are
printed, and put into the model's card (README.md): WER, CER, the share of texts without any error (exact), that of
languages identified rightly, by a model that does so, errors on hotwords (B-WER) and on the rest (U-WER), how far the
times of words are off (those in the manifest are its `alignment`), where they are written by the model or found by
--timestamps, and the BLEU of translations, where sacrebleu is installed. Translations are in groups such as en>zh, and
CTC has none of them. A text that a guard has stopped, because it repeats itself or is too long for its audio, is cut
there; how many is logged. An utterance that the model cannot recognize, such as one without the language that the
prompt names, is logged and left out; one that is too short to hear anything in has an empty text. Ctrl-C ends the
program with the status 130.

What is found is kept batch by batch (part-RANK-of-WORLD_SIZE-SET-MODEL-*.jsonl): the same command, with the same model,
options and data, goes on from there. Of several processes, wherever and whenever they run, the one that finishes last
writes the results, the same as one process would.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from speechllm.cli.exits import run_to_exit
from speechllm.cli.options import add_dtype_option, add_share_options, add_weights_options, share_of
from speechllm.cli.search_options import (
    add_search_options,
    check_without_language_model,
    search_identity,
    search_options,
)
from speechllm.config import ConfigError
from speechllm.data import Batch, SpeechLoader, build_eval_loader
from speechllm.data.share import Share
from speechllm.decode.interface import RecognizeOptions, Recognizer, Speech
from speechllm.decode.result import Recognition
from speechllm.errors import UserError
from speechllm.hub import hub_id
from speechllm.log import setup_logging
from speechllm.model.build import load_model, model_identity, prepare_for_inference
from speechllm.model.card import add_results
from speechllm.model.config import load_model_config
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.scoring import (
    Transcript,
    characters,
    exact_match,
    language_accuracy,
    score,
    transcripts,
    word_time_error,
    write_reports,
)
from speechllm.scoring.hotwords import hotword_report
from speechllm.scoring.parts import Part, part_paths, together
from speechllm.scoring.reports import aligned
from speechllm.scoring.translation import translation_scores
from speechllm.train.config import Experiment, load_experiment

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="experiment configuration (YAML)")
    parser.add_argument("--exp-dir", required=True, type=Path, help="folder for logs and results")
    parser.add_argument("--model", required=True, type=Path, help="folder of the trained model")
    add_share_options(parser)
    add_weights_options(parser)
    add_dtype_option(parser)
    parser.add_argument(
        "--timestamps",
        action="store_true",
        help="find when each word is said, with the CTC head, where the model does not write it",
    )
    add_search_options(parser)
    args, overrides = parser.parse_known_args()

    def run() -> None:
        share = share_of(args)
        config = load_experiment(args.config, overrides)
        asked, own = search_options(args, shows_nbest=False), load_model_config(args.model)
        options = replace(own.recognize_options(asked), timestamps=args.timestamps)
        if own.llm is None:
            check_without_language_model(args)
        weights = args.llm_weights, args.encoder_weights
        decode(config, args.exp_dir, args.model, args.dtype, weights, options, share)

    run_to_exit(run)


def decode(
    config: Experiment,
    exp_dir: Path,
    model_dir: Path,
    dtype: str | None,
    weights: tuple[str, str | None],
    options: RecognizeOptions,
    share: Share,
) -> None:
    if not config.data.test:
        raise ConfigError("data.test names no test set")
    setup_logging(exp_dir / "log", "log-decode", share.rank)
    model = load_model(model_dir)
    prepare_for_inference(model, None, dtype, *weights)
    recognizer = model.recognizer(options)
    search, ctc_search = search_names(options)
    if model.llm is None and model.transducer is None:
        search = ctc_search
    data = asdict(config.data) | {"num_workers": 0}  # how many has no influence
    follows_from = [model_identity(model_dir), search_identity(options), dtype, *filter(None, weights), data]
    parts: dict[str, list[Path]] = {}
    for name, sources in config.data.test.items():
        loader = build_eval_loader(config.data, sources, share.rank, share.world_size, feature_kind=model.feature_kind)
        digest = hashlib.sha256(repr([*follows_from, loader.state_dict()["identity"]]).encode()).hexdigest()[:8]
        parts[name] = part_paths(exp_dir / search, f"{name}-{model_dir.name}-{digest}", share.world_size)
        part = Part(parts[name][share.rank])
        if not part.finished:
            loader.load_state_dict(loader.state_dict() | {"batches": part.batches})
            decode_set(name, model, recognizer, loader, config.data.text, part, (search, ctc_search))
            part.finish()
    results: dict[str, dict[str, list[Transcript]]] = {}
    for name, paths in parts.items():
        if (found := together(paths)) is None:
            print(f"rank {share.rank} of {share.world_size} is done; the one that finishes last writes the results")
            return
        results[name] = found
    report(exp_dir, model_dir, results, search)
    for path in itertools.chain(*parts.values()):
        path.unlink(missing_ok=True)


def decode_set(
    name: str,
    model: SpeechLLM | EncoderModel,
    recognizer: Recognizer,
    loader: SpeechLoader,
    text_steps: Sequence[str],
    part: Part,
    searches: tuple[str, str],
) -> None:
    """Decode what is left of this process's batches of a test set, to `part`."""
    audio_seconds, utterances, stopped, left_out, start = 0.0, 0, 0, 0, time.perf_counter()
    # that are being searched, the rows that can be, and how many the loader had given with it
    batches: deque[tuple[Batch, list[int], int]] = deque()

    def speech() -> Iterator[Speech]:
        nonlocal left_out
        for batch in tqdm(loader, desc=name, unit="batch", disable=None):
            batch = batch.to(model.device)
            rows = recognizable_rows(recognizer, batch)
            left_out += len(batch) - len(rows)
            if rows:
                batches.append((batch, rows, loader.batches))
                yield speech_of(batch).rows(rows)

    for recognitions in recognizer(speech()):
        batch, rows, number = batches.popleft()
        found: list[Recognition | None] = [None] * len(batch)
        for row, recognition in zip(rows, recognitions, strict=True):
            found[row] = recognition
        texts, languages, words, ctc_texts = (
            [getattr(recognition, attribute, None) for recognition in found]
            for attribute in ("text", "language", "words", "ctc_text")
        )
        by_llm, by_ctc = (
            transcripts(batch, texts, text_steps, languages, words),
            transcripts(batch, ctc_texts, text_steps),
        )
        part.add(number, dict(zip(searches, (by_llm, by_ctc), strict=True)) if by_ctc else {searches[0]: by_llm})
        audio_seconds += sum(batch.durations[row] for row in rows)
        utterances += len(rows)
        stopped += sum(r.fallback is not None for r in recognitions)
    elapsed = time.perf_counter() - start
    logger.info(
        "%s: %d utterances, %.0f s of audio in %.1f s (real-time factor %.4f); %d texts were cut, %d left out",
        name, utterances, audio_seconds, elapsed, elapsed / max(audio_seconds, 1e-9), stopped, left_out,
    )  # fmt: skip


def report(
    exp_dir: Path, model_dir: Path, results: Mapping[str, Mapping[str, Sequence[Transcript]]], search: str
) -> None:
    """Score the results, by test set and search, and write and print what there is to say of them.

    Raises:
      UserError: there are none.
    """
    table: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    rates: dict[tuple[str, str], float] = {}
    for name, of_set in results.items():
        if not of_set.get(search):
            logger.error("%s: no utterance of this test set can be recognized", name)
            continue
        for setting, recognized in of_set.items():
            errors = write_reports(exp_dir / setting, name, model_dir.name, recognized, setting=setting)
            logger.info("%s, %s: WER %s", name, setting, errors)
            rates[name, setting] = round(100 * errors.rate, 2)
            spoken = sorted({t.language for t in recognized if t.language is not None})
            groups = [(language, [t for t in recognized if t.language == language]) for language in spoken]
            for language, group in [*groups, ("all", recognized)]:
                table[name, language].setdefault("words", str(score(group).ref_len))  # CTC may have fewer
                table[name, language] |= measures(setting, group)
    if not table:
        raise UserError(f"{model_dir}: no utterance of the test sets can be recognized; the log says why")
    text = table_text(table)
    print(f"\n{text}", end="")
    if hub_id(model_dir) is None:  # the card of a model on the Hub is its owner's
        add_results(model_dir, text, rates)


def speech_of(batch: Batch) -> Speech:
    return Speech(batch.features, batch.feature_lens, batch.requests)


def recognizable_rows(recognizer: Recognizer, batch: Batch) -> list[int]:
    """The rows of a batch that the model can recognize; what the others lack is logged. They are left out, as are
    utterances whose audio cannot be read."""
    rows = []
    for row, (request, frames) in enumerate(zip(batch.requests, batch.feature_lens.tolist(), strict=True)):
        try:
            recognizer.check(request, frames)
        except UserError as error:
            logger.warning("left out: %s: %s", request.id, error)
        else:
            rows.append(row)
    return rows


def search_names(options: RecognizeOptions) -> tuple[str, str]:
    """Names of the folders for what the language model's (or the transducer's) search and the CTC head's find."""
    search = options.search
    name = f"beam_search_{search.beam}" if search.method == "beam" else f"{search.method}_search"
    for part, used in (("ctc", options.ctc_weight), ("hotwords", options.hotwords), ("ngram", options.ngram)):
        name += f"_{part}" if used else ""
    return name, "ctc_greedy_search" if options.ctc_beam == 1 else f"ctc_prefix_beam_search_{options.ctc_beam}"


def measures(setting: str, group: Sequence[Transcript]) -> dict[str, str]:
    """The cells of one search's results in the table."""
    cells = {
        f"{setting} WER %": f"{100 * score(group).rate:.2f}",
        f"{setting} CER %": f"{100 * score(group, characters).rate:.2f}",
        f"{setting} exact %": f"{100 * exact_match(group):.2f}",
    }
    if (accuracy := language_accuracy(group)) is not None:
        cells[f"{setting} language %"] = f"{100 * accuracy:.2f}"
    if (off := word_time_error(group)) is not None:
        cells[f"{setting} times off, ms"] = f"{1000 * off:.0f}"
    if (hotwords := hotword_report(group)) is not None:
        cells[f"{setting} B-WER %"] = f"{100 * hotwords.listed.rate:.2f}"
        cells[f"{setting} U-WER %"] = f"{100 * hotwords.others.rate:.2f}"
        cells[f"{setting} false hotwords"] = f"{hotwords.written}/{hotwords.absent}"
    if all(">" in (result.language or "") for result in group) and importlib.util.find_spec("sacrebleu") is not None:
        bleu = translation_scores(group)
        cells |= {f"{setting} BLEU": f"{bleu.bleu:.2f}"} if bleu is not None else {}
    return cells


def table_text(table: Mapping[tuple[str, str], Mapping[str, str]]) -> str:
    """What was measured, by test set and language; `-` where a search has no such results."""
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    rows = [["test set", "language", *columns]]
    for (name, language), cells in table.items():
        rows.append([name, language, *(cells.get(column, "-") for column in columns)])
    return aligned(rows, left=2)


if __name__ == "__main__":
    main()
