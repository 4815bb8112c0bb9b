"""A tiny random Llama model for the tests: as a GGUF file, and run by a slow fp64 reference.

The reference shares nothing with llama_numpy.py. It works on the weights as GGUF stores them,
rotates neighbouring channels as complex numbers (GGUF's convention), and goes position by position,
so it checks the row permutation, the rotation and the blocked attention of the real code at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

LAYERS = 3
HIDDEN = 32
QUERY_HEADS = 4
KV_HEADS = 2
HEAD_DIM = 12  # QUERY_HEADS * HEAD_DIM differs from HIDDEN, so that a transposed matrix cannot fit
FFN = 64
THETA = 500.0
EPS = 1e-5
CONTEXT = 64

MERGES = ["t h", "th e", "1 2", "Ġ the"]
VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "12", "Ġthe", "<bos>"]
BOS = len(VOCABULARY) - 1


@dataclass(frozen=True)
class ReferenceLayer:
    """fp64, after RoPE, channels in half-rotation order."""

    q: np.ndarray  # [T, Hq, D]
    k: np.ndarray  # [T, Hkv, D]
    v: np.ndarray  # [T, Hkv, D]


def fields() -> dict[str, Any]:
    """GGUF metadata of the model."""
    return {
        "general.license": "test-license",
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": QUERY_HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": EPS,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": THETA,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": BOS,
    }


def tensors(seed: int = 1) -> dict[str, np.ndarray]:
    """Random fp32 weights under their GGUF names, in GGUF's row order."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return random.uniform(0.5, 1.5, HIDDEN).astype(np.float32)

    result = {
        "token_embd.weight": matrix(len(VOCABULARY), HIDDEN),
        "output_norm.weight": norm(),
    }
    for layer in range(LAYERS):
        result |= {
            f"blk.{layer}.attn_norm.weight": norm(),
            # Larger than the rest, so that attention is far from uniform and its errors show.
            f"blk.{layer}.attn_q.weight": 3 * matrix(QUERY_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k.weight": 3 * matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output.weight": matrix(HIDDEN, QUERY_HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm.weight": norm(),
            f"blk.{layer}.ffn_gate.weight": matrix(FFN, HIDDEN),
            f"blk.{layer}.ffn_up.weight": matrix(FFN, HIDDEN),
            f"blk.{layer}.ffn_down.weight": matrix(HIDDEN, FFN),
        }
    return result


def write_gguf(
    path: Path,
    weights: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    architecture: str = "llama",
    quantised: tuple[str, ...] = (),
) -> None:
    """Write a GGUF file; tensors named in `quantised` are stored as Q8_0, the others as fp32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, weight in weights.items():
        if name in quantised:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(weight, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference_forward(
    weights: Mapping[str, np.ndarray], tokens: np.ndarray
) -> tuple[list[ReferenceLayer], np.ndarray]:
    """fp64 layers and log-probabilities [T, vocabulary] of the next token, from GGUF weights."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    factors = w.get("rope_freqs.weight", np.ones(HEAD_DIM // 2))
    frequencies = np.array([THETA ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]) / factors
    unembedding = w.get("output.weight", w["token_embd.weight"])

    keys = [[] for _ in range(LAYERS)]  # complex [Hkv, D/2] per position
    values = [[] for _ in range(LAYERS)]  # [Hkv, D] per position
    queries = [[] for _ in range(LAYERS)]  # complex [Hq, D/2] per position
    log_probabilities = []
    for position, token in enumerate(tokens):
        turn = np.exp(1j * position * frequencies)
        x = w["token_embd.weight"][token]
        for layer in range(LAYERS):

            def named(name: str, layer: int = layer) -> np.ndarray:
                return w[f"blk.{layer}.{name}.weight"]

            h = _norm(x) * named("attn_norm")
            queries[layer].append(_complex_heads(named("attn_q") @ h) * turn)
            keys[layer].append(_complex_heads(named("attn_k") @ h) * turn)
            values[layer].append((named("attn_v") @ h).reshape(KV_HEADS, HEAD_DIM))
            heads = [
                _attend(
                    queries[layer][-1][head],
                    [key[head * KV_HEADS // QUERY_HEADS] for key in keys[layer]],
                    [value[head * KV_HEADS // QUERY_HEADS] for value in values[layer]],
                )
                for head in range(QUERY_HEADS)
            ]
            x = x + named("attn_output") @ np.concatenate(heads)
            h = _norm(x) * named("ffn_norm")
            gate = named("ffn_gate") @ h
            x = x + named("ffn_down") @ (gate / (1 + np.exp(-gate)) * (named("ffn_up") @ h))
        logits = unembedding @ (_norm(x) * w["output_norm.weight"])
        log_probabilities.append(logits - np.log(np.exp(logits).sum()))
    layers = [
        ReferenceLayer(_half_order(q), _half_order(k), np.array(v))
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return layers, np.array(log_probabilities)


def _norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + EPS)


def _complex_heads(x: np.ndarray) -> np.ndarray:
    """[H * D], channels 2i and 2i+1 a pair -> complex [H, D/2]."""
    pairs = x.reshape(-1, HEAD_DIM // 2, 2)
    return pairs[..., 0] + 1j * pairs[..., 1]


def _half_order(heads: list[np.ndarray]) -> np.ndarray:
    """Complex [T, H, D/2] -> [T, H, D], real parts first."""
    z = np.array(heads)
    return np.concatenate([z.real, z.imag], axis=-1)


def _attend(query: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    scores = np.array([(query * key.conj()).sum().real for key in keys]) / HEAD_DIM**0.5
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ np.array(values)
