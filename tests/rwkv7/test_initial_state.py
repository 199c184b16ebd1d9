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


def test_a_tuned_state_of_rwkv_peft(model, tmp_path):
    """blocks.N.att.time_state (H, V, K), in bfloat16 as it is trained: as if it were the model's own initial state."""
    llm = model.llm
    shape = llm.initial_state(1).wkv.shape  # (layers, 1, H, V, K)
    tuned = torch.randn(shape).bfloat16()
    names = [f"blocks.{i}.att.time_state" for i in range(shape[0])]
    file = {name: wkv[0] for name, wkv in zip(names, tuned, strict=True)}
    torch.save(file, tmp_path / "state.pth")
    state = load_state(tmp_path / "state.pth", llm)
    assert torch.equal(state.wkv, tuned.float()) and not state.att_shift.any()
    ids = torch.arange(1, 6)[None]
    logits, _ = llm(input_ids=ids, state=state)
    llm.add_initial_state(state)
    assert torch.equal(llm(input_ids=ids)[0], logits)
    state.save(tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == file.keys() and all(torch.equal(x, file[name].float()) for name, x in back.items())
    with pytest.raises(UserError, match="back.pth: only a tuned state of one row .* end the name in .safetensors"):
        state_of_text(llm, [1, 2]).save(tmp_path / "back.pth")
    assert torch.load(tmp_path / "back.pth", weights_only=True).keys() == back.keys()


def test_other_files_of_rwkv_peft_are_no_states(model, tmp_path):
    state = {f"blocks.{i}.att.time_state": torch.zeros(2, 16, 16) for i in range(2)}
    lora = {"blocks.0.att.key.lora_A": torch.zeros(2, 32)}
    for content, message in (
        (lora, "not a tuned state: it holds blocks.0.att.key.lora_A"),
        (
            state | lora,
            "holds more than a tuned state .*: a whole model is given as llm.path, an adapter as llm.adapter",
        ),
        ({n: x for n, x in state.items() if "0" in n}, "`att_shift` has shape .* it is not its state"),
        ({n: x[:, :8] for n, x in state.items()}, r"time_state has shape \(2, 8, 16\); expected"),
        ({n: x.transpose(0, 1)[:, :, :16] for n, x in state.items()}, "time_state has shape"),
        (
            {"blocks.1.att.time_state": torch.zeros(2, 16, 16)},
            "a tuned state of 1 layers without blocks.0.att.time_state",
        ),
    ):
        torch.save(content, tmp_path / "state.pth")
        with pytest.raises(UserError, match=f"state.pth: {message}"):
            load_state(tmp_path / "state.pth", model.llm)
