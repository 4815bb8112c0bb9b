"""Forward pass of a Llama-type decoder in numpy, made to hand out keys, values and queries.

For hidden state x [T, hidden], layer by layer (Touvron et al., "LLaMA", 2023; grouped-query
attention from "Llama 2", 2023):

    h       = rms_norm(x) * attn_norm            rms_norm(x) = x / sqrt(mean(x^2) + eps)
    q, k, v = h @ wq.T, h @ wk.T, h @ wv.T       + bias (Qwen2); split into heads of D channels
    q, k    = rms_norm(q) * q_norm, rms_norm(k) * k_norm       per head (Qwen3)
    q, k    = rope(q), rope(k)                   channels (i, i + D/2) turn by
                                                 position * theta^(-2i/D), scaled
    a       = softmax(q k^T / sqrt(D), causal) v query head j reads key/value head j // G
    x       = x + a @ wo.T
    h       = rms_norm(x) * ffn_norm
    x       = x + (silu(h @ w_gate.T) * (h @ w_up.T)) @ w_down.T

    logits  = rms_norm(x) * final_norm @ unembedding.T

Arithmetic is fp32, except the rotation angles: at position 8000 an fp32 angle is off by 2e-4 rad
already, hence fp64 there. The weights of one layer are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

# Bound on the attention scores in memory at a time; below it the speed does not depend on it.
SCORE_BYTES = 64 << 20

# Rows of the logits in memory at a time: 128 x 49152 fp32 are 24 MiB.
LOGIT_ROWS = 128


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a model."""

    num_layers: int
    hidden_size: int
    num_query_heads: int  # Hq
    num_kv_heads: int  # Hkv; G = Hq / Hkv query heads share one
    head_dim: int  # D
    rope_theta: float
    rms_eps: float
    rope_scaling: Mapping[str, Any] | None = None  # as in model_file.py; see rope_frequencies


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer, fp32; matrices are [out, in], q and k rows in half-rotation order."""

    attn_norm: np.ndarray  # [hidden]
    wq: np.ndarray  # [Hq * D, hidden]
    wk: np.ndarray  # [Hkv * D, hidden]
    wv: np.ndarray  # [Hkv * D, hidden]
    wo: np.ndarray  # [hidden, Hq * D]
    ffn_norm: np.ndarray  # [hidden]
    w_gate: np.ndarray  # [ffn, hidden]
    w_up: np.ndarray  # [ffn, hidden]
    w_down: np.ndarray  # [hidden, ffn]
    bq: np.ndarray | None = None  # [Hq * D]
    bk: np.ndarray | None = None  # [Hkv * D]
    bv: np.ndarray | None = None  # [Hkv * D]
    q_norm: np.ndarray | None = None  # [D]
    k_norm: np.ndarray | None = None  # [D]


class LlamaModel(Protocol):
    """Where the weights come from; all arrays fp32."""

    config: LlamaConfig

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """[T] int32 -> [T, hidden]."""

    def layer(self, index: int) -> LayerWeights:
        """Weights of one layer."""

    def final_norm(self) -> np.ndarray:
        """[hidden]."""

    def unembedding(self) -> np.ndarray:
        """[vocabulary, hidden]."""


@dataclass(frozen=True)
class LayerTensors:
    """What attention in one layer multiplies, all fp32."""

    q: np.ndarray  # [T, Hq, D], after RoPE
    k: np.ndarray  # [T, Hkv, D], after RoPE
    v: np.ndarray  # [T, Hkv, D]
    w_o: np.ndarray  # [Hq * D, hidden]


def forward(
    model: LlamaModel,
    tokens: np.ndarray,
    num_layers: int,
    on_layer: Callable[[int, LayerTensors], None],
) -> np.ndarray:
    """Run num_layers layers over tokens [T], calling on_layer(index, tensors) in each.

    Returns the hidden state [T, hidden] after those layers.
    """
    config = model.config
    cos, sin = rope_table(config, len(tokens))
    x = model.embed(tokens)
    for index in range(num_layers):
        weights = model.layer(index)
        q, k, v = project(config, weights, x, cos, sin)
        on_layer(index, LayerTensors(q, k, v, weights.wo.T))
        x = x + causal_attention(q, k, v).reshape(len(tokens), -1) @ weights.wo.T
        x = x + mlp(config, weights, x)
    return x


def project(
    config: LlamaConfig, weights: LayerWeights, x: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states [T, hidden] -> q [T, Hq, D], k and v [T, Hkv, D]; q and k after RoPE."""
    h = rms_norm(x, config.rms_eps) * weights.attn_norm

    def heads(weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        y = h @ weight.T
        if bias is not None:
            y += bias
        return y.reshape(len(x), -1, config.head_dim)

    q, k, v = (
        heads(weights.wq, weights.bq),
        heads(weights.wk, weights.bk),
        heads(weights.wv, weights.bv),
    )
    if weights.q_norm is not None:
        q = rms_norm(q, config.rms_eps) * weights.q_norm
    if weights.k_norm is not None:
        k = rms_norm(k, config.rms_eps) * weights.k_norm
    return rope(q, cos, sin), rope(k, cos, sin), v


def mlp(config: LlamaConfig, weights: LayerWeights, x: np.ndarray) -> np.ndarray:
    """What the second half of a layer adds to hidden states [T, hidden]."""
    h = rms_norm(x, config.rms_eps) * weights.ffn_norm
    return (silu(h @ weights.w_gate.T) * (h @ weights.w_up.T)) @ weights.w_down.T


def perplexity(model: LlamaModel, hidden: np.ndarray, tokens: np.ndarray, count: int) -> float:
    """exp(mean negative log-likelihood) of the last `count` of tokens [T], each given those before.

    hidden [T, hidden] is the state after the last layer; 1 <= count < T.
    """
    states = rms_norm(hidden[-count - 1 : -1], model.config.rms_eps) * model.final_norm()
    targets = tokens[-count:]
    unembedding = model.unembedding()
    total = 0.0
    for start in range(0, count, LOGIT_ROWS):
        logits = states[start : start + LOGIT_ROWS] @ unembedding.T
        wanted = targets[start : start + LOGIT_ROWS]
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
        total += float((log_sum - logits[np.arange(len(wanted)), wanted]).sum())
    return float(np.exp(total / count))


def rms_norm(x: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x); exp overflows to inf for x < -88, where the result is the right limit, -0."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def rope_table(config: LlamaConfig, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotation angles at positions 0 .. num_tokens-1, [T, 1, D/2] fp32."""
    frequencies, scale = rope_frequencies(config)
    angles = np.outer(np.arange(num_tokens), frequencies)[:, None, :]
    return (scale * np.cos(angles)).astype(np.float32), (scale * np.sin(angles)).astype(np.float32)


def rope_frequencies(config: LlamaConfig) -> tuple[np.ndarray, float]:
    """Radians per position [D/2] fp64, and a factor of cos and sin.

    The scaling rules are those of Hugging Face transformers (modeling_rope_utils.py); "yarn" is
    Peng et al., "YaRN", 2023.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"], 1.0
    if scaling["rope_type"] == "factors":
        return frequencies / np.array(scaling["factors"], dtype=np.float64), 1.0
    if scaling["rope_type"] == "llama3":
        # Turns within the original context: few are slowed down by `factor`, many left alone.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (keep + (1 - keep) / scaling["factor"]), 1.0
    if scaling["rope_type"] == "yarn":
        return _yarn(config, scaling, frequencies)
    return frequencies, 1.0


def _yarn(
    config: LlamaConfig, scaling: Mapping[str, Any], frequencies: np.ndarray
) -> tuple[np.ndarray, float]:
    factor = scaling["factor"]
    context = scaling["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        """The (fractional) channel that turns so often within the original context."""
        return (
            config.head_dim
            * math.log(context / (turns * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    first = channel(scaling.get("beta_fast", 32))
    last = channel(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    ramp = (np.arange(config.head_dim // 2) - first) / (max(last - first, 0.001))
    slow = np.clip(ramp, 0, 1)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = scaling.get("attention_factor")
    if scale is None:
        scale = magnitude(1)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            scale = magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return frequencies * (1 - slow + slow / factor), scale


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate x [T, H, D] in half-rotation order: channel i pairs with i + D/2."""
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of q [T, Hq, D] over k, v [T, Hkv, D], each position over itself and those before.

    Returns [T, Hq, D]. Works on blocks of positions so that the scores stay within SCORE_BYTES.
    """
    num_tokens, num_query_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_query_heads // num_kv_heads
    block = max(1, SCORE_BYTES // (4 * group * num_tokens))
    scaled = q * np.float32(head_dim**-0.5)
    out = np.empty_like(q)
    for start in range(0, num_tokens, block):
        end = min(start + block, num_tokens)
        rows = end - start
        future = np.arange(start, end)[:, None] < np.arange(start, end)  # [rows, rows]
        for head in range(num_kv_heads):
            heads = slice(head * group, (head + 1) * group)
            queries = scaled[start:end, heads].transpose(1, 0, 2).reshape(group * rows, head_dim)
            scores = queries @ k[:end, head].T  # [G * rows, end]
            # Only the square of keys inside the block can lie in the future.
            scores.reshape(group, rows, end)[:, :, start:][:, future] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            result = scores @ v[:end, head]
            result /= scores.sum(axis=1, keepdims=True)
            out[start:end, heads] = result.reshape(group, rows, head_dim).transpose(1, 0, 2)
    return out
