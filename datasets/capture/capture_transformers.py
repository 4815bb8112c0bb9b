#!/usr/bin/env python3
"""Capture keys, values and queries of a Hugging Face model into a KV trace (trace_file.py).

For models that capture_gguf.py cannot run, and for long texts on a GPU. The hook is in
transformers_hook.py.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import transformers

import cli
from trace_file import CaptureError, TraceWriter
from transformers_hook import FAMILIES, capture_layers, check_family, trace_info

COMPUTE_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

EXAMPLES = """\
examples:
  capture_transformers.py --model ./Qwen3-0.6B --text book.txt --out book.h5
      all layers, 4096 tokens, queries of the last 160 positions, on the CPU in fp32
  capture_transformers.py --model ./Llama-3.1-8B --text book.txt --tokens 32768 \\
      --layers 0,8,16,24,31 --device cuda --compute bf16 --out book.h5
"""


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    text = cli.read_text(options.text)
    tokenizer, model = _load(options)
    config = model.config
    bos_token = tokenizer.bos_token_id if _adds_bos(tokenizer) else None
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    selection = cli.select(
        options,
        np.array(ids, dtype=np.int32),
        config.num_hidden_layers,
        config.max_position_embeddings,
        bos_token,
    )
    info = trace_info(
        config,
        model=options.model_name or Path(options.model).name,
        text=selection.text_label,
        license=options.license or "unknown",
        tokenizer=type(tokenizer).__name__,
    )
    progress = cli.Progress("chunk", math.ceil(options.tokens / options.chunk))
    with TraceWriter(options.out, info, selection.tokens, options.dtype) as writer:
        for layer, trace in capture_layers(
            model,
            selection.tokens,
            selection.layers,
            selection.first_query_position,
            options.w_o,
            options.chunk,
            progress.step,
        ):
            writer.add_layer(layer, trace)
    return 0


def _load(
    options: argparse.Namespace,
) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PreTrainedModel]:
    try:
        check_family(transformers.AutoConfig.from_pretrained(options.model).model_type)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, dtype=COMPUTE_TYPES[options.compute]
        ).to(options.device)
    except (OSError, ValueError, RuntimeError) as error:
        # transformers explains at length; its first line says what is wrong.
        first_line = str(error).strip().partition("\n")[0]
        raise CaptureError(f"cannot load {options.model}: {first_line}") from error
    return tokenizer, model


def _adds_bos(tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer starts a text with a begin-of-sequence token by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="capture_transformers.py",
        description="Capture keys, values and queries of a transformers model into a KV trace. "
        f"Model families: {', '.join(FAMILIES)}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="folder of a saved model, or its hub name"
    )
    cli.add_trace_options(parser)
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--compute", choices=tuple(COMPUTE_TYPES), default="fp32", help="type of the forward pass"
    )
    parser.add_argument(
        "--chunk",
        type=cli.positive_int,
        default=1024,
        metavar="N",
        help="tokens per forward call (default: 1024)",
    )
    options = parser.parse_args(arguments)
    if options.out is None:
        parser.error("the following arguments are required: --out")
    return options


if __name__ == "__main__":
    cli.run_command(main)
