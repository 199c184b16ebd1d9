"""Folders of models whose matrices are stored in bfloat16."""

import dataclasses

import torch
from safetensors.torch import load_file

from speechllm.model.build import load_model
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.weights import restored, stored


def test_a_folder_of_half_the_size_is_the_model_rounded_once(model_config, tmp_path):
    torch.manual_seed(0)
    alone = dataclasses.replace(model_config, llm=None, ctc_weight=1.0)
    for name, model in (("whole", SpeechLLM.from_config(model_config)), ("alone", EncoderModel.from_config(alone))):
        model.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
        whole, half = ((tmp_path / folder / "model.safetensors").stat().st_size for folder in (name, "half"))
        assert half < 0.6 * whole
        for key, value in load_model(tmp_path / "half").state_dict().items():
            expected = model.state_dict()[key]
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected.bfloat16().to(expected.dtype) if expected.dim() > 1 else expected)


def test_what_is_in_half_precision_altogether_stays_so(model_config, tmp_path):
    model = SpeechLLM.from_config(model_config)
    model.llm.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {x.dtype for name, x in weights.items() if name.startswith("llm.")} == {torch.bfloat16}
    assert load_model(tmp_path / "model").llm.emb.weight.dtype == torch.bfloat16
    assert torch.equal(restored(stored({"a.b": torch.arange(3)}, torch.bfloat16))["a.b"], torch.arange(3))
