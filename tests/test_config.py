"""Configuration: what fits is read, what does not is named."""

import math
from dataclasses import dataclass, field

import pytest

from speechllm.config import ConfigError, check_limits, from_dict, load_config, save_config, setting, to_dict


@dataclass
class Inner:
    size: int = setting(3, at_least=0)
    rate: float = setting(0.1, "0 is no rate", above=0, below=math.inf)
    most: float | None = setting(None, at_least=0, at_most=1)
    names: list[str] = field(default_factory=list)

    def __post_init__(self):
        check_limits(self)
        if self.names == ["x"]:
            raise ValueError("names: x is none")


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    many: dict[str, list[Inner]] = field(default_factory=dict)
    maybe: Inner | None = None
    label: str = ""
    flag: bool = False


def test_round_trip(tmp_path):
    config = from_dict(Outer, {"inner": {"size": 7, "names": ["a"]}, "many": {"x": [{"rate": 1}]}, "flag": True})
    assert config.inner.size == 7 and config.many["x"][0].rate == 1.0 and config.maybe is None
    save_config(config, tmp_path / "c.yaml", header="made by\na test")
    assert load_config(Outer, tmp_path / "c.yaml") == config
    assert from_dict(Outer, to_dict(config)) == config


def test_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("inner: {size: 1, rate: 1e-3}\n")
    config = load_config(
        Outer, path, ["--inner.size", "5", "--flag=true", "--maybe.size", "2", "--inner.names", "[a, b]"]
    )
    assert config.inner == Inner(5, 1e-3, names=["a", "b"]) and config.flag and config.maybe.size == 2


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"inner": {"sise": 1}}, "unknown key inner.sise; did you mean inner.size?"),
        ({"iner": {}}, "unknown key iner; did you mean inner?"),
        ({"inner": {"size": "big"}}, "inner.size: expected an integer, got 'big'"),
        ({"inner": {"size": True}}, "inner.size: expected an integer, got True"),
        ({"inner": {"rate": "fast"}}, "inner.rate: expected a number"),
        ({"inner": {"names": "a"}}, "inner.names: expected a list"),
        ({"inner": {"size": -1}}, "inner: size must be at least 0, got -1"),
        ({"inner": {"rate": 0}}, "inner: rate must be above 0 and finite, got 0.0; 0 is no rate"),
        ({"inner": {"rate": float("inf")}}, "inner: rate must be above 0 and finite, got inf"),
        ({"inner": {"rate": float("nan")}}, "inner: rate must be above 0 and finite, got nan"),
        ({"inner": {"most": 1.5}}, "inner: most must be at least 0 and at most 1, got 1.5"),
        ({"inner": {"names": ["x"]}}, "inner: names: x is none"),
        ({"many": {"x": [{}, {"size": 1.5}]}}, "many.x[1].size: expected an integer, got 1.5"),
        ({"label": {"text": None}}, "label: expected text; one that begins with a brace stands in quotes"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
    ],
)
def test_errors_name_source_and_key(tree, said):
    with pytest.raises(ConfigError) as error:
        from_dict(Outer, tree, source="exp.yaml")
    assert str(error.value).startswith("exp.yaml: ") and said in str(error.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--inner.sise", "1"], "unknown key inner.sise; did you mean inner.size?"),
        (["--inner.size"], "--inner.size needs a value"),
        (["stray"], "unexpected argument 'stray'"),
        (["--inner.size", "[1"], "cannot read the value '[1' as YAML"),
    ],
)
def test_override_errors(tmp_path, args, said):
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ConfigError, match="^command line") as error:
        load_config(Outer, tmp_path / "c.yaml", args)
    assert said in str(error.value)


def test_file_errors(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(Outer, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(Outer, tmp_path / "bad.yaml")


@dataclass
class Required:
    path: str
    inner: Inner
    weight: float = 1.0


def test_keys_that_must_be_given_are_named_with_their_section():
    with pytest.raises(ConfigError, match="^configuration: path, inner must be given$"):
        from_dict(Required, {})
    with pytest.raises(ConfigError, match=r"^x.yaml: path must be given$"):
        from_dict(Required, {"inner": {}}, source="x.yaml")


def test_a_key_that_comes_twice_is_an_error(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("inner:\n  size: 1\nname: x\ninner: {size: 2}\n")
    with pytest.raises(ConfigError, match="key inner is there for the second time(.|\n)*line 4"):
        load_config(Outer, path)
