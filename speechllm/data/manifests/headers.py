"""How long recordings are, by their files, for manifests that do not say it."""

from __future__ import annotations

import subprocess

from speechllm.data.audio_file import UtteranceError, open_audio
from speechllm.data.commands import command_output


def audio_seconds(audio: str | bytes, name: str | None = None) -> float:
    """Seconds of a file, or of the contents of one.

    Args:
        name: for messages; None for the path.

    Raises:
        ValueError: it cannot be opened as audio.
    """
    name = name or ("the audio" if isinstance(audio, bytes) else audio)
    try:
        with open_audio(audio, name) as file:
            return file.count_frames() / file.rate
    except UtteranceError as error:
        raise ValueError(f"missing field 'duration', and {error}") from error


def command_seconds(command: str) -> float:
    """Seconds of what a command writes.

    Raises:
        ValueError: it fails, or writes no audio.
    """
    try:
        output = command_output(command, keep=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(str(error)) from error
    return audio_seconds(output, command)
