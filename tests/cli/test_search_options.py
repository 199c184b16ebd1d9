import argparse

import pytest

from speechllm.cli.search_options import add_search_options, search_options
from speechllm.decode.recognizer import RecognizeOptions
from speechllm.decode.search import SearchOptions
from speechllm.errors import UserError


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    return search_options(parser.parse_args(arguments))


def test_nothing_is_asked_for_where_nothing_is_given():
    assert parse() is None
    assert parse("--search", "greedy") == RecognizeOptions()
    assert parse("--ctc-beam", "4") == RecognizeOptions(ctc_beam=4)


def test_what_is_given_arrives():
    given = parse("--search", "beam", "--beam", "8", "--nbest", "3", "--ctc-weight", "0.3", "--hotwords", "f")
    assert given == RecognizeOptions(SearchOptions("beam", beam=8, nbest=3), ctc_weight=0.3, hotwords="f")
    assert parse("--search", "sample", "--top-p", "0.9", "--seed", "7").search.seed == 7


def test_what_makes_no_sense_is_an_error():
    with pytest.raises(UserError, match="temperature: is for method sample alone"):
        parse("--temperature", "0.5")
