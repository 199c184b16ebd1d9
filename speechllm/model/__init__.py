"""The parts put together: SpeechLLM, an encoder alone, saving and loading."""

from speechllm.model.config import ModelConfig, load_model_config
from speechllm.model.speech_llm import SpeechLLM

__all__ = ["ModelConfig", "SpeechLLM", "load_model_config"]
