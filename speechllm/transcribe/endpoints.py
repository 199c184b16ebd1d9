"""Live audio, cut into what is said between pauses, as soon as a pause has come.

`pauses.split_at_pauses` looks at the next half minute before it cuts; here nobody has heard it yet. A frame of 10 ms is
sound when it is above -70 dB, above 40 dB below the loudest 5 % so far, and 6 dB above the noise: the level that 10 %
of the last 10 s are below, or -60 dB until 3 s are known. Levels are looked at 0.1 s at a time, so that how the samples
come has no influence.
"""

from __future__ import annotations

import numpy as np

from speechllm.data.features import SAMPLE_RATE
from speechllm.transcribe.pauses import (
    FRAME,
    LEAST_SOUND,
    NOISE_MARGIN,
    NOISE_PERCENTILE,
    PADDING,
    SILENCE,
    SOUND_RANGE,
    AudioSegment,
    Loudness,
    best_cut,
    frame_levels,
)

_HOP = 10  # frames
_NOISE_FRAMES = 1000
_FIRST_FRAMES, _FIRST_NOISE = 30, -60.0
_FRAMES_PER_SECOND = SAMPLE_RATE // FRAME


class Endpointer:
    """Cuts one stream.

    Args:
      silence_seconds: a pause of this length ends a segment; None: only `finish` does.
      max_seconds: a longer segment is cut where it is quietest, as in `split_at_pauses`.

    Attributes:
      started: where the segment begins that is being spoken, in seconds from the first sample; None in a pause.
    """

    def __init__(self, silence_seconds: float | None = 0.6, max_seconds: float = 30.0) -> None:
        self._silence = None if silence_seconds is None else round(silence_seconds * _FRAMES_PER_SECOND)
        self._most = int(max_seconds * _FRAMES_PER_SECOND)
        self._loudness = Loudness()
        self._samples = np.zeros(0, dtype=np.float32)  # from frame `_start` on
        self._levels = np.zeros(0)  # of these, as far as they were looked at
        self._sound = np.zeros(0, dtype=bool)
        self._start = self._shared = 0  # frames before these; how many at their beginning the last segment has too
        # Of a stream that begins with speech, the first frames are no noise.
        self._last_levels = np.full(_FIRST_FRAMES, _FIRST_NOISE)
        self.started: float | None = None

    @property
    def seconds(self) -> float:
        """How much audio it has heard."""
        return self._start / _FRAMES_PER_SECOND + len(self._samples) / SAMPLE_RATE

    def accept(self, samples: np.ndarray) -> list[AudioSegment]:
        """The segments that have ended with these samples: (num_samples,) float32 in [-1, 1], 16 kHz."""
        self._samples = np.concatenate([self._samples, samples])
        segments = []
        while len(self._samples) >= (len(self._levels) + _HOP) * FRAME:
            self._look()
            if (segment := self._ended()) is not None:
                segments.append(segment)
        return segments

    def finish(self) -> list[AudioSegment]:
        """What is being said, to the end of the audio. Audio that comes after is of the next segment."""
        segment = self._taken(len(self._samples)) if self.started is not None else None
        self._drop(len(self._samples))
        return [] if segment is None else [segment]

    def _look(self) -> None:
        at = len(self._levels)
        new = frame_levels(self._samples[at * FRAME : (at + _HOP) * FRAME])
        self._loudness.add(self._start + at, new)
        self._last_levels = np.concatenate([self._last_levels, new])[-_NOISE_FRAMES:]
        noise = float(np.percentile(self._last_levels, NOISE_PERCENTILE))
        threshold = max(SILENCE, self._loudness.level() - SOUND_RANGE, noise + NOISE_MARGIN)
        self._levels = np.concatenate([self._levels, new])
        self._sound = np.concatenate([self._sound, new > threshold])

    def _ended(self) -> AudioSegment | None:
        """The segment that ends with what was looked at last, if one does. Silence before speech is forgotten."""
        frames = len(self._levels)
        if self.started is None:
            first = int(self._sound.argmax()) if self._sound.any() else frames
            self._drop(max(0, first - PADDING) * FRAME)
            if np.count_nonzero(self._sound) < LEAST_SOUND:
                # a click is no speech
                if self._sound.any() and frames > 2 * PADDING + _HOP:
                    self._drop((frames - PADDING) * FRAME)
                return None
            self.started = self._start / _FRAMES_PER_SECOND
            return None
        places = np.flatnonzero(self._sound)
        last = int(places[-1]) + 1 if len(places) else 0  # the frame after the last one with sound
        if self._silence is not None and frames - last >= self._silence:
            end = min(frames, last + PADDING) * FRAME
            # what goes on after a cut may be silence alone
            segment = self._taken(end) if len(places) >= LEAST_SOUND else None
            self.started, self._shared = None, 0
            self._drop(end)
            return segment
        if frames >= self._most:
            end, after = best_cut(self._levels, self._loudness.level())
            segment = self._taken(end * FRAME)
            self._drop(after * FRAME)
            self._shared = end - after
            self.started = self._start / _FRAMES_PER_SECOND
            return segment
        return None

    def _taken(self, samples: int) -> AudioSegment:
        overlap, self._shared = self._shared / _FRAMES_PER_SECOND, 0
        self.started = None
        return AudioSegment(self._samples[:samples].copy(), self._start / _FRAMES_PER_SECOND, overlap)

    def _drop(self, samples: int) -> None:
        """Forget the first samples: whole frames, but for the end of all that there is, which is taken for one."""
        frames = -(-samples // FRAME)
        self._samples, self._start = self._samples[samples:], self._start + frames
        self._levels, self._sound = self._levels[frames:], self._sound[frames:]
