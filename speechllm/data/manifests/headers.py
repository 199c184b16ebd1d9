"""How long recordings are, by the headers of their files, for manifests that do not say it."""

from __future__ import annotations

import io
import subprocess

from lhotse.audio.backend import info as audio_info


def audio_seconds(audio: str | bytes) -> float:
    """Seconds of a file, or of the contents of one.

    Raises:
        ValueError: it cannot be opened as audio.
    """
    try:
        return audio_info(io.BytesIO(audio) if isinstance(audio, bytes) else audio).duration
    except Exception as error:  # each of lhotse's audio backends raises what it likes
        name = "the audio" if isinstance(audio, bytes) else audio
        (reason, *_) = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"missing field 'duration', and {name} cannot be read: {reason}") from error


def command_seconds(command: str) -> float:
    """Seconds of what a command writes.

    Raises:
        ValueError: it fails, or writes no audio.
    """
    try:
        output = subprocess.run(command, shell=True, check=True, stdout=subprocess.PIPE).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(str(error)) from error
    return audio_seconds(output)
