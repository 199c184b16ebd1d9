import os

import pytest
import torch
from safetensors.torch import save_file

from speechllm.rwkv7 import RWKV7State


def make(N=3):
    return RWKV7State(torch.randn(2, N, 8), torch.randn(2, N, 8), torch.randn(2, N, 2, 4, 4))


def parts(state):
    return state.att_shift, state.ffn_shift, state.wkv


def test_select_takes_rows_in_order_and_repeatedly():
    state = make()
    chosen = state.select(torch.tensor([2, 0, 2, 2]))
    assert len(chosen) == 4
    for x, y in zip(parts(state), parts(chosen), strict=True):
        assert torch.equal(y, x[:, [2, 0, 2, 2]])


@pytest.mark.parametrize("index", [[0, 1, 2], [0, 0, 2], [2, 0, 1], [1, 1, 1], [2, 0], [0, 1, 2, 2]])
def test_select_with_overwrite_gives_the_same(index):
    state, index = make(), torch.tensor(index)
    expected = state.select(index)
    for x, y in zip(parts(state.select(index, overwrite=True)), parts(expected), strict=True):
        assert torch.equal(x, y)


def test_repeat_keeps_the_copies_of_a_row_together():
    state = make(2)
    for x, y in zip(parts(state), parts(state.repeat(3)), strict=True):
        assert torch.equal(y, x[:, [0, 0, 0, 1, 1, 1]])


def test_cat_puts_rows_one_after_the_other():
    states = [make(2), make(1), make(3)]
    joined = RWKV7State.cat(states)
    assert len(joined) == 6
    for i, rows in enumerate(([0, 1], [2], [3, 4, 5])):
        for x, y in zip(parts(states[i]), parts(joined.select(torch.tensor(rows))), strict=True):
            assert torch.equal(x, y)


def test_detach_and_cpu():
    state = make()
    state.wkv.requires_grad_()
    assert not state.detach().wkv.requires_grad and state.cpu().wkv.device.type == "cpu"


def test_save_and_load(tmp_path):
    state = make().select(torch.tensor([1, 0]))
    state.save(tmp_path / "prompt.state")
    for x, y in zip(parts(state), parts(RWKV7State.load(tmp_path / "prompt.state")), strict=True):
        assert torch.equal(x, y)
    assert os.listdir(tmp_path) == ["prompt.state"]


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        RWKV7State.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not an RWKV-7 state.*weight.*given as the folder"):
        RWKV7State.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    state, path = make(), tmp_path / "prompt.state"
    state.save(path)
    monkeypatch.setattr("speechllm.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        make().save(path)
    assert torch.equal(RWKV7State.load(path).wkv, state.wkv)
