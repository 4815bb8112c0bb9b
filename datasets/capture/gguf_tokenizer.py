"""The vocabulary in the fields of a GGUF file, and a byte-level BPE tokenizer made of it."""

from __future__ import annotations

import numpy as np

from gguf_file import GgufFile
from trace_file import CaptureError
from vocabulary import NORMAL, PRE_TOKENIZERS, BpeTokenizer, Vocabulary


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Tokens, merges and special tokens of the model in a GGUF file."""
    kind = file.field("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CaptureError(
            f'{file.path}: tokenizer of type "{kind}" is not supported, '
            'only byte-level BPE ("gpt2")'
        )
    pre_tokenizer = file.field("tokenizer.ggml.pre")
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise CaptureError(
            f'{file.path}: pre-tokenizer "{pre_tokenizer}" is not supported '
            f"(known: {', '.join(PRE_TOKENIZERS)})"
        )
    tokens = file.field("tokenizer.ggml.tokens")
    return Vocabulary(
        tokens=tokens,
        merges=file.field("tokenizer.ggml.merges"),
        types=file.field("tokenizer.ggml.token_type", [NORMAL] * len(tokens)),
        pre_tokenizer=pre_tokenizer,
        bos_token=int(file.field("tokenizer.ggml.bos_token_id", -1)),
        eos_token=int(file.field("tokenizer.ggml.eos_token_id", -1)),
        add_bos=bool(file.field("tokenizer.ggml.add_bos_token", pre_tokenizer == "llama-bpe")),
    )


class GgufTokenizer:
    """Text to token ids. Names of special tokens in the text are ordinary text."""

    def __init__(self, file: GgufFile) -> None:
        vocabulary = read_vocabulary(file)
        self.name = vocabulary.pre_tokenizer
        self.bos_token = vocabulary.bos_token if vocabulary.add_bos else None
        self._tokenizer = BpeTokenizer(vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """Token ids [n] int32, without a begin-of-sequence token."""
        return self._tokenizer.encode(text)
