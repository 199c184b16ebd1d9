"""Options that several commands have."""

from __future__ import annotations

import argparse
import os
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Importing this takes no time: `speechllm --help` answers at once.
if TYPE_CHECKING:
    from speechllm.data import SourceConfig
    from speechllm.data.share import Share
    from speechllm.prompt.request import Request

MANIFEST_HELP = (
    "NeMo JSON lines, lhotse cuts, a directory in Kaldi's or lhotse's Shar form, Parquet or Arrow files, a table "
    "(.tsv, .csv), a list of WeNet or FunASR"
)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind",
        choices=("auto", "nemo", "lhotse", "shar", "kaldi", "parquet", "arrow", "table", "webdataset", "messages"),
        default="auto",
        help="of the manifests on the command line (default: looked up)",
    )
    parser.add_argument("--tar-path", help="the tar shards of a NeMo manifest, such as audio_{0..127}.tar")
    parser.add_argument("--lang", help="language of lines that do not say theirs")
    parser.add_argument("--target-lang", help="language that they are translated into")
    parser.add_argument("--task", choices=("asr", "ast"), help="their task: transcription or translation")
    parser.add_argument("--channel", type=int, help="the one to take of several (default: their mean)")
    parser.add_argument(
        "--text-field",
        metavar="FIELD",
        help="where the text is, such as custom.texts.0 in Libriheavy (default: text)",
    )
    parser.add_argument("--lang-field", metavar="FIELD", help="where the language of the speech is (default: lang)")


def command_line_sources(args: argparse.Namespace, manifests: list[str]) -> list[SourceConfig]:
    from speechllm.data import SourceConfig
    from speechllm.errors import UserError

    try:
        names = ("kind", "tar_path", "lang", "target_lang", "task", "channel", "text_field", "lang_field")
        return [SourceConfig(path, **{name: getattr(args, name) for name in names}) for path in manifests]
    except ValueError as e:
        raise UserError(str(e)) from e


_TYPES = {"int": (int, "N"), "float": (float, "X"), "float | None": (float, "X"), "str | None": (str, "FILE")}


def add_settings(parser: argparse._ActionsContainer, of: type) -> None:
    """Add an option for each field of a dataclass that has a help (`speechllm.config.setting`)."""
    for field in _settings(of):
        if field.type == "bool":
            parser.add_argument(option_of(field.name), action="store_true", default=None, help=field.metadata["help"])
            continue
        kind, metavar = _TYPES[str(field.type)]
        value = field.default if isinstance(field.default, int | None) else f"{field.default:g}"
        default = "" if value is None else f" (default: {value})"
        parser.add_argument(option_of(field.name), type=kind, metavar=metavar, help=field.metadata["help"] + default)


def given_settings(args: argparse.Namespace, of: type) -> dict[str, Any]:
    """The values of the options of `add_settings` that were given."""
    values = ((field.name, getattr(args, field.name)) for field in _settings(of))
    return {name: value for name, value in values if value is not None}


def _settings(of: type) -> list[Field]:
    return [field for field in fields(of) if field.metadata.get("help")]


def option_of(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        help="where to compute: cuda, cuda:1, cpu, ... (default: the first GPU, or the CPU if there is none)",
    )


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, as `speechllm.model.build.prepare_for_inference` takes it."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the language model's weights and of the encoder's matrix products (default: bfloat16 on a "
        "GPU, or float16 on one without bfloat16; float32 on the CPU)",
    )


def add_share_options(parser: argparse.ArgumentParser) -> None:
    """Add what `share_of` reads."""
    parser.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help="share the work out over N processes, which need not know of each other; give each its --rank (default: "
        "as torchrun says; 1 without it. Variables of SLURM and others are not read)",
    )
    parser.add_argument("--rank", type=int, metavar="K", help="which of them this process is, counted from 0")


def share_of(args: argparse.Namespace) -> Share:
    """What `--world-size` and `--rank`, or else torchrun, say of this process.

    Other launchers set `RANK` or `SLURM_PROCID` also where one process is to do everything, as in an interactive
    allocation: a share of the work, taken for the whole, would be worse than an option that has to be given.

    Raises:
        UserError: one of the options is given without the other; there is no such rank.
    """
    from speechllm.data.share import Share
    from speechllm.errors import UserError

    if (args.world_size is None) != (args.rank is None):
        raise UserError("--world-size and --rank: give both, or neither")
    if args.rank is not None:
        return Share(args.rank, args.world_size)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return Share()


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Add `--llm-weights` and `--encoder-weights`, as `speechllm.model.build.prepare_for_inference` takes them."""
    parser.add_argument(
        "--llm-weights",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="on the CPU, how the language model's matrices are kept: float32 is exact, bfloat16 faster on processors "
        "that have its instructions, int8 smaller (default: %(default)s)",
    )
    parser.add_argument(
        "--encoder-weights",
        choices=("float32", "bfloat16", "int8"),
        help="the same of the encoder's matrices; other than float32 it computes in bfloat16 (default: bfloat16 with "
        "--dtype bfloat16, else float32)",
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add what `command_line_request` reads besides `--language` and `--target-language`."""
    parser.add_argument("--previous", metavar="TEXT", help="the text before the audio, for the prompt's {previous}")
    parser.add_argument(
        "--prompt-hotwords", type=Path, metavar="FILE", help="phrases for the prompt's {hotwords}, one a line"
    )


def command_line_request(args: argparse.Namespace) -> Request:
    """What `--language`, `--target-language`, `--previous` and `--prompt-hotwords` ask for.

    Raises:
        UserError, FileNotFoundError: the file cannot be read.
    """
    from speechllm.errors import UserError
    from speechllm.prompt.request import Request

    hotwords = None
    if args.prompt_hotwords is not None:
        try:
            lines = args.prompt_hotwords.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(f"--prompt-hotwords: {args.prompt_hotwords}: no such file") from None
        except UnicodeDecodeError:
            raise UserError(f"--prompt-hotwords: {args.prompt_hotwords}: not UTF-8; save the file as UTF-8") from None
        hotwords = tuple(line.strip() for line in lines if line.strip())
        if not hotwords:
            raise UserError(f"--prompt-hotwords: {args.prompt_hotwords}: there is no phrase in it")
    languages = {"language": args.language, "target_language": args.target_language}
    return Request(previous=args.previous, hotwords=hotwords, **languages)
