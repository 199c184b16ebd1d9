"""The parts put together: SpeechLLM, an encoder alone, saving and loading."""

from speechllm.model.speech_llm import ModelConfig, SpeechLLM, load_model_config

__all__ = ["ModelConfig", "SpeechLLM", "load_model_config"]
