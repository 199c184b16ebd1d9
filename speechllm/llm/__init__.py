"""Language models: the seam that all of them implement, those of transformers, adapters."""

from speechllm.llm.interface import IGNORE, LanguageModel, LanguageModelState

__all__ = ["IGNORE", "LanguageModel", "LanguageModelState"]
