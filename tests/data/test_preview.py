"""`speechllm data preview`: the files hold what the data set gives to the model."""

import builtins

import numpy as np
import pytest
import soundfile
import torch

from speechllm.cli.main import main
from speechllm.data import SourceConfig, read_manifest
from speechllm.data.audio import load_samples
from speechllm.data.augment.augmenter import AugmentConfig, Augmenter, NoiseConfig, SpeedConfig, VolumeConfig
from speechllm.data.augment.specaugment import SpecAugmentConfig
from speechllm.data.dataset import BatchPlan, SpeechDataset
from speechllm.data.preview import write_previews
from speechllm.errors import UserError
from speechllm.prompt.label import LabelTemplate

from .conftest import write_manifest


def test_what_is_shown_is_what_the_model_gets(corpus, tmp_path):
    source = SourceConfig(str(corpus / "a.jsonl"))
    augment = AugmentConfig(
        speed=SpeedConfig([0.9, 1.1]),
        noise=NoiseConfig([SourceConfig(str(corpus / "noise.jsonl"))], probability=1.0),
        volume=VolumeConfig(probability=1.0),
        spec_augment=SpecAugmentConfig(probability=1.0),
    )
    cuts = {cut.id: cut for cut in read_manifest(source)}
    dataset = SpeechDataset(
        None,
        text_steps=[],
        augmenter=Augmenter(augment),
        seed=5,
        features_on="worker",
        feature_kind="fbank",
        allow_empty_text=False,
        label=LabelTemplate(),
    )
    made = list(write_previews([source], tmp_path / "out", count=4, seed=5, augment=augment))
    assert len({preview.id for preview in made}) == 4
    for preview in made:
        cut = cuts[preview.id]
        batch, _, _ = dataset[BatchPlan(1, [cut], [0], [preview.speed])]
        torch.testing.assert_close(preview.augmented_features, batch.features[0], rtol=0, atol=1e-3)
        for suffix, samples in (("", load_samples(cut)), ("-augmented", preview.augmented_samples)):
            written, rate = soundfile.read(tmp_path / f"out/{preview.name}{suffix}.wav", dtype="float32")
            assert rate == 16000 and np.array_equal(written, samples)
        assert len(preview.augmented_samples) == pytest.approx(len(preview.samples) / preview.speed, abs=1)
        assert (tmp_path / f"out/{preview.name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "out").iterdir())) == 12


def test_the_choice_follows_the_seed_and_reaches_all_lines(corpus, tmp_path):
    sources = [SourceConfig(str(corpus / f"{name}.jsonl")) for name in "ab"]
    first, again, other = (
        [preview.id for preview in write_previews(sources, tmp_path, count=2, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_strange_ids_and_texts_make_files(corpus, tmp_path):
    line = {"audio_filepath": str(corpus / "a/0.wav"), "duration": 0.3, "text": "$a_b $ 中文", "id": "../x y/中:1"}
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", [line])))
    (made,) = write_previews([source], tmp_path / "out", count=3, seed=1)
    assert made.text == line["text"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{made.name}{suffix}" for suffix in (".wav", "-augmented.wav", ".png")
    }


def test_the_command(corpus, tmp_path, capsys):
    def status(*arguments) -> int:
        with pytest.raises(SystemExit) as caught:
            main(["data", "preview", *map(str, arguments), "--output", str(tmp_path / "out")])
        return caught.value.code

    config = tmp_path / "x.yaml"
    config.write_text(f"data: {{train: [{{path: {corpus}/a.jsonl}}]}}\n")
    assert status("--config", config, "--n", 2, "--data.augment.speed.factors", "[1.25]") == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 2 and output.count("speed 1.25") == 2
    missing = write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "0.wav", "duration": 1.0, "text": "x"}])
    assert status(missing) == 1
    printed = capsys.readouterr().err
    assert "m.jsonl:1: " in printed and "none of the utterances" in printed
    assert status() == 1


def test_without_matplotlib_it_says_what_to_install(corpus, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(UserError, match=r"pip install 'speechllm\[plot\]'"):
        list(write_previews([SourceConfig(str(corpus / "a.jsonl"))], tmp_path / "out", count=1, seed=1))
    assert not (tmp_path / "out").exists()
