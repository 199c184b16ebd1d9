"""Streaming rows: audio and text of one utterance in turns, so that a model writes while it listens.

The audio is cut into chunks of `chunk_seconds`, from its beginning on. A row that the language model reads is

    [soft | before | boundary | audio 1 | text 1, next | audio 2 | text 2, next | ... | audio K | text K, next
     | rest of the audio | boundary | after | rest of the text], and predicts end of text at its end

`before` and `after` are the text of the template `prompt.streaming` before and after its {audio}; it has a slot
{chunk_seconds}, so that one model serves every latency, and may have all the slots of a transcript's prompt. `soft` and
`boundary` are there if the prompt has them.

Chunks. The K whole chunks of an utterance are whole in the encoder's own frames, 20 ms each: K = frames // frames of
a chunk (for a Zipformer frames = (T - 7) // 2, T frames of features). Each has the same number of positions. What is
left, perhaps nothing, is the rest of the audio: the stream has ended, which `after` tells the model. A chunk that
covers all of the audio is all rest: then the row is that of offline recognition, in the template `prompt.streaming`.

Text. The tokens are those of the offline label, `prompt.before_label` and text encoded as one, dealt out to the chunks:
a chunk has the tokens of the words that end in it. A word ends in the chunk k (from 0) with k * chunk < end + delay <=
(k + 1) * chunk; what ends later is in the rest. Tokens between two words (a space by itself, `before_label`) belong to
the second one, and a token that has parts of several words to the last of these. So the texts of all chunks and the
rest, joined, are the offline label; a chunk may have no text at all.

`next` says that the text of a chunk is complete and more audio is wanted. It is the tokenizer's end of text (`eos_id`),
as in SpeechLLM-XL (arXiv 2410.03752): every tokenizer has one, every language model knows how to write it, also a
frozen one, and no text can be taken for it, as a newline or a tag in pieces could. It is read like any token before the
audio of the next chunk. After the rest of the text the same token ends the whole; it is predicted, never read.

Loss. On text, `next` and the final end of text, each predicted at the position before it: the first token of a chunk's
text, or `next`, at the chunk's last audio position; the first of the rest at the row's last position that is no label,
which is the last `next` where rest, boundary and `after` are all empty. There is no loss where audio or prompt follow.

A recognizer reads `before`, then for each whole chunk its audio, writes greedily until `next`, and reads `next`; at the
end it reads the rest of the audio, the boundary and `after`, and writes until the end of text.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from speechllm.prompt.label import WordTime
from speechllm.prompt.request import Request
from speechllm.prompt.splice import Kind, Segment, Spliced, packed
from speechllm.prompt.template import PromptConfig
from speechllm.text.tokenizer import Tokenizer

# Times are sums of floats: a word that ends with a chunk is in it.
_TOLERANCE = 1e-6


@dataclass
class StreamingConfig:
    """How a model learns to write while it listens (`speechllm.prompt.interleave`).

    Args:
        chunk_seconds: how much audio it hears before it writes, one of the list for each training batch. It is told in
            the prompt, and may be chosen anew when speech is recognized.
        delay_seconds: words are written in the chunk in which they ended so long ago. More delay, more context.
        offline_share: of the training batches; they have all audio before the text, in the prompt of offline
            recognition. Validation is offline.
        memory_seconds: how much of a stream the language model remembers, unless the recognizer is told otherwise: at
            least so much audio and its text, at most twice as much. Not more than the utterances of training last, as
            no model does well what it has never had to do; it is not the encoder's left context.

    Raises:
        ValueError: a value is out of range.
    """

    chunk_seconds: list[float] = field(default_factory=lambda: [0.32, 0.64, 1.28])
    delay_seconds: float = 0.0
    offline_share: float = 0.3
    memory_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.chunk_seconds or min(self.chunk_seconds) <= 0:
            raise ValueError(f"chunk_seconds must be a list of times above 0, got {self.chunk_seconds}")
        if not self.memory_seconds > 0:
            raise ValueError(f"memory_seconds must be above 0, got {self.memory_seconds}")
        if self.delay_seconds < 0:
            raise ValueError(f"delay_seconds must be at least 0, got {self.delay_seconds}")
        if not 0 < self.offline_share < 1:
            raise ValueError(
                f"offline_share must be above 0 and below 1, got {self.offline_share}: validation is offline, and a "
                "model that is to be offline alone needs no model.streaming"
            )

    def draw(self, seed: int, epoch: int, number: int) -> float | None:
        """The chunk of the `number`-th batch of an epoch in seconds, the same for all processes; None for offline."""
        rng = np.random.default_rng([seed, 4, epoch, number])
        if rng.random() < self.offline_share:
            return None
        return self.chunk_seconds[rng.integers(len(self.chunk_seconds))]


def deal_out(
    token_ids: Sequence[int],
    words: Sequence[WordTime],
    tokenizer: Tokenizer,
    *,
    before_label: str,
    num_chunks: int,
    chunk_seconds: float,
    delay_seconds: float = 0.0,
) -> list[list[int]]:
    """The tokens of a label by the chunk that they are written in.

    Args:
        token_ids: of `before_label` and the text.
        words: of the text, in its order; times in seconds from the beginning of the audio.

    Returns:
        `num_chunks` + 1 lists, the last of them the rest; joined they are `token_ids`.
    """
    ends = list(accumulate(_letters(word.word) for word in words))
    chunks = [min(math.ceil((word.end + delay_seconds) / chunk_seconds - _TOLERANCE) - 1, num_chunks) for word in words]
    chunks = list(accumulate(chunks, max, initial=0))[1:]
    stream = tokenizer.stream()
    pieces = [_letters(stream.push(token)) for token in token_ids]
    before = _letters(before_label)
    # 1 unless some letters have no token: those of a tokenizer with an unknown one.
    scale = ends[-1] / max(sum(pieces) - before, 1) if ends else 1.0
    dealt: list[list[int]] = [[] for _ in range(num_chunks + 1)]
    chunk = 0 if chunks else num_chunks
    for token, piece, said in zip(token_ids, pieces, accumulate(pieces), strict=True):
        if chunks:
            # Without a letter of its own, or with only some bytes of one, it belongs to the word of the next letter.
            letter = max(said - before, 0) + (piece == 0)
            word = bisect_left(ends, letter * scale - _TOLERANCE)
            chunk = max(chunk, chunks[min(word, len(chunks) - 1)])
        dealt[chunk].append(token)
    return dealt


def interleave(
    prompt: PromptConfig,
    tokenizer: Tokenizer,
    audio_lens: Sequence[int],
    requests: Sequence[Request],
    label_ids: Sequence[Sequence[Sequence[int]]],
    chunk_seconds: float,
    chunk_positions: int,
) -> Spliced:
    """Lay out the rows of a batch of streams, built on the CPU.

    Args:
        audio_lens: positions of the audio of each row.
        requests: what is asked for each row.
        label_ids: the tokens of each row by chunk, the rest last (`deal_out`). A row with the rest alone has all of its
            audio before its text; so must those with a target language, whose prompt is that of a translation.
        chunk_positions: of the audio of a whole chunk.

    Raises:
        UserError: the prompt has a slot for what an utterance does not have, or a tag that the tokenizer must not
            split.
        ValueError: a row has less audio than its chunks.
    """
    rows: list[list[Segment]] = []
    boundary = (Kind.BOUNDARY, [0] * int(prompt.boundary))
    for audio_len, request, (*chunks, rest) in zip(audio_lens, requests, label_ids, strict=True):
        left = audio_len - len(chunks) * chunk_positions
        if left < 0:
            raise ValueError(f"{len(chunks)} chunks of {chunk_positions} positions in audio of {audio_len}")
        before, after = prompt.encoded(tokenizer, request, chunk_seconds)
        row: list[Segment] = [(Kind.SOFT, [0] * prompt.soft_tokens), (Kind.TEXT, before), boundary]
        for chunk in chunks:
            row += [(Kind.AUDIO, [0] * chunk_positions), (Kind.LABEL, [*chunk, tokenizer.eos_id])]
        row += [(Kind.AUDIO, [0] * left), boundary, (Kind.TEXT, after), (Kind.LABEL, rest)]
        rows.append(row)
    return packed(rows, tokenizer.eos_id)


def _letters(text: str) -> int:
    """How many characters a text has besides white space, whatever Unicode normal form a tokenizer brings it into."""
    return len("".join(unicodedata.normalize("NFKD", text).split()))
