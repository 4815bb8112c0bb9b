#!/usr/bin/env python3
"""Capture keys, values and queries of a GGUF model on a text into a KV trace (trace_file.py).

Needs no deep-learning framework: the gguf package dequantises the weights to fp32, llama_numpy.py
runs the model. With 135 million parameters on two cores 4096 tokens take 20 s, 8192 take 40 s.
Memory is one layer's weights plus a few arrays of [tokens, hidden] (and the vocabulary for
--perplexity).
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import cli
from gguf_file import GgufFile
from gguf_model import GgufModel
from gguf_tokenizer import GgufTokenizer
from llama_numpy import LayerTensors, forward, perplexity
from trace_file import CaptureError, LayerTrace, TraceInfo, TraceWriter

EXAMPLES = """\
examples:
  capture_gguf.py --model model.gguf --text book.txt --out book.h5
      all layers, 4096 tokens, queries of the last 160 positions
  capture_gguf.py --model model.gguf --text book.txt --tokens 8192 --layers 0,5,10-12 \\
      --queries all --w-o --dtype fp32 --out book.h5
  capture_gguf.py --model model.gguf --text book.txt --tokens 8192 --perplexity 1024
      no trace, only a check that the forward pass is right
"""


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    text = cli.read_text(options.text)
    file = GgufFile(options.model)
    model = GgufModel(file)
    tokenizer = GgufTokenizer(file)
    selection = cli.select(
        options,
        tokenizer.encode(text),
        model.config.num_layers,
        model.info.max_positions,
        tokenizer.bos_token,
    )
    if options.perplexity is not None and options.perplexity >= options.tokens:
        raise CaptureError(
            f"--perplexity {options.perplexity} must be less than --tokens {options.tokens}"
        )

    with contextlib.ExitStack() as stack:
        writer = None
        if options.out is not None:
            info = _trace_info(options, file, model, tokenizer, selection)
            writer = stack.enter_context(
                TraceWriter(options.out, info, selection.tokens, options.dtype)
            )
        _capture(options, model, selection, writer)
    return 0


def _capture(
    options: argparse.Namespace,
    model: GgufModel,
    selection: cli.Selection,
    writer: TraceWriter | None,
) -> None:
    whole_model = options.perplexity is not None
    num_layers = model.config.num_layers if whole_model else selection.layers[-1] + 1
    progress = cli.Progress("layer", num_layers)

    def on_layer(index: int, tensors: LayerTensors) -> None:
        if writer is not None and index in selection.layers:
            first = selection.first_query_position
            w_o = tensors.w_o if options.w_o else None
            writer.add_layer(index, LayerTrace(tensors.k, tensors.v, tensors.q[first:], first, w_o))
        progress.step()

    hidden = forward(model, selection.tokens, num_layers, on_layer)
    if whole_model:
        value = perplexity(model, hidden, selection.tokens, options.perplexity)
        print(
            f"perplexity {value:.3f} over the last {options.perplexity} of {options.tokens} tokens"
        )


def _trace_info(
    options: argparse.Namespace,
    file: GgufFile,
    model: GgufModel,
    tokenizer: GgufTokenizer,
    selection: cli.Selection,
) -> TraceInfo:
    weights_license = file.field("general.license", "unknown")
    return TraceInfo(
        model=options.model_name or options.model.stem,
        num_layers=model.config.num_layers,
        num_query_heads=model.config.num_query_heads,
        num_kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        rope_theta=model.config.rope_theta,
        rope_layout="half",
        rope_applied=True,
        text=selection.text_label,
        license=options.license or f"weights {weights_license}; text unknown",
        tokenizer=tokenizer.name,
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="capture_gguf.py",
        description="Capture keys, values and queries of a GGUF model on a text into a KV trace.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="FILE", help="GGUF file, Llama architecture"
    )
    cli.add_trace_options(parser)
    parser.add_argument(
        "--perplexity",
        type=cli.positive_int,
        metavar="N",
        help="print the perplexity over the last N tokens; then --out may be left out",
    )
    options = parser.parse_args(arguments)
    if options.out is None and options.perplexity is None:
        parser.error("nothing to do: give --out, --perplexity or both")
    return options


if __name__ == "__main__":
    cli.run_command(main)
