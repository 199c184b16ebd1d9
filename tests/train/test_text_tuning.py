"""Tuning on text: documents, batches, the loop, and the command."""

import dataclasses
import itertools
import re
from itertools import islice

import pytest
import torch

from speechllm.cli.main import main
from speechllm.errors import UserError
from speechllm.llm.adapters import TuneConfig, load_adapter, tune
from speechllm.rwkv7 import RWKV7State, load_rwkv7, save_rwkv7
from speechllm.text.tokenizer import load_tokenizer
from speechllm.train.text_tuning import (
    Document,
    TextTuning,
    batches,
    inputs_and_labels,
    read_documents,
    text_loss,
    tune_on_text,
)
from tests.rwkv7.small import small_model

EOS = 1
DOCUMENTS = [Document([5, 6, 7, 8] * n) for n in (1, 2, 3, 5, 9)]  # one is longer than a segment


def test_documents_of_text_and_json(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    (tmp_path / "a.txt").write_text("one two\n\n  \ntres", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "uno\\u2028dos"}\n', encoding="utf-8")
    documents = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer)
    assert [tokenizer.decode(x.ids) for x in documents] == ["one two", "tres", "uno\u2028dos"]
    (tmp_path / "b.jsonl").write_text('{"text": "uno"}\n{"txt": "dos"}\n')
    with pytest.raises(UserError, match="b.jsonl, line 2: expected JSON"):
        read_documents([tmp_path / "b.jsonl"], tokenizer)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="c.txt: not UTF-8"):
        read_documents([tmp_path / "c.txt"], tokenizer)
    (tmp_path / "d.txt").write_text("\n")
    with pytest.raises(UserError, match="no text in .*d.txt"):
        read_documents([tmp_path / "d.txt"], tokenizer)


def test_each_document_once_a_round_in_batches_that_fit():
    found = list(islice(batches(DOCUMENTS, 30, seed=1), 40))
    stream = [document for batch in found for document in batch]
    for i in range(0, 50, 5):
        assert sorted(map(len, stream[i : i + 5])) == sorted(map(len, DOCUMENTS))
    assert all(len(batch) == 1 or sum(len(d) + 1 for d in batch) <= 30 for batch in found)
    assert found == list(islice(batches(DOCUMENTS, 30, seed=1), 40))


def test_labels_are_the_next_ids():
    ids, labels, cu_seqlens = inputs_and_labels([Document([5, 6]), Document([7])], EOS)
    assert ids.tolist() == [[EOS, 5, 6, EOS, 7]] and labels.tolist() == [[5, 6, EOS, 7, EOS]]
    assert cu_seqlens.tolist() == [0, 3, 5]


def test_a_prompt_is_read_and_not_learned(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "text": " two"}\n{"text": "tres"}\n', encoding="utf-8")
    documents = read_documents([tmp_path / "a.jsonl"], tokenizer)
    prompt, text = tokenizer.encode("one"), tokenizer.encode(" two")
    assert documents == [Document(prompt + text, len(prompt)), Document(tokenizer.encode("tres"))]
    _, labels, _ = inputs_and_labels(documents[:1], EOS)
    assert labels.tolist() == [[-100] * len(prompt) + text + [EOS]]
    model = small_model()
    given = [Document([5, 6, 7, 8, 9], 4)]  # with a segment in which nothing is learned
    losses = [text_loss(model, given, TextTuning(segment=n), EOS) for n in (2, 100)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    options = TextTuning(steps=2, tokens_per_step=40, segment=2, lr=1e-2, warmup_steps=1, valid_every_n=2)
    _, after = tune_on_text(model, given, given, options, EOS, lambda: None)
    assert after < losses[0]
    (tmp_path / "a.jsonl").write_text('{"prompt": 3, "text": "two"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="a.jsonl, line 1"):
        read_documents([tmp_path / "a.jsonl"], tokenizer)


def test_the_loss_does_not_depend_on_segments():
    model = small_model()
    losses = [text_loss(model, DOCUMENTS, TextTuning(segment=n), EOS) for n in (3, 100)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("method, lr", [("full", 1e-2), ("miss", 1e-2), ("adalora", 3e-2), ("state", 1e-1)])
def test_a_model_learns_the_text(method, lr):
    model = tune(small_model(), TuneConfig(method)).train()
    saved = []
    options = TextTuning(steps=20, tokens_per_step=40, segment=16, lr=lr, warmup_steps=2, valid_every_n=10)
    before, after = tune_on_text(model, DOCUMENTS, DOCUMENTS, options, EOS, lambda: saved.append(1))
    assert after < 0.9 * before and len(saved) == 2


@pytest.mark.parametrize("method", ["full", "miss", "state"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(method, tmp_path):
    options = TextTuning(steps=9, tokens_per_step=40, segment=16, lr=1e-2, warmup_steps=2, valid_every_n=3)

    def run(unfinished, stop_after=None):
        model = tune(small_model(), TuneConfig(method)).train()
        saves = itertools.count(1)

        def save():
            if next(saves) == stop_after:
                raise KeyboardInterrupt

        losses = tune_on_text(model, DOCUMENTS, DOCUMENTS, options, EOS, save, unfinished)
        assert not unfinished.exists()
        return losses, [p for p in model.parameters() if p.requires_grad], next(saves) - 1

    losses, parameters, saves = run(tmp_path / "never")
    assert saves == 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_after=3)
    other = dataclasses.replace(options, lr=1e-3)
    with pytest.raises(UserError, match="stopped: is of a run with other options or text; remove it"):
        model = tune(small_model(), TuneConfig(method))
        tune_on_text(model, DOCUMENTS, DOCUMENTS, other, EOS, list, tmp_path / "stopped")
    again, resumed, saves = run(tmp_path / "stopped")
    assert saves == 1 and again == losses
    assert all(torch.equal(p, q) for p, q in zip(parameters, resumed, strict=True))


@pytest.fixture
def files(tmp_path, tokenizer_dir):
    """The options of a small `speechllm tune`."""
    save_rwkv7(small_model(vocab_size=300), tmp_path / "lm.pth")
    (tmp_path / "text.txt").write_text("one two three\nuno dos tres\n" * 4)
    return [
        "tune", "--llm", str(tmp_path / "lm.pth"), "--text", str(tmp_path / "text.txt"),
        "--valid", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "out"),
        "--steps", "6", "--tokens-per-step", "40", "--lr", "1e-2",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["miss", "state", "full"])
def test_the_command_writes_what_loads(files, tmp_path, method, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*files, "--method", method, "--checkpoint-blocks", "--bf16", "--segment", "6"])
    assert exit_info.value.code == 0
    line = capsys.readouterr().out
    assert line.startswith("loss of a token: ") and f"written to {tmp_path / 'out'}" in line
    base = load_rwkv7(tmp_path / "lm.pth")
    ids = torch.randint(0, 300, (1, 9))
    expected = base(ids)[0]
    if method == "full":
        tuned = load_rwkv7(tmp_path / "out")
    else:
        tuned = load_adapter(load_rwkv7(tmp_path / "lm.pth"), tmp_path / "out")
    assert not torch.allclose(tuned(ids)[0], expected)
    if method == "state":  # the file is also a state to decode from
        (file,) = (tmp_path / "out").iterdir()
        assert torch.equal(tuned(ids)[0], base(ids, state=RWKV7State.load(file))[0])


def test_the_command_trains_a_new_model(files, tmp_path, tokenizer_dir, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["tune", "--new", "2x64", *files[3:]])
    assert exit_info.value.code == 0
    config = load_rwkv7(tmp_path / "out").config
    assert (config.n_layer, config.n_embd, config.vocab_size) == (2, 64, load_tokenizer(tokenizer_dir).vocab_size)
    before, after = re.search(r"loss of a token: (\S+) -> ([0-9.]+)", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    assert not (tmp_path / "out.unfinished.pt").exists()
    for change, message in (
        (["--method", "lora"], "is trained in full"),
        (["--new", "2x63"], "--new 2x63: layers and"),
    ):
        with pytest.raises(SystemExit):
            main(["tune", "--new", "2x64", *files[3:], *change])
        assert message in capsys.readouterr().err


def test_dry_run_prints_the_table(files, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*files[:3], "--dry-run", "--rank", "4"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    for method in ("full", "lora", "rslora", "dora", "pissa", "miss", "adalora", "state"):
        assert f"| {method} |" in out


@pytest.mark.parametrize("change, message", [
    (["--method", "lota"], "method: 'lota' is unknown; choose from full, lora"),
    (["--method", "state", "--rank", "3"], "rank: method state does not have it"),
    (["--targets", "keys"], "keys"),
    (["--llm", "nowhere.pth"], "nowhere.pth: no such file"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--tokenizer", "rwkv"], "65536 ids, the model 300"),
])  # fmt: skip
def test_mistakes_are_explained(files, change, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main([*files, *change])
    assert exit_info.value.code == 1
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith("error: ") and message in err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(files, capsys):
    with pytest.raises(SystemExit):
        main(files[:3])
    assert "--text, --valid, --output missing" in capsys.readouterr().err
