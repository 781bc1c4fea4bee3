"""Small texts, and tokenizers that were trained on one."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dbdist.data.options import TextOptions
from dbdist.data.text import load_dataset
from dbdist.errors import DataError

PROSE = (
    "the waters brought forth abundantly, and the evening and the morning were the fifth day. "
    "let the waters under the heaven be gathered together unto one place, and let the dry land "
    "appear: and it was so. and god called the dry land earth; and the gathering together of the "
    "waters called he seas: and god saw that it was good. "
)


def lines() -> Iterator[str]:
    """PROSE by its words in several orders, so that a tokenizer has something to count."""
    words = PROSE.split()
    for i in range(40):
        yield " ".join(words[i % 7 :: 1 + i % 3])


def sentencepiece_file(path: Path, *, add_dummy_prefix: bool = True, kind: str = "bpe") -> Path:
    """A .model file of 120 pieces."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=lines(),
        model_writer=written,
        vocab_size=120,
        model_type=kind,
        byte_fallback=False,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return path


def hugging_face_file(path: Path) -> Path:
    """A tokenizer.json of byte-level BPE, as GPT-2's, with a special token and truncation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path


def options(root: Path, **values: Any) -> TextOptions:
    return TextOptions(**{"name": "text", "root": str(root), "length": 8} | values)


def refusal(data: TextOptions, split: Any = "train") -> str:
    """What is said of data that cannot be used: one sentence."""
    with pytest.raises(DataError) as caught:
        load_dataset(data, split)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message
