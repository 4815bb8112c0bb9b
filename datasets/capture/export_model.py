#!/usr/bin/env python3
"""Turn a GGUF file or a Hugging Face folder into one HDF5 model file (model_file.py)."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import cli
import hf_model
from model_file import DTYPES, ModelWriter, WeightSource
from trace_file import CaptureError
from vocabulary import Vocabulary, check_vocabulary, missing_bytes

EXAMPLES = """\
examples:
  export_model.py --model model.gguf --out model.h5
      GGUF of architecture llama (Llama, Mistral, SmolLM), qwen2 or qwen3; weights dequantised
  export_model.py --model ./Llama-3.1-8B-Instruct --dtype bf16 --out llama.h5
      folder with config.json, *.safetensors and tokenizer.json
"""


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    source, vocabulary = _open(options.model, not options.no_tokenizer)
    if vocabulary is not None:
        check_vocabulary(vocabulary, options.model)
        missing = missing_bytes(vocabulary)
        if missing:
            listed = ", ".join(f"0x{byte:02x}" for byte in missing)
            print(f"note: no token for the bytes {listed}", file=sys.stderr)
        if len(vocabulary.tokens) != source.info.vocab_size:
            raise CaptureError(
                f"{options.model}: {len(vocabulary.tokens)} tokens, "
                f"but {source.info.vocab_size} rows in the embedding"
            )
    labels = {
        field: value
        for field in ("name", "source", "license")
        if (value := getattr(options, field)) is not None
    }
    info = replace(source.info, **labels)
    names = sorted(source.names())
    progress = cli.Progress("tensor", len(names))
    with ModelWriter(options.out, info, vocabulary, options.dtype) as writer:
        for name in names:
            writer.add(name, source.tensor(name))
            progress.step()
    return 0


def _open(path: Path, with_tokenizer: bool) -> tuple[WeightSource, Vocabulary | None]:
    if path.is_dir():
        model = hf_model.HfModel(path)
        if not with_tokenizer:
            return model, None
        return model, hf_model.read_vocabulary(path, model.info.vocab_size)
    # Imported late: a folder needs no gguf package.
    import gguf_model
    import gguf_tokenizer
    from gguf_file import GgufFile

    file = GgufFile(path)
    model = gguf_model.GgufModel(file)
    return model, gguf_tokenizer.read_vocabulary(file) if with_tokenizer else None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export_model.py",
        description="Turn a GGUF file or a Hugging Face folder into one HDF5 model file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="PATH", help="file or folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="HDF5 to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="storage of matrices (default: fp16)"
    )
    parser.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="leave the vocabulary out, for models whose tokenizer is not byte-level BPE",
    )
    labels = parser.add_argument_group("labels (root attributes)")
    labels.add_argument("--name", metavar="TEXT", help="default: what the model says")
    labels.add_argument("--source", metavar="TEXT", help="default: name of the file or folder")
    labels.add_argument("--license", metavar="TEXT", help="default: what the model says")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run_command(main)
