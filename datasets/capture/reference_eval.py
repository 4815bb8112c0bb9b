#!/usr/bin/env python3
"""What a model says with a compressed, sparse KV cache: the reference for `sikv eval`.

Protocol: a prompt of 4096 tokens (2000..6095 of the text, at positions 0..4095, without a
begin-of-sequence token) through dense prefill; all of it is encoded, the tail starts empty; 64
tokens are pinned by the last prompt query. Then 96 teacher-forced steps, every layer sparse: step i
feeds token 6096 + i and is scored on the next one. Each pipeline computes its own hidden states and
tail. Reported, as means over steps: NLL, KL = sum p_dense (log p_dense - log p_pipeline), share of
steps whose most likely token is that of dense, and scans per step, layer and KV head.

Beside each row stands EXPECTED (eval_expected.json), the values of an earlier implementation that
shares no code with this one. Exit code 1: a row is farther away than the tolerances.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cli
from llama_numpy import LayerTensors, forward, mlp, project, rms_norm, rope_table
from model_file import ModelFile, WeightSource
from reference_pipelines import WINDOW, Codec, DenseLayer, Pipeline, PromptLayer, SparseLayer
from trace_file import CaptureError
from vocabulary import BpeTokenizer, Vocabulary

FIRST_TOKEN = 2000
PROMPT = 4096
STEPS = 96

_EXPECTED_FILE = json.loads(Path(__file__).with_name("eval_expected.json").read_text())
DENSE_NLL: float = _EXPECTED_FILE["dense_nll"]
DENSE_NLL_TOLERANCE: float = _EXPECTED_FILE["tolerance"]["dense_nll"]
NLL_TOLERANCE: float = _EXPECTED_FILE["tolerance"]["nll_added"]
KL_TOLERANCE: float = _EXPECTED_FILE["tolerance"]["kl"]
KL_SHARE: float = _EXPECTED_FILE["tolerance"]["kl_share"]  # the larger of the two holds
SCANS_TOLERANCE: float = _EXPECTED_FILE["tolerance"]["scans_per_step"]

PAPER = Codec("sign_vq", 2, 2)
ROTATED = Codec("rot_lm", 3, 2)


def _everything(name: str, keys: int, values: int) -> Pipeline:
    label = name if name != "rot_lm" else f"rot_lm {keys},{values}"
    return Pipeline(f"everything, {label}", Codec(name, keys, values), None)


_PIPELINES = [
    *(
        pipeline
        for budget in (96, 192, 384)
        for pipeline in (
            Pipeline(f"sign_vq + intq, {budget}", PAPER, budget),
            Pipeline(f"rot_lm rerank 4, {budget}", ROTATED, budget, 4),
            Pipeline(f"rot_lm rerank 4, schedule auto, {budget}", ROTATED, budget, 4, None),
        )
    ),
    _everything("sign_vq", 2, 2),
    _everything("rot_lm", 2, 2),
    _everything("rot_lm", 3, 2),
    _everything("rot_lm", 3, 3),
    _everything("rot_lm", 4, 3),
    Pipeline("rot_lm rerank 4, every 8, 192", ROTATED, 192, 4, 8),
    Pipeline("rot_lm rerank 4, every 8, refresh 0.45, 192", ROTATED, 192, 4, 8, 0, 0.45),
]

Expected = tuple[float | None, float, float, float | None]


def _expected_of(pipeline: Pipeline) -> Expected:
    row = next(row for row in _EXPECTED_FILE["rows"] if row["label"] == pipeline.label)
    return row["scans_per_step"], row["nll_added"], row["kl"], row["top1_same"]


# Pipeline, then scans per step, NLL added, KL, top-1 of the other implementation (None: not known).
EXPECTED: list[tuple[Pipeline, Expected]] = [(p, _expected_of(p)) for p in _PIPELINES]


@dataclass(frozen=True)
class Row:
    """What one pipeline measured."""

    label: str
    scans: float | None  # per step, layer and KV head; None: nothing to select
    nll: float
    nll_added: float
    kl: float
    top1: float


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    started = time.monotonic()
    model, vocabulary = _open(options.model)
    text_tokens = BpeTokenizer(vocabulary).encode(cli.read_text(options.text))
    tokens = text_tokens[options.first_token :][: options.prompt + options.steps + 1]
    if len(tokens) < options.prompt + options.steps + 1:
        raise CaptureError(f"{options.text} has only {len(text_tokens)} tokens")
    chosen = [
        (pipeline, expected) for pipeline, expected in EXPECTED if options.only in pipeline.label
    ]
    prompts = prefill(model, tokens[: options.prompt])
    print(f"prefill: {time.monotonic() - started:.0f} s")
    rows = evaluate(model, prompts, tokens, options.prompt, [pipeline for pipeline, _ in chosen])
    print(f"all: {time.monotonic() - started:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")

    protocol = (options.first_token, options.prompt, options.steps)
    if protocol != (FIRST_TOKEN, PROMPT, STEPS):
        for row in rows:
            print(f"{row.label}: NLL {row.nll:.4f}, KL {row.kl:.4f}, top-1 {row.top1:.3f}")
        return 0
    return report(rows, [expected for _, expected in chosen])


def prefill(model: WeightSource, tokens: np.ndarray) -> list[PromptLayer]:
    """Dense forward pass over tokens [P]; what each layer keeps of it."""
    layers: list[PromptLayer] = []
    progress = cli.Progress("prefill layer", model.info.num_layers)

    def on_layer(_: int, tensors: LayerTensors) -> None:
        layers.append(PromptLayer(tensors.k, tensors.v, tensors.q[-WINDOW:]))
        progress.step()

    forward(model, tokens, model.info.num_layers, on_layer)
    return layers


def evaluate(
    model: WeightSource,
    prompts: list[PromptLayer],
    tokens: np.ndarray,
    prompt: int,
    pipelines: list[Pipeline],
) -> list[Row]:
    """Teacher-forced steps over tokens[prompt:]; row 0 is dense. All pipelines step together."""
    config = model.config
    caches = [[DenseLayer(layer) for layer in prompts]]
    for pipeline in pipelines:
        caches.append([])
        for layer in prompts:
            if pipeline.period is None:
                periods = layer.schedule(pipeline)
            else:
                periods = np.full(len(layer.keys), pipeline.period)
            caches[-1].append(SparseLayer(layer, pipeline, periods))
    weights = [model.layer(index) for index in range(config.num_layers)]
    final_norm, unembedding = model.final_norm(), model.unembedding()
    cos, sin = rope_table(config, len(tokens))

    steps = len(tokens) - prompt - 1
    nll = np.empty((steps, len(caches)))
    kl = np.empty((steps, len(caches)))
    top1 = np.empty((steps, len(caches)), dtype=bool)
    progress = cli.Progress("step", steps)
    for step in range(steps):
        position = prompt + step
        x = np.repeat(model.embed(tokens[position : position + 1]), len(caches), axis=0)
        here = slice(position, position + 1)
        for layer, w in enumerate(weights):
            q, k, v = project(config, w, x, cos[here], sin[here])
            answers = [cache[layer].attend(q[i], k[i], v[i]) for i, cache in enumerate(caches)]
            x = x + np.stack(answers).reshape(len(caches), -1) @ w.wo.T
            x = x + mlp(config, w, x)
        logits = (rms_norm(x, config.rms_eps) * final_norm) @ unembedding.T
        log_p = log_softmax(logits.astype(np.float64))
        nll[step] = -log_p[:, tokens[position + 1]]
        kl[step] = (np.exp(log_p[0]) * (log_p[0] - log_p)).sum(axis=1)
        top1[step] = log_p.argmax(axis=1) == log_p[0].argmax()
        progress.step()

    rows = []
    for i, cache in enumerate(caches):
        heads = config.num_layers * config.num_kv_heads
        scans = sum(layer.scans for layer in cache) / (steps * heads)
        rows.append(
            Row(
                label=pipelines[i - 1].label if i else "dense",
                scans=scans or None,
                nll=float(nll[:, i].mean()),
                nll_added=float((nll[:, i] - nll[:, 0]).mean()),
                kl=float(kl[:, i].mean()),
                top1=float(top1[:, i].mean()),
            )
        )
    return rows


def report(rows: list[Row], expected: list[Expected]) -> int:
    """Print the table; 1 if a value is farther from the expected one than its tolerance."""
    dense = rows[0]
    off = int(abs(dense.nll - DENSE_NLL) > DENSE_NLL_TOLERANCE)
    print(f"dense NLL {dense.nll:.4f} (expected {DENSE_NLL})" + ("  <- DIFFERENT" if off else ""))
    header = "scans         NLL added           KL                top-1"
    print(f"{'(expected in parentheses)':<45} {header}")
    for row, (scans, nll, kl, top1) in zip(rows[1:], expected, strict=True):
        far = abs(row.nll_added - nll) > NLL_TOLERANCE
        far |= abs(row.kl - kl) > max(KL_TOLERANCE, KL_SHARE * kl)
        far |= scans is not None and abs(row.scans - scans) > SCANS_TOLERANCE
        off += far
        cells = [
            f"{row.scans:.2f} ({scans:.2f})" if scans is not None else " " * 11,
            f"{row.nll_added:+.4f} ({nll:+.4f})",
            f"{row.kl:.4f} ({kl:.4f})",
            f"{row.top1:.3f}" + (f" ({top1:.3f})" if top1 is not None else ""),
        ]
        print(f"{row.label:<45} " + "   ".join(cells) + ("  <- DIFFERENT" if far else ""))
    return 1 if off else 0


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = x.max(axis=-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True))


def _open(path: Path) -> tuple[WeightSource, Vocabulary]:
    if path.suffix == ".gguf":
        import gguf_model
        import gguf_tokenizer
        from gguf_file import GgufFile

        file = GgufFile(path)
        return gguf_model.GgufModel(file), gguf_tokenizer.read_vocabulary(file)
    model = ModelFile(path)
    if model.vocabulary is None:
        raise CaptureError(f"{path} holds no vocabulary")
    return model, model.vocabulary


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reference_eval.py",
        description="Evaluate SmolLM2-135M with compressed, sparse KV caches; compare with "
        "expected values.",
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="FILE", help="GGUF file or model file (HDF5)"
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain text")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose label has this")
    parser.add_argument("--first-token", type=int, default=FIRST_TOKEN, metavar="N")
    parser.add_argument("--prompt", type=cli.positive_int, default=PROMPT, metavar="N")
    parser.add_argument("--steps", type=cli.positive_int, default=STEPS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run_command(main)
