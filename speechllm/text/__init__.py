"""Text: steps of normalization, tokenizers, names of languages."""

from speechllm.text.normalize import check_steps, normalize_text
from speechllm.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "check_steps", "load_tokenizer", "normalize_text"]
