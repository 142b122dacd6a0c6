"""A Hugging Face encoder with pooling, an optional prompt and a training head; sentences in, vectors out.

Shape suffixes: B sentences, T tokens, D embedding width, L layers + 1 (the embedding layer is the first).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clusterns_ray.errors import ConfigError, NonFiniteError
from clusterns_ray.io.files import DIRECTORY_MANIFEST, check_unchanged, follow_umask
from clusterns_ray.kernels.packed_attention import Packing
from clusterns_ray.kernels.transfer import to_device
from clusterns_ray.models.backbone import (
    check_dropout,
    first_position,
    has_decoder,
    is_causal,
    load_transformer,
    longest_input,
    passes_differ,
)
from clusterns_ray.models.base_model import BIDIRECTIONAL, choose_pooling, complete_encoder
from clusterns_ray.models.packed_bert import PackedBert, can_pack
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.models.sdpa import ATTENTION, keyed_dropout, number_dropout, use_keyed_dropout
from clusterns_ray.models.serialization import (
    HIDDEN_STATE_POOLINGS,
    write_prompt_module,
    write_sentence_transformers,
    write_settings,
)
from clusterns_ray.models.settings import ModelSettings, read_settings
from clusterns_ray.models.tokenization import prompt_affixes, prompt_length, tokenize

if TYPE_CHECKING:
    from clusterns_ray.config import EncoderConfig

LONGEST_ENCODED = 512
"""Tokens that a newly trained encoder reads at most, unless the encoder it came from says otherwise."""


class TokenBatch(NamedTuple):
    """What :meth:`Encoder.embed` reads."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    view: int = 0
    """1 where the rows have the second prompt"""
    token_embeds_BTD: Tensor | None = None
    """the embeddings of the tokens, where they were looked up before; read where the batch is not packed"""
    row_keys_B: np.ndarray | None = None
    """int64: of the dropout of each row, in every draw, the first draw first; without them torch's generator draws"""
    template_keys_B: np.ndarray | None = None
    """int64: of the dropout of the template at each row's length, for denoising"""
    lengths_B: np.ndarray | None = None
    """tokens of each row, where padding stands behind them; without it the host reads the mask, and waits for it"""
    draws: int = 1
    """how many times the batch goes in, which dropout makes differ: embeddings are (draws x B, D)"""

    def real_BT(self) -> np.ndarray:
        """Where the tokens are real, on the host: bool."""
        if self.lengths_B is None:
            return self.attention_mask_BT.numpy(force=True).astype(bool)
        return np.arange(self.attention_mask_BT.shape[1]) < self.lengths_B[:, None]

    def row_lengths_B(self) -> np.ndarray:
        """Tokens of each row, on the host: int64."""
        return self.real_BT().sum(axis=1) if self.lengths_B is None else self.lengths_B


class Encoder(nn.Module):
    """Sentences to embeddings.

    >>> encoder = Encoder.load("runs/quickstart/model")
    >>> encoder.encode(["A first sentence.", "And a second."]).shape
    (2, 384)
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        max_length: int = 128,
        prompt: str | None = None,
        normalize: bool = False,
        denoise: bool = False,
        lower_case: bool = False,
        similarity: str = "cosine",
        second_prompt: str | None = None,
        head: nn.Module | None = None,
    ) -> None:
        """
        Args:
            lower_case: whether the tokenizer was made to put text into lower case, which a saved one may forget.
            similarity: by which the embeddings are meant to be compared.
            second_prompt: of the second view, for training alone; not saved.
            head: over the pooled states, for training alone; not saved.
        """
        super().__init__()
        self.backbone: Any = backbone
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_length = max_length
        self.prompt = prompt
        self.normalize = normalize
        self.denoise = denoise
        self.lower_case = lower_case
        self.similarity = similarity
        self.head = head
        self.packs = True
        """whether to pack where it can be done"""
        number_dropout(backbone)
        self.truncated = 0
        """how many sentences it has cut to ``max_length`` so far"""
        self._weights: PackedBert | None = None
        self.autocast_dtype = torch.float32
        """in which :meth:`encode_ids` multiplies; a run sets its own, a finished encoder keeps float32"""
        if has_decoder(backbone) and (pooling in HIDDEN_STATE_POOLINGS or denoise):
            raise ConfigError(
                f"encoder.pooling is {pooling} and encoder.denoise {str(denoise).lower()}, but the model is an "
                "encoder-decoder, of which the last layer alone is read.",
                "Use mean or last, without denoise.",
            )
        if pooling == "mask":
            _check_mask_prompt("prompt", prompt, tokenizer)
            if second_prompt is not None:
                _check_mask_prompt("second_prompt", second_prompt, tokenizer)
        prompts = (prompt, second_prompt or prompt)
        self.prompt_affixes = [prompt_affixes(each, tokenizer) for each in prompts if each] if denoise else []
        # The pooler is not read, so it gets no gradient; it stays, so that the exported model is complete.
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.requires_grad_(False)

    # ---- making one -------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, name: str | os.PathLike[str], *, pooling: str | None = None, max_length: int | None = None
    ) -> Encoder:
        """Load a finished encoder: a run's ``model/``, a transformers or sentence-transformers directory, a hub id,
        or ``package:PYTHON_PACKAGE/SUBDIR``.

        Pooling, length and normalisation come from the directory where it says so; a plain transformer is pooled
        by the mean of its token states, or by the last one where it is causal, at 128 tokens. Similarities of all kinds
        are cosines here, also where a model of sentence-transformers names another one: see :attr:`similarity`.

        Raises:
            ConfigError: it cannot be found or loaded.
            StorageError: it was exported by a run, and is damaged.
        """
        source = resolve_model(str(name))
        check_unchanged(Path(source))
        backbone, tokenizer = load_transformer(source)
        return cls.finished(backbone, tokenizer, read_settings(source), str(name), pooling, max_length)

    @classmethod
    def finished(
        cls,
        backbone: Any,
        tokenizer: Any,
        settings: ModelSettings,
        name: str,
        pooling: str | None = None,
        max_length: int | None = None,
    ) -> Encoder:
        """:meth:`load` of a backbone that is loaded already."""
        limit = longest_text(backbone, tokenizer, settings.prompt)
        if max_length is not None and limit is not None and max_length > limit:
            raise ConfigError(
                f"max_length is {max_length}, but {name} reads at most {limit} tokens.", f"Use at most {limit}."
            )
        length = max_length or own_length(settings, tokenizer, name) or 128
        return cls(
            backbone,
            tokenizer,
            pooling=choose_pooling(pooling, settings.pooling, "mean", lambda: is_causal(backbone), name),
            max_length=length if limit is None else min(length, limit),
            prompt=settings.prompt,
            normalize=settings.normalize,
            denoise=settings.denoise,
            lower_case=settings.lower_case,
            similarity=settings.similarity,
        ).eval()

    @classmethod
    def for_training(cls, config: EncoderConfig, seed: int) -> Encoder:
        """The encoder a run starts from, with the training head; the head is drawn from ``seed``.

        ``config.max_length`` is for training; finished embeddings read as much as the model can (at most
        :data:`LONGEST_ENCODED` tokens), as published STS scores are taken without cutting.
        """
        source = resolve_model(config.name)
        check_unchanged(Path(source))
        backbone, tokenizer = load_transformer(
            source,
            revision=config.revision,
            num_layers=config.num_layers,
            dropout=config.dropout,
        )
        if not passes_differ(backbone):
            check_dropout(backbone.config, config.name)
        config = complete_encoder(config)[0]
        return cls.from_backbone(backbone, tokenizer, config, seed, read_settings(source, revision=config.revision))

    @classmethod
    def from_backbone(
        cls, backbone: Any, tokenizer: Any, config: EncoderConfig, seed: int, own: ModelSettings | None = None
    ) -> Encoder:
        """:meth:`for_training` of a backbone that is loaded already, by a configuration that is complete.

        Args:
            own: what the model says of its finished embeddings, such as how many tokens they read.
        """
        own = own or ModelSettings()
        reads = own_length(own, tokenizer, config.name) or LONGEST_ENCODED
        limit = longest_text(backbone, tokenizer, config.prompt, config.second_prompt)
        if limit is not None and config.max_length > limit:
            besides = " besides the prompt" if config.prompt else ""
            raise ConfigError(
                f"encoder.max_length is {config.max_length}, but {config.name} reads at most {limit} tokens{besides}.",
                f"Set encoder.max_length to {limit} or less.",
            )
        use_keyed_dropout(backbone)
        width = backbone.config.hidden_size
        head = None
        if config.head == "mlp":
            linear = nn.Linear(width, width)
            nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(linear.bias)
            head = nn.Sequential(linear, nn.Tanh())
        return cls(
            backbone,
            tokenizer,
            pooling=config.pooling or "cls",
            max_length=min(reads, LONGEST_ENCODED if limit is None else limit),
            prompt=config.prompt,
            denoise=config.denoise,
            normalize=own.normalize,
            lower_case=own.lower_case,
            second_prompt=config.second_prompt,
            head=head,
        )

    @property
    def width(self) -> int:
        """D, the number of values in an embedding."""
        return self.backbone.config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # ---- tensors ----------------------------------------------------------------------------------------------

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, view: int = 0) -> Tensor:
        """Embeddings (B x D) of one batch, without the training head; see :class:`TokenBatch`."""
        return self.embed([TokenBatch(input_ids_BT, attention_mask_BT, view)])[0]

    def embed(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Embeddings (B x D) of each batch, without the training head; dropout where the encoder is in training.

        All of them go through the layers packed, in one pass, where the architecture is known.
        """
        pooled = self._pooled_packed(batches) if self.can_pack() else map(self._pooled, batches)
        embeddings = []
        for batch, z_BD in zip(batches, pooled, strict=True):
            if self.denoise:
                delta_BD = self.template_states(batch.row_lengths_B(), batch.view, batch.template_keys_B)
                z_BD = z_BD - delta_BD.repeat(batch.draws, 1)
            embeddings.append(nn.functional.normalize(z_BD, dim=-1) if self.normalize else z_BD)
        return embeddings

    def can_pack(self) -> bool:
        """Whether its batches are packed, see :func:`~clusterns_ray.models.packed_bert.can_pack`."""
        return self._weights is not None or (self.packs and can_pack(self.backbone))

    def _pooled(self, batch: TokenBatch) -> Tensor:
        """Padded, by transformers."""
        n = batch.draws
        words = {"input_ids": batch.input_ids_BT.repeat(n, 1)}
        # The decoder of an encoder-decoder is given the ids of the sentence.
        if batch.token_embeds_BTD is not None and not has_decoder(self.backbone):
            words = {"inputs_embeds": batch.token_embeds_BTD.repeat(n, 1, 1)}
        all_layers = self.pooling in HIDDEN_STATE_POOLINGS
        mask_BT = batch.attention_mask_BT.repeat(n, 1)
        with self._keyed(batch.row_keys_B):
            output = self.backbone(
                **words, attention_mask=self.attention_mask(mask_BT), output_hidden_states=all_layers
            )
        states = output.hidden_states if all_layers else (output.last_hidden_state,)
        return pool(states, mask_BT, self.pooling, self._read_B(batch))

    def _pooled_packed(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Packed, in one pass; of the last layer no more is computed than is read."""
        packings = [Packing.of(batch.real_BT(), batch.input_ids_BT.device) for batch in batches]
        ids = [packing.pack(batch.input_ids_BT) for packing, batch in zip(packings, batches, strict=True)]
        token_embeds_ND = self.backbone.get_input_embeddings()(torch.cat(ids))
        drawn = [packing.times(batch.draws) for packing, batch in zip(packings, batches, strict=True)]
        read_R, first = [], 0
        for packing, batch in zip(drawn, batches, strict=True):
            column_B = self._read_B(batch)
            if column_B is not None:
                read_R.append(first + packing.find(column_B))
            first += len(packing)
        all_layers = self.pooling in HIDDEN_STATE_POOLINGS
        weights = self._packed_weights()
        with torch.autocast(self.device.type, enabled=False):
            states = weights(
                token_embeds_ND,
                packings,
                [self._row_keys(batch) for batch in batches] if self.backbone.training else None,
                draws=[batch.draws for batch in batches],
                read_R=torch.cat(read_R) if read_R else None,
                all_layers=all_layers,
            )
        if read_R:
            return list(states[-1].split([packing.rows for packing in drawn]))
        parts = zip(*(state.split([len(packing) for packing in drawn]) for state in states), strict=True)
        return [
            pool([packing.unpack(x_ND) for x_ND in part], batch.attention_mask_BT.repeat(batch.draws, 1), self.pooling)
            for packing, batch, part in zip(drawn, batches, parts, strict=True)
        ]

    def states_at(self, batch: TokenBatch, at_R: Tensor) -> Tensor:
        """States of the last layer (R, D) at places of the padded batch, read row by row; packed."""
        packing = Packing.of(batch.real_BT(), batch.input_ids_BT.device)
        token_embeds_ND = self.backbone.get_input_embeddings()(packing.pack(batch.input_ids_BT))
        weights = self._packed_weights()
        with torch.autocast(self.device.type, enabled=False):
            keys = [self._row_keys(batch)] if self.backbone.training else None
            return weights(token_embeds_ND, [packing], keys, read_R=torch.searchsorted(packing.at_N, at_R))[-1]

    def _packed_weights(self) -> PackedBert:
        """In the precision of the moment: those that are frozen, or the current ones."""
        dtype = autocast_dtype(self.device)
        if self._weights is not None and self._weights.dtype == dtype:
            return self._weights
        return PackedBert(self.backbone, dtype)

    def _read_B(self, batch: TokenBatch) -> Tensor | None:
        """The column of the one token whose state in the last layer is a row's embedding, for every draw; None where it
        is not one."""
        if self.pooling == "cls":
            return batch.attention_mask_BT.to(torch.int64).argmax(dim=1).repeat(batch.draws)
        if self.pooling == "last":
            mask_BT = batch.attention_mask_BT.to(torch.int64)
            return (mask_BT * torch.arange(mask_BT.shape[1], device=mask_BT.device)).argmax(dim=1).repeat(batch.draws)
        if self.pooling == "mask":
            is_mask_BT = batch.input_ids_BT == self.tokenizer.mask_token_id
            return is_mask_BT.to(torch.int64).argmax(dim=1).repeat(batch.draws)
        return None

    @staticmethod
    def _row_keys(batch: TokenBatch) -> np.ndarray:
        """Of the batch, or drawn by torch's generator."""
        if batch.row_keys_B is not None:
            return batch.row_keys_B
        return torch.randint(2**63 - 1, (batch.draws * len(batch.input_ids_BT),)).numpy()

    def attention_mask(self, mask_BT: Tensor) -> Tensor:
        """The attention mask as transformers' own pass takes it. Of two dimensions it asks whether all tokens are real,
        and the host would wait for a GPU's answer; four it takes as they are, and knows of no other mask then."""
        config = self.backbone.config
        fused = getattr(config, "_attn_implementation", None) in ("sdpa", ATTENTION)
        plain = config.model_type in BIDIRECTIONAL and not getattr(config, "is_decoder", False)
        if not (fused and plain and mask_BT.device.type == "cuda"):
            return mask_BT
        return mask_BT.bool()[:, None, None, :].expand(-1, -1, mask_BT.shape[1], -1)

    def _keyed(self, row_keys_B: np.ndarray | None) -> AbstractContextManager[object]:
        if row_keys_B is None or not self.backbone.training:
            return nullcontext()
        return keyed_dropout(row_keys_B, self.device)

    @contextmanager
    def same_weights(self, dtype: torch.dtype, *, frozen: bool) -> Iterator[None]:
        """Inside, weights stay as they are, and are cast to ``dtype`` once for all packed passes.

        Args:
            frozen: nothing is trained, so that they may be laid out anew as well; else gradients flow through the cast.
        """
        before = self._weights
        if self.can_pack():
            with torch.set_grad_enabled(not frozen):
                self._weights = PackedBert(self.backbone, dtype)
        try:
            yield
        finally:
            self._weights = before

    def template_states(self, lengths_B: np.ndarray, view: int = 0, keys_B: np.ndarray | None = None) -> Tensor:
        """States of the mask token of the template alone (B x D), at the positions that it has in rows of ``lengths_B``
        tokens: what comes after the sentence stays behind it.

        Template denoising, after Jiang et al., "PromptBERT: Improving BERT Sentence Embeddings with Prompts", EMNLP
        2022. Each different length is encoded once, with dropout by its own key.
        """
        before, after = self.prompt_affixes[view]
        lengths_L, first_L, row_B = np.unique(lengths_B, return_index=True, return_inverse=True)
        ids = np.array([*before, *after])
        behind_LS = lengths_L[:, None] - np.arange(len(after), 0, -1)
        before_LP = np.broadcast_to(np.arange(len(before)), (len(lengths_L), len(before)))
        positions_LT = np.concatenate([before_LP, behind_LS], axis=1) + first_position(self.backbone)
        ids_LT = to_device(np.tile(ids, (len(lengths_L), 1)), self.device)
        with self._keyed(None if keys_B is None else keys_B[first_L]):
            states_LTD = self.backbone(
                input_ids=ids_LT,
                attention_mask=self.attention_mask(torch.ones_like(ids_LT)),
                position_ids=to_device(positions_LT, self.device),
            ).last_hidden_state
        mask_at = int((ids == self.tokenizer.mask_token_id).argmax())
        return states_LTD[:, mask_at][to_device(row_B, self.device)]

    def project(self, z_BD: Tensor) -> Tensor:
        """Through the training head, where there is one."""
        return z_BD if self.head is None else self.head(z_BD)

    # ---- sentences --------------------------------------------------------------------------------------------

    def tokenize(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids with the prompt and the special tokens, cut to ``max_length``."""
        ids, truncated = tokenize(sentences, self.tokenizer, self.max_length, self.prompt)
        self.truncated += truncated
        return ids

    def describe_truncation(self, truncated: int, sentences: int) -> str:
        """Say how many of these sentences were cut, to how many tokens, and what raises that limit."""
        longest = longest_text(self.backbone, self.tokenizer, self.prompt)
        most = "" if longest is None else f" (the model reads {longest:,})"
        more = f" --max-length raises that{most}." if longest is None or longest > self.max_length else ""
        return f"{truncated:,} of {sentences:,} sentences were cut to {self.max_length:,} tokens.{more}"

    def encode(
        self,
        sentences: Sequence[str],
        *,
        batch_size: int = 64,
        bf16: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Embeddings of sentences, in the order given.

        Inside they are sorted by length, so that little is computed for padding; dropout is off.

        Args:
            bf16: multiply in bfloat16: nearly twice as fast where the processor has it, and equal to 2 or 3 digits.
            progress: called with the number of sentences done.

        Returns:
            float32 array (n, D).

        Raises:
            NonFiniteError: an embedding is NaN or infinite.
        """
        if isinstance(sentences, str):
            raise TypeError("Encoder.encode takes a list of sentences, and got one str; wrap it: encode([text]).")
        ids = self.tokenize(sentences)
        embeddings = np.empty((len(ids), self.width), dtype=np.float32)
        done = 0
        dtype = torch.bfloat16 if bf16 else torch.float32
        # Around the loop, as casts are kept until the context ends.
        with autocast(self.device, dtype), self.same_weights(dtype, frozen=True):
            for rows in length_batches([len(row) for row in ids], batch_size):
                embeddings[rows] = self.encode_ids([ids[row] for row in rows]).cpu().numpy()
                done += len(rows)
                if progress is not None:
                    progress(done)
        broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if len(broken):
            raise NonFiniteError(
                f"{len(broken):,} of {len(embeddings):,} embeddings are NaN or infinite, such as that of "
                f"{sentences[int(broken[0])][:60]!r}: the model's weights are damaged, or too large to compute with.",
                "Copy or download the model again, or take an earlier checkpoint.",
            )
        return embeddings

    @torch.inference_mode()
    def encode_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """One padded batch of token ids to float32 embeddings (n x D), dropout off."""
        was_training = self.training
        self.eval()
        try:
            input_ids_BT, mask_BT = pad(ids, self.tokenizer.pad_token_id)
            with autocast(self.device, self.autocast_dtype):
                lengths_B = np.array([len(row) for row in ids])
                ids_BT, mask_BT = (to_device(each.numpy(), self.device) for each in (input_ids_BT, mask_BT))
                return self.embed([TokenBatch(ids_BT, mask_BT, lengths_B=lengths_B)])[0].float()
        finally:
            self.train(was_training)

    # ---- writing one ------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str], *, weights: bool = True) -> None:
        """Write a directory that transformers and sentence-transformers load as it is; the head is left out.

        With a prompt whose end stands after the sentence, sentence-transformers has no module of its own that
        applies it; it then takes ours, where this package is installed and ``trust_remote_code=True`` is given.

        Args:
            weights: leave them out where another file of the directory is to hold them.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / DIRECTORY_MANIFEST).unlink(missing_ok=True)  # of what was there before
        (self.backbone if weights else self.backbone.config).save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        follow_umask(path)
        settings = ModelSettings(
            pooling=self.pooling,
            max_length=self.max_length,
            prompt=self.prompt,
            normalize=self.normalize,
            denoise=self.denoise,
            lower_case=self.lower_case,
        )
        write_settings(path, settings)
        # What stands before a sentence alone is a prompt to sentence-transformers too.
        if self.prompt is None or (self.prompt.endswith("{sentence}") and self.pooling != "mask"):
            length = self.max_length + (prompt_length(self.prompt, self.tokenizer) if self.prompt else 0)
            write_sentence_transformers(path, replace(settings, max_length=length), self.backbone.config)
        else:
            write_prompt_module(path)


def own_length(settings: ModelSettings, tokenizer: Any, name: str) -> int | None:
    """Tokens of a sentence, besides its prompt, that a model reads by its own settings; None if they do not say."""
    if settings.max_length is None or not (settings.counts_prompt and settings.prompt):
        return settings.max_length
    length = settings.max_length - prompt_length(settings.prompt, tokenizer)
    if length <= tokenizer.num_special_tokens_to_add(False):
        raise ConfigError(
            f"encoder {name!r}: it reads {settings.max_length} tokens (max_seq_length), of which its default prompt "
            f"{settings.prompt.removesuffix('{sentence}')!r} leaves none for the text.",
            "Raise max_seq_length in its sentence_bert_config.json.",
        )
    return length


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in ``dtype``; float32 changes nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def longest_text(backbone: Any, tokenizer: Any, *prompts: str | None) -> int | None:
    """What ``max_length`` can be at most: the model's own limit, less the longest prompt, which comes on top."""
    limit = longest_input(backbone, tokenizer)
    if limit is None:
        return None
    return limit - max((prompt_length(prompt, tokenizer) for prompt in prompts if prompt), default=0)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The precision in which a device multiplies at the moment."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def pool(states_L: Sequence[Tensor], attention_mask_BT: Tensor, pooling: str, column_B: Tensor | None = None) -> Tensor:
    """Token states (B x T x D) to one vector a sentence (B x D).

    ``cls``: the first token. ``last``: the last one that does not pad. ``mean``: over real tokens. ``mask``: at the
    mask token. ``first_last``: mean over tokens of the average of the embedding layer and the last layer (as SimCSE's
    ``avg_first_last``). ``top2``: the same of the last two layers.

    Args:
        states_L: of the last layer at the end, before it those of the others where pooling asks for them.
        column_B: which token of each row is read, where it is one.
    """
    last_BTD = states_L[-1]
    if column_B is not None:
        return last_BTD[torch.arange(len(last_BTD), device=last_BTD.device), column_B]
    if pooling == "mean":
        states_BTD = last_BTD
    elif pooling in HIDDEN_STATE_POOLINGS:
        other = states_L[0] if pooling == "first_last" else states_L[-2]
        states_BTD = (other + last_BTD) / 2
    else:
        raise ConfigError(f"encoder.pooling is {pooling!r}; it must be cls, mean, mask, first_last, top2 or last.")
    weight_BT1 = attention_mask_BT.unsqueeze(-1).to(states_BTD.dtype)
    return (states_BTD * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp(min=1e-9)


def pad(ids: Sequence[Sequence[int]], pad_token_id: int | None) -> tuple[Tensor, Tensor]:
    """Rows of token ids to ``(input_ids, attention_mask)``, int64, padded to the longest row."""
    longest = max(map(len, ids))
    input_ids = np.full((len(ids), longest), pad_token_id or 0, dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.int64)
    for row, values in enumerate(ids):
        input_ids[row, : len(values)] = values
        mask[row, : len(values)] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(mask)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of sentences of similar length, the longest first (so that memory runs out early)."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _check_mask_prompt(key: str, prompt: str | None, tokenizer: Any) -> None:
    ids = tokenizer(prompt or "", add_special_tokens=False)["input_ids"]
    if tokenizer.mask_token_id is None or ids.count(tokenizer.mask_token_id) != 1:
        raise ConfigError(
            f"encoder.pooling is mask, so encoder.{key} must hold the mask token {tokenizer.mask_token!r} exactly "
            f"once; it is {prompt!r}."
        )
