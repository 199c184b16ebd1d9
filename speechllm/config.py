"""Typed configuration: dataclasses <- YAML <- command line.

A configuration is one tree of dataclasses. A YAML file fills it, `--section.key value` on the command line
overrides single values, and everything is checked before anything slow starts: an unknown key, a value of
the wrong type or an impossible combination is a `ConfigError` that names the source, the key, what is
allowed and the nearest key to a mistyped one.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from speechllm.errors import UserError
from speechllm.files import replaced_file

T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot be used; the message says where and why."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML itself takes the last of several equal keys, and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "in a mapping", node.start_mark, f"the key {key.value} is there for the second time", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def setting(default: Any, hint: str = "", help: str = "", **bounds: float) -> Any:
    """A field of a dataclass with the limits of its value, which `check_limits` holds, and its option's help.

    Args:
      default: also one that is outside of the limits and means something else, such as None.
      hint: what to do, for the error.
      help: of the option of a command line that is made of the field.
      bounds: `at_least`, `above`, `at_most`, `below`; infinity is allowed unless a value must be `below` it.
    """
    return dataclasses.field(default=default, metadata={"bounds": bounds, "hint": hint, "help": help})


def check_limits(config: Any) -> None:
    """For the `__post_init__` of a dataclass whose fields are `setting`s.

    Raises:
      UserError: a value is out of its limits.
    """
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata.get("bounds", {})
        if value is None or not bounds:
            continue
        if not all(_BOUNDS[name](value, bound) for name, bound in bounds.items()):
            words = (f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds.items())
            must = " and ".join(words).replace("below inf", "finite")
            hint = f"; {field.metadata['hint']}" if field.metadata["hint"] else ""
            raise UserError(f"{field.name} must be {must}, got {value}{hint}")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] | None = None) -> T:
    """Read `path` (YAML) into the dataclass `cls`; `overrides` is what argparse left over: `--a.b value ...`.

    Raises:
      ConfigError: the file does not exist or is not YAML; a key or a value does not fit.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {e}") from None
    config = from_dict(cls, tree, source=str(path))
    return override(config, parse_overrides(overrides or ()), source="command line")


def override(config: T, changes: dict[str, Any], source: str) -> T:
    """`config` with other values: `{section.key: value}`, checked as a whole.

    Raises:
      ConfigError: names `source` and the full key.
    """
    if not changes:
        return config
    tree = to_dict(config)
    for key, value in changes.items():
        _set(tree, key, value)
    return from_dict(type(config), tree, source=source)


def from_dict(cls: type[T], tree: dict[str, Any], source: str = "configuration") -> T:
    """Build the dataclass `cls` from nested dicts; checks keys and types, and runs each `__post_init__`.

    Raises:
      ConfigError: names `source` and the full key.
    """
    return _build(cls, tree, source, "")


def to_dict(config: Any) -> dict[str, Any]:
    """The nested dict of a configuration: what `from_dict` reads back to an equal one."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: str | Path, header: str = "") -> None:
    """Write `config` as YAML; `header` lines come first as comments."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    with replaced_file(path) as tmp:
        tmp.write_text(comment + text, encoding="utf-8")


def _build(annotation: Any, value: Any, source: str, key: str) -> Any:
    """`value` checked against, and converted to, `annotation`."""

    def error(expected: str) -> ConfigError:
        return ConfigError(f"{source}: {key or 'top level'}: expected {expected}, got {value!r}")

    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise error("a mapping")
        return _build_dataclass(annotation, value, source, key)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _build_one_of(args, value, source, key, error)
    if origin is typing.Literal:
        if value not in args:
            raise error(f"one of {', '.join(map(str, args))}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise error("a list")
        return origin(_build(args[0], v, source, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise error("a mapping")
        return {k: _build(args[1], v, source, f"{key}.{k}") for k, v in value.items()}
    return value if annotation is Any else _build_scalar(annotation, value, error)


def _build_one_of(
    options: Sequence[Any], value: Any, source: str, key: str, error: Callable[[str], ConfigError]
) -> Any:
    """`value` as the first of the types that it fits."""
    if value is None and type(None) in options:
        return None
    errors = []
    for option in (o for o in options if o is not type(None)):
        try:
            return _build(option, value, source, key)
        except ConfigError as e:
            errors.append(e)
    raise errors[0] if len(errors) == 1 else error(" or ".join(map(_name, options)))


def _build_scalar(annotation: type, value: Any, error: Callable[[str], ConfigError]) -> Any:
    """A number, a text, or a truth value."""
    if annotation is float:
        # YAML 1.1 reads "1e-3" (no dot) as a string: people write it, so it is a number here.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise error("a number") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise error("a number")
        return float(value)
    if annotation is str and isinstance(value, dict):  # YAML's reading of {timed_text}
        raise error("text; one that begins with a brace stands in quotes, '\"{...}\"' on the command line")
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise error(_name(annotation))
    return value


def _build_dataclass(cls: type, tree: dict[str, Any], source: str, key: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    prefix = f"{key}." if key else ""
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}? " if near else ""
            raise ConfigError(f"{source}: unknown key {prefix}{name}; {hint}allowed here: {', '.join(sorted(fields))}")
    missing = [
        prefix + f.name
        for f in dataclasses.fields(cls)
        if f.init and f.name not in tree and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{source}: {', '.join(missing)} must be given")
    values = {name: _build(hints[name], value, source, prefix + name) for name, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{source}: {key or 'top level'}: {e}") from None


def parse_overrides(args: Sequence[str]) -> dict[str, Any]:
    """`["--a.b", "1", "--c.d=x"]` -> `{"a.b": 1, "c.d": "x"}`; values are read as YAML, the last of a key counts.

    Raises:
      ConfigError: an argument is not of this form.
    """
    changes, i = {}, 0
    while i < len(args):
        name, equals, value = args[i].partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"command line: unexpected argument {args[i]!r}; settings are --section.key value")
        if not equals:
            i += 1
            if i == len(args):
                raise ConfigError(f"command line: {name} needs a value")
            value = args[i]
        try:
            changes[name[2:]] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"command line: {name}: cannot read the value {value!r} as YAML") from None
        i += 1
    return changes


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        # A section that is absent (None) is made; an unknown one is reported by `from_dict`, with its neighbors.
        child = tree.get(name)
        if not isinstance(child, dict):
            child = {}
        tree[name] = child
        tree = child
    tree[last] = value


def _name(annotation: Any) -> str:
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
