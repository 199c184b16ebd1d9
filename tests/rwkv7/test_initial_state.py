"""State files: of long texts, and what is wrong with a file."""

import pytest
import torch

from speechllm.cli.main import main
from speechllm.errors import UserError
from speechllm.rwkv7 import RWKV7, RWKV7Config, initial_state
from speechllm.rwkv7.initial_state import load_state, state_of_text


def test_a_text_is_read_in_pieces(model, monkeypatch):
    tokens = model.tokenizer.encode("one two three four five six seven eight nine")
    _, whole = model.llm(input_ids=torch.tensor([tokens]))
    monkeypatch.setattr(initial_state, "_TOKENS_AT_ONCE", 4)
    pieces = state_of_text(model.llm, tokens)
    for name in whole.__dataclass_fields__:
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name).detach(), rtol=1e-4, atol=1e-5)


def test_the_command_writes_what_loads(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("one two", encoding="utf-8")
    output = tmp_path / "state.safetensors"
    arguments = ["state", str(tmp_path / "text"), "--model", str(tmp_path / "model"), "--output", str(output)]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    tokens = model.tokenizer.encode("one two")
    assert f"{len(tokens)} tokens read" in capsys.readouterr().out
    torch.testing.assert_close(load_state(output, model.llm).wkv, state_of_text(model.llm, tokens).wkv)
    (tmp_path / "text").write_text("")
    output.unlink()
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    assert "text: there is no text in it" in capsys.readouterr().err and not output.exists()


def test_what_is_no_state_of_the_model_is_an_error(model, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match="state: no such state file"):
        load_state(path, model.llm)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="state: not a safetensors file"):
        load_state(path, model.llm)
    state = state_of_text(model.llm, [1])
    state.repeat(2).save(path)
    with pytest.raises(UserError, match="`att_shift` has shape .* it is not its state"):
        load_state(path, model.llm)
    config = model.llm.config
    other = RWKV7(RWKV7Config(config.n_layer + 1, config.n_embd, config.vocab_size, head_size=config.head_size))
    state_of_text(other, [1]).save(path)
    with pytest.raises(UserError, match="it is not its state"):
        load_state(path, model.llm)
