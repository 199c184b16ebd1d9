"""What the language model reads around the audio, and what it writes."""

from speechllm.prompt.label import LabelTemplate
from speechllm.prompt.request import Request
from speechllm.prompt.template import PromptConfig, PromptContext

__all__ = ["LabelTemplate", "PromptConfig", "PromptContext", "Request"]
