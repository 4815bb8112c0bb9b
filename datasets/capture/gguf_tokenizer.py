"""Byte-level BPE tokenizer built from the fields of a GGUF file.

GGUF keeps the vocabulary (tokenizer.ggml.tokens), the merges (tokenizer.ggml.merges) and, by name
only, the rule that cuts a text into words before merging (tokenizer.ggml.pre). WORD_RULES gives
those names meaning; llama.cpp's list of pre-tokenizers is the source.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from gguf_file import GgufFile
from trace_file import CaptureError

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_words() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2_words()])


def _llama3_words() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, as_bytes])


WORD_RULES = {"gpt-2": _gpt2_words, "smollm": _smollm_words, "llama-bpe": _llama3_words}

# Llama 3 takes a word that is in the vocabulary whole, even where its merges would not build it.
WHOLE_WORDS_FIRST = {"llama-bpe"}


class GgufTokenizer:
    """Text to token ids. Names of special tokens in the text are ordinary text."""

    def __init__(self, file: GgufFile) -> None:
        kind = file.field("tokenizer.ggml.model")
        if kind != "gpt2":
            raise CaptureError(
                f'{file.path}: tokenizer of type "{kind}" is not supported, '
                'only byte-level BPE ("gpt2"); capture_transformers.py may serve this model'
            )
        self.name = file.field("tokenizer.ggml.pre")
        if self.name not in WORD_RULES:
            raise CaptureError(
                f'{file.path}: pre-tokenizer "{self.name}" is not supported '
                f"(known: {', '.join(sorted(WORD_RULES))})"
            )
        tokens = file.field("tokenizer.ggml.tokens")
        merges = file.field("tokenizer.ggml.merges")
        self._tokenizer = Tokenizer(
            models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[tuple(merge.split(" ")) for merge in merges],
                ignore_merges=self.name in WHOLE_WORDS_FIRST,
            )
        )
        self._tokenizer.pre_tokenizer = WORD_RULES[self.name]()
        adds_bos = file.field("tokenizer.ggml.add_bos_token", self.name == "llama-bpe")
        self.bos_token = int(file.field("tokenizer.ggml.bos_token_id")) if adds_bos else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids [n] int32, without a begin-of-sequence token."""
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int32)
