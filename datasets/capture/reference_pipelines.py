"""Compressed, sparse attention of one layer in plain numpy: the check of the toolkit's own code.

Written from the method's description, not from the toolkit. Notation: E encoded tokens, Hkv KV
heads, G query heads per KV head, D channels, and groups of 4 channels whose sign pattern (a nibble)
is the index of a key.

Keys, sign_vq + intq (arXiv 2603.14224): centre by the prompt mean; per token and group of 32
channels |k'| / alpha as 2 bits min-max with fp16 scale and zero, alpha the largest |k'| of a
channel; values the same way, not centred. Keys and values, rot_lm: centre, rotate by H diag(s) (H
Walsh-Hadamard, s random signs), store signs and Lloyd-Max levels of |y| / rms(y) and one fp16 scale
per token, the least-squares one.

A scan scores every encoded token by a table per group: the dot product of the group-mean query with
the mean sub-vector of each sign pattern, rounded to 6 bits. The best rerank * budget of them are
the candidate pool; each step rescores the pool with its decoded keys and attends to the best
`budget`, the pinned tokens and the tail.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

PINNED = 64
WINDOW = 48  # prompt queries that the schedule replays
PERIODS = (1, 2, 4, 8)  # steps between scans that the schedule may choose
SCALE_GROUP = 32
TABLE_MAX = 63

# Total bits -> boundaries between levels, and levels, of |y| / rms(y).
LLOYD_MAX = {
    2: ([0.9816], [0.4528, 1.5104]),
    3: ([0.5006, 1.0500, 1.7480], [0.2451, 0.7560, 1.3439, 2.1520]),
    4: (
        [0.2582, 0.5224, 0.7996, 1.0993, 1.4371, 1.8435, 2.4008],
        [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
    ),
}


@dataclass(frozen=True)
class Codec:
    """How keys and values are stored."""

    name: str  # "sign_vq" (with intq values) | "rot_lm"
    key_bits: int
    value_bits: int


@dataclass(frozen=True)
class Pipeline:
    """One way to answer queries from a compressed cache."""

    label: str
    codec: Codec
    budget: int | None  # tokens selected per step; None: everything
    rerank: int = 1
    period: int | None = 1  # steps between scans; None: by schedule
    tolerance: float = 0.01  # of the schedule
    refresh_cosine: float | None = None


# --- Codecs. Arrays are [Hkv, E, D] fp32. ---------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """What a scan reads: sign patterns, and the mean sub-vector of each."""

    pair_codes: np.ndarray  # [Hkv, D/8, E] int32: pair * 256 + low nibble + 16 * high nibble
    codebook: np.ndarray  # [Hkv, D/4, 16, 4] fp32
    rotated: bool  # whether the codebook is of rotated keys


def sign_vq_keys(keys: np.ndarray, bits: int) -> np.ndarray:
    """Keys as sign_vq decodes them."""
    mean = keys.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    centred = keys - mean
    alpha = np.abs(centred).max(axis=1, keepdims=True)
    alpha[alpha == 0] = 1
    magnitudes = min_max(np.abs(centred) / alpha, bits)
    return np.where(centred >= 0, magnitudes, -magnitudes) * alpha + mean


def min_max(x: np.ndarray, bits: int) -> np.ndarray:
    """x through asymmetric min-max codes per group of 32 channels."""
    groups = x.reshape(*x.shape[:-1], -1, SCALE_GROUP)
    low = groups.min(axis=-1, keepdims=True)
    spread = groups.max(axis=-1, keepdims=True) - low
    scale = (spread / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    zero = low.astype(np.float16).astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1))
    codes = np.clip(np.rint((groups - zero) / divisor), 0, 2**bits - 1)
    return (codes * scale + zero).reshape(x.shape)


@functools.cache
def rotation(head_dim: int) -> np.ndarray:
    """R [D, D]: y = R x."""
    block = head_dim & -head_dim  # the largest power of two that divides D
    hadamard = np.ones((1, 1))
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    blocks = np.kron(np.eye(head_dim // block), hadamard / np.sqrt(block))
    signs = [1.0 if _splitmix64(channel) & 1 else -1.0 for channel in range(head_dim)]
    return (blocks * signs).astype(np.float32)


def rot_lm(x: np.ndarray, bits: int) -> np.ndarray:
    """Keys or values as rot_lm decodes them."""
    mean = x.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    turn = rotation(x.shape[-1])
    y = (x - mean) @ turn.T
    boundaries, levels = LLOYD_MAX[bits]
    rms = np.sqrt((y * y).mean(axis=-1, keepdims=True))
    ratio = np.abs(y) / np.where(rms > 0, rms, np.float32(1))
    index = np.searchsorted(np.array(boundaries, dtype=np.float32), ratio, side="left")
    level = np.array(levels, dtype=np.float32)[index]
    level = np.where(y >= 0, level, -level)
    scale = (y * level).sum(axis=-1, keepdims=True) / (level * level).sum(axis=-1, keepdims=True)
    scale = scale.astype(np.float16).astype(np.float32)
    return (level * scale) @ turn + mean


def make_index(keys: np.ndarray, rotated: bool) -> Index:
    """Sign patterns of centred (and rotated) keys, and their mean sub-vectors."""
    heads, encoded, head_dim = keys.shape
    centred = keys - keys.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    if rotated:
        centred = centred @ rotation(head_dim).T
    parts = centred.reshape(heads, encoded, -1, 4)
    bits = (parts >= 0).astype(np.int32)
    nibbles = (bits * (1, 2, 4, 8)).sum(axis=-1)  # [Hkv, E, D/4]
    average = np.abs(centred).mean(axis=1).reshape(heads, -1, 4)
    codebook = np.empty((heads, head_dim // 4, 16, 4), dtype=np.float32)
    for code in range(16):
        members = nibbles == code
        count = members.sum(axis=1)[..., None]  # [Hkv, D/4, 1]
        total = np.einsum("het,hetc->htc", members, parts, dtype=np.float64)
        signs = np.array([1 if code >> channel & 1 else -1 for channel in range(4)])
        codebook[:, :, code] = np.where(count > 0, total / np.maximum(count, 1), signs * average)
    pairs = nibbles[..., 0::2] + 16 * nibbles[..., 1::2]
    pairs += 256 * np.arange(pairs.shape[-1])
    return Index(np.ascontiguousarray(pairs.transpose(0, 2, 1)), codebook, rotated)


def scan(index: Index, mean_queries: np.ndarray) -> np.ndarray:
    """Scores [Hkv, E] of all encoded tokens for group-mean queries [Hkv, D], with 6-bit tables."""
    heads, head_dim = mean_queries.shape
    if index.rotated:
        mean_queries = mean_queries @ rotation(head_dim).T
    tables = np.einsum("hgcd,hgd->hgc", index.codebook, mean_queries.reshape(heads, -1, 4))
    tables -= tables.min(axis=2, keepdims=True)
    widest = tables.max(axis=(1, 2), keepdims=True)
    codes = np.rint(tables * (TABLE_MAX / np.where(widest > 0, widest, 1))).astype(np.int16)
    # Two groups at a time: half the look-ups.
    pairs = (codes[:, 0::2, None, :] + codes[:, 1::2, :, None]).reshape(heads, -1)
    return np.stack(
        [pairs[h][index.pair_codes[h]].sum(axis=0, dtype=np.int16) for h in range(heads)]
    )


def _splitmix64(state: int) -> int:
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


# --- The cache of one layer after prefill. --------------------------------------------------------


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest of [Hkv, E], ascending; ties to the lower position."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.sort(order, axis=1)


class PromptLayer:
    """Keys and values of the prompt in one layer, exact and as each codec decodes them."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, last_queries: np.ndarray) -> None:
        """keys, values [P, Hkv, D], all encoded; last_queries [WINDOW, Hq, D]."""
        self.keys = np.ascontiguousarray(keys.transpose(1, 0, 2))
        self.values = np.ascontiguousarray(values.transpose(1, 0, 2))
        heads, _, head_dim = self.keys.shape
        self.queries = last_queries.reshape(len(last_queries), heads, -1, head_dim)
        scores = np.einsum("hd,hed->he", self.queries[-1].mean(axis=1), self.keys)
        self.pinned = best(scores, PINNED)
        self.query_mean = self.queries.mean(axis=(0, 2))  # [Hkv, D]
        self._decoded: dict[tuple[str, str, int], np.ndarray] = {}
        self._indexes: dict[str, Index] = {}

    def decoded(self, codec: Codec) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [Hkv, E, D] as stored; the pinned ones exact."""
        found = []
        for what, exact, bits in (
            ("keys", self.keys, codec.key_bits),
            ("values", self.values, codec.value_bits),
        ):
            key = (what, codec.name, bits)
            if key not in self._decoded:
                if codec.name == "rot_lm":
                    stored = rot_lm(exact, bits)
                else:
                    stored = sign_vq_keys(exact, bits) if what == "keys" else min_max(exact, bits)
                rows = self.pinned[:, :, None]
                np.put_along_axis(stored, rows, np.take_along_axis(exact, rows, 1), 1)
                self._decoded[key] = stored
            found.append(self._decoded[key])
        return found[0], found[1]

    def index(self, codec: Codec) -> Index:
        """What scans read. Does not depend on the bits."""
        if codec.name not in self._indexes:
            self._indexes[codec.name] = make_index(self.keys, rotated=codec.name == "rot_lm")
        return self._indexes[codec.name]

    def candidates(self, codec: Codec, mean_queries: np.ndarray, count: int) -> np.ndarray:
        """Positions [Hkv, count] of the best encoded, unpinned tokens by a scan."""
        scores = scan(self.index(codec), mean_queries)
        np.put_along_axis(scores, self.pinned, -1, 1)
        return best(scores, min(count, scores.shape[1] - PINNED))

    def schedule(self, pipeline: Pipeline) -> np.ndarray:
        """Steps between scans [Hkv]: replay the last prompt queries with each period."""
        heads, length, head_dim = self.keys.shape
        first = length - WINDOW
        positions = np.arange(length)
        share = np.empty((WINDOW, heads, length), dtype=np.float32)  # group-mean probability
        pools = []
        for i in range(WINDOW):
            logits = np.einsum("hgd,hed->hge", self.queries[i], self.keys) / head_dim**0.5
            logits[:, :, positions > first + i] = -np.inf
            share[i] = softmax(logits).mean(axis=1)
            count = pipeline.rerank * pipeline.budget
            pools.append(self.candidates(pipeline.codec, self.queries[i].mean(axis=1), count))
        always = np.zeros((heads, length), dtype=bool)
        np.put_along_axis(always, self.pinned, True, 1)
        always |= positions >= first
        dropped = {}
        for period in PERIODS:
            total = np.zeros(heads)
            for i in range(WINDOW):
                pool = pools[i - i % period]
                seen = np.take_along_axis(share[i], pool, 1)
                seen[pool > first + i] = -1
                chosen = np.take_along_axis(pool, best(seen, pipeline.budget), 1)
                kept = always.copy()
                np.put_along_axis(kept, chosen, True, 1)  # a share beyond position i is 0
                total += 1 - np.where(kept, share[i], 0).sum(axis=1, dtype=np.float64)
            dropped[period] = total / WINDOW
        periods = np.ones(heads, dtype=np.int64)
        for period in PERIODS[1:]:
            periods[dropped[period] - dropped[1] <= pipeline.tolerance] = period
        return periods


class SparseLayer:
    """One pipeline's state in one layer during decode: a tail of its own, and a candidate pool."""

    def __init__(self, prompt: PromptLayer, pipeline: Pipeline, periods: np.ndarray) -> None:
        heads = len(prompt.keys)
        self._prompt = prompt
        self._pipeline = pipeline
        self._periods = periods  # [Hkv]
        self._keys, self._values = prompt.decoded(pipeline.codec)
        self._tail_keys: list[np.ndarray] = []
        self._tail_values: list[np.ndarray] = []
        self._pool: np.ndarray | None = None
        self._last_scan = np.zeros(heads, dtype=np.int64)
        self._last_query = np.zeros_like(prompt.query_mean)
        self._step = 0
        self.scans = 0

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Append k, v [Hkv, D] to the tail, then answer q [Hq, D]; returns [Hq, D]."""
        self._tail_keys.append(k)
        self._tail_values.append(v)
        queries = q.reshape(len(k), -1, q.shape[-1])
        if self._pipeline.budget is None:
            out = self._exact_over(queries, self._keys, self._values)
        else:
            self._update_pool(queries.mean(axis=1))
            out = self._answer(queries)
        self._step += 1
        return out.reshape(q.shape)

    def _update_pool(self, mean_queries: np.ndarray) -> None:
        pipeline = self._pipeline
        due = (self._step - self._last_scan) >= self._periods
        if self._pool is None:
            due[:] = True
        elif pipeline.refresh_cosine is not None:
            now = mean_queries - self._prompt.query_mean
            then = self._last_query - self._prompt.query_mean
            cosine = (now * then).sum(axis=1) / (
                np.linalg.norm(now, axis=1) * np.linalg.norm(then, axis=1)
            )
            due |= cosine < pipeline.refresh_cosine
        if not due.any():
            return
        count = pipeline.rerank * pipeline.budget
        pool = self._prompt.candidates(pipeline.codec, mean_queries, count)
        self._pool = pool if self._pool is None else np.where(due[:, None], pool, self._pool)
        self._last_scan[due] = self._step
        self._last_query[due] = mean_queries[due]
        self.scans += int(due.sum())

    def _answer(self, queries: np.ndarray) -> np.ndarray:
        pool = self._pool
        rows = np.concatenate([self._prompt.pinned, pool], axis=1)
        keys = _rows(self._keys, rows)
        logits = self._logits(queries, keys)  # [Hkv, G, pinned + pool + tail]
        pinned, last = PINNED, PINNED + pool.shape[1]
        if self._pipeline.rerank > 1:
            scores = softmax(logits).mean(axis=1)[:, pinned:last]
            chosen = best(scores, self._pipeline.budget)
            rows = np.concatenate(
                [self._prompt.pinned, np.take_along_axis(pool, chosen, 1)], axis=1
            )
            at = chosen[:, None, :] + pinned
            middle = np.take_along_axis(logits, np.repeat(at, logits.shape[1], 1), 2)
            logits = np.concatenate([logits[..., :pinned], middle, logits[..., last:]], axis=2)
        values = np.concatenate([_rows(self._values, rows), np.stack(self._tail_values, 1)], axis=1)
        return softmax(logits) @ values

    def _exact_over(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        logits = self._logits(queries, keys)
        split = keys.shape[1]
        shares = softmax(logits)
        return shares[..., :split] @ values + shares[..., split:] @ np.stack(self._tail_values, 1)

    def _logits(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """[Hkv, G, D] x ([Hkv, n, D], then the tail) -> [Hkv, G, n + tail]."""
        scaled = queries * np.float32(queries.shape[-1] ** -0.5)
        tail = np.stack(self._tail_keys, 1)
        return np.concatenate(
            [scaled @ keys.transpose(0, 2, 1), scaled @ tail.transpose(0, 2, 1)], axis=2
        )


class DenseLayer(SparseLayer):
    """Exact attention over everything."""

    def __init__(self, prompt: PromptLayer) -> None:
        self._prompt = prompt
        self._tail_keys = []
        self._tail_values = []
        self.scans = 0

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """As SparseLayer."""
        self._tail_keys.append(k)
        self._tail_values.append(v)
        queries = q.reshape(len(k), -1, q.shape[-1])
        return self._exact_over(queries, self._prompt.keys, self._prompt.values).reshape(q.shape)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _rows(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """x [Hkv, E, D], rows [Hkv, n] -> [Hkv, n, D]."""
    return x[np.arange(len(x))[:, None], rows]
