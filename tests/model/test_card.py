import dataclasses

from speechllm.model.card import add_results
from speechllm.model.encoder_model import EncoderModel


def test_results_are_added_and_replaced(tmp_path):
    (tmp_path / "README.md").write_text("# Card\n")
    add_results(tmp_path, "\ntest  1.00\n")
    add_results(tmp_path, "\ntest  2.00\n")
    assert (tmp_path / "README.md").read_text() == "# Card\n\n## Results\n\n```\ntest  2.00\n```\n"
    add_results(tmp_path / "of another tool", "table")
    assert "table" in (tmp_path / "of another tool" / "README.md").read_text()


def test_the_use_that_a_card_shows_is_one_that_the_model_takes(model, model_config):
    assert 'transcribe(["speech.wav"], language="en")' in model.card()
    model.config.languages = ["es", "es>en"]
    assert "--model PATH --language es`" in model.card()
    encoder = EncoderModel.from_config(dataclasses.replace(model_config, llm=None))
    assert 'transcribe(["speech.wav"])' in encoder.card() and "--language" not in encoder.card()
