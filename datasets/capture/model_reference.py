"""A Llama-type model, position by position in fp64: slow, and what faster code is checked against.

Shares nothing with llama_numpy.py but the tensors' names: one position at a time, heads one by one,
a pair of channels (i, i + D/2) as a complex number that is turned by multiplication.
"""

from __future__ import annotations

import cmath
import json
import math
from dataclasses import dataclass

import numpy as np

from model_file import ModelInfo, WeightSource


@dataclass(frozen=True)
class Reference:
    """What each position and layer computes, fp64."""

    hidden: np.ndarray  # [layers + 1, T, hidden]: the embedding, then the state after each layer
    q: np.ndarray  # [layers, T, Hq, D], after norm and RoPE
    k: np.ndarray  # [layers, T, Hkv, D], after norm and RoPE
    v: np.ndarray  # [layers, T, Hkv, D]
    logits: np.ndarray  # [T, vocab]


def run(model: WeightSource, tokens: np.ndarray) -> Reference:
    """Feed tokens [T], at positions 0 .. T-1."""
    info = model.info
    weights = {name: model.tensor(name).astype(np.float64) for name in model.names()}
    output = weights["embedding" if info.tie_embeddings else "output"]
    half = info.head_dim // 2
    hidden: list[list[np.ndarray]] = []
    queries, keys, values = ([[] for _ in range(info.num_layers)] for _ in range(3))
    logits = []
    for position, token in enumerate(tokens):
        turns = np.array([_turn(info, position, channel) for channel in range(half)])
        x = weights["embedding"][token]
        hidden.append([x])
        for layer in range(info.num_layers):
            w = {
                name.rpartition("/")[2]: tensor
                for name, tensor in weights.items()
                if name.startswith(f"layers/{layer}/")
            }
            h = _norm(info, x) * w["attention_norm"]
            q = (w["wq"] @ h + w.get("bq", 0)).reshape(info.num_query_heads, info.head_dim)
            k = (w["wk"] @ h + w.get("bk", 0)).reshape(info.num_kv_heads, info.head_dim)
            v = (w["wv"] @ h + w.get("bv", 0)).reshape(info.num_kv_heads, info.head_dim)
            if "q_norm" in w:
                q = np.array([_norm(info, head) * w["q_norm"] for head in q])
            if "k_norm" in w:
                k = np.array([_norm(info, head) * w["k_norm"] for head in k])
            queries[layer].append([_rotated(head, turns) for head in q])
            keys[layer].append([_rotated(head, turns) for head in k])
            values[layer].append(v)
            heads = []
            for head in range(info.num_query_heads):
                shared = head * info.num_kv_heads // info.num_query_heads
                query = queries[layer][-1][head]
                scores = np.array([query @ key[shared] for key in keys[layer]])
                scores /= math.sqrt(info.head_dim)
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                heads.append(
                    sum(s * value[shared] for s, value in zip(shares, values[layer], strict=True))
                )
            x = x + w["wo"] @ np.concatenate(heads)
            h = _norm(info, x) * w["mlp_norm"]
            gate = w["w_gate"] @ h
            x = x + w["w_down"] @ (gate / (1 + np.exp(-gate)) * (w["w_up"] @ h))
            hidden[-1].append(x)
        logits.append(output @ (_norm(info, x) * weights["norm"]))
    return Reference(
        hidden=np.array(hidden).swapaxes(0, 1),
        q=np.array(queries),
        k=np.array(keys),
        v=np.array(values),
        logits=np.array(logits),
    )


def _norm(info: ModelInfo, x: np.ndarray) -> np.ndarray:
    return x / math.sqrt((x @ x) / len(x) + info.rms_norm_eps)


def _rotated(head: np.ndarray, turns: np.ndarray) -> np.ndarray:
    half = len(head) // 2
    z = (head[:half] + 1j * head[half:]) * turns
    return np.concatenate([z.real, z.imag])


def _turn(info: ModelInfo, position: int, channel: int) -> complex:
    """The complex number that turns channels (channel, channel + D/2) at a position."""
    frequency = info.rope_theta ** (-2 * channel / info.head_dim)
    scaling = json.loads(info.rope_scaling) if info.rope_scaling else {"rope_type": "none"}
    kind, factor = scaling["rope_type"], scaling.get("factor")
    length = 1.0
    if kind == "factors":
        frequency /= scaling["factors"][channel]
    elif kind == "linear":
        frequency /= factor
    elif kind == "llama3":
        context = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / frequency
        if wavelength > context / low:
            frequency /= factor
        elif wavelength >= context / high:
            smooth = (context / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
    elif kind == "yarn":
        context = scaling["original_max_position_embeddings"]

        def border(turns: float) -> float:
            ratio = math.log(context / (turns * 2 * math.pi)) / (2 * math.log(info.rope_theta))
            return info.head_dim * ratio

        first = max(math.floor(border(scaling.get("beta_fast", 32))), 0)
        last = min(math.ceil(border(scaling.get("beta_slow", 1))), info.head_dim - 1)
        slow = min(max((channel - first) / max(last - first, 0.001), 0), 1)
        frequency = frequency / factor * slow + frequency * (1 - slow)
        length = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1
    return length * cmath.exp(1j * position * frequency)
