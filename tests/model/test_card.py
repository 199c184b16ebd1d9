import dataclasses

from huggingface_hub import ModelCard

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


def test_results_in_the_header_are_what_the_hub_reads(model, tmp_path):
    (tmp_path / "README.md").write_text(model.card())
    for wer in (3.5, 2.25):
        add_results(tmp_path, "table", {("test_clean", "greedy_search"): wer, ("test_clean", "ctc_greedy_search"): 9.0})
    card = ModelCard.load(tmp_path / "README.md")
    found = {
        (r.dataset_name, r.metric_name): (r.task_type, r.metric_type, r.metric_value) for r in card.data.eval_results
    }
    assert found == {
        ("test_clean", "Test WER (greedy_search)"): ("automatic-speech-recognition", "wer", 2.25),
        ("test_clean", "Test WER (ctc_greedy_search)"): ("automatic-speech-recognition", "wer", 9.0),
    }
    assert card.text.startswith("\n# SpeechLLM") and card.text.count("## Results") == 1


def test_a_card_that_somebody_wrote_stays(tmp_path):
    path = tmp_path / "README.md"
    for written in ("# A model\n\n## Results\n\nGood ones.\n", "# A model\n\n## Results\n\n```\nx\n```\n\n## Limits\n"):
        path.write_text(written)
        add_results(tmp_path, "test 1.5", {("test", "greedy"): 1.5})
        assert path.read_text() == written
