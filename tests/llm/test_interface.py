"""What `speechllm.llm.interface` says of a language model, of each kind that there is."""

import pytest
import torch
import torch.nn.functional as F

from speechllm.decode.search import Prompt, SearchOptions, search
from tests.llm.tiny_llms import KINDS, tiny_llm

NEAR = {"rtol": 1e-4, "atol": 1e-4}
LENS = [12, 1, 9, 4]


@pytest.fixture(params=KINDS)
def model(request):
    return tiny_llm(request.param)


def rows_of(state, *rows):
    return state.select(torch.tensor(rows))


def assert_same(model, state, other):
    """That the model goes on in the same way from both, whatever is in them."""
    assert len(state) == len(other)
    ids = torch.randint(0, 40, (len(state), 7))
    torch.testing.assert_close(model(ids, state=state)[0], model(ids, state=other)[0], **NEAR)


@pytest.fixture
def read(model):
    """Four rows that have read something, each of its own length."""
    with torch.no_grad():
        return model(torch.randint(0, 40, (4, 12)), lens=torch.tensor(LENS))[1]


def test_sizes(model):
    assert (model.hidden_size, model.vocab_size) == (32, 40) and isinstance(model.name, str)
    assert model.embed(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 32)
    assert model.embed(torch.zeros(0, dtype=torch.long)).shape == (0, 32)


@pytest.mark.parametrize("garbage", [5.0, float("nan")])
@torch.no_grad()
def test_each_row_gets_what_it_gets_alone(model, read, garbage):
    for state in (None, read):
        lens = [3, 11, 1, 0]
        embeds = torch.randn(4, 11, 32)
        for i, n in enumerate(lens):
            embeds[i, n:] = garbage
        logits, after = model(inputs_embeds=embeds, lens=torch.tensor(lens), state=state)
        assert logits.isfinite().all()
        for i, n in enumerate(lens):
            row = None if state is None else rows_of(state, i)
            if n > 0:
                alone, row = model(inputs_embeds=embeds[i : i + 1, :n], state=row)
                torch.testing.assert_close(logits[i, :n], alone[0], **NEAR)
            if row is not None:
                assert_same(model, rows_of(after, i), row)


@torch.no_grad()
def test_ids_beyond_the_length_may_be_anything(model):
    ids, lens = torch.randint(0, 40, (2, 20)), torch.tensor([20, 12])
    expected, _ = model(ids, lens=lens)
    ids[1, 12:] = -100
    torch.testing.assert_close(model(ids, lens=lens)[0], expected)


@torch.no_grad()
def test_embeddings_in_place_of_ids(model):
    ids = torch.randint(0, 40, (2, 20))
    torch.testing.assert_close(model(inputs_embeds=model.embed(ids))[0], model(ids)[0])


@torch.no_grad()
def test_reading_in_parts_is_reading_at_once(model, read):
    ids = torch.randint(0, 40, (4, 10))
    for state in (None, read):
        logits, end = model(ids, state=state)
        for split in (1, 6, 9):
            first, middle = model(ids[:, :split], state=state)
            second, last = model(ids[:, split:], state=middle)
            torch.testing.assert_close(torch.cat((first, second), 1), logits, **NEAR)
            assert_same(model, last, end)


@pytest.mark.parametrize("overwrite", [False, True])
@torch.no_grad()
def test_step_reads_as_forward_does(model, read, overwrite):
    ids = torch.randint(0, 40, (4, 10))
    logits, end = model(ids, state=read)
    state = read.select(torch.arange(4))
    for t in range(10):
        out, after = model.step(ids[:, t], state, overwrite=overwrite)
        torch.testing.assert_close(out, logits[:, t], **NEAR)
        if not overwrite:
            torch.testing.assert_close(model.step(ids[:, t], state)[0], out)  # the given state is what it was
        state = after
    assert_same(model, state, end)


@pytest.mark.parametrize("overwrite", [False, True])
@torch.no_grad()
def test_rows_of_states_are_chosen_repeated_and_put_together(model, read, overwrite):
    ids = torch.randint(0, 40, (4, 6))
    logits, _ = model(ids, state=read)
    for rows in ([2, 1], [3, 3, 0, 1], [1], [1, 0, 2, 2]):
        given = read.select(torch.arange(4))
        chosen = given.select(torch.tensor(rows), overwrite=overwrite)
        assert len(chosen) == len(rows)
        torch.testing.assert_close(model(ids[rows], state=chosen)[0], logits[rows], **NEAR)
    repeated = rows_of(read, 3, 1).repeat(3)
    torch.testing.assert_close(model(ids[[3, 3, 3, 1, 1, 1]], state=repeated)[0], logits[[3, 3, 3, 1, 1, 1]], **NEAR)
    parts = [rows_of(read, 1), rows_of(read, 0, 2), rows_of(read, 1, 3)]
    together = type(read).cat(parts)
    torch.testing.assert_close(model(ids[[1, 0, 2, 1, 3]], state=together)[0], logits[[1, 0, 2, 1, 3]], **NEAR)


@torch.no_grad()
def test_logits_only_where_asked(model, read):
    ids, mask = torch.randint(0, 40, (4, 10)), torch.rand(4, 10) < 0.3
    logits, state = model(ids, state=read)
    some, same = model(ids, state=read, logits_mask=mask)
    torch.testing.assert_close(some, logits[mask], **NEAR)
    assert_same(model, same, state)


def test_loss_equals_cross_entropy_of_the_logits(model, monkeypatch):
    monkeypatch.setattr("speechllm.linear._LOGITS_AT_ONCE", 40 * 7)  # several chunks
    ids, lens = torch.randint(0, 40, (4, 12)), torch.tensor(LENS)
    labels = torch.where(torch.rand(4, 12) < 0.6, torch.randint(0, 40, (4, 12)), -100)
    labels = labels.masked_fill(torch.arange(12) >= lens[:, None], -100)
    results = []
    for whole in (True, False):
        model.zero_grad()
        if whole:
            logits, _ = model(ids, lens=lens)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            correct = (logits.argmax(-1) == labels).sum()
        else:
            (loss, tokens, correct), _ = model.loss(labels, ids, lens=lens)
            assert tokens == (labels != -100).sum()
        (loss * 0.3).backward()
        results.append((loss, correct, *(p.grad for p in model.parameters() if p.grad is not None)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="asked for at 3 positions of padding"):
        model.loss(torch.zeros(1, 12, dtype=torch.long), ids[:1], lens=torch.tensor([9]))


def test_log_probs_are_those_of_the_logits(model):
    ids, lens = torch.randint(0, 40, (4, 12)), torch.tensor(LENS)
    labels = torch.where(torch.rand(4, 12) < 0.6, torch.randint(0, 40, (4, 12)), -100)
    labels = labels.masked_fill(torch.arange(12) >= lens[:, None], -100)
    mask, logits = labels != -100, model(ids, lens=lens)[0]
    for temperature in (1.0, 0.7):
        expected = (logits[mask].float() / temperature).log_softmax(-1).gather(1, labels[mask][:, None])[:, 0]
        found = model.log_probs(labels, ids, lens=lens, temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (loss, _, _), _ = model.loss(labels, ids, lens=lens)
    torch.testing.assert_close(-model.log_probs(labels, ids, lens=lens).sum(), loss, rtol=1e-4, atol=1e-3)


def test_loss_of_a_batch_is_that_of_its_rows(model, read):
    embeds, labels, lens = torch.randn(4, 12, 32), torch.randint(0, 40, (4, 12)), torch.tensor(LENS)
    embeds[1, 1:], labels = float("nan"), labels.masked_fill(torch.arange(12) >= lens[:, None], -100)
    for state in (None, read):
        (loss, tokens, correct), _ = model.loss(labels, inputs_embeds=embeds, lens=lens, state=state)
        parts = []
        for i, n in enumerate(LENS):
            row = None if state is None else rows_of(state, i)
            parts.append(model.loss(labels[i : i + 1, :n], inputs_embeds=embeds[i : i + 1, :n], state=row)[0])
        for whole, rows in zip((loss, tokens, correct), zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(whole, sum(rows), rtol=1e-4, atol=1e-3)


def test_loss_without_a_label_is_zero_and_has_gradients(model):
    (loss, tokens, correct), _ = model.loss(torch.full((2, 5), -100), torch.ones(2, 5, dtype=torch.long))
    assert loss == 0 and tokens == 0 and correct == 0
    loss.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters() if p.requires_grad)


def test_checkpointed_blocks_change_nothing(model):
    ids, grads = torch.randint(0, 40, (2, 20)), []
    model.train()
    for model.checkpoint_blocks in (False, True, False):
        model.zero_grad()
        (loss, _, _), _ = model.loss(ids, ids)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for x, y, z in zip(*grads, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_gradients_flow_to_inputs_and_states(model):
    embeds, grads = torch.randn(2, 12, 32), []
    for splits in ([12], [5, 7]):
        inputs, state, loss = embeds.clone().requires_grad_(), None, 0.0
        for part in inputs.split(splits, 1):
            logits, state = model(inputs_embeds=part, state=state)
            loss = loss + logits.logsumexp(-1).sum()
        grads.append(torch.autograd.grad(loss, inputs)[0])
    assert (grads[0].abs().sum(-1) > 0).all()
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_bfloat16_autocast(model):
    ids = torch.randint(0, 40, (2, 20))
    expected, _ = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(ids)
        stepped, _ = model.step(ids[:, 0], state)
    # a norm: experts may be chosen otherwise
    assert (logits.float() - expected).norm() < 0.2 * expected.norm() and stepped.isfinite().all()


@pytest.mark.parametrize("options", [
    SearchOptions(max_rows=3),
    SearchOptions("beam", beam=3, nbest=3, max_rows=8),
    SearchOptions("sample", nbest=2, max_rows=5, seed=1),
], ids=lambda options: options.method)  # fmt: skip
@torch.no_grad()
def test_a_search_finds_for_an_utterance_what_it_finds_alone(model, options):
    _, before = model(torch.tensor([[3, 5, 7]]))
    prompts = [Prompt(torch.randn(n, 32), 12, before if n % 2 else None) for n in (4, 1, 7, 3, 2, 6)]
    found = dict(search(model, prompts, options, eos_id=0))
    for i, prompt in enumerate(prompts):
        if options.method == "sample":  # its random numbers depend on the number of the utterance
            prompt = [Prompt(prompts[0].inputs_embeds, 1)] * i + [prompt]
            alone = dict(search(model, prompt, SearchOptions("sample", nbest=2, max_rows=2, seed=1), eos_id=0))[i]
        else:
            ((_, alone),) = search(model, [prompt], options, eos_id=0)
        assert [h.tokens for h in alone] == [h.tokens for h in found[i]]
        for one, other in zip(alone, found[i], strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3)
    assert len({found[i][0].tokens for i in found}) > 1


@torch.no_grad()
def test_call_errors(model, read):
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="L = 0"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="lens"):
        model(ids, lens=torch.tensor([1, 6]))
    with pytest.raises(ValueError, match="the state has 4 rows, the input 2"):
        model(ids, state=read)
    with pytest.raises(ValueError, match="logits_mask has shape"):
        model(ids, logits_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="labels have shape"):
        model.loss(ids[:, 1:], ids)
    with pytest.raises(ValueError, match="asked for at 7 positions of padding"):
        model.loss(ids, ids, lens=torch.tensor([2, 1]))


@torch.no_grad()
def test_a_state_goes_on_from_its_tensors(model, read):
    tensors = {name: x.clone() for name, x in read.tensors().items()}
    assert_same(model, type(read).from_tensors(tensors), read)
    one = rows_of(read, 2)
    assert_same(model, type(read).from_tensors(one.tensors()), one)
