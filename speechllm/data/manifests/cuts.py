"""What the supervisions of lhotse cuts say of an utterance, and cuts changed so that they say it without a source."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from lhotse import fastcopy
from lhotse.cut import Cut, MixedCut, MonoCut, MultiCut
from lhotse.cut.data import DataCut
from lhotse.supervision import SupervisionSegment

from speechllm.data.manifests.source import Entry, SourceConfig, duration_of, hotwords_of, string_of
from speechllm.data.manifests.supervisions import (
    Part,
    Said,
    Understood,
    bounds,
    data_cuts,
    in_order,
    parts_of,
    translation_of_all,
    understand,
)
from speechllm.data.manifests.task import TRANSLATIONS, Writing, what_to_write
from speechllm.text.languages import same_language


def describe_cut(cut: Cut) -> Entry:
    """What a cut of `to_cut` says of its utterance: the texts of its supervisions in the order of their times; language
    and what the prompt needs are those of the first supervision that has them, or the cut's own custom fields. Cuts
    that are mixed of several have no word times.

    Raises:
        ValueError: it cannot be told what is said, or a custom field has a wrong type or value.
    """
    entry = entry_of(cut.id, duration_of({"duration": cut.duration}), parts_of(cut), None)
    return entry if isinstance(cut, DataCut) else dataclasses.replace(entry, words=None)


def entry_of(name: str, duration: float, parts: Sequence[Part], source: SourceConfig | None) -> Entry:
    """What the parts of a cut say of its utterance; `source`: see `what_to_write`."""
    found = [understand(part, source) for part in parts]
    said = sorted(itertools.chain(*(part.said for part in found)), key=lambda one: bounds(one.supervision))
    fields: dict = {}
    for custom in [*(one.supervision.custom for one in said), *(part.custom for part in parts)]:
        fields = (custom or {}) | fields
    if said:
        inside = in_order(said)
        writing = _together(said, inside, parts)
    else:
        inside, writing = [], _without_supervisions(fields, source)
    words = [one.supervision.words for one in inside]
    all_words = tuple(word for of_one in words for word in of_one or ())
    return Entry(
        name,
        duration,
        writing.text,
        writing.lang,
        writing.task,
        writing.ast_text,
        writing.target_lang,
        None if None in words or not words else all_words,
        string_of(fields, "previous"),
        hotwords_of(fields),
    )


def _without_supervisions(fields: dict, source: SourceConfig | None) -> Writing:
    return what_to_write(fields, None, string_of(fields, "source_lang", "lang"), source)


def _together(said: Sequence[Said], inside: Sequence[Said], parts: Sequence[Part]) -> Writing:
    """What is to be written of a whole cut.

    Args:
        said: all of its supervisions by time.
        inside: those that have something to write.

    Raises:
        ValueError: they are to be written in several ways.
    """
    writings = [one.writing for one in inside or said]
    ways = {(w.task, w.target_lang) for w in writings}
    if len(ways) > 1 and any(task == "ast" for task, _ in ways):
        listed = ", ".join(f"{task} into {target or 'no language'}" for task, target in sorted(ways, key=str))
        raise ValueError(f"supervisions of several tasks: {listed}")
    spoken = list(dict.fromkeys(one.writing.lang for one in inside if one.writing.lang))
    if not all(same_language(spoken[0], lang) for lang in spoken):
        raise ValueError(
            f"supervisions of several languages ({', '.join(spoken)}), and a prompt has room for one: make a cut of "
            "each with lhotse's cut.trim_to_supervisions(), or name them alike with `languages` of the source"
        )
    custom = {name: value for part in parts for name, value in part.custom.items()}
    return Writing(
        " ".join(one.writing.text for one in inside if one.writing.text),
        next((w.lang for w in writings if w.lang), None),
        writings[0].task,
        translation_of_all(inside, custom),
        next((w.target_lang for w in writings if w.target_lang), None),
    )


def settled_cut(cut: Cut, source: SourceConfig) -> Cut:
    """The cut so that `describe_cut` says of it what it says to `source`, with the channels that are to be averaged.
    Changes the cut.

    Raises:
        ValueError: see `describe_cut`.
    """
    parts, cuts = parts_of(cut), data_cuts(cut)
    entry_of(cut.id, duration_of({"duration": cut.duration}), parts, source)  # for its errors
    settled = {}
    found = [understand(part, source) for part in parts]
    for part, data_cut, understood in zip(parts, cuts, found, strict=True):
        data_cut.supervisions = [_settled_supervision(data_cut, part, one) for one in understood.said]
        settled[id(data_cut)] = _on_channels(data_cut, part, understood)
    if cuts and not any(understood.said for understood in found):
        fields: dict = {}
        for part in parts:
            fields = part.custom | fields
        writing = _without_supervisions(fields, source)
        stated = _stated(writing) | {"lang": writing.lang, "source_lang": writing.lang}
        stated["asr_text"] = writing.text or None
        first = settled[id(cuts[0])]
        first.custom = (first.custom or {}) | {name: value for name, value in stated.items() if value is not None}
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            track.cut = settled.get(id(track.cut), track.cut)
        return cut
    return settled.get(id(cut), cut)


def _settled_supervision(cut: DataCut, part: Part, one: Said) -> SupervisionSegment:
    original, supervision, writing = cut.supervisions[one.supervision.number], one.supervision, one.writing
    stated = _stated(writing)
    of_cut, of_supervision = (
        any(custom.get(name) is not None for name in TRANSLATIONS) for custom in (part.custom, supervision.custom)
    )
    if of_cut and not of_supervision:  # one for all supervisions of the cut
        cut.custom = (cut.custom or {}) | {"ast_text": stated.pop("ast_text", writing.ast_text)}
    if (supervision.custom | part.custom).get("source_lang") is not None:
        stated["source_lang"] = writing.lang
    custom = (original.custom or {}) | {name: value for name, value in stated.items() if value is not None}
    alignment = original.alignment
    if alignment is not None and supervision.words is not None:
        items = zip(alignment["word"], supervision.words, strict=True)
        alignment = alignment | {"word": [item._replace(symbol=word.word) for item, word in items]}
    text = None if original.text is None and not writing.text else writing.text
    return fastcopy(original, text=text, language=writing.lang, custom=custom or None, alignment=alignment)


def _stated(writing: Writing) -> dict[str, str | None]:
    """The custom fields that say what is to be written; none of a plain transcript."""
    if writing.task == "asr" and writing.target_lang is None and not writing.ast_text:
        return {}
    stated: dict[str, str | None] = {"task": writing.task, "target_lang": writing.target_lang}
    # of a translation even where it is empty: the text would be taken for it
    return stated | {"ast_text": writing.ast_text if writing.task == "ast" else writing.ast_text or None}


def _on_channels(cut: DataCut, part: Part, understood: Understood) -> DataCut:
    """The cut of these of its channels alone."""
    if understood.channels == part.channels:
        return cut
    channels = sorted(understood.channels)
    channel = channels[0] if len(channels) == 1 else channels
    return (MonoCut if len(channels) == 1 else MultiCut)(
        cut.id,
        cut.start,
        cut.duration,
        channel,
        [fastcopy(supervision, channel=channel) for supervision in cut.supervisions],
        recording=cut.recording,
        custom=cut.custom,
    )
