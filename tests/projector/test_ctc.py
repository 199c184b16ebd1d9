"""CTC posteriors as the projector: which frames stand for what is said, and models with it."""

import dataclasses

import pytest
import torch

from speechllm.config import ConfigError, from_dict, override
from speechllm.decode.interface import Speech
from speechllm.decode.options import SearchOptions
from speechllm.decode.recognizer import RecognizeOptions
from speechllm.encoder import WhisperEncoderConfig
from speechllm.model.config import EncoderSection, LLMSection, ModelConfig
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import OptimConfig, build_optimizer, parameter_groups
from speechllm.projector import CTCProjector, ProjectorConfig
from speechllm.projector.ctc import representative_frames
from speechllm.text.tokenizer import load_tokenizer, train_sentencepiece
from tests.llm.tiny_llms import SIZES


def runs_by_hand(probs):
    """The rule as a loop over the frames (T, V + 1) of one utterance."""
    blank = probs[:, -1]
    heard = [t for t in range(len(probs)) if blank[t] <= 0.9] or [int(blank.argmin())]
    runs = []
    for t in heard:
        piece = int(probs[t, :-1].argmax())
        if runs and runs[-1][-1] == t - 1 and piece == int(probs[t - 1, :-1].argmax()):
            runs[-1].append(t)
        else:
            runs.append([t])
    return [min(run, key=lambda t: (float(blank[t]), t)) for run in runs]


@pytest.mark.parametrize("blank_bias", [-5.0, 0.0, 3.0, 30.0])  # from nothing blank to all of it
def test_the_frames_of_a_batch_are_those_of_its_rows(blank_bias):
    torch.manual_seed(0)
    lens = torch.tensor([60, 37, 4, 1])
    logits = 2 * torch.randn(4, 60, 5).repeat_interleave(2, dim=1)[:, :60]  # runs, and frames that are equal
    logits[..., -1] += blank_bias
    probs = logits.softmax(-1)
    positions, position_lens = representative_frames(probs, lens)
    for i, n in enumerate(lens.tolist()):
        expected = runs_by_hand(probs[i, :n])
        assert positions[i, : position_lens[i]].tolist() == expected
        assert not positions[i, position_lens[i] :].any()


def test_embeddings_are_weighted_by_the_posteriors():
    torch.manual_seed(0)
    projector = CTCProjector(8, torch.randn(4, 8))
    with torch.no_grad():
        projector.blank.copy_(torch.randn(8))
    # blank, piece 2 twice, blank, piece 2 again, piece 0 beside it
    logits = torch.zeros(1, 6, 5)
    for t, piece in enumerate([4, 2, 2, 4, 2, 0]):
        logits[0, t, piece] = 8.0
    logits[0, 2, 2] = 5.0
    out, lens = projector(logits, torch.tensor([6]))
    probs = logits.softmax(-1)[0, [1, 4, 5]]
    assert lens.tolist() == [3]
    torch.testing.assert_close(out[0], probs @ torch.cat((projector.table, projector.blank[None])))
    shared = CTCProjector(8)
    shared.blank = projector.blank
    torch.testing.assert_close(shared(logits, torch.tensor([6]), projector.table)[0], out)


def test_a_batch_is_its_rows_and_padding_has_no_influence():
    torch.manual_seed(0)
    projector, lens = CTCProjector(8, torch.randn(4, 8)), torch.tensor([30, 11, 1])
    logits = 3 * torch.randn(3, 30, 5)
    for i, n in enumerate(lens):
        logits[i, n:] = float("nan")
    out, out_lens = projector(logits, lens)
    assert (out_lens <= projector.output_lens(lens)).all() and (out_lens >= 1).all()
    for i, n in enumerate(lens):
        alone, alone_lens = projector(logits[i : i + 1, :n], lens[i : i + 1])
        assert alone_lens[0] == out_lens[i]
        torch.testing.assert_close(alone[0], out[i, : out_lens[i]])


@pytest.fixture(scope="module")
def pieces_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    train_sentencepiece([" one two three", " tres dos uno"] * 20, folder, vocab_size=285)
    return folder


@pytest.fixture(params=["rwkv7", "llama"])
def llm_section(request, model_config):
    if request.param == "rwkv7":
        return model_config.llm
    return LLMSection(transformers={"model_type": "llama", **SIZES, "vocab_size": 300})


@pytest.fixture(params=["shared", "own pieces"])
def ctc_model(request, llm_section, model_config, pieces_dir):
    torch.manual_seed(0)
    config = dataclasses.replace(
        model_config,
        llm=llm_section,
        projector=ProjectorConfig("ctc", downsample=1),
        ctc_tokenizer=str(pieces_dir) if request.param == "own pieces" else None,
    )
    return SpeechLLM.from_config(config)


def test_a_model_with_it_is_batch_invariant(ctc_model, batch):
    model = ctc_model.eval()
    features, lens, texts, requests = batch
    rows = [
        model(features[i : i + 1, : lens[i]], lens[i : i + 1], texts[i : i + 1], requests[i : i + 1]) for i in range(3)
    ]
    for name, value in model(*batch).items():
        torch.testing.assert_close(value, sum(row[name] for row in rows), rtol=1e-5, atol=1e-4)
    assert (model.encode(features, lens)[3] <= model.audio_lens(lens)).all()


@pytest.mark.parametrize("blank_bias", [0.0, 50.0])  # what an untrained head says, and one that hears nothing
def test_every_parameter_gets_a_gradient(ctc_model, batch, blank_bias):
    model = ctc_model.train()
    with torch.no_grad():
        model.ctc_head.bias[-1] += blank_bias
        for p in model.llm.parameters():  # RWKV-7 begins with blocks that do nothing
            p.add_(0.1 * torch.randn_like(p))
    out = model(*batch)
    out["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    model(*batch)["llm_loss"].backward()
    assert blank_bias or model.ctc_head.weight.grad.any()  # the language model teaches the head too


def test_a_model_with_it_learns_and_is_saved(ctc_model, batch, tmp_path):
    model = ctc_model.train()
    optimizer = build_optimizer(model, OptimConfig(lr=5e-3))
    losses = []
    for _ in range(30):
        out = model(*batch)
        losses.append(out["loss"].item())
        optimizer.zero_grad()
        (out["loss"] / out["tokens"]).backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    model.eval().save_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    for name, value in loaded(*batch).items():
        assert torch.equal(value, model(*batch)[name])
    features, lens, _, requests = batch
    options = RecognizeOptions(timestamps=True)
    for a, b in zip(*(m.recognize(features, lens, requests, options=options) for m in (model, loaded)), strict=True):
        assert (a.text, a.ctc_text, a.words) == (b.text, b.ctc_text, b.words) and a.ctc_text is not None


def test_learned_embeddings_are_not_decayed(ctc_model):
    groups = parameter_groups(ctc_model, OptimConfig(lr=1.0, weight_decay=0.1))
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decay[p] == 0 for p in ctc_model.projector.parameters())


def test_own_pieces_start_as_the_mean_of_the_tokens_of_their_text(llm_section, model_config, pieces_dir):
    torch.manual_seed(0)
    config = dataclasses.replace(
        model_config, llm=llm_section, projector=ProjectorConfig("ctc", 1), ctc_tokenizer=str(pieces_dir)
    )
    model = SpeechLLM.from_config(config)
    pieces = load_tokenizer(pieces_dir)
    for index in pieces.encode(" one dos tres"):
        text = pieces.piece(index).replace("\u2581", " ")
        tokens = torch.tensor(model.tokenizer.encode(text))
        torch.testing.assert_close(model.projector.table[index], model.llm.embed(tokens).mean(0))
    eos = torch.tensor(model.tokenizer.eos_id)
    torch.testing.assert_close(model.projector.table[pieces.eos_id], model.llm.embed(eos))
    # The same label, whatever the language model's prompt: what an encoder alone has learned to write.
    alone = EncoderModel.from_config(
        ModelConfig(tokenizer=str(pieces_dir), encoder=config.encoder, llm=None, ctc_weight=1.0)
    )
    assert model.ctc_label_ids("one two") == alone.label_ids("one two")
    assert model.ctc_text(model.ctc_label_ids("one two")) == "one two"


def test_a_head_of_other_pieces_takes_part_in_the_search(llm_section, model_config, pieces_dir, batch):
    torch.manual_seed(0)
    config = dataclasses.replace(model_config, llm=llm_section, ctc_tokenizer=str(pieces_dir))
    model = SpeechLLM.from_config(config).eval()
    features, lens, _, requests = batch
    search = SearchOptions("beam", beam=4, nbest=4, tokens_per_second=4)

    def recognized(**options):
        return model.recognize(features, lens, requests, options=RecognizeOptions(**options))

    with torch.no_grad():
        encoder_out, encoder_lens, _, _ = model.encode(features, lens)
        log_probs = model.ctc_head(encoder_out).log_softmax(-1)
    plain, scored = recognized(search=search), recognized(search=search, ctc_weight=2.0)
    assert [r.texts for r in plain] != [r.texts for r in scored]
    for row, result in enumerate(scored):
        assert [h.score for h in result.nbest] == sorted((h.score for h in result.nbest), reverse=True)
        for hypothesis, text in zip(result.nbest, result.texts, strict=True):
            label = torch.tensor([model.ctc_label_ids(text)])
            loss = torch.nn.functional.ctc_loss(
                log_probs[row : row + 1, : encoder_lens[row]].transpose(0, 1),
                label,
                encoder_lens[row : row + 1],
                torch.tensor([label.shape[1]]),
                model.blank_id,
                reduction="none",
            ).item()  # fmt: skip
            if hypothesis.stopped == "end" and loss < 1e4:
                expected = (sum(hypothesis.log_probs) - 2.0 * loss) / len(hypothesis.log_probs)
                assert hypothesis.score == pytest.approx(expected, abs=1e-3)
    recognizer = model.recognizer(RecognizeOptions(search=search, ctc_weight=2.0))
    numbers, joined = recognizer.join(Speech(features, lens, requests)), {}
    while len(joined) < len(numbers):
        joined.update(recognizer.step())
    assert [joined[number].texts for number in numbers] == [result.texts for result in scored]
    greedy = SearchOptions("greedy", tokens_per_second=4)
    assert recognized(search=greedy, ctc_weight=2.0) != recognized(search=greedy)


@pytest.mark.parametrize("own_pieces", [False, True])
def test_the_head_of_an_encoder_alone_is_taken_over(own_pieces, model_config, tokenizer_dir, pieces_dir, tmp_path):
    torch.manual_seed(0)
    section = EncoderSection(whisper=WhisperEncoderConfig(80, 16, 2, 2, 32, 1500))
    written = pieces_dir if own_pieces else tokenizer_dir
    alone = EncoderModel.from_config(ModelConfig(tokenizer=str(written), encoder=section, llm=None, ctc_weight=1.0))
    alone.save_pretrained(tmp_path / "alone")
    from_folder = EncoderSection(path=str(tmp_path / "alone"))

    def head_of(ctc_tokenizer):
        config = dataclasses.replace(
            model_config, encoder=from_folder, projector=ProjectorConfig("ctc", 1), ctc_tokenizer=ctc_tokenizer
        )
        return SpeechLLM.from_config(config).ctc_head

    same = head_of(str(pieces_dir) if own_pieces else None)
    assert torch.equal(same.weight, alone.ctc_head.weight) and torch.equal(same.bias, alone.ctc_head.bias)
    other = head_of(None if own_pieces else str(pieces_dir))
    assert other.weight.shape != same.weight.shape
    again = EncoderModel.from_config(dataclasses.replace(alone.config, tokenizer=str(written), encoder=from_folder))
    assert torch.equal(again.ctc_head.weight, alone.ctc_head.weight)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"projector": {"kind": "ctc"}}, "downsample: 2 with kind: ctc.* set downsample: 1"),
        ({"projector": {"kind": "ctc", "downsample": 1, "layer_weights": True}}, "layer_weights has no effect"),
        ({"projector": {"kind": "ctc", "downsample": 1, "hidden_dim": 8}}, "hidden_dim has no effect with kind: ctc"),
        ({"projector": {"kind": "ctc", "downsample": 1}, "ctc_weight": 0.0}, "ctc reads the CTC head, and ctc_weight"),
        ({"ctc_tokenizer": "x", "ctc_weight": 0.0}, "ctc_tokenizer is for the CTC head, and ctc_weight is 0"),
        ({"ctc_tokenizer": "x", "llm": None}, "ctc_tokenizer leads to the language model, and llm is null"),
    ],
)
def test_settings_that_make_no_sense(settings, said, model_config):
    with pytest.raises(ConfigError, match=said):
        override(model_config, settings, "test")


def test_the_head_is_on_the_first_encoder_only():
    more = [{"encoder": {"path": "x"}, "projector": {"kind": "ctc", "downsample": 1}}]
    values = {
        "tokenizer": "x",
        "encoder": {"path": "x"},
        "llm": {"path": "x"},
        "ctc_weight": 1.0,
        "more_encoders": more,
    }
    with pytest.raises(ConfigError, match=r"more_encoders\[0\].projector.kind: ctc reads the CTC head"):
        from_dict(ModelConfig, values)
