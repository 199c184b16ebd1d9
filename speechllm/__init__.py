"""speechllm: speech recognition and translation with a language model."""

from speechllm.model import SpeechLLM

__version__ = "0.1.0"
__all__ = ["SpeechLLM"]
