"""Byte-level BPE: the vocabulary as data, and a tokenizer made of it.

A vocabulary says by name only how a text is cut into words before merging (`pre_tokenizer`).
_word_rule gives those names meaning; llama.cpp's list of pre-tokenizers is the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_file import CaptureError

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")

# Llama 3 takes a word that is in the vocabulary whole, even where its merges would not build it.
WHOLE_WORDS_FIRST = {"llama-bpe"}

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens, numbered as in GGUF


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and merges in the alphabet of byte-level BPE, one character per byte."""

    tokens: list[str]
    merges: list[str]  # "left right", by rank
    types: list[int]
    pre_tokenizer: str  # one of PRE_TOKENIZERS
    bos_token: int  # -1: none
    eos_token: int  # -1: none
    add_bos: bool  # whether a text starts with bos_token


def byte_alphabet() -> list[str]:
    """The character that stands for each byte 0..255 (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def check_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """Refuse a vocabulary that a byte-level BPE tokenizer cannot work with."""
    if vocabulary.pre_tokenizer not in PRE_TOKENIZERS:
        raise CaptureError(
            f'{path}: pre-tokenizer "{vocabulary.pre_tokenizer}" is not supported '
            f"(known: {', '.join(PRE_TOKENIZERS)})"
        )
    known = set(vocabulary.tokens)
    if len(known) != len(vocabulary.tokens):
        raise CaptureError(f"{path}: a token is twice in the vocabulary")
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise CaptureError(f'{path}: the merge "{merge}" names a token that does not exist')
    for name in ("bos_token", "eos_token"):
        if not -1 <= getattr(vocabulary, name) < len(vocabulary.tokens):
            raise CaptureError(f"{path}: {name} is {getattr(vocabulary, name)}, not a token")
    if vocabulary.add_bos and vocabulary.bos_token < 0:
        raise CaptureError(f"{path}: texts start with a token, but the file does not name it")


def missing_bytes(vocabulary: Vocabulary) -> list[int]:
    """Bytes without a token. Some vocabularies lack control characters (SmolLM2: 21 bytes)."""
    known = set(vocabulary.tokens)
    return [byte for byte, character in enumerate(byte_alphabet()) if character not in known]


class BpeTokenizer:
    """Text to token ids. Names of special tokens in the text are ordinary text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer, models

        self._tokenizer = Tokenizer(
            models.BPE(
                vocab={token: index for index, token in enumerate(vocabulary.tokens)},
                merges=[tuple(merge.split(" ")) for merge in vocabulary.merges],
                ignore_merges=vocabulary.pre_tokenizer in WHOLE_WORDS_FIRST,
            )
        )
        self._tokenizer.pre_tokenizer = _word_rule(vocabulary.pre_tokenizer)

    def encode(self, text: str) -> np.ndarray:
        """Token ids [n] int32, without a begin-of-sequence token."""
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int32)


def _word_rule(name: str):
    """The pre-tokenizer of the tokenizers library for one of PRE_TOKENIZERS."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return gpt2
    if name == "smollm":
        return Sequence([Digits(individual_digits=True), gpt2])
    words = {"llama-bpe": LLAMA3_WORDS, "qwen2": QWEN2_WORDS}[name]
    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(words), behavior="isolated"), as_bytes])
