"""What all kinds of manifests share: brace patterns, lines, and the checks of a source's configuration."""

import argparse
import subprocess

import pytest

from speechllm.cli.options import add_source_options
from speechllm.data.manifests.lines import expand_braces, parse_line
from speechllm.data.manifests.source import KINDS, SourceConfig


@pytest.mark.parametrize(
    "pattern",
    ["a.tar", "a_{0..3}.tar", "a_{08..11}.tar", "a_{3..1}", "{x,y}/{0..1}.tar", "a{x}b", "a{}", "{0..10}", "{00..1}"],
)
def test_braces_expand_as_in_bash(pattern):
    expected = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout
    assert expand_braces(pattern) == expected.split()


def test_braces_of_nemo():
    assert expand_braces("audio__OP_0..2_CL_.tar") == expand_braces("audio_{0..2}.tar")


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": 0},
        {"weight": float("inf")},
        {"weight": "much"},
        {"task": "tts"},
        {"kind": "csv"},
        {"channel": -1},
        {"channel": True},
        {"tar_path": "a.tar", "kind": "kaldi"},
        {"tar_path": "pipe:curl https://host/a.tar"},
    ],
)
def test_a_wrong_source_is_named_with_its_key(wrong):
    with pytest.raises(ValueError, match=f"source here.jsonl: {next(iter(wrong))}: "):
        SourceConfig("here.jsonl", **wrong)


def test_the_commands_take_every_kind():
    parser = argparse.ArgumentParser()
    add_source_options(parser)
    assert [parser.parse_args(["--kind", kind]).kind for kind in KINDS] == list(KINDS)


def test_urls_are_for_streams():
    with pytest.raises(ValueError, match="path: .*stream: true"):
        SourceConfig("s3://bucket/cuts.{0..3}.jsonl.gz")
    assert SourceConfig("s3://bucket/cuts.{0..3}.jsonl.gz", stream=True).stream


def test_lines():
    assert parse_line(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}\r\n') == {"a": "\N{GRINNING FACE}"}
    with pytest.raises(UnicodeError):
        parse_line(b'{"a": "\\ud83d"}')
