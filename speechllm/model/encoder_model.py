"""EncoderModel: an encoder trained by itself, with CTC, CR-CTC or a transducer.

    features (N, T, F) -> encoder -> (N, T/4, D_enc), 25 Hz -> CTC head -> CTC loss [+ consistency of two views]
                                                            -> transducer (with the text so far) -> transducer loss

It recognizes speech, and a `SpeechLLM` takes its folder as `model.encoder.path`: so a language without a released
encoder can start here. What it hears it transcribes; it does not translate, and knows no languages.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechllm.config import ConfigError, save_config
from speechllm.decode.encoder_recognizer import EncoderRecognizer
from speechllm.decode.options import RecognizeOptions
from speechllm.encoder import WhisperEncoder
from speechllm.encoder.ctc import consistency_losses, ctc_losses
from speechllm.encoder.transducer import Transducer
from speechllm.errors import UserError
from speechllm.files import replaced_folder
from speechllm.hub import local_path, push_folder
from speechllm.model.base import Losses, SpeechModel, takes_columns_too
from speechllm.model.card import encoder_card, encoder_name
from speechllm.model.config import EncoderSection, ModelConfig, load_model_config
from speechllm.model.ctc_head import load_ctc_head
from speechllm.model.parts import Encoder, build_encoder, saved_section
from speechllm.prompt.label import LabelTemplate
from speechllm.prompt.request import Request
from speechllm.text.tokenizer import Tokenizer, load_tokenizer
from speechllm.weights import load_state_dict_strict, meta_device, restored, stored


class EncoderModel(SpeechModel):
    """See the module's docstring. Build one with `from_config` (training) or `from_pretrained` (use).

    Attributes:
      llm: None, as opposed to that of a `SpeechLLM`.
      ctc_head, transducer: None where the configuration has none.
    """

    llm = None

    label_template = LabelTemplate()  # an encoder writes texts

    def __init__(self, config: ModelConfig, encoder: Encoder, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = dataclasses.replace(config, prompt=config.prompt.written_out())
        self.tokenizer = tokenizer
        self.encoder = encoder
        # Blank is the last class, so the others keep the tokenizer's ids.
        self.blank_id = tokenizer.vocab_size
        self.ctc_head = nn.Linear(encoder.output_dim, self.blank_id + 1) if config.ctc_weight else None
        self.transducer = None
        if config.transducer is not None:
            self.transducer = Transducer(config.transducer, encoder.output_dim, tokenizer.vocab_size)
        if config.encoder.freeze:
            encoder.requires_grad_(False)
        self.train()

    @classmethod
    def from_config(cls, config: ModelConfig) -> EncoderModel:
        """Build the model; an encoder with a `path` is loaded, everything else begins with random weights.

        Raises:
          UserError, FileNotFoundError: the configuration has a language model; a part does not load.
        """
        if config.llm is not None:
            raise ConfigError("model.llm: with a language model it is a SpeechLLM, not an EncoderModel: set llm: null")
        tokenizer = load_tokenizer(config.tokenizer)
        model = cls(config, build_encoder(config.encoder), tokenizer)
        if model.ctc_head is not None and config.encoder.path is not None:
            load_ctc_head(model.ctc_head, config.encoder.path, tokenizer)
        return model

    @property
    def needs_two_views(self) -> bool:
        """Whether it is trained on two views of each utterance."""
        return self.config.cr_ctc is not None

    @property
    def seconds_per_position(self) -> float:
        """How much audio one frame of the encoder's output stands for."""
        return self.frame_seconds

    @property
    def ctc_tokenizer(self) -> Tokenizer:
        """Of the CTC head's pieces, as of all that it writes."""
        return self.tokenizer

    def ctc_label_ids(self, text: str) -> list[int]:
        """The pieces of a transcript that the CTC head is to write."""
        return self.label_ids(text)

    def encoders(self) -> list[tuple[str, EncoderSection, Encoder]]:
        """Name as a part of the model, configuration and module of the encoder; see `SpeechLLM.encoders`."""
        return [("encoder", self.config.encoder, self.encoder)]

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D_enc), (N,)."""
        trains = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains), self.encoding():
            encoder_out, lens = self.encoder(features, feature_lens)
        return encoder_out if self.autocast_dtype is None else encoder_out.float(), lens

    @takes_columns_too
    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        texts: Sequence[str],
        requests: Sequence[Request],
        labels: Sequence[str] | None = None,
        words: object = None,
        chunk_seconds: None = None,
    ) -> Losses:
        """Losses of a batch, SUMMED over its utterances; of two views of each, the mean of both is taken.

        Args:
          features: (N, T, F) log-mel, right-padded, or (2 N, T, F) with the second views behind all the first, which
            CR-CTC is trained on; feature_lens: (N,) or (2 N,) frames.
          texts: N transcripts.
          requests: of the N utterances; it learns from none that asks for a translation.
          labels: what is written of the texts; None: the texts themselves.
          words, chunk_seconds: not used, as there is no language model to read streams.

        Returns:
          scalars: `loss` = ctc_weight * `ctc_loss` + cr_ctc.weight * `cr_ctc_loss` + transducer.weight *
          `transducer_loss`, to be divided by `tokens`; the three losses, of which those are 0 that the configuration
          does not have; `tokens` of the labels, one more for each label, as a `SpeechLLM` counts them.

        Raises:
          UserError: an utterance is to be translated.
          ValueError: the number of views is not the one that the model is trained on.
        """
        config = self.config
        for request in requests:
            if (language := request.target_language) is not None:
                raise UserError(
                    f"a translation into {language} is among the training or validation data, and model.llm is null: "
                    "an encoder alone learns transcripts"
                )
        views = len(features) // len(texts)
        if len(features) != views * len(texts) or views > 2 or (self.training and views != 1 + self.needs_two_views):
            raise ValueError(
                f"{len(features)} rows of features for {len(texts)} texts: it takes {1 + self.needs_two_views} for "
                f"each in training ({'with' if self.needs_two_views else 'without'} model.cr_ctc)"
            )
        label_ids = [self.label_ids(label) for label in labels or texts]
        encoder_out, lens = self.encode(features, feature_lens)
        zero = torch.zeros((), device=encoder_out.device)
        ctc_loss = cr_ctc_loss = transducer_loss = loss = zero
        if self.ctc_head is not None:
            logits = self.ctc_head(encoder_out)
            ctc_loss = ctc_losses(logits, lens, label_ids * views, self.blank_id).sum() / views
            loss = loss + config.ctc_weight * ctc_loss
            if views == 2 and config.cr_ctc is not None:
                cr_ctc_loss = consistency_losses(logits, lens).sum()
                loss = loss + config.cr_ctc.weight * cr_ctc_loss
        if self.transducer is not None and config.transducer is not None:
            transducer_loss = self.transducer(encoder_out, lens, label_ids * views).sum() / views
            loss = loss + config.transducer.weight * transducer_loss
        return {
            "loss": loss,
            "ctc_loss": ctc_loss,
            "cr_ctc_loss": cr_ctc_loss,
            "transducer_loss": transducer_loss,
            "tokens": zero + sum(len(ids) + 1 for ids in label_ids),
        }

    def recognizer(self, options: RecognizeOptions | None = None) -> EncoderRecognizer:
        """Recognizes any number of batches.

        Raises:
          UserError: the options ask for what the model does not have.
        """
        return EncoderRecognizer(self, options)

    def card(self) -> str:
        """The text of its folder's README.md, without results."""
        parts: list[tuple[str, nn.Module]] = [(encoder_name(self.encoder), self.encoder)]
        how = []
        if self.ctc_head is not None:
            parts.append(("CTC head", self.ctc_head))
            how.append("CTC")
        if self.transducer is not None:
            parts.append(("transducer (decoder and joiner)", self.transducer))
            how.append("a transducer")
        return encoder_card(self.config, parts, " and ".join(how))

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        *,
        push_to_hub: str | None = None,
    ) -> None:
        """Write the whole model: config.yaml, model.safetensors, tokenizer, README.md; and config.json, with which
        `encoder.load_encoder` finds the encoder in it. Replaces `folder` in one move.

        Args:
          dtype: of the matrices in the file, such as torch.bfloat16 for half its size; they are float32 again when the
            folder is loaded.
          push_to_hub: upload the folder to this repository of the Hugging Face Hub, too (`speechllm.hub.push_folder`).

        Raises:
          UserError: it cannot be pushed.
        """
        with replaced_folder(folder) as tmp:
            self.tokenizer.save(tmp)
            section = saved_section(self.encoder)
            save_config(dataclasses.replace(self.config, tokenizer=".", encoder=section), tmp / "config.yaml")
            sizes: dict[str, Any] = {"encoder_config": self.encoder.config.to_dict()}
            if isinstance(self.encoder, WhisperEncoder):  # as a released Whisper says it
                sizes = {"model_type": "whisper", **self.encoder.config.to_dict()}
            (tmp / "config.json").write_text(f"{json.dumps(sizes, indent=2)}\n", encoding="utf-8")
            save_file(stored(self.state_dict(), dtype), tmp / "model.safetensors")
            (tmp / "README.md").write_text(self.card(), encoding="utf-8")
        if push_to_hub is not None:
            push_folder(folder, push_to_hub)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> EncoderModel:
        """Load what `save_pretrained` wrote; in evaluation mode, on the CPU.

        Raises:
          FileNotFoundError, UserError: the folder is not one, or its parts do not fit together.
        """
        folder = local_path(folder)
        path = folder / "model.safetensors"
        with meta_device():
            model = cls.from_config(load_model_config(folder))
        load_state_dict_strict(model, restored(load_file(path)), path, assign=True)
        return model.eval()
