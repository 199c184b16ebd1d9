"""What a run is built of besides its model and optimizer: its data, and new encoders that begin with a look at it."""

from __future__ import annotations

from accelerate import Accelerator

from speechllm.data import DataConfig, SpeechLoader, build_eval_loader, build_train_loader
from speechllm.encoder import Zipformer, init_from_data
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM


def training_data(
    data: DataConfig, seed: int, model: SpeechLLM | EncoderModel, accelerator: Accelerator
) -> SpeechLoader:
    """This process's share of the training data."""
    return build_train_loader(
        data,
        seed,
        accelerator.process_index,
        accelerator.num_processes,
        labels=model,
        feature_kind=model.feature_kind,
        two_views=model.needs_two_views,
    )


def validation_data(data: DataConfig, model: SpeechLLM | EncoderModel, accelerator: Accelerator) -> SpeechLoader:
    """This process's share of the validation data."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    return build_eval_loader(data, data.valid, rank, processes, model, model.feature_kind)


def init_new_encoders(model: SpeechLLM | EncoderModel, loader: SpeechLoader, loaded: set[str]) -> None:
    """The front ends of Zipformers that are trained from scratch begin with the statistics of the first batch.

    Args:
      loaded: names of weights that are there already, from the stage before.
    """
    new = [
        encoder
        for name, section, encoder in model.encoders()
        if isinstance(encoder, Zipformer)
        and section.is_new_zipformer
        and not any(key.startswith(f"{name}.") for key in loaded)
    ]
    if new:
        first = next(iter(loader)).to("cpu")
        for encoder in new:
            init_from_data(encoder, model.features_of(encoder, first.features), first.feature_lens)


def schedule_new_encoders(model: SpeechLLM | EncoderModel, step: int) -> None:
    """Tell Zipformers that are trained from scratch how far they are; a released one has its schedules behind it."""
    for _, section, encoder in model.encoders():
        if isinstance(encoder, Zipformer) and section.is_new_zipformer:
            encoder.set_batch_count(step * section.schedule_speed)
