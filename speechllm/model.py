"""SpeechLLM: encoder + projector + prompt + language model.

    features (N, T, F) -> encoder -> (N, T/4, D_enc), 25 Hz -> projector -> (N, T/8, D_llm), 12.5 Hz
      -> [before_audio | audio | after_audio | label] embeddings -> language model -> loss on label and end of text

An auxiliary CTC head on the encoder (arXiv 1609.06773) helps a model trained from scratch to align. It is trained on
transcripts only: the encoder sees no prompt, so it cannot know that a translation is wanted.

In a batch the rows with a target language are to be translated, the others to be transcribed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechllm.checkpoint import load_state_dict_strict
from speechllm.config import ConfigError, load_config, save_config
from speechllm.decode.formats import Recording
from speechllm.decode.recognise import ENCODER_FRAME_SECONDS, RecogniseOptions, Recogniser, Speech
from speechllm.decode.result import Recognition
from speechllm.encoder import Zipformer, ZipformerConfig, load_encoder
from speechllm.errors import UserError
from speechllm.files import replaced_folder
from speechllm.label import LabelTemplate, ReadLabel
from speechllm.llm import LanguageModel
from speechllm.model_card import model_card
from speechllm.projector import Projector, ProjectorConfig
from speechllm.prompt import PromptConfig, splice
from speechllm.rwkv7 import (
    RWKV7,
    RWKV7Config,
    TuneConfig,
    load_adapter,
    load_rwkv7,
    merged_state_dict,
    save_adapter,
    tune,
)
from speechllm.rwkv7.wkv import BACKENDS
from speechllm.tokenizer import Tokenizer, load_tokenizer


@dataclass
class EncoderSection:
    """`path`: a released encoder's folder; without it, one of the sizes in `zipformer` is trained from scratch.

    `schedule_speed`: the schedules of the encoder's training (dropout, layer skip, balancers) span 4,000 to 20,000
    steps of a large run; a short run passes through them so many times faster.
    `checkpoint_layers`: activations are computed again in the backward pass: less memory, a third more work.
    """

    path: str | None = None
    freeze: bool = False
    schedule_speed: float = 1.0
    checkpoint_layers: bool = False
    zipformer: ZipformerConfig | None = None

    def __post_init__(self) -> None:
        _check_source(self, "zipformer")


@dataclass
class LLMSection:
    """`path`: an RWKV-7 checkpoint; without it, one of the sizes in `rwkv7` is trained from scratch.

    `adapter`: a folder with what was tuned before (a PEFT adapter or a state), put on the checkpoint and not trained.
    `tune`: what of the checkpoint trains, and how; without it everything does, or with `freeze` nothing.
    `checkpoint_blocks`: activations are computed again in the backward pass: less memory, a third more work.
    `wkv_backend`: see `rwkv7.wkv.wkv7`.
    """

    path: str | None = None
    freeze: bool = False
    adapter: str | None = None
    tune: TuneConfig | None = None
    checkpoint_blocks: bool = False
    wkv_backend: str = "auto"
    rwkv7: RWKV7Config | None = None

    def __post_init__(self) -> None:
        _check_source(self, "rwkv7")
        if self.wkv_backend not in BACKENDS:
            raise ValueError(f"wkv_backend: unknown {self.wkv_backend!r}, choose from {', '.join(BACKENDS)}")
        if self.tune is not None and not self.path:
            raise ValueError("tune without path would tune random weights")
        if self.adapter is not None and (self.tune is not None or not (self.path and self.freeze)):
            raise ValueError(
                "adapter goes on the checkpoint at path, and with freeze: true; to train on, merge it first"
            )
        if self.tune is not None and self.freeze:
            raise ValueError("give either freeze (nothing is trained) or tune (which freezes what it does not train)")

    @property
    def freezes_base(self) -> bool:
        """Whether the weights at `path` stay as they are in training."""
        return self.freeze or (self.tune is not None and self.tune.freezes_base)


@dataclass
class ModelConfig:
    """Everything that defines a model. `tokenizer` is `rwkv` or the folder of a sentencepiece model.

    `label`: what the language model writes, behind `prompt.before_label`: the text, perhaps with the language and the
    times of words (`speechllm.label`).
    `ctc_weight` scales the CTC loss of a linear head on the encoder; 0 builds no head.
    """

    tokenizer: str
    encoder: EncoderSection
    llm: LLMSection
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    label: str = "{text}"
    ctc_weight: float = 0.0

    def __post_init__(self) -> None:
        prompts = [text for text in dataclasses.astuple(self.prompt) if "{lang}" in str(text)]
        if LabelTemplate(self.label).has_language and prompts:
            raise ValueError(
                f"label {self.label!r} asks for the language that the prompt {prompts[0]!r} tells: take {{lang}} out "
                "of one of them"
            )
        if self.ctc_weight < 0:
            raise ValueError(f"ctc_weight must be at least 0, got {self.ctc_weight}")


def _check_source(section: EncoderSection | LLMSection, sizes: str) -> None:
    if bool(section.path) == bool(getattr(section, sizes)):
        raise ValueError(f"give either path (a checkpoint) or {sizes} (sizes to train from scratch)")
    if section.freeze and not section.path:
        raise ValueError("freeze without path would freeze random weights")


class SpeechLLM(nn.Module):
    """See the module's docstring. Build one with `from_config` (training) or `from_pretrained` (use)."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: Zipformer,
        projector: Projector,
        llm: LanguageModel,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.projector = projector
        self.llm = llm
        # Blank is the last class, so the others keep the tokenizer's ids.
        self.blank_id = tokenizer.vocab_size
        self.ctc_head = nn.Linear(encoder.output_dim, self.blank_id + 1) if config.ctc_weight else None
        self.label_template = LabelTemplate(config.label, self.seconds_per_position)
        for part, frozen in ((encoder, config.encoder.freeze), (llm, config.llm.freeze)):
            if frozen:
                part.requires_grad_(False)
        self.train()

    @classmethod
    def from_config(cls, config: ModelConfig) -> SpeechLLM:
        """Build the model; parts with a `path` are loaded, the others initialised for training from scratch.

        Raises:
          UserError, FileNotFoundError: a part does not load, or two parts do not fit together.
        """
        tokenizer = load_tokenizer(config.tokenizer)
        encoder = load_encoder(config.encoder.path) if config.encoder.path else Zipformer(config.encoder.zipformer)
        encoder.checkpoint_layers = config.encoder.checkpoint_layers
        llm = load_rwkv7(config.llm.path) if config.llm.path else RWKV7(config.llm.rwkv7)
        if config.llm.adapter is not None:
            load_adapter(llm, config.llm.adapter)
        if config.llm.tune is not None:
            tune(llm, config.llm.tune)
        llm.checkpoint_blocks, llm.wkv_backend = config.llm.checkpoint_blocks, config.llm.wkv_backend
        if llm.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"the language model ({config.llm.path or 'llm.rwkv7'}) has a vocabulary of {llm.vocab_size}, "
                f"the tokenizer {config.tokenizer} of {tokenizer.vocab_size}: they must belong together"
            )
        projector = Projector(config.projector, encoder.output_dim, llm.hidden_size)
        return cls(config, encoder, projector, llm, tokenizer)

    def train(self, mode: bool = True) -> SpeechLLM:
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        if mode:
            for module in self.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.projector.out_proj.weight.device

    @property
    def seconds_per_position(self) -> float:
        """How much audio one position of the language model stands for."""
        return ENCODER_FRAME_SECONDS * self.projector.downsample

    def _encoder_trains(self) -> bool:
        return any(p.requires_grad for p in self.encoder.parameters())

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D_enc), (N,), audio_embeds (N, T'', D_llm), (N,)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._encoder_trains()):
            encoder_out, encoder_out_lens = self.encoder(features, feature_lens)
        return encoder_out, encoder_out_lens, *self.projector(encoder_out, encoder_out_lens)

    def prompted(
        self,
        audio_embeds: Tensor,
        audio_lens: Tensor,
        languages: Sequence[str | None],
        label_ids: Sequence[Sequence[int]] | None = None,
        target_languages: Sequence[str | None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Splice audio into the prompt (see `prompt.splice`): inputs_embeds (N, L, D), lens (N,), labels (N, L)."""
        device = audio_embeds.device
        spliced = splice(
            self.config.prompt, self.tokenizer, audio_lens.tolist(), languages, label_ids, target_languages
        )
        token_ids, audio_mask, lens, labels = (t.to(device) for t in spliced)
        valid = torch.arange(audio_embeds.shape[1], device=device)[None, :] < audio_lens[:, None]
        text_embeds = self.llm.embed(token_ids)
        inputs_embeds = text_embeds.masked_scatter(audio_mask[..., None], audio_embeds[valid].to(text_embeds.dtype))
        return inputs_embeds, lens, labels

    def label_ids(self, label: str) -> list[int]:
        """The tokens of a label as it stands behind the prompt, without the end of text."""
        return self.tokenizer.encode(self.config.prompt.before_label + label)

    def label_lengths(self, labels: Sequence[str]) -> list[int]:
        """How many tokens each label has behind the prompt, the end of text not counted."""
        return [len(self.label_ids(label)) for label in labels]

    def label_identity(self) -> str:
        """A string that differs between models that make other tokens of some label; for the names of caches."""
        return f"{self.tokenizer.identity()} {self.config.prompt.before_label!r} {self.label_template}"

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens of a transcript, which is what the CTC head writes."""
        return self.tokenizer.decode(token_ids).removeprefix(self.config.prompt.before_label)

    def read_label(self, token_ids: Sequence[int]) -> ReadLabel:
        """What the language model says with the tokens of a label; the inverse of `label_ids` of `label_template`."""
        if self.label_template.is_plain:
            return ReadLabel(self.text(token_ids))
        written, prefix = self.tokenizer.decode(token_ids, keep_tags=True), self.config.prompt.before_label
        read = self.label_template.read(written, len(prefix) if written.startswith(prefix) else 0)
        if self.label_template.has_language and read.language is None:
            return ReadLabel(self.label_template.read(self.text(token_ids)).text)  # what tags there are is no text
        return read

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        texts: Sequence[str],
        languages: Sequence[str | None],
        target_languages: Sequence[str | None] | None = None,
        labels: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch, SUMMED over its label tokens (each label's end of text included).

        Args:
          features: (N, T, F) log-mel, right-padded; feature_lens: (N,) frames.
          texts: N transcripts or translations; languages: N tags for the prompt's `{lang}` slot, or None.
          target_languages: N tags for `{target_lang}`, None in rows whose text is a transcript; None if all are.
          labels: N labels of the texts (`label_template`); None: made of the above, which say no word times.

        Returns:
          scalars: `loss` = `llm_loss` + ctc_weight * `ctc_loss`, to be divided by `tokens`; `llm_loss`;
          `ctc_loss` of the transcripts (0 without a head); `tokens` and `correct` (tokens predicted right) of the
          language model.
        """
        target_languages = target_languages or [None] * len(texts)
        if labels is None:
            rows = zip(texts, languages, target_languages, strict=True)
            labels = [self.label_template.fill(*row) for row in rows]
        label_ids = [self.label_ids(label) for label in labels]
        encoder_out, encoder_out_lens, audio_embeds, audio_lens = self.encode(features, feature_lens)
        inputs_embeds, lens, labels = self.prompted(audio_embeds, audio_lens, languages, label_ids, target_languages)
        (llm_loss, tokens, correct), _ = self.llm.loss(labels, inputs_embeds=inputs_embeds, lens=lens)
        ctc_loss = llm_loss.new_zeros(())
        if self.ctc_head is not None:
            losses = self.ctc_losses(encoder_out, encoder_out_lens, [self.label_ids(text) for text in texts])
            # Of translations it counts nothing, but it is computed: every parameter gets a gradient in every batch.
            is_transcript = torch.tensor([target is None for target in target_languages], device=losses.device)
            ctc_loss = (losses * is_transcript).sum()
        return {
            "loss": llm_loss + self.config.ctc_weight * ctc_loss,
            "llm_loss": llm_loss,
            "ctc_loss": ctc_loss,
            "tokens": tokens,
            "correct": correct,
        }

    def ctc_losses(self, encoder_out: Tensor, encoder_out_lens: Tensor, label_ids: Sequence[Sequence[int]]) -> Tensor:
        """CTC losses (N,); that of a label that has more tokens than its audio has frames is 0."""
        log_probs = self.ctc_head(encoder_out).float().log_softmax(-1)
        targets = torch.tensor([t for ids in label_ids for t in ids], dtype=torch.long)
        target_lens = torch.tensor([len(ids) for ids in label_ids])
        return F.ctc_loss(
            log_probs.transpose(0, 1),
            targets.to(log_probs.device),
            encoder_out_lens,
            target_lens.to(log_probs.device),
            blank=self.blank_id,
            reduction="none",
            zero_infinity=True,
        )

    def recognise(
        self,
        features: Tensor,
        feature_lens: Tensor,
        languages: Sequence[str | None],
        target_languages: Sequence[str | None] | None = None,
        options: RecogniseOptions | None = None,
    ) -> list[Recognition]:
        """What is said in a batch; for more than one batch, a `Recogniser` searches across them.

        Rows with a target language are translated; the CTC head cannot, and has no text for them.
        """
        speech = Speech(features, feature_lens, languages, target_languages or [None] * len(languages))
        return next(Recogniser(self, options)([speech]))

    def transcribe(
        self,
        audio: Sequence[str | Path | np.ndarray | Tensor],
        language: str | None = None,
        target_language: str | None = None,
        options: RecogniseOptions | None = None,
    ) -> list[Recording]:
        """What is said in audio of any length; translations with a target language. `[0].text` is that of the first.

        Long audio is cut at pauses; what is silent has no text.

        Args:
          audio: files of any format and sampling rate, or (num_samples,) floating-point samples in [-1, 1], 16 kHz.

        Raises:
          DataError: a file cannot be read; the message names it.
          UserError: the prompt has a slot for a language that is not given; samples of another shape.
        """
        from speechllm.transcribe import audio_input, transcribe_inputs  # the model itself needs no lhotse

        inputs = [audio_input(a, f"audio[{i}]", language, target_language) for i, a in enumerate(audio)]
        was_training = self.training
        self.eval()
        try:
            found = [result for _, result in transcribe_inputs(inputs, Recogniser(self, options))]
        finally:
            self.train(was_training)
        if errors := [result for result in found if isinstance(result, Exception)]:
            raise errors[0]
        return found

    def save_pretrained(self, folder: str | Path, merged: bool = True) -> None:
        """Write the whole model: config.yaml, model.safetensors, tokenizer, README.md. Replaces `folder` in one move.

        What was tuned of the language model is in `adapter` by itself (see `rwkv7.save_adapter`).

        Args:
          merged: the adapter is merged into the language model, all of which is in model.safetensors (a quantised base
            in floating point, as it is after quantisation). Otherwise nothing of the base is in the folder: config.yaml
            names its path.

        Raises:
          UserError: there is no adapter to be kept apart from its base.
        """
        has_adapter = self.config.llm.tune is not None and self.config.llm.tune.freezes_base
        if not merged and not has_adapter:
            raise UserError("merged=False: the language model has no adapter (model.llm.tune) beside a frozen base")
        llm = LLMSection(rwkv7=self.llm.config)
        if not merged:
            llm = LLMSection(path=str(Path(self.config.llm.path).absolute()), freeze=True, adapter="adapter")
        with replaced_folder(folder) as tmp:
            self.tokenizer.save(tmp)
            config = dataclasses.replace(
                self.config, tokenizer=".", encoder=EncoderSection(zipformer=self.encoder.config), llm=llm
            )
            save_config(config, tmp / "config.yaml")
            weights = {k: v for k, v in self.state_dict().items() if not k.startswith("llm.")}
            if merged:
                weights |= {f"llm.{k}": v for k, v in merged_state_dict(self.llm).items()}
            save_file({k: v.contiguous() for k, v in weights.items()}, tmp / "model.safetensors")
            if has_adapter:
                save_adapter(self.llm, tmp / "adapter", base=self.config.llm.path)
            (tmp / "README.md").write_text(model_card(self), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SpeechLLM:
        """Load what `save_pretrained` wrote; in evaluation mode, on the CPU.

        Raises:
          FileNotFoundError, UserError: the folder is not one, or its parts do not fit together.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"{folder}: no config.yaml: not a folder written by save_pretrained")
        config = load_config(ModelConfig, folder / "config.yaml")
        config = dataclasses.replace(config, tokenizer=str(folder / config.tokenizer))
        path = folder / "model.safetensors"
        weights = load_file(path)
        if config.llm.path is not None:
            if not Path(config.llm.path).exists():
                raise FileNotFoundError(
                    f"{folder}: holds an adapter without its base, and {config.llm.path} is not there: set llm.path in "
                    f"{folder / 'config.yaml'} to where the checkpoint is"
                )
            config.llm = dataclasses.replace(config.llm, adapter=str(folder / config.llm.adapter))
            model = cls.from_config(config)
            weights |= {name: t for name, t in model.state_dict().items() if name.startswith("llm.")}
        else:
            with torch.device("meta"):  # no time for initial values that are about to be replaced
                model = cls.from_config(config)
                if "llm.initial_wkv" in weights:
                    model.llm.add_initial_state()
        load_state_dict_strict(model, weights, path, assign=True)
        return model.eval()
