"""Files of RWKV-PEFT, made here in its layout: what they compute, what they become, and what is wrong with one."""

import copy
import json

import pytest
import torch

from speechllm.errors import UserError
from speechllm.llm.adapters import (
    TuneConfig,
    convert_adapter,
    load_adapter,
    merge,
    merged_state_dict,
    save_adapter,
    tune,
    unmerge,
)
from speechllm.rwkv7 import RWKV7, RWKV7Config, load_rwkv7, save_rwkv7

CONFIG = RWKV7Config(2, 32, 40, head_size=16, lora_ranks={"decay": 4, "a": 4, "v": 4, "gate": 4})
RANK = 4
MATRICES = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]


def random_model(config=CONFIG):
    torch.manual_seed(0)
    model = RWKV7(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def base():
    return random_model()


def shapes(base):
    weights = base.state_dict()
    return {f"blocks.{i}.{m}": weights[f"blocks.{i}.{m}.weight"].shape for i in range(2) for m in MATRICES}


def lora_file(base, rank=RANK, prefix=""):
    torch.manual_seed(1)
    file = {}
    for name, (out, width) in shapes(base).items():
        file[f"{prefix}{name}.lora_A"] = torch.randn(rank, width)
        file[f"{prefix}{name}.lora_B"] = 0.1 * torch.randn(out, rank)
    return file


def disha_file(base, rank=RANK):
    torch.manual_seed(2)
    return {f"{name}.disha": 0.1 * torch.randn(rank, out) for name, (out, _) in shapes(base).items()}


def state_file():
    torch.manual_seed(3)
    return {f"blocks.{i}.att.time_state": torch.randn(2, 16, 16) for i in range(2)}


def added(base, differences):
    """A plain model with these differences of its weights, by matrix."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, difference in differences.items():
            model.get_submodule(name).weight.add_(difference)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).view(2, 12))[0]


def check(base, path, expected, **options):
    """What it computes: on the base, merged, and unmerged again."""
    model = load_adapter(copy.deepcopy(base), path, **options)
    assert not any(p.requires_grad for p in model.parameters())
    assert not torch.allclose(logits(expected), logits(base), atol=1e-2)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    merge(model)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    unmerge(model)
    plain = RWKV7(CONFIG).eval()
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(logits(plain), logits(expected), rtol=1e-4, atol=1e-4)
    return model


def saved(path, content, dtype=torch.float32):
    torch.save({name: x.to(dtype) for name, x in content.items()}, path)
    return path


def lora_difference(file, alpha):
    names = {name.rpartition(".")[0] for name in file}
    return {n: alpha / RANK * file[f"{n}.lora_B"] @ file[f"{n}.lora_A"] for n in names}


@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module.model.", "module.", "base_model.model."])
def test_lora_counts_alpha_over_rank_times(base, tmp_path, prefix):
    file = lora_file(base)
    path = saved(tmp_path / "rwkv-0.pth", lora_file(base, prefix=prefix))
    check(base, path, added(base, lora_difference(file, 16)), alpha=16)


def test_names_of_peft_in_a_file(base, tmp_path):
    """As a state dict of a model that peft was put on has them."""
    file = lora_file(base)
    names = {f"base_model.model.{name}.default.weight": x for name, x in file.items()}
    check(base, saved(tmp_path / "rwkv-0.pth", names), added(base, lora_difference(file, 2)), alpha=2)


def test_bfloat16(base, tmp_path):
    """As bf16 training saves it: the numbers in the file count, in float32."""
    file = {name: x.bfloat16().float() for name, x in lora_file(base).items()}
    path = saved(tmp_path / "rwkv-0.pth", file, torch.bfloat16)
    check(base, path, added(base, lora_difference(file, 8)), alpha=8)


def pissa_files(base, folder, prefix="model."):
    """What is trained, and what it began as: of the base, that much was taken away."""
    file, start = lora_file(base), {}
    torch.manual_seed(4)
    for name, x in file.items():
        matrix, _, part = name.rpartition(".")
        start[f"{prefix}{matrix}.init_{part}"] = x + 0.1 * torch.randn_like(x)
    saved(folder / "init_pissa.pth", start)
    differences = {}
    for name in shapes(base):
        first = start[f"{prefix}{name}.init_lora_B"] @ start[f"{prefix}{name}.init_lora_A"]
        differences[name] = file[f"{name}.lora_B"] @ file[f"{name}.lora_A"] - first
    return saved(folder / "rwkv-0.pth", file), differences


@pytest.mark.parametrize("prefix", ["", "model."])
def test_pissa_is_trained_minus_start(base, tmp_path, prefix):
    path, differences = pissa_files(base, tmp_path, prefix)
    check(base, path, added(base, differences))
    with pytest.raises(UserError, match="alpha: is LoRA's; init_pissa.pth beside it says that this is PiSSA"):
        load_adapter(copy.deepcopy(base), path, alpha=8)
    (tmp_path / "init_pissa.pth").unlink()
    with pytest.raises(UserError, match="scale of a LoRA is not in its file.*put its training's init_pissa.pth"):
        load_adapter(copy.deepcopy(base), path)


@pytest.mark.parametrize("rank", [4, 5])
def test_miss_repeats_its_block(base, tmp_path, rank):
    """y = W x + D^T (sum of the blocks of x), the last one padded with zeros where the rank does not divide."""
    file = disha_file(base, rank)
    differences = {}
    for name, (_, width) in shapes(base).items():
        differences[name] = file[f"{name}.disha"].T.repeat(1, -(-width // rank))[:, :width]
    check(base, saved(tmp_path / "rwkv-0.pth", file), added(base, differences))


def test_norms_in_the_file_replace_those_of_the_base(base, tmp_path):
    """RWKV-PEFT trains them by default (train_parts), and saves them with the adapter."""
    norms = {n: torch.randn_like(p) for n, p in base.named_parameters() if ".ln" in n or n.startswith("ln_out")}
    file = lora_file(base)
    expected = added(base, lora_difference(file, 4))
    expected.load_state_dict(norms, strict=False)
    model = check(base, saved(tmp_path / "rwkv-0.pth", {**file, **norms}), expected, alpha=4)
    with pytest.raises(UserError, match="trained in full .* save the merged model"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"no place: merge all of it into its base \(--adapter\)"):
        convert_adapter(tmp_path / "rwkv-0.pth", tmp_path / "adapter", alpha=4)
    assert not (tmp_path / "adapter").exists()


def with_state(base):
    model = copy.deepcopy(base)
    model.add_initial_state()
    with torch.no_grad():
        model.initial_wkv.copy_(torch.stack(list(state_file().values())))
    return model


def test_a_tuned_state(base, tmp_path):
    expected = with_state(base)
    path = saved(tmp_path / "state.pth", state_file())
    model = load_adapter(copy.deepcopy(base), path)
    assert torch.equal(logits(model), logits(expected)) and not model.initial_wkv.requires_grad
    assert load_adapter(copy.deepcopy(base), path, trainable=True).initial_wkv.requires_grad
    save_adapter(model, tmp_path / "ours")
    again = load_adapter(copy.deepcopy(base), tmp_path / "ours" / "initial_state.safetensors")
    assert torch.equal(again.initial_wkv, expected.initial_wkv)


def test_a_checkpoint_with_a_merged_state(base, tmp_path):
    """As merge_state.py writes it; and written again so."""
    expected = with_state(base)
    path = saved(tmp_path / "merged.pth", {**base.state_dict(), **state_file()}, torch.bfloat16)
    model = load_rwkv7(path)
    state = {name: x.bfloat16().float() for name, x in state_file().items()}
    assert torch.equal(model.initial_wkv, torch.stack(list(state.values())))
    assert load_rwkv7(path, dtype=None).initial_wkv.dtype == torch.float32  # the recurrence's, whatever the weights'
    save_rwkv7(expected, tmp_path / "again.pth")
    assert torch.equal(logits(load_rwkv7(tmp_path / "again.pth")), logits(expected))
    written = torch.load(tmp_path / "again.pth", weights_only=True)
    for name, x in state_file().items():
        assert torch.equal(written[name], x)
    with pytest.raises(UserError, match="no place for the model's tuned initial state: write a name ending in .pth"):
        save_rwkv7(expected, tmp_path / "folder")
    saved(tmp_path / "half.pth", {**base.state_dict(), "blocks.1.att.time_state": torch.zeros(2, 16, 16)})
    with pytest.raises(UserError, match="tuned state of 1 layers without blocks.0.att.time_state"):
        load_rwkv7(tmp_path / "half.pth")
    saved(tmp_path / "heads.pth", {**base.state_dict(), **{n: x[:1] for n, x in state_file().items()}})
    with pytest.raises(UserError, match="does not fit the model: initial state: wkv has shape"):
        load_rwkv7(tmp_path / "heads.pth")


def test_to_peft_and_back(base, tmp_path):
    """A folder of PEFT computes what the file did; back, the file is the same."""
    lora = saved(tmp_path / "lora.pth", lora_file(base))
    assert convert_adapter(lora, tmp_path / "lora", alpha=16) == 16
    check(base, tmp_path / "lora", added(base, lora_difference(lora_file(base), 16)))
    assert convert_adapter(tmp_path / "lora", tmp_path / "back.pth") == 16
    miss = saved(tmp_path / "miss.pth", disha_file(base))
    assert convert_adapter(miss, tmp_path / "miss") is None
    assert convert_adapter(tmp_path / "miss", tmp_path / "miss-back.pth") is None
    for one, other in (("lora", "back"), ("miss", "miss-back")):
        a, b = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
    (tmp_path / "run").mkdir()
    path, differences = pissa_files(base, tmp_path / "run")
    assert convert_adapter(path, tmp_path / "pissa") == 2 * RANK
    assert convert_adapter(tmp_path / "pissa", tmp_path / "pissa.pth") == 2 * RANK
    check(base, tmp_path / "pissa.pth", added(base, differences), alpha=2 * RANK)


def test_a_folder_of_newer_versions(base, tmp_path):
    """peft's own, of a model that has a task."""
    path = saved(tmp_path / "lora.pth", lora_file(base))
    convert_adapter(path, tmp_path / "run-adapter", alpha=16)
    config = tmp_path / "run-adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "CAUSAL_LM"}))
    check(base, tmp_path / "run-adapter", added(base, lora_difference(lora_file(base), 16)))


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "miss"])
def test_what_is_tuned_here_is_written_for_rwkv_peft(base, tmp_path, method):
    torch.manual_seed(5)
    model = tune(copy.deepcopy(base), TuneConfig(method, rank=RANK))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    alpha = convert_adapter(tmp_path / "adapter", tmp_path / "rwkv-0.pth")
    names = torch.load(tmp_path / "rwkv-0.pth", weights_only=True)
    assert {name.rpartition(".")[2] for name in names} == ({"disha"} if method == "miss" else {"lora_A", "lora_B"})
    again = load_adapter(copy.deepcopy(base), tmp_path / "rwkv-0.pth", alpha=alpha)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dora", "adalora"])
def test_what_rwkv_peft_does_not_have(base, tmp_path, method):
    save_adapter(tune(copy.deepcopy(base), TuneConfig(method, rank=RANK)), tmp_path / "adapter")
    with pytest.raises(UserError, match=f"(?i)RWKV-PEFT has no {method} of this form: merge it"):
        convert_adapter(tmp_path / "adapter", tmp_path / "rwkv-0.pth")
    assert not (tmp_path / "rwkv-0.pth").exists()


class Pickled:
    """Something that only executing its pickle could read."""


WRONG = {
    "a whole model": (lambda base: base.state_dict(), "it is a whole model: give it as llm.path"),
    "no adapter": (lambda base: {"blocks.0.ln1.weight": torch.ones(32)}, "expected an adapter of RWKV-PEFT"),
    "another layer count": (
        lambda base: {n: x for n, x in lora_file(base).items() if "blocks.0" in n},
        "is for a model of 1 layers; the base has 2",
    ),
    "another width": (
        lambda base: {n: x[:, :16] if n.endswith("A") else x for n, x in lora_file(base).items()},
        r"receptance.lora_A: \(4, 16\) in the file, but the base's weight is \(32, 32\)",
    ),
    "MiSS of another width": (
        lambda base: {n: x[:, :24] for n, x in disha_file(base).items()},
        r"receptance.disha: \(4, 24\) in the file, but the base's weight is \(32, 32\)",
    ),
    "two ranks": (
        lambda base: {**lora_file(base), **{n: x for n, x in lora_file(base, 2).items() if "ffn" in n}},
        "has rank 4, .* 2: RWKV-PEFT's adapters have one rank",
    ),
    "halves of two ranks": (
        lambda base: {n: x[:, :2] if n.endswith("B") else x for n, x in lora_file(base).items()},
        "lora_A has rank 4, lora_B 2: they are not of one adapter",
    ),
    "half": (
        lambda base: {n: x for n, x in lora_file(base).items() if n.endswith("A")},
        "receptance has lora_A; expected lora_A and lora_B",
    ),
    "mode bat": (
        lambda base: {n: torch.zeros(8, 4, 4) for n in disha_file(base)},
        "DiSHA's mode bat .* merge_disha.py",
    ),
    "Bone": (lambda base: {f"{n}.bone": torch.zeros(4, 32) for n in shapes(base)}, "is of Bone, whose formula"),
    "DoRA": (
        lambda base: {**lora_file(base), "blocks.0.att.key.lora_magnitude_vector": torch.ones(32)},
        "is of DoRA: give the folder of PEFT that it is in",
    ),
    "the start of a PiSSA": (
        lambda base: {n.replace("lora", "init_lora"): x for n, x in lora_file(base).items()},
        r"is of the start of a PiSSA \(init_pissa.pth\): give the rwkv-N.pth",
    ),
    "RWKV-6": (
        lambda base: {**lora_file(base), "blocks.0.att.time_maa_x": torch.ones(1, 1, 32)},
        "time_maa_x is of RWKV-4, 5 or 6; only RWKV-7",
    ),
    "a part that the base lacks": (
        lambda base: {**lora_file(base), "blocks.0.att.ln_y.weight": torch.ones(32)},
        "unexpected: blocks.0.att.ln_y.weight",
    ),
    "norms of another width": (
        lambda base: {**lora_file(base), "ln_out.weight": torch.ones(16)},
        r"ln_out.weight: \(16,\) in the file, \(32,\) in the base",
    ),
    "no tensors": (lambda base: {"lora": Pickled()}, "not a PyTorch checkpoint"),
    "a state of another size": (
        lambda base: {n: x[:, :8, :8] for n, x in state_file().items()},
        "does not fit the model: initial state: wkv has shape",
    ),
    "a state and more": (lambda base: {**state_file(), **lora_file(base)}, "holds more than a tuned state"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_the_base_stays(base, tmp_path, case):
    make, message = WRONG[case]
    torch.save(make(base), tmp_path / "rwkv-0.pth")
    model = copy.deepcopy(base)
    with pytest.raises(UserError, match=f"(?s)rwkv-0.pth: .*({message})"):
        load_adapter(model, tmp_path / "rwkv-0.pth", alpha=None if "state" in case else 8)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(x, base.state_dict()[n]) for n, x in model.state_dict().items())


def test_a_scale_where_there_is_none(base, tmp_path):
    for content, message in ((disha_file(base), "this is MiSS"), (state_file(), "this is a tuned state")):
        path = saved(tmp_path / "rwkv-0.pth", content)
        with pytest.raises(UserError, match=f"alpha: is LoRA's; {message}"):
            load_adapter(copy.deepcopy(base), path, alpha=8)
    with pytest.raises(FileNotFoundError, match="absent.pth: no such file"):
        load_adapter(copy.deepcopy(base), tmp_path / "absent.pth")


def test_a_start_of_another_pissa(base, tmp_path):
    path, _ = pissa_files(base, tmp_path)
    saved(tmp_path / "init_pissa.pth", {"model.blocks.0.att.key.init_lora_A": torch.zeros(4, 32)})
    with pytest.raises(UserError, match="init_pissa.pth: lacks .*: it is not the start of rwkv-0.pth"):
        load_adapter(copy.deepcopy(base), path)
    other = {n.replace("lora", "init_lora"): x for n, x in lora_file(base, 2).items()}
    saved(tmp_path / "init_pissa.pth", other)
    with pytest.raises(UserError, match=r"init_lora_A has shape \(2, 32\), lora_A in rwkv-0.pth \(4, 32\)"):
        load_adapter(copy.deepcopy(base), path)
