"""The model: golden data, states, padding, initialization, gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from speechllm.rwkv7 import RWKV7, RWKV7Config, RWKV7State, load_rwkv7

from .small import assert_same, random_state, small_model

GOLDEN = Path(__file__).parents[1] / "golden" / "rwkv7" / "small"


@pytest.fixture(scope="module")
def model():
    return load_rwkv7(GOLDEN / "model.pth")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "io.safetensors")


NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_golden(golden, backend):
    model = load_rwkv7(GOLDEN / "model.pth", wkv_backend=backend)
    logits, _ = model(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() <= 1e-4
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), golden["input_ids"][:, 1:].flatten())
    assert abs(loss - golden["loss"]) <= 1e-4
    loss.backward()
    parameters = dict(model.named_parameters())
    checked = [name for name in golden if name.startswith("grad.")]
    assert checked
    for name in checked:
        got, expected = parameters[name.removeprefix("grad.")].grad, golden[name]
        assert (got - expected).norm() <= 1e-3 * expected.norm(), name


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_prefill_then_step_equals_one_pass(model, given):
    ids = torch.randint(0, 160, (3, 40))
    state = random_state(model, 3) if given else None
    logits, end = model(ids, state=state)
    for split in (1, 33, 39):
        first, middle = model(ids[:, :split], state=state)
        second, last = model(ids[:, split:], state=middle)
        torch.testing.assert_close(torch.cat((first, second), 1), logits, **NEAR)
        assert_same(last, end, **NEAR)
        for t in range(split, 40):
            before = middle.wkv.clone()
            out, after = model.step(ids[:, t], middle)
            assert torch.equal(middle.wkv, before)  # the given state can be used again
            torch.testing.assert_close(out, logits[:, t], **NEAR)
            middle = after
        assert_same(middle, end, **NEAR)


@torch.no_grad()
def test_a_state_given_up_is_overwritten_by_the_same_next_one(model):
    ids, state = torch.tensor([3, 5]), random_state(model, 2)
    logits, after = model.step(ids, state)
    again, overwritten = model.step(ids, state, overwrite=True)
    assert overwritten.wkv is state.wkv and torch.equal(again, logits)
    assert_same(overwritten, after, rtol=0, atol=0)


@pytest.mark.parametrize("garbage", [5.0, float("nan")])
@torch.no_grad()
def test_each_row_gets_what_it_gets_alone(model, garbage):
    lens = [50, 1, 33, 0]
    embeds, state = torch.randn(4, 50, 128), random_state(model, 4)
    for i, n in enumerate(lens):
        embeds[i, n:] = garbage
    logits, end = model(inputs_embeds=embeds, lens=torch.tensor(lens), state=state)
    assert logits.isfinite().all()
    for i, n in enumerate(lens):
        row = state.select(torch.tensor([i]))
        if n > 0:
            alone, row = model(inputs_embeds=embeds[i : i + 1, :n], state=row)
            torch.testing.assert_close(logits[i, :n], alone[0], **NEAR)
        assert_same(end.select(torch.tensor([i])), row, **NEAR)
    next_ids = torch.tensor([1, 2, 3, 4])  # and decoding goes on from there
    stepped, _ = model.step(next_ids, end)
    together, _ = model(next_ids[:, None], state=end)
    torch.testing.assert_close(stepped, together[:, 0], **NEAR)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_rows_equal_separate_rows(backend):
    model = small_model()
    model.wkv_backend = backend
    lens = [40, 1, 0, 17, 38]
    rows, state = [torch.randn(1, n, 32) for n in lens], random_state(model, 5)
    labels = [torch.randint(0, 40, (1, n)) for n in lens]
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0)
    results = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            parts = [(torch.cat(rows, 1), torch.cat(labels, 1), {"cu_seqlens": cu_seqlens, "state": state})]
        else:
            parts = [(rows[i], labels[i], {"state": state.select(torch.tensor([i]))}) for i in range(5) if lens[i] > 0]
        logits = torch.cat([model(inputs_embeds=x, **options)[0] for x, _, options in parts], 1)
        ends = [model(inputs_embeds=x, **options)[1] for x, _, options in parts]
        loss = sum(model.loss(y, inputs_embeds=x, **options)[0].loss for x, y, options in parts)
        loss.backward()
        results.append((logits, ends, loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (logits, (end,), loss, grads), (logits_2, ends, loss_2, grads_2) = results
    torch.testing.assert_close(logits, logits_2, **NEAR)
    torch.testing.assert_close(loss, loss_2)
    for i, row in enumerate((0, 1, 3, 4)):
        assert_same(end.select(torch.tensor([row])), ends[i], **NEAR)
    assert_same(end.select(torch.tensor([2])), state.select(torch.tensor([2])))
    for x, y in zip(grads, grads_2, strict=True):
        assert (x - y).norm() <= 1e-4 * y.norm()


def test_loss_without_a_label_is_zero_and_has_gradients():
    model = small_model()
    (loss, tokens, correct), _ = model.loss(torch.full((2, 5), -100), torch.ones(2, 5, dtype=torch.long))
    assert loss == 0 and tokens == 0 and correct == 0
    loss.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_checkpointed_blocks_change_nothing():
    model = small_model()
    ids = torch.randint(0, 40, (2, 20))
    grads = []
    for model.checkpoint_blocks in (False, True):
        model.zero_grad()
        loss, end = model.loss(ids, ids)
        (loss.loss + end.wkv.square().sum()).backward()
        grads.append([p.grad for p in model.parameters()])
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)


def test_initial_state():
    model = small_model()
    ids, state = torch.randint(0, 40, (2, 20)), random_state(model, 1)
    state = RWKV7State(torch.zeros_like(state.att_shift), torch.zeros_like(state.ffn_shift), state.wkv)
    expected, end = model(ids, state=state.repeat(2))
    model.add_initial_state(state)
    logits, same = model(ids)
    torch.testing.assert_close(logits, expected)
    assert_same(same, end)
    logits.sum().backward()
    assert model.initial_wkv.grad.abs().sum() > 0
    stepped, after = model.step(ids[:, 0], model.initial_state(2))
    expected, expected_after = model.step(ids[:, 0], state.repeat(2))
    assert torch.equal(stepped, expected)
    assert_same(after, expected_after, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"wkv has shape \(2, 2, 2, 16, 16\), this model needs \(2, 1, 2, 16, 16\)"):
        model.add_initial_state(state.repeat(2))


def test_gradient_flows_to_a_given_state_through_a_segment_border(model):
    ids, grads = torch.randint(0, 160, (2, 40)), []
    for splits in ([40], [17, 23]):
        state = RWKV7State(*(x.detach().requires_grad_() for x in vars(model.initial_state(2)).values()))
        end, loss = state, 0.0
        for part in ids.split(splits, 1):
            logits, end = model(part, state=end)
            loss = loss + logits.logsumexp(-1).sum()
        grads.append(torch.autograd.grad(loss, vars(state).values()))
    for one, two in zip(*grads, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_bfloat16_autocast_keeps_the_state_in_float32(model):
    ids = torch.randint(0, 160, (2, 40))
    expected, _ = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(ids)
        stepped, next_state = model.step(ids[:, 0], state)
    assert state.wkv.dtype == next_state.wkv.dtype == torch.float32
    assert (logits.float() - expected).abs().max() < 0.1 and stepped.isfinite().all()


def test_bfloat16_weights():
    model = load_rwkv7(GOLDEN / "model.pth", dtype=torch.bfloat16)
    logits, state = model(torch.randint(0, 160, (2, 40)), lens=torch.tensor([40, 3]))
    assert logits.dtype == torch.bfloat16 and state.wkv.dtype == torch.float32
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.step(torch.tensor([1, 2]), state)[1].wkv.dtype == torch.float32


def test_official_initialization():
    torch.manual_seed(0)
    model = RWKV7(RWKV7Config(4, 128, 512))
    att, ffn = model.blocks[1].att, model.blocks[1].ffn
    assert model.emb.weight.abs().max() <= 1e-4
    eye = torch.eye(128)
    torch.testing.assert_close(model.head.weight.T @ model.head.weight, eye, rtol=0, atol=1e-4)  # (0.5 * 2)^2
    torch.testing.assert_close(att.key.weight @ att.key.weight.T, 0.01 * eye, rtol=0, atol=1e-5)
    assert (att.output.weight == 0).all() and (ffn.value.weight == 0).all() and (att.w1 == 0).all()
    torch.testing.assert_close(att.ln_x.weight, torch.full((128,), 0.5**0.7))
    assert att.x_r[0, 0, 0] == 1 and abs(att.x_r[0, 0, 64].item() - (1 - 0.5 ** (0.2 * 0.75))) < 1e-6
    # n = 0: -6 + 0.5 + 2.5 * zigzag(-1), n = 127: 0 + 0.5 + 2.5
    assert abs(att.w0[0, 0, 0].item() + 8.0) < 1e-5 and abs(att.w0[0, 0, 127].item() - 3.0) < 1e-5
    assert abs(att.v0.mean().item() - 0.73) < 1e-5 and not hasattr(model.blocks[0].att, "v0")


@pytest.mark.parametrize("change, message", [
    ({"n_layer": 0}, "n_layer: 0"),
    ({"n_embd": 1.5}, "n_embd: 1.5"),
    ({"head_size": 48}, "head_size: 48 does not divide n_embd: 128"),
    ({"lora_ranks": {"w": 3}}, r"unknown \['w'\]"),
    ({"lora_ranks": {"decay": -1}}, r"lora_ranks\['decay'\]: -1"),
])  # fmt: skip
def test_configuration_errors(change, message):
    with pytest.raises(ValueError, match=message):
        RWKV7Config(**({"n_layer": 2, "n_embd": 128, "vocab_size": 10} | change))


def test_call_errors(model):
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="L = 0"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="lens go from 1 to 6, the input has L = 5"):
        model(ids, lens=torch.tensor([1, 6]))
    with pytest.raises(ValueError, match=r"cu_seqlens must go from 0 up to L = 5.*got \[0, 5\] for an input of 2 rows"):
        model(ids, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"cu_seqlens.*got \[0, 4\]"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="the state has 3 rows, the input 2"):
        model(ids, state=model.initial_state(3))


def test_every_parameter_of_a_new_model_learns():
    torch.manual_seed(0)
    model = RWKV7(RWKV7Config(2, 64, 50, head_size=32))
    ids = torch.randint(0, 50, (4, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(ids)[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())  # nothing stays at its zero start
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_a_step_of_many_rows_is_made_in_parts(monkeypatch):
    model = small_model()
    ids, state = torch.arange(7), random_state(model, 7)
    logits, after = model.step(ids, state)
    monkeypatch.setattr("speechllm.rwkv7.model._STATE_AT_ONCE", 3 * 16 * 16)
    in_parts, same = model.step(ids, state)
    torch.testing.assert_close(in_parts, logits)
    assert_same(same, after)
