#!/usr/bin/env python3
"""Make the tiny random models and their golden values in datasets/tiny (see its README.md).

The same bytes every time. A model file is written, then read back, and the golden values are
computed from what it holds: reading, decoding and the forward pass are checked by them, rounding of
the stored weights is not part of the difference.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

import cli
import model_reference
from model_file import (
    ModelFile,
    ModelInfo,
    ModelWriter,
    optional_shapes,
    required_shapes,
)
from vocabulary import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    USER_DEFINED,
    BpeTokenizer,
    Vocabulary,
    byte_alphabet,
)

PROMPT_TOKENS = 40

MERGES = [
    *("t h", "i n", "a n", "th e", "e r", "Ġ the", "an d", "Ġ a", "o n", "r e", "Ġ and", "in g"),
    *("1 2", "12 3", "0 0", "Ġ 1", "' s", "' t", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "Ċ ĊĊ", ". .", "! !"),
    *("Ã ¤", "Ã ©", "ä ¸", "ä¸ Ń", "ð Ł", "ðŁ ĺ", "Ġ Ã", "Ð ¿", "Â ł", "ï ¼", "č Ċ", "h e"),
]
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]

INFO = ModelInfo(
    architecture="llama",
    name="",
    source="random weights (datasets/capture/make_tiny_models.py)",
    license="Apache-2.0",
    num_layers=2,
    num_query_heads=2,
    num_kv_heads=1,
    head_dim=64,
    hidden_size=128,
    intermediate_size=96,
    vocab_size=300,
    max_positions=2048,
    rope_theta=10000.0,
    rope_scaling="",
    rms_norm_eps=1e-5,
    tie_embeddings=1,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def _scaling(rule: dict[str, object]) -> str:
    return json.dumps(rule, sort_keys=True)


# name -> sizes and constants, storage of matrices, optional tensors, pre-tokenizer
MODELS: dict[str, tuple[ModelInfo, str, tuple[str, ...], str]] = {
    "llama": (INFO, "fp16", (), "smollm"),
    "llama3": (
        replace(INFO, rope_theta=500000.0, rope_scaling=_scaling(LLAMA3)),
        *("int8", (), "llama-bpe"),
    ),
    "qwen2": (
        replace(
            INFO,
            architecture="qwen2",
            num_query_heads=4,
            num_kv_heads=2,
            intermediate_size=64,
            tie_embeddings=0,
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
            rope_scaling=_scaling(YARN),
        ),
        *("bf16", ("bq", "bk", "bv"), "qwen2"),
    ),
    "qwen3": (
        replace(
            INFO,
            architecture="qwen3",
            num_query_heads=3,
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
        ),
        *("fp32", ("q_norm", "k_norm"), "gpt-2"),
    ),
}

# What byte-level tokenizers get wrong: spaces before and between words, digits, apostrophes, line
# ends, characters of 2, 3 and 4 bytes, marks that combine, spaces that are not U+0020, controls.
TEXTS = [
    "",
    " ",
    "the",
    " the",
    "  the  and    the     ",
    "There is the 1200 and the 12345678 in 3 things, then 1,000.00.",
    "it's the cat's, isn't it? I'LL go; THEY'RE 'the' 'S",
    "line\nline\n\nline\n\n\n  indented\r\nwindows\r\n\r\nend\n",
    "tabs\tand\t\ttabs \t mixed \n\t the",
    "trailing spaces   \n   leading",
    "caf\u00e9 cafe\u0301 \u00e4\u00f6\u00fc \u00df \u00c4 na\u00efve \u00bd \u00b2",
    "\u0661\u0662\u0663 \u06f4 \u2163 \u2460",
    "\u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f600 \U0001f469\u200d\U0001f4bb !! \u2764\ufe0f",
    "\u2026 \u2014 \u201cquoted\u201d it\u2019s",
    "no\u00a0break\u2003em\u3000wide \u2028 \u0085 \u200b\ufeff",
    "<|im_start|>user<|im_end|> <|end|>",
    'a_b-c=d+e*f/(g){h}[i]|j\\k "l" `m` ~n #o $p %q ^r &s @t',
    "\x00\x01\x04\x7f\x1b[0m",
    "!!!... ... ...!! ?!\n...\n",
    "x" * 50 + " " * 20 + "1" * 20 + "\n" * 7 + "the" * 9,
]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="make_tiny_models.py", description="Make the files in datasets/tiny again."
    )
    default = Path(__file__).resolve().parent.parent / "tiny"
    parser.add_argument(
        "--out", type=Path, default=default, metavar="FOLDER", help="default: datasets/tiny"
    )
    folder = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(MODELS):
        write_model(folder / f"{name}.h5", name, seed)
    write_golden(folder)
    write_tokenizer_golden(folder / "tokenizer_golden.json")
    return 0


def vocabulary(pre_tokenizer: str) -> Vocabulary:
    """300 tokens: special ones, all bytes, and merges that tell the word rules apart."""
    merged = list(dict.fromkeys(merge.replace(" ", "") for merge in MERGES))
    tokens = [*SPECIAL, *byte_alphabet(), *merged]
    tokens += [f"<|extra_{index}|>" for index in range(INFO.vocab_size - len(tokens))]
    types = [CONTROL if token in SPECIAL else NORMAL for token in tokens]
    types = [
        USER_DEFINED if token.startswith("<|extra") else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    return Vocabulary(
        tokens=tokens,
        merges=MERGES,
        types=types,
        pre_tokenizer=pre_tokenizer,
        bos_token=0,
        eos_token=1,
        add_bos=pre_tokenizer == "llama-bpe",
    )


def write_model(path: Path, name: str, seed: int) -> None:
    """One random model."""
    info, dtype, options, pre_tokenizer = MODELS[name]
    info = replace(info, name=f"tiny-{name}")
    random = np.random.default_rng(1000 + seed)

    def matrix(shape: tuple[int, ...], gain: float) -> np.ndarray:
        # 15 values: fits any type and compresses to a fraction of the bytes.
        steps = np.clip(np.rint(3 * random.standard_normal(shape)), -7, 7)
        return (steps * (gain * 2.0 ** np.rint(np.log2(shape[1] ** -0.5 / 3)))).astype(np.float32)

    shapes = required_shapes(info)
    shapes |= {
        key: shape
        for key, shape in optional_shapes(info).items()
        if key.rpartition("/")[2] in options
    }
    with ModelWriter(path, info, vocabulary(pre_tokenizer), dtype) as writer:
        for key, shape in shapes.items():
            part = key.rpartition("/")[2]
            if part.endswith("norm"):
                # Around 1, so that a norm left out shows.
                writer.add(key, random.uniform(0.5, 1.5, shape).astype(np.float32))
            elif part in ("bq", "bk", "bv"):
                writer.add(key, random.uniform(-0.5, 0.5, shape).astype(np.float32))
            else:
                # Large queries: attention far from uniform, so that its errors show.
                writer.add(key, matrix(shape, 2 if part == "wq" else 1))


def write_golden(folder: Path) -> None:
    """golden.h5: a prompt per model and what the fp64 reference makes of it."""
    path = folder / "golden.h5"
    partial = path.with_name(path.name + ".partial")
    tokens = np.random.default_rng(7).integers(0, INFO.vocab_size, PROMPT_TOKENS, dtype=np.int32)
    with h5py.File(partial, "w") as file:
        for name in MODELS:
            reference = model_reference.run(ModelFile(folder / f"{name}.h5"), tokens)
            group = file.create_group(name)
            group.create_dataset("tokens", data=tokens)
            for field in ("hidden", "q", "k", "v", "logits"):
                values = getattr(reference, field).astype(np.float32)
                group.create_dataset(field, data=values)
    os.replace(partial, path)


def write_tokenizer_golden(path: Path) -> None:
    """Token ids of awkward texts under each pre-tokenizer, by the tokenizers library."""
    encoded = {}
    for name in PRE_TOKENIZERS:
        tokenizer = BpeTokenizer(vocabulary(name))
        encoded[name] = [tokenizer.encode(text).tolist() for text in TEXTS]
    rows = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in encoded.items()]
    texts = ",\n".join(f"    {json.dumps(text)}" for text in TEXTS)
    body = ",\n".join([f'  "texts": [\n{texts}\n  ]', *rows])
    path.write_text(f"{{\n{body}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run_command(main)
