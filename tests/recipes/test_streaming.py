"""recipes/train.py trains on streams, whose words the CTC head aligns as it learns; what it stops at; and resume."""

import pytest

from speechllm.config import ConfigError
from speechllm.train.checkpoint import load_checkpoint
from speechllm.train.config import load_experiment
from tests.recipes.test_resume import difference
from tests.recipes.test_train import command, run

STREAMING = [
    "--model.encoder.zipformer.causal", "true",
    "--model.encoder.zipformer.chunk_size", "[8, 16, -1]",
    "--model.encoder.zipformer.left_context_frames", "[16, -1]",
    "--model.streaming", "{chunk_seconds: [0.16, 0.32], offline_share: 0.3}",
    "--data.augment.speed", "{factors: [0.9, 1.1]}",
    "--data.max_positions", "200",
    "--train.num_steps", "8",
    "--train.save_every_n", "3",
    "--train.valid_every_n", "8",
]  # fmt: skip


def test_streams_are_trained_on_and_resumed_bit_for_bit(experiment, tmp_path):
    run(*command(experiment, tmp_path / "whole", *STREAMING))
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole" / "checkpoint-3.pt").rename(tmp_path / "stopped" / "checkpoint-3.pt")
    assert "resuming from" in run(*command(experiment, tmp_path / "stopped", *STREAMING)).stderr
    whole, stopped = (load_checkpoint(tmp_path / name / "checkpoint-8.pt") for name in ("whole", "stopped"))
    assert difference(whole, stopped) is None


def test_utterances_without_words_that_nothing_can_align_are_left_out(experiment, tmp_path):
    result = run(*command(experiment, tmp_path / "exp", *STREAMING, "--model.ctc_weight", "0"), check=False)
    assert result.returncode == 1 and "cannot be used (24 no word times)" in result.stderr
    assert "give `alignment` in its manifest line, or train a CTC head" in result.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["--model.streaming.chunk_seconds", "[0.2]"],
            r"0.2 is none of the encoder's chunks, which are \(0.16, 0.32 s\)",
        ),
        (["--model.encoder.zipformer.causal", "false"], "this Zipformer is not causal"),
        (["--data.augment", "{}", "--data.cache_encoder", "x"], "cache_encoder keeps what the encoder hears of whole"),
    ],
)
def test_mistakes_are_known_before_training(experiment, settings, said):
    with pytest.raises(ConfigError, match=said):
        load_experiment(experiment, STREAMING + settings)
