"""Where a CTC head and the embeddings of its pieces start from."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from speechllm.hub import local_path
from speechllm.llm.interface import LanguageModel
from speechllm.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


def load_ctc_head(head: nn.Linear, path: str | Path, tokenizer: Tokenizer) -> None:
    """Take over the CTC head of the model that an encoder is from, if it has one that writes the same pieces.

    Args:
      path: `model.encoder.path`: a folder that `save_pretrained` wrote, or anything else, which has no head.
      tokenizer: of `head`.
    """
    folder = local_path(path)
    config_path, weights_path = folder / "config.yaml", folder / "model.safetensors"
    if not (config_path.is_file() and weights_path.is_file()):
        return
    with safe_open(weights_path, framework="pt") as weights:
        if "ctc_head.weight" not in weights.keys():  # noqa: SIM118 - not a mapping
            return
        config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
        trained = load_tokenizer(folder / (config.get("ctc_tokenizer") or config["tokenizer"]))
        if trained.identity() != tokenizer.identity():
            logger.info("the CTC head of %s writes the pieces of another tokenizer: a new one is trained", path)
            return
        with torch.no_grad():
            head.weight.copy_(weights.get_tensor("ctc_head.weight"))
            head.bias.copy_(weights.get_tensor("ctc_head.bias"))
    logger.info("the CTC head is that of %s", path)


def mean_embeddings(llm: LanguageModel, tokenizer: Tokenizer, pieces: Tokenizer) -> Tensor:
    """For each piece the mean embedding of the language model's tokens for its text: (V, D), float32.

    The end of text is the language model's; pieces without a text have zeros.

    Args:
      tokenizer: of the language model; pieces: of the CTC head.
    """
    rows = []
    with torch.no_grad():
        for i in range(pieces.vocab_size):
            ids = [tokenizer.eos_id] if i == pieces.eos_id else tokenizer.encode(pieces.piece_text(i))
            embeds = llm.embed(torch.tensor(ids, dtype=torch.long))
            rows.append(embeds.float().mean(0) if ids else embeds.new_zeros(llm.hidden_size, dtype=torch.float32))
    return torch.stack(rows)
