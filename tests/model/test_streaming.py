"""Models that are trained on streams: losses, what a stream reads, word times, what cannot be such a model."""

import dataclasses

import pytest
import torch

from speechllm.config import ConfigError, from_dict, to_dict
from speechllm.encoder import WhisperEncoderConfig, Zipformer, ZipformerConfig, save_encoder
from speechllm.errors import UserError
from speechllm.llm.interface import IGNORE
from speechllm.model.config import EncoderSection, LLMSection, ModelConfig, MoreEncoder
from speechllm.model.speech_llm import SpeechLLM
from speechllm.model.streaming import aligned_words, chunk_of
from speechllm.projector import ProjectorConfig
from speechllm.prompt.interleave import StreamingConfig
from speechllm.prompt.label import WordTime
from speechllm.prompt.template import PromptConfig, PromptProjectorConfig
from tests.model import streams

WORDS = [
    (WordTime("one", 0.0, 0.2), WordTime("two", 0.3, 0.5), WordTime("three", 0.6, 1.1)),
    (WordTime("tres", 0.2, 0.7),),
    (WordTime("two", 0.0, 0.1),),
]
LEARNED = PromptConfig(boundary=True, soft_tokens=2, projector=PromptProjectorConfig(hidden=4))
QWEN = {
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture
def config(model_config):
    causal = dataclasses.replace(
        model_config.encoder.zipformer, causal=True, chunk_size=[8, 16, -1], left_context_frames=[16, 32, -1]
    )
    return dataclasses.replace(
        model_config,
        encoder=EncoderSection(zipformer=causal),
        streaming=StreamingConfig([0.16, 0.32], offline_share=0.5),
        prompt=LEARNED,
    )


@pytest.fixture(params=["rwkv7", "transformers"])
def model(request, config):
    torch.manual_seed(0)
    if request.param == "transformers":
        config = dataclasses.replace(config, llm=LLMSection(transformers=QWEN))
    return SpeechLLM.from_config(config)


def losses(model, batch, words=WORDS, chunk_seconds=0.16, **options):
    return model(*batch, words=words, chunk_seconds=chunk_seconds, **options)


def row(batch, i):
    features, lens, *columns = batch
    return features[i : i + 1, : lens[i]], lens[i : i + 1], *(column[i : i + 1] for column in columns)


@pytest.mark.parametrize("chunk_seconds", [0.16, 0.32])
def test_the_loss_of_a_batch_is_the_sum_of_its_rows(model, batch, chunk_seconds):
    model.eval()
    rows = [losses(model, row(batch, i), WORDS[i : i + 1], chunk_seconds) for i in range(3)]
    whole = losses(model, batch, chunk_seconds=chunk_seconds)
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(row[name] for row in rows), rtol=1e-5, atol=1e-4)
    assert whole["tokens"] == model.num_label_tokens(batch[2], batch[1], chunk_seconds)
    chunks = sum(int(model.chunks[chunk_seconds].count(n)) for n in batch[1])
    assert whole["tokens"] == model.num_label_tokens(batch[2], batch[1]) + chunks


def test_read_step_by_step_a_stream_is_the_row_that_was_trained_on(model, batch):
    """The state goes on from chunk to chunk, and from token to token, as in the one row."""
    model.eval()
    tokenizer = model.tokenizer
    for i, words in enumerate(WORDS):
        features, lens, (text,), requests = row(batch, i)
        with torch.no_grad():
            _, _, audio_embeds, audio_lens = model.encode(features, lens, model.chunks[0.16])
            spliced = model.streamed(model.chunks[0.16], lens, audio_lens, requests, [model.label_ids(text)], [words])
            whole, _ = model.llm(inputs_embeds=model.embed(spliced, audio_embeds, audio_lens), lens=spliced.lens)
            labels = spliced.labels[0]
            said = labels[labels != IGNORE].tolist()
            found, state = [], None
            for embeds in streams.pieces(model, features[0], 0.16, requests[0]):
                logits, state = model.llm(inputs_embeds=embeds[None], state=state)
                found.append(logits[0, -1])
                while (token := said[len(found) - 1]) != tokenizer.eos_id:
                    logits, state = model.llm.step(torch.tensor([token]), state)
                    found.append(logits[0])
        assert len(found) == len(said) == int(model.chunks[0.16].count(lens)) + len(model.label_ids(text)) + 1
        torch.testing.assert_close(torch.stack(found), whole[0][labels != IGNORE], rtol=1e-4, atol=1e-4)
        loss = -torch.stack(found).log_softmax(-1)[range(len(said)), said].sum()
        torch.testing.assert_close(losses(model, row(batch, i), [words])["llm_loss"], loss, rtol=1e-4, atol=1e-4)


def test_a_chunk_does_not_depend_on_what_comes_later(model, batch):
    model.eval()
    features, lens = batch[0][:1], batch[1][:1]
    chunk = model.chunks[0.16]
    _, _, whole, _ = model.encode(features, lens, chunk)
    changed = features.clone()
    # the front end hears 13 frames more than its chunks have: 7 of its convolutions, 6 of its ConvNeXt
    changed[:, 3 * 2 * chunk.encoder_frames + 13 :] = 5.0
    _, _, audio, _ = model.encode(changed, lens, chunk)
    heard = 3 * chunk.positions
    torch.testing.assert_close(audio[:, :heard], whole[:, :heard])
    assert not torch.allclose(audio[:, heard:], whole[:, heard:])


def test_every_parameter_has_a_gradient(model, batch):
    losses(model, batch)["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_words_without_times_are_aligned_by_the_ctc_head(model, batch):
    model.eval()
    chunk = model.chunks[0.16]
    with torch.no_grad():
        encoder_out, lens, _, _ = model.encode(*batch[:2], chunk)
        log_probs = model.ctc_head(encoder_out).log_softmax(-1)
    ids = [model.ctc_label_ids(text) for text in batch[2]]
    words = aligned_words(log_probs, lens, ids, model.blank_id, model.ctc_tokenizer, model.frame_seconds)
    assert [" ".join(word.word for word in said) for said in words] == batch[2]
    for said, frames in zip(words, batch[1], strict=True):
        assert said[0].start >= 0 and said[-1].end <= float(frames) / 100
    assert losses(model, batch, None)["llm_loss"] == losses(model, batch, words)["llm_loss"]
    some = losses(model, batch, [WORDS[0], None, words[2]])["llm_loss"]
    assert some == losses(model, batch, [WORDS[0], words[1], words[2]])["llm_loss"]


def test_a_transcript_that_does_not_fit_its_audio_has_no_loss(model, batch):
    model.eval()
    features, lens, texts, requests = batch
    long = features, lens, [texts[0], "three " * 30, texts[2]], requests
    words = [WORDS[0], None, WORDS[2]]
    expected = sum(losses(model, row(batch, i), [words[i]])["llm_loss"] for i in (0, 2))
    torch.testing.assert_close(losses(model, long, words)["llm_loss"], expected, rtol=1e-5, atol=1e-4)


def test_without_times_and_without_a_ctc_head_there_is_no_stream(config, batch):
    model = SpeechLLM.from_config(dataclasses.replace(config, ctc_weight=0.0))
    losses(model, batch)
    with pytest.raises(UserError, match=r"without word times.*`alignment` in the manifests.*ctc_weight"):
        losses(model, batch, [WORDS[0], None, WORDS[2]])


def test_a_translation_is_read_when_all_of_it_was_heard(model, batch):
    model.eval()
    *said, requests = batch
    mixed = *said, [requests[0], dataclasses.replace(requests[1], target_language="en"), requests[2]]
    words = [WORDS[0], None, WORDS[2]]
    rows = [losses(model, row(mixed, i), words[i : i + 1]) for i in range(3)]
    llm_loss = losses(model, mixed, words)["llm_loss"]
    torch.testing.assert_close(llm_loss, sum(row["llm_loss"] for row in rows), rtol=1e-5, atol=1e-4)
    assert rows[1]["tokens"] == len(model.label_ids("tres")) + 1


def test_offline_batches_hear_all_in_training_too(config, batch):
    """The encoder by itself would draw a chunk."""
    torch.manual_seed(0)
    model = SpeechLLM.from_config(config).eval()
    expected = model.encode(*batch[:2])[0]
    model.encoder.context = lambda chunk_size, left: (chunk_size, left)  # and nothing is drawn
    torch.testing.assert_close(model.encode(*batch[:2])[0], expected)


def test_saved_and_loaded_it_is_the_same(model, batch, tmp_path):
    model.eval()
    model.save_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    assert loaded.streaming == model.streaming and loaded.chunks == model.chunks
    assert loaded.config.prompt.streaming == PromptConfig().written_out().streaming
    assert losses(loaded, batch)["loss"] == losses(model, batch)["loss"]


def test_greedy_search_ends(model, batch):
    model.eval()
    texts = streams.greedy(model, batch[0][0], 0.32, batch[3][0], max_tokens=3)
    assert len(texts) == 1 + int(model.chunks[0.32].count(torch.tensor(120))) and max(map(len, texts)) <= 3


# ---- what cannot be ----


def changed(config: ModelConfig, **changes) -> ModelConfig:
    zipformer = {name: changes.pop(name) for name in list(changes) if name in ZipformerConfig.__dataclass_fields__}
    if zipformer:
        changes["encoder"] = EncoderSection(zipformer=dataclasses.replace(config.encoder.zipformer, **zipformer))
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"causal": False}, "this Zipformer is not causal.*zipformer.causal: true"),
        ({"streaming": StreamingConfig([0.2])}, r"0.2 is none of the encoder's chunks, which are \(0.16, 0.32 s\)"),
        ({"chunk_size": [-1]}, "none, but the whole utterance"),
        ({"left_context_frames": [-1]}, "left context with an end"),
        ({"projector": ProjectorConfig(kind="conv")}, "projector.kind: conv does not: take kind: mlp or qformer"),
        ({"projector": ProjectorConfig(kind="rwkv")}, "projector.kind: rwkv"),
        ({"projector": ProjectorConfig(layer_weights=True)}, "projector.layer_weights"),
        ({"projector": ProjectorConfig(downsample=3)}, r"0.16 is no multiple of the 0.12 s"),
        ({"projector": ProjectorConfig(kind="qformer", num_queries=3)}, r"no multiple of the 0.24 s"),
        ({"label": "{timed_text}"}, 'set label: "{text}"'),
        ({"encoder": EncoderSection(whisper=WhisperEncoderConfig())}, "Whisper hears whole utterances only"),
        (
            {"prompt": PromptConfig(streaming="a{audio}"), "streaming": StreamingConfig([0.16], 0.2)},
            "delay_seconds: 0.2",
        ),
        ({"llm": None, "prompt": PromptConfig()}, "llm is null: leave out streaming"),
    ],
)
def test_what_cannot_stream_is_refused(config, changes, said):
    with pytest.raises(ValueError, match=said):
        changed(config, **changes)


def test_several_encoders_cannot_stream(config):
    more = [MoreEncoder(EncoderSection(zipformer=config.encoder.zipformer))]
    with pytest.raises(ValueError, match="streaming takes one encoder"):
        changed(config, more_encoders=more)


def test_a_loaded_encoder_that_cannot_stream_is_refused(config, model_config, tmp_path):
    save_encoder(Zipformer(model_config.encoder.zipformer), tmp_path / "encoder")
    with pytest.raises(ConfigError, match="not causal"):
        SpeechLLM.from_config(changed(config, encoder=EncoderSection(path=str(tmp_path / "encoder"))))


def test_mistakes_name_the_key(config, tmp_path):
    values = to_dict(changed(config))
    values["streaming"]["chunk_seconds"] = [0.2]
    with pytest.raises(ConfigError, match=r"streaming.chunk_seconds: 0.2"):
        from_dict(ModelConfig, values)


def test_chunks_of_released_sizes():
    """icefall's causal Zipformer, 8 of whose frames all stacks divide."""
    chunk = chunk_of(0.64, ZipformerConfig(causal=True), ProjectorConfig())
    assert (chunk.encoder_frames, chunk.left_context_frames, chunk.positions) == (32, 256, 8)
    assert chunk.count(torch.tensor([70, 71, 135, 1000])).tolist() == [0, 1, 2, 15]
