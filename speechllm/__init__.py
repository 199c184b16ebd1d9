"""speechllm: speech recognition and translation with a language model."""

__version__ = "0.1.0"
__all__ = ["SpeechLLM"]


def __getattr__(name: str) -> object:
    """`SpeechLLM` is imported when it is asked for: torch and lhotse take seconds, `speechllm --help` must not."""
    if name == "SpeechLLM":
        from speechllm.model.speech_llm import SpeechLLM

        return SpeechLLM
    raise AttributeError(f"module 'speechllm' has no attribute {name!r}")
