"""SpeechLLM: encoder + projector + prompt + language model.

    features (N, T, F) -> encoder -> (N, T/4, D_enc), 25 Hz -> projector -> (N, T/8, D_llm), 12.5 Hz
      -> [prompt with the audio in it | label] embeddings -> language model -> loss on label and end of text

An auxiliary CTC head on the encoder (arXiv 1609.06773) helps a model trained from scratch to align. It is trained on
transcripts only: the encoder sees no prompt, so it cannot know that a translation is wanted.

In a batch the rows with a target language are to be translated, the others to be transcribed.

With `more_encoders` the audio is what each encoder's projector gives, one after another, as MoWE-Audio (arXiv
2409.06635) puts weak encoders beside a strong one. The CTC head stays on the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechllm.config import ConfigError, save_config
from speechllm.decode.options import RecognizeOptions
from speechllm.decode.recognizer import SpeechLLMRecognizer
from speechllm.encoder import ZipformerConfig
from speechllm.encoder.ctc import ctc_losses
from speechllm.errors import UserError
from speechllm.files import replaced_folder
from speechllm.hub import hub_id, local_path, push_folder
from speechllm.llm.adapters import load_adapter, merged_state_dict, save_adapter, tune
from speechllm.llm.interface import IGNORE, TunableModel
from speechllm.llm.transformers import TransformersLM
from speechllm.model.base import Losses, SpeechModel, takes_columns_too
from speechllm.model.card import encoder_name, model_card
from speechllm.model.config import (
    EncoderSection,
    LLMSection,
    ModelConfig,
    MoreEncoder,
    load_model_config,
    save_decoding,
)
from speechllm.model.ctc_head import load_ctc_head, mean_embeddings
from speechllm.model.parts import Encoder, build_encoder, build_language_model, saved_section
from speechllm.model.streaming import Chunk, aligned_words, chunks_of
from speechllm.projector import CTCProjector, Projector, WeightedStacks, build_projector, one_after_another
from speechllm.prompt.interleave import StreamingConfig, deal_out, interleave
from speechllm.prompt.label import LabelTemplate, ReadLabel, WordTime
from speechllm.prompt.request import Request
from speechllm.prompt.splice import PromptEmbedder, Spliced, splice
from speechllm.prompt.template import PromptConfig
from speechllm.rwkv7 import RWKV7
from speechllm.text.tokenizer import Beginnings, Tokenizer, load_tokenizer
from speechllm.weights import load_state_dict_strict, meta_device, restored, stored

# What stands before a transcript in a CTC head's own pieces: what an encoder alone has learned to write.
_CTC_PREFIX = PromptConfig().label_prefix


class SpeechLLM(SpeechModel):
    """See the module's docstring. Build one with `from_config` (training) or `from_pretrained` (use)."""

    llm: TunableModel
    needs_two_views = False

    def __init__(
        self,
        config: ModelConfig,
        encoder: Encoder,
        projector: Projector,
        llm: TunableModel,
        tokenizer: Tokenizer,
        more_encoders: Sequence[tuple[Encoder, Projector]] = (),
        ctc_tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        # The texts, not the names of presets: what is saved stays what it was trained with.
        self.config = dataclasses.replace(config, prompt=config.prompt.written_out())
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.projector = projector
        self.llm = llm
        self.prompt = PromptEmbedder(config.prompt, llm)
        self.more_encoders = nn.ModuleList(nn.ModuleDict({"encoder": e, "projector": p}) for e, p in more_encoders)
        self.ctc_tokenizer = ctc_tokenizer or tokenizer
        # Blank is the last class, so the others keep the tokenizer's ids.
        self.blank_id = self.ctc_tokenizer.vocab_size
        self.ctc_head = nn.Linear(encoder.output_dim, self.blank_id + 1) if config.ctc_weight else None
        self.label_template = LabelTemplate(config.label, self.seconds_per_position)
        self.chunks = chunks_of(config.streaming, encoder, config.projector) if config.streaming is not None else {}
        sections: list[tuple[nn.Module, EncoderSection | LLMSection]] = [(llm, self.llm_section)]
        sections += [(part, section) for _, section, part in self.encoders()]
        for part, section in sections:
            if section.freeze:
                part.requires_grad_(False)
        self.train()

    @classmethod
    def from_config(cls, config: ModelConfig) -> SpeechLLM:
        """Build the model; parts with a `path` are loaded, the others initialized for training from scratch.

        Raises:
          UserError, FileNotFoundError: a part does not load, or two parts do not fit together.
        """
        if config.llm is None:
            raise ConfigError("model.llm: null: without a language model it is an EncoderModel, not a SpeechLLM")
        tokenizer = load_tokenizer(config.tokenizer)
        config.prompt.check_tags(tokenizer, config.tokenizer)
        encoder = build_encoder(config.encoder)
        llm = build_language_model(config.llm)
        if config.llm.adapter is not None:
            load_adapter(llm, config.llm.adapter, alpha=config.llm.adapter_alpha)
        if config.llm.tune is not None:
            tune(llm, config.llm.tune)
        llm.checkpoint_blocks = config.llm.checkpoint_blocks
        if llm.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"the language model ({config.llm.path or llm.name}) has a vocabulary of {llm.vocab_size}, "
                f"the tokenizer {config.tokenizer} of {tokenizer.vocab_size}: they must belong together"
            )
        ctc_tokenizer = None if config.ctc_tokenizer is None else load_tokenizer(config.ctc_tokenizer)
        table = None
        if config.projector.kind == "ctc" and ctc_tokenizer is not None:
            table = mean_embeddings(llm, tokenizer, ctc_tokenizer)
        projector = build_projector(config.projector, encoder.output_dim, llm.hidden_size, encoder.num_stacks, table)
        more_encoders = []
        for i, more in enumerate(config.more_encoders):
            other = build_encoder(more.encoder)
            if other.feature_kind == encoder.feature_kind and other.feature_dim != encoder.feature_dim:
                raise ConfigError(
                    f"model.more_encoders[{i}].encoder reads features of {other.feature_dim} bins, model.encoder of "
                    f"{encoder.feature_dim}: encoders read the same {encoder.feature_kind} features"
                )
            sizes = other.output_dim, llm.hidden_size, other.num_stacks
            more_encoders.append((other, build_projector(more.projector, *sizes)))
        model = cls(config, encoder, projector, llm, tokenizer, more_encoders, ctc_tokenizer)
        if model.ctc_head is not None and config.encoder.path is not None:
            load_ctc_head(model.ctc_head, config.encoder.path, model.ctc_tokenizer)
        return model

    @property
    def streaming(self) -> StreamingConfig | None:
        """How it writes while it listens; None if it does not."""
        return self.config.streaming

    @property
    def llm_section(self) -> LLMSection:
        """The configuration of the language model."""
        assert self.config.llm is not None  # see `from_config`
        return self.config.llm

    @property
    def seconds_per_position(self) -> float:
        """How much audio one position of the language model stands for, the positions of all encoders counted."""
        return 1 / sum(1 / (encoder.frame_seconds * projector.downsample) for encoder, projector in self._branches())

    def audio_lens(self, feature_lens: Tensor) -> Tensor:
        """How many positions of audio the language model reads for feature_lens (N,) frames: (N,)."""
        lens = [projector.output_lens(encoder.output_lens(feature_lens)) for encoder, projector in self._branches()]
        return torch.stack(lens).sum(0)

    def encoders(self) -> list[tuple[str, EncoderSection, Encoder]]:
        """Name as a part of the model, configuration and module of each encoder, the first one first."""
        sections = [self.config.encoder, *(more.encoder for more in self.config.more_encoders)]
        names = ["encoder", *(f"more_encoders.{i}.encoder" for i in range(len(self.more_encoders)))]
        modules = [encoder for encoder, _ in self._branches()]
        return list(zip(names, sections, modules, strict=True))

    def _branches(self) -> list[tuple[Encoder, Projector]]:
        more = [cast("dict[str, Any]", part) for part in self.more_encoders]
        return [(self.encoder, self.projector), *((part["encoder"], part["projector"]) for part in more)]

    def encode(
        self, features: Tensor, feature_lens: Tensor, chunk: Chunk | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D_enc), (N,), audio_embeds (N, T'', D_llm), (N,).

        encoder_out is the first encoder's; the audio is that of all. With a `chunk` it is what a stream of such chunks
        hears.
        """
        with self.encoding():
            encoder_out, encoder_out_lens, embeds, lens = self._encode_all(features, feature_lens, chunk)
        return encoder_out if self.autocast_dtype is None else encoder_out.float(), encoder_out_lens, embeds, lens

    def _encode_all(
        self, features: Tensor, feature_lens: Tensor, chunk: Chunk | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `encode`."""
        if not self.more_encoders:
            return self._encode(self.encoder, self.projector, features, feature_lens, self._encoder_context(chunk))
        (encoder_out, encoder_out_lens, *first), *parts = (
            self._encode(encoder, projector, self.features_of(encoder, features), feature_lens)
            for encoder, projector in self._branches()
        )
        embeds, lens = zip(first, *(part[2:] for part in parts), strict=True)
        if self.training and self.config.encoder_dropout:
            lens = self._with_encoder_dropout(torch.stack(lens))
        return encoder_out, encoder_out_lens, *one_after_another(embeds, lens)

    def _encoder_context(self, chunk: Chunk | None) -> dict[str, int]:
        """What an encoder is told about the context that it hears in."""
        if chunk is not None:
            return chunk.encoder_context
        if self.config.streaming is None:
            return {}
        # By itself it would draw one in training: but for streams there are batches of their own.
        config = cast(ZipformerConfig, self.encoder.config)  # `chunks_of` sees to it
        sizes, left = config.chunk_size, config.left_context_frames
        return {
            "chunk_size": -1 if -1 in sizes else max(sizes),
            "left_context_frames": -1 if -1 in left else max(left),
        }

    def _encode(
        self,
        encoder: Encoder,
        projector: Projector,
        features: Tensor,
        feature_lens: Tensor,
        context: dict[str, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """encoder_out (N, T', D_enc), (N,), audio_embeds (N, T'', D_llm), (N,) of one encoder and its projector."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())):
            if isinstance(projector, WeightedStacks):
                encoder_out, lens, projected = encoder(features, feature_lens, return_stacks=True)
            else:
                encoder_out, lens = encoder(features, feature_lens, **(context or {}))
                projected = encoder_out
        if isinstance(projector, CTCProjector):
            tokens = torch.arange(self.blank_id, device=encoder_out.device)
            llm_embeds = self.llm.embed(tokens) if projector.table is None else None
            assert self.ctc_head is not None  # `ModelConfig` sees to it
            return encoder_out, lens, *projector(self.ctc_head(encoder_out), lens, llm_embeds)
        return encoder_out, lens, *projector(projected, lens)

    def _with_encoder_dropout(self, lens: Tensor) -> Tensor:
        """lens (E, N) of E encoders' audio, 0 for those that are left out of an utterance."""
        kept = torch.rand(lens.shape, device=lens.device) >= self.config.encoder_dropout
        one = torch.randint(len(lens), lens.shape[1:], device=lens.device)  # is there if no other is
        kept |= ~kept.any(0) & (torch.arange(len(lens), device=lens.device)[:, None] == one)
        return lens * kept

    def spliced(
        self,
        audio_lens: Tensor,
        requests: Sequence[Request],
        label_ids: Sequence[Sequence[int]] | None = None,
    ) -> Spliced:
        """What the language model reads of each row (see `prompt.splice`), on the device of `audio_lens`."""
        rows = splice(self.config.prompt, self.tokenizer, audio_lens.tolist(), requests, label_ids)
        return rows.to(audio_lens.device)

    def embed(self, spliced: Spliced, audio_embeds: Tensor, audio_lens: Tensor) -> Tensor:
        """The embeddings (N, L, D) of what is spliced; audio_embeds (N, T'', D), audio_lens (N,)."""
        valid = torch.arange(audio_embeds.shape[1], device=audio_embeds.device)[None, :] < audio_lens[:, None]
        return self.prompt(spliced, self.llm.embed(spliced.token_ids), audio_embeds[valid])

    def prompted(
        self,
        audio_embeds: Tensor,
        audio_lens: Tensor,
        requests: Sequence[Request],
        label_ids: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The audio in its prompt, and the label: inputs_embeds (N, L, D), lens (N,), labels (N, L)."""
        spliced = self.spliced(audio_lens, requests, label_ids)
        return self.embed(spliced, audio_embeds, audio_lens), spliced.lens, spliced.labels

    def streamed(
        self,
        chunk: Chunk,
        feature_lens: Tensor,
        audio_lens: Tensor,
        requests: Sequence[Request],
        label_ids: Sequence[Sequence[int]],
        words: Sequence[Sequence[WordTime] | None],
    ) -> Spliced:
        """What the language model reads of each row of a batch of streams (see `prompt.interleave`), on the device of
        `audio_lens`.

        Args:
          label_ids: the tokens of N labels; words: those of N transcripts, with their times. Where these are None,
            there is no loss; translations need none.
        """
        is_stream = [request.target_language is None for request in requests]
        delay = 0.0 if self.streaming is None else self.streaming.delay_seconds
        dealt = [
            deal_out(
                ids,
                said or (),
                self.tokenizer,
                before_label=self.config.prompt.label_prefix,
                num_chunks=count if streams else 0,
                chunk_seconds=chunk.seconds,
                delay_seconds=delay,
            )
            for ids, said, count, streams in zip(
                label_ids, words, chunk.count(feature_lens).tolist(), is_stream, strict=True
            )
        ]
        prompt, seconds, positions = self.config.prompt, chunk.seconds, chunk.positions
        spliced = interleave(prompt, self.tokenizer, audio_lens.tolist(), requests, dealt, seconds, positions)
        for i, (said, streams) in enumerate(zip(words, is_stream, strict=True)):
            if said is None and streams:
                spliced.labels[i] = IGNORE
        return spliced.to(audio_lens.device)

    def _aligned(
        self, ctc_logits: Tensor | None, lens: Tensor, transcripts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[tuple[WordTime, ...] | None]:
        """When the words of the transcripts of some rows are said, as the CTC head hears them now."""
        if ctc_logits is None:
            raise UserError(
                "streaming: there are transcripts without word times, and no CTC head that could align them: give "
                "`alignment` in the manifests, or set model.ctc_weight above 0"
            )
        log_probs = ctc_logits.detach()[list(rows)].float().log_softmax(-1)
        said = [transcripts[i] for i in rows]
        return aligned_words(log_probs, lens[list(rows)], said, self.blank_id, self.ctc_tokenizer, self.frame_seconds)

    def num_label_tokens(self, labels: Sequence[str], feature_lens: Tensor, chunk_seconds: float | None = None) -> int:
        """See `SpeechModel`."""
        count = super().num_label_tokens(labels, feature_lens, chunk_seconds)
        return count if chunk_seconds is None else count + int(self.chunks[chunk_seconds].count(feature_lens).sum())

    def ctc_label_ids(self, text: str) -> list[int]:
        """The pieces of a transcript that the CTC head is to write."""
        if self.ctc_tokenizer is self.tokenizer:
            return self.label_ids(text)
        return self.ctc_tokenizer.encode(_CTC_PREFIX + text)

    def ctc_beginnings(self, text: str, words: Sequence[str]) -> Beginnings:
        """The pieces that the CTC head may begin with where a transcript goes on after `text` with a word that begins
        like one of `words`, for each of them."""
        return self.ctc_tokenizer.beginnings(_CTC_PREFIX + text, words)

    def ctc_text(self, token_ids: Sequence[int]) -> str:
        """The text of pieces that the CTC head wrote."""
        if self.ctc_tokenizer is self.tokenizer:
            return self.text(token_ids)
        return self.ctc_tokenizer.decode(token_ids).removeprefix(_CTC_PREFIX)

    def read_label(self, token_ids: Sequence[int]) -> ReadLabel:
        """What the language model says with the tokens of a label; the inverse of `label_ids` of `label_template`."""
        if self.label_template.is_plain:
            return ReadLabel(self.text(token_ids))
        written, prefix = self.tokenizer.decode(token_ids, keep_tags=True), self.config.prompt.label_prefix
        read = self.label_template.read(written, len(prefix) if written.startswith(prefix) else 0)
        if self.label_template.has_language and read.language is None:
            return ReadLabel(self.label_template.read(self.text(token_ids)).text)  # what tags there are is no text
        return read

    @takes_columns_too
    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        texts: Sequence[str],
        requests: Sequence[Request],
        labels: Sequence[str] | None = None,
        words: Sequence[Sequence[WordTime] | None] | None = None,
        chunk_seconds: float | None = None,
        hypotheses: Sequence[Sequence[Sequence[int]]] | None = None,
        temperature: float = 1.0,
    ) -> Losses:
        """Losses of a batch, SUMMED over its label tokens (each label's end of text included).

        Args:
          features: (N, T, F) log-mel, right-padded; feature_lens: (N,) frames.
          texts: N transcripts or translations.
          requests: what is asked for each of the N utterances: a transcript, or a translation into a language.
          labels: N labels of the texts (`label_template`); None: made of the above, which say no word times.
          words: N times those of the transcripts, with their times, for streams; those that are None are aligned by the
            CTC head.
          chunk_seconds: the rows are streams of such chunks, one of `model.streaming` (`speechllm.prompt.interleave`);
            None for all audio before the text, as always in rows with a target language.
          hypotheses: of each utterance, the tokens of other labels whose probabilities are wanted, M in all, each with
            its end of text if it has one; the encoder hears the utterance once for all of them.
          temperature: at which these probabilities are.

        Returns:
          scalars: `loss` = `llm_loss` + ctc_weight * `ctc_loss`, to be divided by `tokens`; `llm_loss`;
          `ctc_loss` of the transcripts (0 without a head); `tokens` and `correct` (tokens predicted right) of the
          language model. A transcript that is too long to be aligned with its audio has no `llm_loss` in a stream.
          With `hypotheses` also their `hypothesis_log_probs` (M,).
        """
        if labels is None:
            labels = [self.label_template.fill(*row) for row in zip(texts, requests, strict=True)]
        label_ids = [self.label_ids(label) for label in labels]
        chunk = None if chunk_seconds is None else self.chunks[chunk_seconds]
        encoder_out, encoder_out_lens, audio_embeds, audio_lens = self.encode(features, feature_lens, chunk)
        transcripts, ctc_logits = [], None
        if self.ctc_head is not None:
            transcripts, ctc_logits = [self.ctc_label_ids(text) for text in texts], self.ctc_head(encoder_out)
        if chunk is None:
            spliced = self.spliced(audio_lens, requests, label_ids)
        else:
            words = list(words or [None] * len(texts))
            unknown = [i for i, said in enumerate(words) if said is None and requests[i].target_language is None]
            if unknown:
                aligned = self._aligned(ctc_logits, encoder_out_lens, transcripts, unknown)
                for i, said in zip(unknown, aligned, strict=True):
                    words[i] = said
            spliced = self.streamed(chunk, feature_lens, audio_lens, requests, label_ids, words)
        inputs_embeds = self.embed(spliced, audio_embeds, audio_lens)
        (llm_loss, tokens, correct), _ = self.llm.loss(spliced.labels, inputs_embeds=inputs_embeds, lens=spliced.lens)
        ctc_loss = llm_loss.new_zeros(())
        if ctc_logits is not None:
            losses = ctc_losses(ctc_logits, encoder_out_lens, transcripts, self.blank_id)
            # Of translations it counts nothing, but it is computed: every parameter gets a gradient in every batch.
            is_transcript = torch.tensor([r.target_language is None for r in requests], device=losses.device)
            ctc_loss = (losses * is_transcript).sum()
        found = {
            "loss": llm_loss + self.config.ctc_weight * ctc_loss,
            "llm_loss": llm_loss,
            "ctc_loss": ctc_loss,
            "tokens": tokens,
            "correct": correct,
        }
        if hypotheses is not None:
            log_probs = self._log_probs_of_labels(audio_embeds, audio_lens, requests, hypotheses, temperature)
            found["hypothesis_log_probs"] = log_probs
        return found

    def _log_probs_of_labels(
        self,
        audio_embeds: Tensor,
        audio_lens: Tensor,
        requests: Sequence[Request],
        labels: Sequence[Sequence[Sequence[int]]],
        temperature: float,
    ) -> Tensor:
        """Log probabilities (M,), each the sum over a label's tokens; see `forward`."""
        rows = [row for row, several in enumerate(labels) for _ in several]
        flat = [label for several in labels for label in several]
        ended = [bool(label) and label[-1] == self.tokenizer.eos_id for label in flat]
        lens = audio_lens[rows]
        texts = [label[:-1] if end else label for label, end in zip(flat, ended, strict=True)]
        spliced = self.spliced(lens, [requests[row] for row in rows], texts)
        endless = [i for i, end in enumerate(ended) if not end]
        spliced.labels[endless, spliced.lens[endless] - 1] = IGNORE
        inputs_embeds = self.embed(spliced, audio_embeds[rows], lens)
        found = self.llm.log_probs(
            spliced.labels, inputs_embeds=inputs_embeds, lens=spliced.lens, temperature=temperature
        )
        mask = spliced.labels != IGNORE
        return found.new_zeros(mask.shape).masked_scatter(mask, found).sum(1)

    def recognizer(self, options: RecognizeOptions | None = None) -> SpeechLLMRecognizer:
        """Recognizes any number of batches, which it searches together.

        Raises:
          UserError: the options ask for what the model does not have.
        """
        return SpeechLLMRecognizer(self, options)

    def card(self) -> str:
        """The text of its folder's README.md, without results."""
        parts: list[tuple[str, nn.Module]] = []
        for i, (encoder, projector) in enumerate(self._branches()):
            number = f" {i + 1}" if i else ""
            parts += [(f"{encoder_name(encoder)}{number}", encoder), (f"projector{number}", projector)]
        parts.append((f"{self.llm.name} language model", self.llm))
        parts += [("CTC head", self.ctc_head)] if self.ctc_head is not None else []
        return model_card(self.config, parts)

    def save_pretrained(
        self,
        folder: str | Path,
        merged: bool = True,
        dtype: torch.dtype | None = None,
        *,
        push_to_hub: str | None = None,
    ) -> None:
        """Write the whole model: config.yaml, model.safetensors, tokenizer, README.md. Replaces `folder` in one move.

        What was tuned of the language model is in `adapter` by itself (see `rwkv7.save_adapter`).

        Args:
          merged: the adapter is merged into the language model, all of which is in model.safetensors (a quantized base
            in floating point, as it is after quantization). Otherwise nothing of the base is in the folder: config.yaml
            names its path.
          dtype: of the matrices in the file, such as torch.bfloat16 for half its size; they are float32 again when the
            folder is loaded.
          push_to_hub: upload the folder to this repository of the Hugging Face Hub, too (`speechllm.hub.push_folder`).

        Raises:
          UserError: there is no adapter to be kept apart from its base; it cannot be pushed, or nobody else could load
            it, as its base is a path of this machine.
        """
        section = self.llm_section
        has_adapter = section.tune is not None and section.tune.freezes_base
        if not merged and not has_adapter:
            raise UserError("merged=False: the language model has no adapter (model.llm.tune) beside a frozen base")
        if isinstance(self.llm, RWKV7):
            llm = LLMSection(rwkv7=self.llm.config)
        else:
            llm = LLMSection(transformers=cast(TransformersLM, self.llm).config)
        if not merged:
            base, base_dtype = cast(str, section.path), str(self.llm.dtype).removeprefix("torch.")
            path = base if hub_id(base) else str(Path(base).absolute())
            if push_to_hub is not None and hub_id(base) is None:
                raise UserError(
                    f"push_to_hub: {push_to_hub}: merged=False leaves out the base, {base}, which is on this machine "
                    "only: push the merged model, or name the base by its id on the Hub (model.llm.path)"
                )
            stated = None if base_dtype == "float32" else base_dtype
            llm = LLMSection(path=path, freeze=True, adapter="adapter", dtype=stated)
        with replaced_folder(folder) as tmp:
            self.tokenizer.save(tmp)
            has_own_pieces = self.ctc_tokenizer is not self.tokenizer
            if has_own_pieces:
                self.ctc_tokenizer.save(tmp / "ctc_tokenizer")
            config = dataclasses.replace(
                self.config,
                tokenizer=".",
                ctc_tokenizer="ctc_tokenizer" if has_own_pieces else None,
                encoder=saved_section(self.encoder),
                llm=llm,
                decoding=save_decoding(self.config.decoding, tmp),
                more_encoders=[
                    MoreEncoder(saved_section(encoder), more.projector)
                    for more, (encoder, _) in zip(self.config.more_encoders, self._branches()[1:], strict=True)
                ],
            )
            save_config(config, tmp / "config.yaml")
            weights = {k: v for k, v in self.state_dict().items() if not k.startswith("llm.")}
            if merged:
                tied = self.llm.tied_weights()
                weights |= {f"llm.{k}": v for k, v in merged_state_dict(self.llm).items() if k not in tied}
            save_file(stored(weights, dtype), tmp / "model.safetensors")
            if has_adapter:
                save_adapter(self.llm, tmp / "adapter", base=section.path)
            (tmp / "README.md").write_text(self.card(), encoding="utf-8")
        if push_to_hub is not None:
            push_folder(folder, push_to_hub)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SpeechLLM:
        """Load what `save_pretrained` wrote; in evaluation mode, on the CPU.

        Raises:
          FileNotFoundError, UserError: the folder is not one, or its parts do not fit together.
        """
        folder, config = local_path(folder), load_model_config(folder)
        if config.llm is None:
            raise UserError(
                f"{folder}: holds an encoder without a language model: load it as an EncoderModel, or train a language "
                "model on it (model.encoder.path)"
            )
        path = folder / "model.safetensors"
        weights = restored(load_file(path))
        if config.llm.path is not None:
            if not local_path(config.llm.path).exists():
                raise FileNotFoundError(
                    f"{folder}: holds an adapter without its base, and {config.llm.path} is not there: set llm.path in "
                    f"{folder / 'config.yaml'} to where the checkpoint is"
                )
            config.llm = dataclasses.replace(config.llm, adapter=str(folder / (config.llm.adapter or "adapter")))
            model = cls.from_config(config)
            weights |= {name: t for name, t in model.state_dict().items() if name.startswith("llm.")}
        else:
            with meta_device():
                model = cls.from_config(config)
                if "llm.initial_wkv" in weights:
                    model.llm.tune_initial_state()
            tied = model.llm.tied_weights()
            weights |= {f"llm.{name}": weights[f"llm.{first}"] for name, first in tied.items()}
        load_state_dict_strict(model, weights, path, assign=True)
        model.llm.tie_weights()
        return model.eval()
