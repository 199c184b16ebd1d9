"""JSON lines of messages, as audio language models are tuned with, as NeMo lines.

`messages` with `role` and `content`, or `conversations` with `from` and `value`; the audio is a part of the content
(`{"type": "audio", "audio": PATH}`, Qwen-Audio), between tags (`<audio>PATH</audio>`; `<|startofspeech|>!PATH
<|endofspeech|>`, FunASR), or in `audios` beside them, with `<audio>` in its place (ms-swift, LLaMA-Factory).

Used is a line with one audio and one answer. What the user and the system say besides is not read: the prompt of a
model here is that of its configuration. As an answer may be anything, the source, or the line, must say that it is a
transcript (`task: asr`) or a translation (`task: ast`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from speechllm.data.manifests.headers import Row, with_durations
from speechllm.data.manifests.kinds import MESSAGES
from speechllm.data.manifests.lines import used_lines
from speechllm.data.manifests.rows import AudioFinder, name_without_suffix
from speechllm.data.manifests.source import LINE_ERRORS, ManifestError, SourceConfig, explain, string_of, task_of

_ANSWERING = ("assistant", "gpt", "model")
_ASKING = ("user", "human", "system")
_TAGGED = re.compile(r"<audio>(.+?)</audio>|<\|startofspeech\|>!(.+?)<\|endofspeech\|>", re.DOTALL)
_AUDIO_PARTS = ("audio", "audio_url", "input_audio")
_KEPT = (
    *("duration", "offset", "channel", "speaker", "previous", "hotwords"),
    *("lang", "source_lang", "target_lang", "task"),
)
_FIELD_OF_TASK = {"asr": "text", "ast": "ast_text"}


def message_objects(files: list[str], source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and NeMo line of every line; the audio is opened where nothing says how long it is."""
    for row in with_durations(row for file in files for row in _rows(file, source)):
        yield row.where, row.line


def _rows(file: str, source: SourceConfig) -> Iterator[Row]:
    finder = AudioFinder(os.path.dirname(file))
    for where, found in used_lines(file):
        if isinstance(found, ManifestError):
            yield Row(where, found)
            continue
        try:
            line = _line(found, source, finder)
            yield Row(where, line, line["audio_filepath"])
        except LINE_ERRORS as error:
            yield Row(where, ManifestError(f"{where}: {explain(error)}"))


def _line(obj: dict, source: SourceConfig, finder: AudioFinder) -> dict[str, Any]:
    messages = next((obj[name] for name in MESSAGES if obj.get(name)), None)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{MESSAGES[0]}: expected a list of messages")
    audio, answers = _listed_audio(obj), []
    for message in messages:
        role = str(message.get("role", message.get("from"))).lower()
        content = message.get("content", message.get("value"))
        if role not in (*_ANSWERING, *_ASKING):
            raise ValueError(f"{MESSAGES[0]}: the role {role!r} is none of {', '.join((*_ASKING, *_ANSWERING))}")
        if message.get("type") == "audio":  # a message for each part
            content = [{"type": "audio", "audio": content}]
        texts, files = _parts(content)
        audio += files
        if role in _ANSWERING:
            answers.append("".join(texts))
    if len(answers) != 1 or len(audio) != 1:
        raise ValueError(
            f"{MESSAGES[0]}: {len(audio)} audio files and {len(answers)} answers; conversations of several turns are "
            "not used: give a line with one audio and its answer"
        )
    task = task_of(obj) or source.task
    if task is None and source.text_field is None:
        raise ValueError(
            "the answer may be anything; if it is what is said, give task: asr, and if it is a translation, task: ast, "
            "for the source or in the line"
        )
    field = source.text_field or _FIELD_OF_TASK[str(task)]
    path = audio[0].removeprefix("file://")
    line = {"id": string_of(obj, "id", "key") or name_without_suffix(path)}
    line |= {name: obj[name] for name in _KEPT if obj.get(name) is not None}
    return line | {field: answers[0], "audio_filepath": finder.path(path)}


def _listed_audio(obj: dict) -> list[str]:
    listed = obj.get("audios") or obj.get("audio") or []
    paths = [listed] if isinstance(listed, str) else listed
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"audios: expected paths, found {listed!r}")
    return list(paths)


def _parts(content: Any) -> tuple[list[str], list[str]]:
    """The texts and the audio files of a message."""
    texts: list[str] = []
    files: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise ValueError(f"content: expected a text or a list of parts, found {part!r}")
        kind = part.get("type", "text")
        if kind in _AUDIO_PARTS:
            files += _audio_of(part, kind)
        elif kind == "text" and isinstance(part.get("text"), str):
            files += [path.strip() for pair in _TAGGED.findall(part["text"]) for path in pair if path]
            texts.append(_TAGGED.sub("", part["text"]))
        else:
            raise ValueError(f"content: a part of type {kind!r} is not used; expected text and audio")
    return texts, files


def _audio_of(part: dict, kind: str) -> list[str]:
    """The path in a part; none where the audio is listed beside the messages."""
    value = next((part[name] for name in (kind, "audio", "audio_url", "url", "path") if part.get(name)), None)
    value = value.get("url") if isinstance(value, dict) else value
    if value is None and kind == "audio":
        return []
    if not isinstance(value, str) or value.startswith("data:"):
        raise ValueError(f"{kind}: expected a path; audio in the line itself is not read")
    return [value]
