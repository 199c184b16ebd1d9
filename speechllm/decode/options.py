"""What a search and a recognizer can be asked for.

Imports nothing slow: the command line makes its options of these fields, their defaults, limits and help.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import ceil, inf
from typing import Literal, get_args

from speechllm.config import check_limits, setting
from speechllm.errors import UserError

Method = Literal["greedy", "beam", "sample"]

# However short the audio, a word that the tokenizer spells in bytes has room.
_FEWEST_TOKENS = 8

_ONLY_WITH = {
    "beam": "is for method beam alone",
    "length_penalty": "is for method beam, and for sample with nbest above 1",
    **dict.fromkeys(("temperature", "top_p", "top_k", "seed"), "is for method sample alone"),
}


@dataclass(frozen=True)
class SearchOptions:
    """How to search; `speechllm transcribe --help` says what each field is.

    Attributes:
      method: `greedy`, the most probable token, one at a time; `beam`; or `sample`, at random.
      length_penalty: a hypothesis is ranked by the sum of all of its scores / (tokens with the end)**length_penalty.
      temperature: `sample` draws from softmax(logits / temperature).
      top_p: see arXiv 1904.09751.
      seed: an utterance's random numbers depend on this and on its prompt's `key` alone.
      max_repeats: see `speechllm.decode.search.loop_length`.
      max_rows: rows of a step.

    Raises:
      UserError: a value that is out of range, or that has no effect with the method.
    """

    method: Method = "greedy"
    beam: int = setting(4, at_least=1, help="hypotheses of an utterance that run side by side in beam search")
    nbest: int = setting(
        1, at_least=1, help="how many results an utterance has in json, or how many samples the best is taken of"
    )
    length_penalty: float = setting(1.0, at_least=0, below=inf, help="scores are divided by length to this power")
    temperature: float = setting(1.0, "greedy is its limit at 0", above=0, below=inf, help="temperature of sampling")
    top_p: float = setting(
        1.0, above=0, at_most=1, help="sample from the best tokens that together have this probability"
    )
    top_k: int = setting(0, at_least=0, help="sample from this many of the best tokens; 0: from all")
    seed: int = setting(0, help="seed of sampling; an utterance is given the same text in any batch")
    tokens_per_second: float = setting(
        12.5, above=0, below=inf, help="tokens of the longest text for a second of audio"
    )
    max_repeats: int = setting(
        10, at_least=1, help="how often the end of a text may repeat itself before it counts as a loop"
    )
    max_rows: int = setting(64, at_least=1, help="hypotheses in one step of the language model, over all utterances")

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UserError(f"method: unknown {self.method!r}, choose from {', '.join(get_args(Method))}")
        check_limits(self)
        _check_effects(self)
        if self.method != "sample" and self.nbest > self.width:
            raise UserError(
                f"nbest: {self.nbest} results need method beam with a beam of at least {self.nbest}, or sample"
            )
        if self.max_rows < self.width:
            raise UserError(f"max_rows: {self.max_rows} has no room for the {self.width} rows of one utterance")

    def without_effect(self) -> dict[str, str]:
        """The names of the options that change nothing with this method, and what is wrong with giving them."""
        has_effect = {
            "beam": self.method == "beam" or self.beam == 1,  # as greedy search is
            "length_penalty": self.method == "beam" or (self.method == "sample" and self.nbest > 1),
            **dict.fromkeys(("temperature", "top_p", "top_k", "seed"), self.method == "sample"),
        }
        return {name: f"{_ONLY_WITH[name]}, the method is {self.method}" for name in _ONLY_WITH if not has_effect[name]}

    @property
    def width(self) -> int:
        """The most rows that an utterance takes."""
        return {"greedy": 1, "beam": self.beam, "sample": self.nbest}[self.method]

    def max_tokens(self, seconds: float) -> int:
        """How many tokens, the end among them, the text of audio of this duration may have."""
        return max(_FEWEST_TOKENS, ceil(seconds * self.tokens_per_second))


@dataclass(frozen=True)
class RecognizeOptions:
    """How speech is recognized; `speechllm transcribe --help` says what each field is.

    Attributes:
      search: of the language model.
      fallback: what becomes of a text that a guard has stopped, because it repeats itself or is longer than the audio
        can say: `cut`, it ends there; `ctc`, the text of the CTC head is taken instead, where there is one. None leaves
        it to the caller: `transcribe` takes `ctc`, `recognize` and recipes/decode.py `cut`.
      ctc_weight: see arXiv 1609.06773. A CTC head that writes other pieces than the language model (`ctc_tokenizer`)
        scores a word when it has ended.
      timestamps: find the words' times with the CTC head, where the model does not write them itself.
      hotwords: see `speechllm.decode.hotwords.Hotwords.from_file`.
      initial_state: `RWKV7State.save` writes such files.

    Raises:
      UserError: a value is out of range, or has no effect with the others.
    """

    search: SearchOptions = field(default_factory=SearchOptions)
    fallback: Literal["cut", "ctc"] | None = None
    ctc_weight: float = setting(0.0, at_least=0, help="weight of the CTC head's scores in the search; 0: none")
    ctc_beam: int = setting(1, at_least=1, help="beam of the CTC head's own search; 1: greedy")
    timestamps: bool = False
    hotwords: str | None = setting(None, help="file of phrases to prefer, one a line, perhaps with a tab and a boost")
    hotword_weight: float = setting(1.0, at_least=0, below=inf, help="weight of the hotwords")
    ngram: str | None = setting(
        None, help="n-gram language model over words: of tools/pack_ngram.py, or ARPA or binary, which kenlm reads"
    )
    ngram_weight: float = setting(0.3, at_least=0, below=inf, help="weight of the n-gram language model")
    initial_state: str | None = setting(
        None,
        help="state of RWKV-7 that prompts go on from: of `speechllm state`, or tuned here or by RWKV-PEFT (.pth)",
    )

    def __post_init__(self) -> None:
        if self.fallback not in (None, "cut", "ctc"):
            raise UserError(f"fallback: unknown {self.fallback!r}, choose from cut, ctc")
        check_limits(self)
        _check_effects(self)

    def without_effect(self) -> dict[str, str]:
        """The names of the options that change nothing beside the others, and what is wrong with giving them; those of
        `search` aside."""
        found: dict[str, str] = {}
        if self.hotwords is None:
            found["hotword_weight"] = "is the weight of hotwords, and none are given"
        if self.ngram is None:
            found["ngram_weight"] = "is the weight of an n-gram model, and none is given"
        if self.search.method == "sample":
            why = "has no part in sampling: search with method greedy or beam"
            found |= dict.fromkeys(("ctc_weight", "hotwords", "ngram"), why)
        return found


RecogniseOptions = RecognizeOptions  # its name in 0.1

# Those that name a file.
FILE_OPTIONS = ("hotwords", "ngram", "initial_state")


@dataclass(frozen=True)
class StreamingOptions:
    """How a stream is recognized; `speechllm stream --help` says what each field is.

    Attributes:
      beam: hypotheses that are followed, each with a state of its own; 1 is greedy search. No word is ever taken back.
      stable_seconds: with a beam; after so long a word is written as the best hypothesis has it, and hypotheses with
        another one are given up.
      ctc: greedily, also where there is a language model.
      hotwords: see `speechllm.decode.hotwords.Hotwords.from_file`.
      endpoint_seconds: None: there is one segment. Nothing is lost: the states go on.
      memory_seconds: None: `model.streaming.memory_seconds` of the model.
      max_rows: hypotheses of all streams.

    Raises:
      UserError: a value is out of range, or has no effect with the others.
    """

    beam: int = setting(
        1, at_least=1, help="hypotheses that run side by side; a word is written when all have it; 1: greedy search"
    )
    stable_seconds: float = setting(
        1.0, at_least=0, below=inf, help="with a beam, a word is written after so long even if not all have it"
    )
    ctc: bool = setting(False, help="write with the CTC head, not with the language model")
    hotwords: str | None = setting(None, help="file of phrases to prefer, one a line, perhaps with a tab and a boost")
    hotword_weight: float = setting(1.0, at_least=0, below=inf, help="weight of the hotwords")
    endpoint_seconds: float | None = setting(
        None, above=0, help="after so much audio without a new word a new segment begins"
    )
    fresh_segments: bool = setting(
        False, help="the language model begins each segment anew, and knows nothing of those before"
    )
    memory_seconds: float | None = setting(
        None,
        above=0,
        help="the language model remembers so much of what it heard and wrote, at most twice as much (default: the "
        "model's own); inf: all",
    )
    tokens_per_second: float = setting(
        12.5, above=0, below=inf, help="tokens of the longest text for a second of audio"
    )
    max_rows: int = setting(64, at_least=1, help="hypotheses in one step of the language model, over all streams")

    def __post_init__(self) -> None:
        check_limits(self)
        _check_effects(self)
        if self.max_rows < self.beam:
            raise UserError(f"max_rows: {self.max_rows} has no room for the {self.beam} rows of one stream")

    def without_effect(self) -> dict[str, str]:
        """The names of the options that change nothing beside the others, and what is wrong with giving them."""
        found: dict[str, str] = {}
        if self.ctc:
            why = "is for the language model's search, and the CTC head writes"
            found |= dict.fromkeys(("beam", "hotwords", "fresh_segments", "memory_seconds", "tokens_per_second"), why)
        if self.beam == 1:
            found["stable_seconds"] = "is for a beam, and there is one hypothesis"
        if self.hotwords is None:
            found["hotword_weight"] = "is the weight of hotwords, and none are given"
        if self.endpoint_seconds is None:
            found["fresh_segments"] = "is for segments, and endpoint_seconds gives none"
        return found


def _check_effects(options: SearchOptions | RecognizeOptions | StreamingOptions) -> None:
    defaults = {option.name: option.default for option in fields(options)}
    for name, why in options.without_effect().items():
        if getattr(options, name) != defaults[name]:
            raise UserError(f"{name}: {why}")
