"""Tiny encoders, corpora and test sets, made on the spot from invented words; no network, no weights.

Plain functions, which tests of processes may call too. The fixtures over them are in ``conftest.py``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ARCHITECTURES = ("bert", "roberta", "distilbert", "mpnet", "modernbert")
WIDTH = 32

_WHO = ["the baker", "a doctor", "the old sailor", "her sister", "one farmer", "the painter", "a quiet child"]
_DOES = ["finds", "sells", "paints", "carries", "forgets", "repairs", "watches", "hides"]
_WHAT = ["a lamp", "the red boat", "seven apples", "an iron key", "the letter", "two horses", "a bridge", "bread"]
_WHERE = ["near the river", "at night", "in the market", "behind a wall", "on the hill", "before winter", ""]


def sentences(count: int, seed: int = 0) -> list[str]:
    """``count`` different invented sentences of 4 to about 20 words."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        parts = []
        for _ in range(draw.choice((1, 1, 2))):
            words = (draw.choice(_WHO), draw.choice(_DOES), draw.choice(_WHAT), draw.choice(_WHERE))
            parts.append(" ".join(filter(None, words)))
        found[" and ".join(parts).capitalize() + "."] = None
    return list(found)


def quick_first(cases: Iterable[Any], quick: int) -> list[Any]:
    """Parameters of a test, of which those after the first ``quick`` are slow."""
    import pytest

    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if at < quick else pytest.mark.slow) for at, case in enumerate(values)]


def write_corpus(path: Path, count: int = 300, seed: int = 0) -> Path:
    """One sentence a line."""
    path.write_text("\n".join(sentences(count, seed)) + "\n", encoding="utf-8")
    return path


def write_articles(directory: Path) -> str:
    """Four documents of five sections, of two paragraphs of six sentences each; returns the glob that finds them."""
    texts = sentences(240)
    for number in range(4):
        lines = []
        for section in range(5):
            start = 60 * number + 12 * section
            lines += [f"## Part {section}", " ".join(texts[start : start + 6]), " ".join(texts[start + 6 : start + 12])]
        (directory / f"document{number}.md").write_text("\n\n".join(lines))
    return str(directory / "document*.md")


def write_pairs(path: Path, count: int = 40, seed: int = 1) -> Path:
    """Graded pairs: 5 for a sentence with itself, fewer the fewer words two sentences share."""
    pool = sentences(2 * count, seed)
    draw = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for first, second in zip(pool[:count], pool[count:]):
            second = first if draw.random() < 0.2 else second
            a, b = set(first.lower().split()), set(second.lower().split())
            score = round(5 * len(a & b) / len(a | b), 3)
            file.write(json.dumps({"sentence1": first, "sentence2": second, "score": score}) + "\n")
    return path


def update_weights(optimizer: Any, loss: Any, rate: float, backward: Callable[[Any], None] | None = None) -> Any:
    """The end of a step: backward (that of ``loss`` unless given), clip, update. Returns the gradients' norm."""
    optimizer.zero_grad()
    scaled = optimizer.scale(loss)
    scaled.backward() if backward is None else backward(scaled)
    norm = optimizer.clip_gradients()
    optimizer.step(rate)
    return norm


def make_tiny_model(
    directory: Path, kind: str = "bert", *, layers: int = 2, dropout: float | None = 0.1, positions: int = 64
) -> Path:
    """A randomly drawn encoder of width 32 with a fast tokenizer, as ``save_pretrained`` writes it.

    Args:
        kind: one of ``ARCHITECTURES``, or of RoBERTa's kin: xlm-roberta, camembert.
        dropout: every dropout of the model; None leaves the architecture's own.
        positions: tokens that it reads at most.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = (
        _byte_tokenizer() if kind in ("roberta", "xlm-roberta", "camembert", "modernbert") else _word_tokenizer(kind)
    )
    tokenizer.model_max_length = positions
    common: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    layered = {"num_hidden_layers": layers, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 48}
    rates = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if kind == "distilbert":
        rates = {} if dropout is None else {"dropout": dropout, "attention_dropout": dropout}
        shape: dict[str, Any] = {"dim": WIDTH, "hidden_dim": 48, "n_layers": layers, "n_heads": 2}
        config: Any = transformers.DistilBertConfig(**common, **shape, **rates, max_position_embeddings=positions)
    elif kind == "modernbert":
        rates = (
            {} if dropout is None else dict.fromkeys(("embedding_dropout", "mlp_dropout", "attention_dropout"), dropout)
        )
        ends = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        ends |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        config = transformers.ModernBertConfig(**common, **layered, **rates, **ends, max_position_embeddings=positions)
    else:
        classes = {
            "bert": transformers.BertConfig,
            "roberta": transformers.RobertaConfig,
            "xlm-roberta": transformers.XLMRobertaConfig,
            "camembert": transformers.CamembertConfig,
            "mpnet": transformers.MPNetConfig,
        }
        # RoBERTa and MPNet number positions from behind the padding index.
        table = positions if kind == "bert" else positions + 2
        config = classes[kind](**common, **layered, **rates, max_position_embeddings=table)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = transformers.AutoModel.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # as they are drawn, all sentences would look alike
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def _word_tokenizer(kind: str) -> Any:
    """WordPiece, as BERT, DistilBERT and MPNet have."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "mpnet":
        special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    first, pad, last = ("<s>", "<pad>", "</s>") if kind == "mpnet" else ("[CLS]", "[PAD]", "[SEP]")
    mask = special[-1]
    # By hand, as a trained vocabulary is not the same twice.
    words = sorted({word for line in sentences(300) for word in line.lower().strip(".").split()})
    signs = sorted({sign for word in words for sign in word})
    vocabulary = [
        *special,
        *'.,:"',
        *words,
        "this",
        "sentence",
        "means",
        "of",
        *signs,
        *(f"##{sign}" for sign in signs),
    ]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    core = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(first, core.token_to_id(first)), (last, core.token_to_id(last))]
    core.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B {last}", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        cls_token=first,
        sep_token=last,
        pad_token=pad,
        unk_token="[UNK]",
        mask_token=mask,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_tokenizer() -> Any:
    """Byte-level BPE, as RoBERTa and ModernBERT have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sentences(300), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def document_sentences(document: Any) -> list[str]:
    """The usable sentences of a document in reading order."""
    from clusterns_ray.data.documents import all_sentences, is_usable

    return [sentence.text for sentence in all_sentences(document) if is_usable(sentence.text)]
