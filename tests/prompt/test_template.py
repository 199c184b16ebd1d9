"""Prompts: templates, the splice, learned parts; and that training and decoding read the same."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import nn

from speechllm.config import from_dict, to_dict
from speechllm.decode.recognizer import Speech, SpeechLLMRecognizer
from speechllm.encoder import init_from_data
from speechllm.errors import UserError
from speechllm.llm.interface import IGNORE
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import OptimConfig, build_optimizer, parameter_groups
from speechllm.prompt.request import Request, requests_of
from speechllm.prompt.splice import Kind, splice
from speechllm.prompt.template import INSTRUCTIONS, PRESETS, PromptConfig, PromptProjectorConfig
from speechllm.text.languages import NAMES_IN, language_name
from speechllm.text.tokenizer import HFTokenizer, RWKVTokenizer, train_sentencepiece
from tests.conftest import SENTENCES
from tests.hf_tokenizers import train_byte_level

tokenizer = RWKVTokenizer()
LEARNED = {"boundary": True, "soft_tokens": 3, "projector": PromptProjectorConfig(hidden=8)}
CONTEXTS = [
    Request("a", "tres", ("uno",), 0.9),
    Request("b", "", (), 0.3),
    Request("c", "two two", ("three", "one")),
]
WITH_CONTEXT = {
    "asr": "{previous}/{hotwords} {audio}{language:zh}<|{lang}|>{instruction}",
    "ast": "{audio}{previous} {language:zh-hant} {target_language}",
    "instructions": ["one: {hotwords}", "two {language}", "three"],
}


def asked(language, target_language=None, context=Request()):  # noqa: B008 - it is frozen
    return replace(context, language=language, target_language=target_language)


# ---- templates ----


def test_the_presets():
    assert PromptConfig().fill(asked("en")) == ("User: ", "<|en|>\n\nAssistant:")
    assert PromptConfig().fill(asked("en", "zh")) == ("User: ", "<|en|><|zh|>\n\nAssistant:")
    assert PromptConfig(preset="tags").fill(asked("en", "zh")) == ("", "<|en|><|zh|>")
    qwen = PromptConfig(preset="qwen", instructions="zh", before_label="\n")
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.fill(asked("en")) == (before, f"请转录这段英语语音{after}")
    assert qwen.fill(asked("en", "de")) == (
        before,
        f"Translate the English speech into German.{after}",
    )
    assert qwen.written_out().before_label == "\n"


@pytest.mark.parametrize("options", [{"preset": name} for name in PRESETS] + [WITH_CONTEXT])
def test_written_out_it_is_the_same_prompt_whatever_the_library_ships(options, monkeypatch):
    prompt = PromptConfig(**options)
    expected = [prompt.fill(asked("en", target, context)) for target in (None, "zh") for context in CONTEXTS]
    saved = to_dict(prompt.written_out())
    monkeypatch.setitem(PRESETS, prompt.preset, {"asr": "?{audio}", "ast": "?{audio}", "before_label": "?"})
    monkeypatch.setitem(INSTRUCTIONS, "en", {"asr": ["?"], "ast": ["?"]})
    loaded = from_dict(PromptConfig, saved)
    assert [loaded.fill(asked("en", target, context)) for target in (None, "zh") for context in CONTEXTS] == expected
    assert loaded.written_out() == loaded


def test_slots_take_what_the_utterance_has():
    prompt = PromptConfig(**WITH_CONTEXT)
    assert prompt.fill(asked("en", None, CONTEXTS[0])) == ("tres/uno ", "英语<|en|>three")
    assert prompt.fill(asked("en", None, CONTEXTS[1])) == ("/ ", "英语<|en|>one: ")
    assert prompt.fill(asked("es-MX", None, CONTEXTS[2])) == (
        "two two/three, one ",
        "西班牙语<|es-MX|>one: three, one",
    )
    assert prompt.fill(asked("en", "fr", CONTEXTS[0])) == ("", "tres 英語 French")
    # neither braces in the template nor those of a value are slots
    braces = PromptConfig(asr="{{audio}} {audio}{previous}{{")
    assert braces.fill(Request(previous="{lang}")) == ("{audio} ", "{lang}{")


def test_every_instruction_is_drawn_and_the_first_is_the_default():
    prompt = PromptConfig(preset="qwen")
    drawn = {prompt.fill(Request(language="en", draw=i / 100)) for i in range(100)}
    assert len(drawn) == len(INSTRUCTIONS["en"]["asr"])
    assert prompt.fill(Request(language="en", draw=0.0)) == prompt.fill(asked("en"))


@pytest.mark.parametrize("pool", INSTRUCTIONS)
def test_the_shipped_instructions_can_be_filled(pool):
    prompt = PromptConfig(preset="qwen", instructions=pool, ast_instructions=pool)
    for target in (None, "ja"):
        for i in range(20):
            _, after = prompt.fill(Request(language="de", target_language=target, draw=i / 20))
            assert language_name("de", pool) in after
            assert target is None or language_name("ja", pool) in after


def test_names_of_languages():
    assert [language_name("en", name_in) for name_in in NAMES_IN] == ["English", "英语", "英語"]
    assert language_name("PT_br") == "Portuguese"
    with pytest.raises(UserError, match="no name is known for the language 'xx'; known are ar, bg"):
        language_name("xx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asr": "x"}, "asr: the slot {audio} must be there once, it is 0 times"),
        ({"ast": "{audio}x{audio}"}, "ast: the slot {audio} .* 2 times"),
        ({"asr": "{audio}{previous}"}, "asr: a prompt needs more than audio"),
        ({"asr": "{speaker}{audio}"}, "asr: unknown slot {speaker}; allowed: {audio}, {instruction}, {lang}"),
        ({"asr": "{audio}{target_lang}"}, "asr: the slot {target_lang} is for translation: use it in ast"),
        ({"asr": "{audio}{lang"}, "asr: .* write {{ and }} for braces"),
        ({"asr": "{audio}{lang!r}"}, "asr: {lang} is not to be formatted"),
        ({"asr": "{audio}{language:fr}"}, "asr: {language} is not to be formatted; .* en, zh, zh-hant"),
        ({"instructions": "zh"}, "instructions: asr has no {instruction} slot"),
        ({"preset": "qwen", "instructions": "zh-hans"}, "instructions: no pool 'zh-hans'; shipped are en, zh, zh-hant"),
        ({"preset": "qwen", "ast_instructions": []}, "ast_instructions: an empty list"),
        ({"preset": "qwen", "instructions": ["a", "{audio}"]}, r"instructions\[1\]: unknown slot {audio}"),
        ({"preset": "qwen", "instructions": ["{target_language}"]}, r"instructions\[0\]: .* for translation"),
        ({"preset": "chatml"}, "preset: unknown 'chatml', choose from rwkv, qwen, tags"),
        ({"soft_tokens": -1}, "soft_tokens must be at least 0"),
    ],
)
def test_templates_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        PromptConfig(**options)


@pytest.mark.parametrize(
    ("slot", "tags", "what"),
    [
        ("lang", (None,), "no language: give `lang`"),
        ("language", (None,), "no language: give `lang`"),
        ("target_lang", ("en", ""), "no target language: give `target_lang`"),
        ("previous", ("en",), "no previous text: give `previous`"),
        ("hotwords", ("en",), "no hotwords: give `hotwords` .*--prompt-hotwords"),
    ],
)
def test_a_slot_without_data_names_slot_and_utterance(slot, tags, what):
    (request,) = requests_of(*([tag] for tag in tags))
    prompt = PromptConfig(**{"ast" if len(tags) == 2 else "asr": f">{{audio}}{{{slot}}}"})
    with pytest.raises(UserError, match=f"the prompt has a {{{slot}}} slot but utterance u7 has {what}"):
        prompt.fill(replace(request, id="u7"))
    with pytest.raises(UserError, match="but the utterance has no"):
        splice(prompt, tokenizer, [2], [request])


# ---- the splice ----


def test_layout_and_labels():
    prompt = PromptConfig()
    labels = [tokenizer.encode(" one two"), tokenizer.encode(" 三")]
    out = splice(prompt, tokenizer, [3, 5], requests_of(["en", "zh"]), labels)
    for i, (audio_len, lang) in enumerate([(3, "en"), (5, "zh")]):
        before = tokenizer.encode("User: ")
        after = tokenizer.encode(f"<|{lang}|>\n\nAssistant:")
        row = out.token_ids[i, : out.lens[i]].tolist()
        assert row == before + [0] * audio_len + after + labels[i]
        is_audio = out.kinds[i] == Kind.AUDIO
        assert is_audio.nonzero().flatten().tolist() == list(range(len(before), len(before) + audio_len))
        assert out.audio_starts[i] == len(before)
        # The last prompt position predicts the first label token, the last label token the end of text.
        start = len(before) + audio_len + len(after) - 1
        expected = [IGNORE] * start + [*labels[i], tokenizer.eos_id]
        assert out.labels[i, : out.lens[i]].tolist() == expected
        assert (out.labels[i, out.lens[i] :] == IGNORE).all()
        assert (out.token_ids[i, out.lens[i] :] == 0).all() and (out.kinds[i, out.lens[i] :] == Kind.PADDING).all()


def test_learned_parts_have_their_places():
    prompt = PromptConfig(asr="ab{audio}c", boundary=True, soft_tokens=2)
    out = splice(prompt, tokenizer, [3], requests_of(["en"]), [[7, 8]])
    a, b, c = ("soft", "boundary", "audio")
    expected = [a, a, *["text"] * len(tokenizer.encode("ab")), b, c, c, c, b, "text", "label", "label"]
    assert [Kind(kind).name.lower() for kind in out.kinds[0].tolist()] == expected
    assert out.audio_starts.tolist() == [expected.index("audio")]
    alone = PromptConfig(asr="{audio}", ast="{audio}", soft_tokens=1)
    assert splice(alone, tokenizer, [1], [Request()], [[]]).labels.tolist() == [[IGNORE, tokenizer.eos_id]]


def test_without_labels_rows_end_with_the_prompt():
    out = splice(PromptConfig(asr="{audio}>"), tokenizer, [2], [Request()])
    assert out.token_ids.tolist() == [[0, 0, *tokenizer.encode(">")]]
    assert (out.labels == IGNORE).all()


def test_a_row_is_laid_out_as_it_is_alone():
    prompt = PromptConfig(**WITH_CONTEXT, **LEARNED)
    labels = [tokenizer.encode(text) for text in (" one", " 一", " un")]
    requests = requests_of(["en", "en", "fr"], [None, "zh", None], CONTEXTS)
    columns = lens, _, _ = [2, 4, 3], requests, labels
    out = splice(prompt, tokenizer, *columns)
    for i in range(3):
        alone = splice(prompt, tokenizer, *(column[i : i + 1] for column in columns))
        for name in ("token_ids", "kinds", "labels"):
            assert torch.equal(getattr(out, name)[i, : out.lens[i]], getattr(alone, name)[0])
        before, after = prompt.fill(requests[i])
        is_text = out.kinds[i] == Kind.TEXT
        assert out.token_ids[i, is_text].tolist() == tokenizer.encode(before) + tokenizer.encode(after)
        assert (out.kinds[i] == Kind.AUDIO).sum() == lens[i]


def test_tags_that_must_not_be_split(model_config, tokenizer_dir):
    qwen = dataclasses.replace(model_config, prompt=PromptConfig(preset="qwen"))
    with pytest.raises(
        UserError, match=rf"prompt.asr: <\|im_start\|> must be one token.*{tokenizer_dir} splits it into"
    ):
        SpeechLLM.from_config(qwen)
    PromptConfig(asr="<|asr|>{audio}").check_tags(tokenizer, "rwkv")
    with pytest.raises(UserError, match=r"prompt.asr: <\|asr\|> must be one token, but the tokenizer rwkv .* '<' '\|'"):
        PromptConfig(asr="<|asr|>{audio}", whole_tags=True).check_tags(tokenizer, "rwkv")
    whole = PromptConfig(preset="tags", whole_tags=True)
    whole.check_tags(tokenizer, "rwkv")  # it has no tag before its slots are filled
    with pytest.raises(UserError, match=r"<\|en\|> must be one token, but the tokenizer rwkv splits it into 5"):
        splice(whole, tokenizer, [2], requests_of(["en"]))


def test_chat_markers_of_a_hugging_face_tokenizer(tmp_path):
    markers = ["<|im_start|>", "<|im_end|>"]
    whole = HFTokenizer(train_byte_level(SENTENCES, tmp_path / "whole", special_tokens=["<|endoftext|>", *markers]))
    prompt = PromptConfig(preset="qwen")
    prompt.check_tags(whole, "whole")
    (row,) = splice(prompt, whole, [1], requests_of(["en"])).token_ids.tolist()
    pieces = [whole.piece(i) for i in row]
    assert [pieces.count(marker) for marker in markers] == [2, 1] and pieces[0] == markers[0]
    split = HFTokenizer(train_byte_level(SENTENCES, tmp_path / "split"))
    with pytest.raises(
        UserError, match=r"prompt.asr: <\|im_start\|> must be one token, but the tokenizer split splits"
    ):
        prompt.check_tags(split, "split")


# ---- in a model ----


@pytest.fixture(scope="session")
def chat_tokenizer_dir(tmp_path_factory):
    """A tokenizer with whole tags for each of the presets."""
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    tags = ["<|im_start|>", "<|im_end|>", "<|en|>", "<|es|>"]
    train_sentencepiece(SENTENCES * 20, folder, vocab_size=300, special_tokens=tags)
    return folder


@pytest.fixture
def prompted_model(model_config, chat_tokenizer_dir):
    """A function of the prompt's options: a model whose output depends on all that it reads."""

    def build(**options) -> SpeechLLM:
        torch.manual_seed(0)
        prompt = PromptConfig(**options)
        model = SpeechLLM.from_config(
            dataclasses.replace(model_config, tokenizer=str(chat_tokenizer_dir), prompt=prompt)
        )
        for p in (p for part in (model.llm, model.prompt) for p in part.parameters()):
            if p.ndim == 2:
                nn.init.normal_(p, std=0.5)
        return model

    return build


VARIANTS = {
    "rwkv": {},
    "qwen": {"preset": "qwen"},
    "tags": {"preset": "tags", "whole_tags": True},
    "context": WITH_CONTEXT,
    "boundary": {"boundary": True},
    "soft": {"preset": "tags", "soft_tokens": 3},
    "projector": {"projector": PromptProjectorConfig(hidden=8)},
    "all": {**WITH_CONTEXT, **LEARNED},
}
REQUESTS = requests_of(["en", "es", "en"], [None, "es", None], CONTEXTS)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_training_and_decoding_read_the_same(prompted_model, batch, options):
    model = prompted_model(**options).eval()
    features, lens, texts, _ = batch
    labels = [model.label_ids(text) for text in texts]
    with torch.no_grad():
        _, _, audio_embeds, audio_lens = model.encode(features, lens)
        trained = model.spliced(audio_lens, REQUESTS, labels)
        logits, _ = model.llm(inputs_embeds=model.embed(trained, audio_embeds, audio_lens), lens=trained.lens)
        recognizer = SpeechLLMRecognizer(model)
        for i, (_, prompt) in enumerate(recognizer._prompts(Speech(features, lens, REQUESTS))):
            read = torch.cat([prompt.inputs_embeds, model.llm.embed(torch.tensor(labels[i]))])
            decoded, _ = model.llm(inputs_embeds=read[None], state=prompt.state)
            count = len(labels[i]) + 1
            end = trained.lens[i]
            torch.testing.assert_close(decoded[0, -count:], logits[i, end - count : end], rtol=1e-4, atol=1e-4)
    assert recognizer._states or options.get("preset") == "tags" and not options.get("soft_tokens")


def test_texts_of_their_own_do_not_fill_the_memory_with_states(prompted_model, batch, monkeypatch):
    model = prompted_model(**WITH_CONTEXT).eval()
    features, lens, *_ = batch
    speech = Speech(features, lens, requests_of(["en", "es", "en"], contexts=CONTEXTS))
    expected = [r.text for r in model.recognize(*speech)]
    monkeypatch.setattr("speechllm.decode.recognizer._MAX_STATES", 1)
    recognizer = SpeechLLMRecognizer(model)
    assert [r.text for r in next(recognizer([speech]))] == expected and len(recognizer._states) == 1


@pytest.mark.parametrize("options", [VARIANTS["qwen"], VARIANTS["all"]], ids=["qwen", "all"])
def test_a_padded_batch_gives_each_utterance_what_it_gets_alone(prompted_model, batch, options):
    model = prompted_model(**options).eval()
    columns = [*batch[:3], REQUESTS, batch[2]]  # the labels are the texts
    with torch.no_grad():
        whole = model(*columns)["llm_loss"]
        rows = [
            model(batch[0][i : i + 1, : batch[1][i]], *(column[i : i + 1] for column in columns[1:]))["llm_loss"]
            for i in range(3)
        ]
    torch.testing.assert_close(whole, sum(rows), rtol=1e-5, atol=1e-4)


def test_every_learned_parameter_gets_a_gradient_from_a_frozen_language_model(prompted_model, batch):
    model = prompted_model(**WITH_CONTEXT, **LEARNED).train()
    model.llm.requires_grad_(False)
    model(*batch[:3], REQUESTS)["loss"].backward()
    learned = dict(model.prompt.named_parameters())
    assert set(learned) == {
        "soft", "boundary",
        *(f"projector.{layer}_proj.{name}" for layer in ("in", "out") for name in ("weight", "bias")),
    }  # fmt: skip
    assert [name for name, p in learned.items() if p.grad is None or not p.grad.any()] == []
    # no text at all in a batch: still a gradient, so that all processes have one
    model.zero_grad()
    silent = prompted_model(asr="{audio}{previous}", ast="{audio}", **LEARNED)
    silent(*batch[:3], [Request(previous="")] * 3)["loss"].backward()
    assert [name for name, p in silent.named_parameters() if p.grad is None] == []


def test_the_prompt_projector_begins_as_the_identity_and_nothing_off_has_parameters(model_config, batch):
    projector = PromptConfig(projector=PromptProjectorConfig())
    plain, projected = (
        SpeechLLM.from_config(dataclasses.replace(model_config, prompt=prompt)).eval()
        for prompt in (PromptConfig(), projector)
    )
    assert not [*plain.prompt.parameters()] and [*projected.prompt.parameters()]
    loaded = projected.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all(name.startswith("prompt.projector.") for name in loaded.missing_keys)
    assert torch.equal(projected(*batch)["llm_loss"], plain(*batch)["llm_loss"])


def test_learned_embeddings_have_no_weight_decay(prompted_model):
    model = prompted_model(**LEARNED)
    decays = {p: g["weight_decay"] for g in parameter_groups(model, OptimConfig()) for p in g["params"]}
    assert decays[model.prompt.soft] == decays[model.prompt.boundary] == 0
    assert decays[model.prompt.projector.in_proj.weight] > 0


@pytest.mark.parametrize("options", [{"preset": "qwen"}, {**WITH_CONTEXT, **LEARNED}], ids=["qwen", "all"])
def test_the_prompt_is_saved_with_the_model(prompted_model, batch, options, tmp_path, monkeypatch):
    model = prompted_model(**options).eval()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(INSTRUCTIONS, "en", {"asr": ["?"], "ast": ["?"]})
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    assert loaded.config.prompt == model.config.prompt
    expected = model(*batch[:3], REQUESTS)["llm_loss"]
    assert torch.equal(loaded(*batch[:3], REQUESTS)["llm_loss"], expected)


def test_a_small_model_learns_with_its_prompt(model_config, batch):
    """The text that is asked for is in the prompt's context alone."""
    torch.manual_seed(0)
    prompt = PromptConfig(**WITH_CONTEXT, **LEARNED)
    model = SpeechLLM.from_config(dataclasses.replace(model_config, prompt=prompt, ctc_weight=0.0))
    features, lens = batch[0][[2, 2, 2], :30], torch.tensor([30, 30, 30])
    init_from_data(model.encoder, features, lens)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    texts, requests = ["one", "two three", "tres"], requests_of(["en"] * 3, contexts=CONTEXTS)
    before = {name: p.detach().clone() for name, p in model.prompt.named_parameters()}
    for step in range(40):
        model.encoder.set_batch_count(step)
        out = model(features, lens, texts, requests)
        (out["loss"] / out["tokens"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in model.prompt.named_parameters())
    found = model.eval().recognize(features, lens, requests)
    assert [r.text for r in found] == texts


def test_end_of_text_comes_before_everything():
    plain, ended = (PromptConfig(asr="{audio}\n", end_of_text_first=x, soft_tokens=1) for x in (False, True))
    before, after = plain.encoded(tokenizer, Request())
    assert ended.encoded(tokenizer, Request()) == ([tokenizer.eos_id, *before], after)
    assert PromptConfig(asr="{audio}", end_of_text_first=True).encoded(tokenizer, Request()) == ([tokenizer.eos_id], [])
