"""From features to text, on a small random model that writes different things for different audio."""

import dataclasses

import pytest
import torch
from torch import nn

from speechllm.decode.recognizer import RecognizeOptions, Speech, SpeechLLMRecognizer
from speechllm.decode.result import Hypothesis
from speechllm.decode.search import SearchOptions
from speechllm.errors import UserError
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prompt.request import requests_of


@pytest.fixture
def talkative(model):
    """Its texts have several tokens and end."""
    torch.manual_seed(0)
    for p in model.llm.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.5)
    nn.init.normal_(model.ctc_head.weight, std=2.0)
    return model.eval()


def speech(*durations, languages=("en", "es")):
    """A batch of noise with these many frames."""
    features = nn.utils.rnn.pad_sequence(
        [torch.randn(n, 80, generator=torch.Generator().manual_seed(n)) for n in durations], batch_first=True
    )
    tags = [languages[i % len(languages)] for i in range(len(durations))]
    return Speech(features, torch.tensor(durations), requests_of(tags))


def translated(batch, language):
    return batch._replace(requests=[dataclasses.replace(r, target_language=language) for r in batch.requests])


def outcome(found):
    return [(r.text, r.tokens, r.ctc_text, r.fallback) for r in found]


def test_it_is_what_the_whole_prompt_gives(talkative):
    """Reading the text before the audio once, and going on from its state, changes nothing."""
    batch = speech(120, 200, 90)
    found = talkative.recognize(*batch)
    _, _, audio_embeds, audio_lens = talkative.encode(batch.features, batch.feature_lens)
    inputs_embeds, lens, _ = talkative.prompted(audio_embeds, audio_lens, batch.requests)
    for i, result in enumerate(found):
        logits, state = talkative.llm(inputs_embeds=inputs_embeds[i : i + 1, : lens[i]])
        tokens, best = [], logits[0, -1].argmax()
        while best != talkative.tokenizer.eos_id and len(tokens) < len(result.tokens):
            tokens.append(int(best))
            logits, state = talkative.llm.step(best[None], state)
            best = logits[0].argmax()
        assert tuple(tokens) == result.tokens and tokens


def test_batches_are_searched_together_and_given_back_in_order(talkative):
    batches = [speech(120, 300), speech(90), speech(200, 150, 60)]
    alone = [outcome(talkative.recognize(*batch)) for batch in batches]
    for max_rows in (1, 2, 64):
        recognizer = SpeechLLMRecognizer(talkative, RecognizeOptions(SearchOptions(max_rows=max_rows)))
        assert [outcome(found) for found in recognizer(iter(batches))] == alone
        assert not recognizer._utterances  # nothing is held on to
        assert [outcome(found) for found in recognizer(batches[:1])] == alone[:1]  # and it can be used again


@pytest.mark.parametrize(
    "options",
    [
        RecognizeOptions(SearchOptions(max_rows=4)),
        RecognizeOptions(SearchOptions("beam", beam=2, max_rows=8), ctc_weight=0.5, timestamps=True),
        RecognizeOptions(SearchOptions("sample", seed=3, max_rows=4)),
    ],
)
def test_utterances_join_and_leave_and_have_the_texts_that_they_have_alone(talkative, options):
    lengths = (120, 300, 3, 200, 150, 260, 90)
    keyed = [
        batch._replace(requests=[dataclasses.replace(batch.requests[0], key=str(n))])
        for n in lengths
        for batch in [speech(n)]
    ]
    alone = [next(SpeechLLMRecognizer(talkative, options)([batch])) for batch in keyed]
    recognizer = SpeechLLMRecognizer(talkative, options)
    found, numbers, gone, waiting = {}, {}, set(), list(enumerate(keyed))
    for turn in range(1000):
        if turn % 3 == 0 and waiting and recognizer.free:
            i, batch = waiting.pop(0)
            (numbers[i],) = recognizer.join(batch)
            assert recognizer.free >= 0
        if turn == 4:  # one goes away in the middle of its text
            gone = {i for i in numbers if numbers[i] not in found and i != 0}
            recognizer.leave([numbers[i] for i in gone])
        found |= dict(recognizer.step())
        if not waiting and len(found) + len(gone) == len(keyed):
            break
    assert gone and recognizer.free == 4 and not recognizer._utterances
    for i, expected in enumerate(alone):
        if i not in gone:
            assert outcome([found[numbers[i]]]) == outcome(expected) and found[numbers[i]].words == expected[0].words


@pytest.mark.parametrize("options", [{}, {"ctc_weight": 0.5}, {"timestamps": True, "ctc_beam": 4}])
def test_beam_1_is_greedy_whatever_takes_part(talkative, options):
    batch = speech(120, 200, 90)
    greedy = talkative.recognize(*batch, RecognizeOptions(**options))
    beam = talkative.recognize(*batch, RecognizeOptions(SearchOptions("beam", beam=1), **options))
    assert outcome(beam) == outcome(greedy) and [r.words for r in beam] == [r.words for r in greedy]


def test_a_heavy_ctc_weight_makes_the_text_that_of_ctc(talkative):
    batch = speech(120, 200, 90)
    # the search is over the language model's best tokens: let them be all
    options = RecognizeOptions(SearchOptions("beam", beam=20), ctc_weight=1e3, ctc_beam=50)
    found = talkative.recognize(*batch, options)
    plain = talkative.recognize(*batch)

    def distance(texts):
        return sum(r.ctc_text != text for r, text in zip(found, texts, strict=True))

    assert distance([r.text for r in found]) <= distance([r.text for r in plain])
    assert [r.text for r in found] != [r.text for r in plain]


def test_words_have_times_within_the_audio(talkative):
    batch = speech(120, 200, 90)
    for result, frames in zip(
        talkative.recognize(*batch, RecognizeOptions(timestamps=True)), batch.feature_lens.tolist(), strict=True
    ):
        if result.words is not None:
            times = [t for word in result.words for t in (word.start, word.end)]
            assert times == sorted(times) and all(0 <= t <= frames / 100 for t in times)
            assert "".join(word.text for word in result.words) == "".join(result.text.split())
    assert all(
        r.words is None for r in talkative.recognize(*translated(batch, "fr"), RecognizeOptions(timestamps=True))
    )


@pytest.mark.parametrize("fallback", ["cut", "ctc"])
@pytest.mark.parametrize("stopped", ["end", "length", "loop"])
def test_what_a_guard_stops_falls_back(talkative, monkeypatch, fallback, stopped):
    tokens = tuple(talkative.label_ids("one two"))

    def search(llm, prompts, options, eos_id, scorers):
        for number, _ in enumerate(prompts):
            yield number, (Hypothesis(tokens, (-0.1,) * len(tokens), -0.1, stopped),)

    monkeypatch.setattr("speechllm.decode.recognizer.search", search)
    (result,) = talkative.recognize(*speech(120), RecognizeOptions(fallback=fallback))
    assert result.ctc_text and result.ctc_text != "one two"
    if stopped == "end":
        assert (result.text, result.fallback) == ("one two", None)
    elif fallback == "cut":
        assert (result.text, result.fallback) == ("one two", "cut")
    else:
        assert (result.text, result.fallback) == (result.ctc_text, "ctc")
    translation = translated(speech(120), "es")
    (result,) = talkative.recognize(*translation, RecognizeOptions(fallback=fallback))
    assert result.text == "one two" and result.ctc_text is None


def test_prompts_go_on_from_a_state(talkative, tmp_path):
    batch = speech(120, 200, 90)
    instruction = talkative.tokenizer.encode("these are digits")
    _, state = talkative.llm(input_ids=torch.tensor([instruction]))
    state.save(tmp_path / "state.safetensors")
    found = talkative.recognize(*batch, RecognizeOptions(initial_state=str(tmp_path / "state.safetensors")))
    # a model that starts every text from what it has read of the instruction
    read = talkative.llm.forward

    def read_after_instruction(*args, state=None, **kwargs):
        if state is None:
            _, state = read(input_ids=torch.tensor([instruction]))
        return read(*args, state=state, **kwargs)

    plain = talkative.recognize(*batch)
    talkative.llm.forward = read_after_instruction
    assert outcome(talkative.recognize(*batch)) == outcome(found) != outcome(plain)


def test_what_the_model_has_not_is_an_error(model_config, tmp_path):
    without = SpeechLLM.from_config(dataclasses.replace(model_config, ctc_weight=0.0)).eval()
    for options in ({"ctc_weight": 0.3}, {"timestamps": True}):
        with pytest.raises(UserError, match=f"{next(iter(options))}: the model has no CTC head"):
            SpeechLLMRecognizer(without, RecognizeOptions(**options))
    assert without.recognize(*speech(120))[0].ctc_text is None
    translation = translated(speech(120), "es")
    with pytest.raises(UserError, match="ctc_weight: .* knows transcripts only"):
        SpeechLLM.from_config(model_config).eval().recognize(*translation, RecognizeOptions(ctc_weight=0.3))
    with pytest.raises(UserError, match="fallback: unknown"):
        RecognizeOptions(fallback="none")
