"""What the supervisions of a lhotse cut say of its audio: their texts in the order in which they are said.

A text must be that of audio which the cut has. lhotse's windows keep supervisions that begin or end outside of a cut
with their whole text, and so does `trim_to_supervisions` where speech overlaps: these are refused as lhotse's
`validate_for_asr` refuses them, unless a word alignment says which words are inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lhotse import fastcopy
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.cut.data import DataCut
from lhotse.supervision import AlignmentItem, SupervisionSegment

from speechllm.data.manifests.source import SourceConfig, field_at, string_of, words_of
from speechllm.data.manifests.task import TRANSLATIONS, Writing, what_to_write
from speechllm.prompt.label import WordTime
from speechllm.text.normalize import normalize_text

# Seconds; lhotse's.
_TOLERANCE = 2e-3
# An alignment may go so many seconds beyond what it is the alignment of.
_WORDS_BEYOND = 0.5


@dataclass(frozen=True)
class Supervision:
    """The `number`-th of a cut: `start` and `end` in seconds of the cut, which lasts from 0 to `duration`; `words`
    likewise, as its alignment has them. The cut begins `offset` seconds into what it is a part of. `in_recording`: it
    does not reach outside of the recording, or that is not known."""

    id: str
    start: float
    end: float
    text: str | None
    language: str | None
    channels: frozenset[int]
    custom: dict
    words: tuple[WordTime, ...] | None
    number: int
    duration: float
    offset: float = 0.0
    in_recording: bool = True


@dataclass(frozen=True)
class Part:
    """A cut that is not mixed, or one of those that a mixed cut consists of; `chosen`: which of its channels to take
    alone, if one was chosen."""

    duration: float
    channels: frozenset[int]
    custom: dict
    supervisions: tuple[Supervision, ...]


@dataclass(frozen=True)
class Said:
    """A supervision and what is to be written of it: all of it, also where it reaches outside of the cut."""

    supervision: Supervision
    writing: Writing


@dataclass(frozen=True)
class Understood:
    """Of a part: the channels to average, and what is said on them, in the order of its supervisions."""

    channels: frozenset[int]
    said: tuple[Said, ...]


def data_cuts(cut: Cut) -> list[DataCut]:
    """The cuts that a cut consists of, padding and silence aside."""
    parts = [track.cut for track in cut.tracks if not track.mute] if isinstance(cut, MixedCut) else [cut]
    return [part for part in parts if not isinstance(part, PaddingCut)]


def part_of_json(obj: dict) -> Part:
    """A cut in lhotse's JSON that is not mixed.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, or has a wrong type or value.
    """
    supervisions = obj.get("supervisions") or []
    if not all(isinstance(s, dict) for s in supervisions):
        raise ValueError("supervisions: expected a list of objects")
    whole = (obj.get("recording") or {}).get("duration")
    found = [
        _supervision(s, s.get("alignment"), i, obj["start"], obj["duration"], whole) for i, s in enumerate(supervisions)
    ]
    return Part(obj["duration"], _channels(obj.get("channel", 0)), obj.get("custom") or {}, tuple(found))


def parts_of(cut: Cut) -> list[Part]:
    """All parts of a cut, padding and silence aside."""
    offsets = [0.0] * len(data_cuts(cut))
    if isinstance(cut, MixedCut):
        offsets = [t.offset for t in cut.tracks if not t.mute and not isinstance(t.cut, PaddingCut)]
    names = ("id", "start", "duration", "text", "language", "channel", "custom")
    parts = []
    for part, offset in zip(data_cuts(cut), offsets, strict=True):
        whole = part.recording.duration if part.has_recording else None
        found = [
            _supervision(
                {name: getattr(s, name) for name in names}, s.alignment, i, part.start, part.duration, whole, offset
            )
            for i, s in enumerate(part.supervisions)
        ]
        parts.append(Part(part.duration, _channels(part.channel), part.custom or {}, tuple(found)))
    return parts


def _supervision(
    fields: dict,
    alignment: dict | None,
    number: int,
    cut_start: float,
    duration: float,
    whole: float | None,
    offset: float = 0.0,
) -> Supervision:
    """`whole`: seconds of the recording, None where there is none."""
    start, end = cut_start + fields["start"], cut_start + fields["start"] + fields["duration"]
    return Supervision(
        str(fields["id"]),
        fields["start"],
        fields["start"] + fields["duration"],
        string_of(fields, "text"),
        string_of(fields, "language"),
        _channels(fields.get("channel", 0)),
        fields.get("custom") or {},
        words_of(alignment, cut_start),
        number,
        duration,
        offset,
        whole is None or (start >= -_TOLERANCE and end <= whole + _TOLERANCE),
    )


def _channels(value: int | Iterable[int]) -> frozenset[int]:
    return frozenset([value] if isinstance(value, int) else value)


def understand(part: Part, source: SourceConfig | None) -> Understood:
    """What the supervisions of a part say.

    Args:
        source: None for cuts that have been through this already.

    Raises:
        ValueError: it cannot be told; see `what_to_write`, `_on_channels` and `_with_fields`.
    """
    supervisions, channels = _on_channels(part, None if source is None else source.channel)
    said = []
    for supervision in supervisions:
        if source is not None:
            supervision = _with_fields(supervision, part.custom, source)
        fields = part.custom | {name: value for name, value in supervision.custom.items() if value is not None}
        language = string_of(fields, "source_lang") or supervision.language or string_of(fields, "lang")
        if source is not None and source.lang_field is not None:
            language = supervision.language
        said.append(Said(supervision, what_to_write(fields, supervision.text, language, source)))
    return Understood(channels, tuple(said))


def _on_channels(part: Part, chosen: int | None) -> tuple[tuple[Supervision, ...], frozenset[int]]:
    """The supervisions that are of the audio to be used, and its channels.

    Raises:
        ValueError: the chosen channel is not there, or there are supervisions of several and none was chosen.
    """
    if chosen is not None:
        if chosen not in part.channels:
            raise ValueError(f"channel: {chosen} was chosen, the cut has {_listed(part.channels)}")
        return tuple(s for s in part.supervisions if chosen in s.channels), frozenset([chosen])
    spoken_on = {s.channels for s in part.supervisions}
    if len(spoken_on) > 1:
        raise ValueError(
            f"supervisions of several channels ({' and '.join(sorted(map(_listed, spoken_on)))}): each has the text of "
            "one alone; choose one with channel, or make a cut of each with lhotse's cut.to_mono()"
        )
    for channels in spoken_on:
        if not channels <= part.channels:
            # a cut of one channel of a supervision of several has its text all the same
            if part.channels <= channels:
                break
            raise ValueError(f"supervisions of channel {_listed(channels)}; the cut has {_listed(part.channels)}")
        return part.supervisions, channels
    return part.supervisions, part.channels


def _listed(channels: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(channels)))


def _with_fields(supervision: Supervision, cut_custom: dict, source: SourceConfig) -> Supervision:
    """With its text and language from the fields that the source names, and its words after the source's steps.

    Raises:
        ValueError: there are several texts, and none is named; a text is none.
    """
    text, language, words = supervision.text, supervision.language, supervision.words
    custom = cut_custom | supervision.custom
    fields = custom | {"text": text, "language": language, "custom": custom}
    if source.text_field is not None:
        text = field_at(fields, source.text_field)
    elif text is None and isinstance(texts := custom.get("texts"), list):  # Libriheavy's
        raise ValueError(
            f"supervision {supervision.id}: custom.texts has {len(texts)} texts: say which for the source, with "
            "text_field: custom.texts.0"
        )
    if source.lang_field is not None:
        language = field_at(fields, source.lang_field)
    if source.text and words is not None:
        tag = source.language(language) or source.stated_lang
        words = tuple(word._replace(word=normalize_text(word.word, source.text, tag)) for word in words)
    return replace(supervision, text=text, language=language, words=words)


def in_order(said: Iterable[Said]) -> list[Said]:
    """Those that have something to write, by the time when they begin; what reaches outside of the cut without it.

    Raises:
        ValueError: it cannot be told what is said: one reaches outside of the cut, or two have the same bounds.
    """
    found = [one for one in said if one.writing.text or one.writing.ast_text]
    found.sort(key=lambda one: bounds(one.supervision))
    for one, other in pairwise(one.supervision for one in found):
        if all(abs(x - y) <= _TOLERANCE for x, y in zip(bounds(one), bounds(other), strict=True)):
            raise ValueError(
                f"supervisions {one.id} and {other.id} are both of {one.start:g} to {one.end:g} s: it cannot be told "
                "whether both are said, or are two texts of the same speech; leave one"
            )
    return [inside for one in found if (inside := _inside(one)).writing.text or inside.writing.ast_text]


def bounds(supervision: Supervision) -> tuple[float, float]:
    """Start and end in the whole that the cut is a part of, in seconds."""
    return supervision.offset + supervision.start, supervision.offset + supervision.end


def _inside(one: Said) -> Said:
    """With the words alone of which at least half is inside the cut.

    Raises:
        ValueError: there is no alignment that says which these are.
    """
    supervision, writing = one.supervision, one.writing
    words, duration = supervision.words, supervision.duration
    if supervision.start >= -_TOLERANCE and supervision.end <= duration + _TOLERANCE:
        return one
    where = (
        f"supervision {supervision.id} reaches from {supervision.start:g} to {supervision.end:g} s of a cut of "
        f"{duration:g} s"
    )
    if writing.ast_text or not words:
        raise ValueError(
            f"{where}: its text is not that of this audio. Cut between supervisions, as lhotse's trim_to_supervisions "
            "and, where speech overlaps, trim_to_supervision_groups do, or give the supervision a word alignment"
        )
    if not supervision.in_recording:
        # the times of the words may be those of a longer recording, out of which this one was cut
        raise ValueError(
            f"{where}, and outside of the recording: it cannot be told where the words of its alignment are. lhotse's "
            "Shar of a part of a recording has them so: write whole recordings, or lhotse's JSON lines"
        )
    first, last = min(word.start for word in words), max(word.end for word in words)
    if first < supervision.start - _WORDS_BEYOND or last > supervision.end + _WORDS_BEYOND:
        raise ValueError(
            f"{where}, and the words of its alignment are at {first:g} to {last:g} s: it cannot be told what is said. "
            "Their times must be those of the recording"
        )
    spans = _spans(writing.text, [word.word for word in words])
    if spans is None:
        raise ValueError(
            f"{where}, and the words of its alignment are not those of its text: it cannot be told what is said"
        )
    inside = [i for i, (_, start, end) in enumerate(words) if 0 <= (start + end) / 2 <= duration]
    places = [span for i in inside if (span := spans[i]) is not None]
    text = writing.text[places[0][0] : places[-1][1]] if places else ""
    kept = tuple(WordTime(words[i].word, max(0.0, words[i].start), min(duration, words[i].end)) for i in inside)
    return Said(replace(supervision, words=kept), replace(writing, text=text))


def _spans(text: str, words: Sequence[str]) -> list[tuple[int, int] | None] | None:
    """Where in `text` each word of the alignment is, characters [first, last), with its punctuation and case; None for
    silence. None at all where they are other words."""
    plain = ("lowercase", "remove_punctuation")
    tokens = [(match.span(), said) for match in re.finditer(r"\S+", text) if (said := normalize_text(match[0], plain))]
    spoken = [i for i, word in enumerate(words) if normalize_text(word, plain)]
    spans: list[tuple[int, int] | None] = [None] * len(words)
    if [said for _, said in tokens] == [normalize_text(words[i], plain) for i in spoken]:
        for i, (span, _) in zip(spoken, tokens, strict=True):
            spans[i] = span
        return spans
    # without spaces, or with others, as in Chinese
    places = [i for i, character in enumerate(text) if not character.isspace()]
    joined = ["".join(word.split()) for word in words]
    if "".join(joined) != "".join(text.split()):
        return None
    first = 0
    for i, word in enumerate(joined):
        if word:
            spans[i] = places[first], places[first + len(word) - 1] + 1
            first += len(word)
    return spans


def inside_supervisions(cut: Cut) -> list[SupervisionSegment]:
    """The supervisions of a cut of `to_cut`, those that reach outside of it with the words alone that are inside."""
    found = []
    for part, data_cut in zip(parts_of(cut), data_cuts(cut), strict=True):
        for one in understand(part, None).said:
            original, inside = data_cut.supervisions[one.supervision.number], _inside(one)
            if inside is not one:
                words = inside.supervision.words or ()
                items = [AlignmentItem(w.word, data_cut.start + w.start, w.end - w.start) for w in words]
                start, end = max(0.0, one.supervision.start), min(part.duration, one.supervision.end)
                original = fastcopy(
                    original, start=start, duration=end - start, text=inside.writing.text, alignment={"word": items}
                )
            found.append(original.with_offset(one.supervision.offset))
    return found


def translation_of_all(said: Sequence[Said], custom: dict) -> str:
    """The translation of several supervisions together: each has its own, or the cut has one for all.

    Raises:
        ValueError: some have none.
    """
    has_own = any(one.supervision.custom.get(name) is not None for one in said for name in TRANSLATIONS)
    if any(custom.get(name) is not None for name in TRANSLATIONS) and not has_own:
        return said[0].writing.ast_text if said else ""
    missing = [
        one.supervision.id
        for one in said
        if one.writing.task == "ast"
        and (
            not one.writing.ast_text
            # that of the others is not in the text, so that its text is none either
            or (has_own and all(one.supervision.custom.get(name) is None for name in TRANSLATIONS))
        )
    ]
    if missing and len(missing) < len(said):
        raise ValueError(f"supervision {missing[0]} has no translation, and others of the cut have")
    return " ".join(one.writing.ast_text for one in said if one.writing.ast_text)
