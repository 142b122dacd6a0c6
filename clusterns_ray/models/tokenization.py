"""Sentences to token ids, with or without a prompt around them; the same in preparation, training and use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ConfigError
from clusterns_ray.models.pretrained import (
    check_code,
    check_vocabulary,
    hub_options,
    loading,
    read_config,
    vocabulary_size,
)
from clusterns_ray.models.settings import read_settings


def load_tokenizer(source: str, *, revision: str | None = None) -> Any:
    """The fast tokenizer of a resolved model (see ``models.resolve_model``), without its weights.

    Raises:
        ConfigError: it cannot be loaded, is not there in full, is not a fast one, or has more tokens than the model's
            config.json states.
    """
    from transformers import AutoTokenizer

    config = read_config(source, revision=revision)
    with loading(source, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False, **hub_options(source, revision)
        )
        check_code(source, "tokenizer_config.json", tokenizer.init_kwargs.get("auto_map"))
        _check_files(source, tokenizer)
        check_fast(tokenizer)
        check_vocabulary(source, tokenizer, vocabulary_size(config))
    if read_settings(source, revision=revision).lower_case:
        _lower_case(tokenizer)
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    return tokenizer


def _lower_case(tokenizer: Any) -> None:
    """Put text into lower case before all else, as sentence-transformers does where ``do_lower_case`` is set."""
    from tokenizers.normalizers import Lowercase, Sequence

    own = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = Sequence([Lowercase(), *([] if own is None else [own])])


def _check_files(source: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that transformers has made up from nothing, or from a part of its files."""
    path, lacking = Path(source), ["tokenizer.json"]
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        lacking += [
            name
            for name in type(tokenizer).vocab_files_names.values()
            if name not in lacking and not (path / name).is_file()
        ]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if len(lacking) > 1:
        reason = f"it has no tokenizer, as {' and '.join(lacking)} cannot be found"
    elif len({*tokenizer.get_vocab().values()} - special) < 2:
        reason = "its tokenizer knows special tokens and no words, so its files are damaged or missing"
    else:
        return
    raise ConfigError(
        f"encoder {source!r} cannot be loaded: {reason}.",
        "Copy the tokenizer's files from the model that it was trained "
        "from, or save them there with tokenizer.save_pretrained.",
    )


def check_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not report where it cut a text.

    Raises:
        ConfigError: with the remedy.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"the tokenizer is a {type(tokenizer).__name__}, which is not a fast one, and only fast ones "
            "report where text was cut; use a model that has a tokenizer.json"
        )


def tokenize(
    sentences: Sequence[str], tokenizer: Any, max_length: int, prompt: str | None = None
) -> tuple[list[list[int]], int]:
    """Token ids of each sentence with special tokens, and how many sentences were truncated.

    With a prompt, the prompt is filled in and tokenised as one text, as tokens may span its seams. A sentence
    that is too long is cut before it is filled in, so that the end of the prompt survives.

    Args:
        sentences: n strings.
        tokenizer: a fast Hugging Face tokenizer.
        max_length: most tokens of a sentence, special tokens included; the tokens of the bare prompt come on
            top, so a row has at most ``max_length`` plus that many.
        prompt: text that holds ``{sentence}`` once.

    Returns:
        n lists of ids, not padded; number of sentences truncated.

    Raises:
        ConfigError: no fast tokenizer, ``max_length`` without room for a token, or not one ``{sentence}``.
    """
    check_fast(tokenizer)
    budget = max_length - tokenizer.num_special_tokens_to_add(False)
    if budget < 1:
        raise ConfigError(
            f"max_length is {max_length}, but {max_length - budget} of these are special tokens, which "
            f"leaves no room for text; set it to {max_length - budget + 1} or more"
        )
    if not sentences:
        return [], 0
    if prompt is not None and prompt.count("{sentence}") != 1:
        raise ConfigError(
            f"prompt is {prompt!r}, which holds {{sentence}} {prompt.count('{sentence}')} times, but the "
            "sentence goes in one place; write {sentence} exactly once"
        )
    head, tail = prompt.split("{sentence}") if prompt else ("", "")
    most = max_length + (prompt_length(prompt, tokenizer) if prompt else 0)
    if not tail:
        encoded = _encode(tokenizer, [head + text for text in sentences], truncation=True, max_length=most)
        full = (i for i, ids in enumerate(encoded["input_ids"]) if len(ids) == most)
        truncated = sum(bool(encoded.encodings[i].overflowing) for i in full)
        return encoded["input_ids"], truncated
    rows = _encode(tokenizer, [head + text + tail for text in sentences])["input_ids"]
    pending = [i for i, ids in enumerate(rows) if len(ids) > most]
    if not pending:
        return rows, 0
    truncated = len(pending)
    alone = _encode(tokenizer, [sentences[i] for i in pending], add_special_tokens=False, return_offsets_mapping=True)
    spans = dict(zip(pending, alone["offset_mapping"], strict=True))
    keep = {i: min(budget, len(spans[i])) for i in pending}
    # Tokens that span a seam, or share a character, can leave a row a little too long; it then gives up as
    # many tokens again.
    while pending:
        texts = [head + _first_tokens(sentences[i], spans[i], keep[i]) + tail for i in pending]
        for i, ids in zip(pending, _encode(tokenizer, texts)["input_ids"], strict=True):
            rows[i] = ids
            keep[i] -= len(ids) - most
        pending = [i for i in pending if len(rows[i]) > most]
    return rows, truncated


def prompt_length(prompt: str, tokenizer: Any) -> int:
    """Tokens of the bare prompt, without special ones: what a row may have beyond ``max_length``."""
    return len(_encode(tokenizer, [prompt.replace("{sentence}", "")], add_special_tokens=False)["input_ids"][0])


def prompt_affixes(prompt: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a prompt before and after the sentence, special tokens included.

    They are what is around a sentence in :func:`tokenize`: a prompt's seams may hold blanks that are tokens of their
    own where nothing stands between them.
    """
    head, tail = prompt.split("{sentence}")
    probe = "a"
    encoded = _encode(tokenizer, [head + probe + tail], return_offsets_mapping=True)
    ids, spans = encoded["input_ids"][0], encoded["offset_mapping"][0]
    inside = [i for i, (start, end) in enumerate(spans) if start < len(head) + len(probe) and end > len(head)]
    return ids[: inside[0]], ids[inside[-1] + 1 :]


def swap_prompt(ids: Sequence[int], old: tuple[list[int], list[int]], new: tuple[list[int], list[int]]) -> list[int]:
    """The row of another prompt around the same sentence, from frames of :func:`prompt_affixes`."""
    return [*new[0], *ids[len(old[0]) : len(ids) - len(old[1])], *new[1]]


def _encode(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)


def _first_tokens(text: str, spans: list[tuple[int, int]], count: int) -> str:
    """The start of ``text`` that its first ``count`` tokens cover."""
    return text[: spans[count - 1][1]] if count > 0 else ""
