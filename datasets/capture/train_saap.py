#!/usr/bin/env python3
"""Trains the query networks of the selector `saap` on a trace with the queries of all positions.

    train_saap.py --trace TRACE --out FILE [--clusters 256] [--hidden 256] [--distance 512] ...

Per layer and KV head: spherical k-means on the keys, rope undone, of norm 1. Per query head: a network
D -> hidden (ReLU) -> clusters, trained so that its softmax is the share of the query's attention that
each bucket holds, among the keys that lie `--distance` or more positions before it (cross-entropy,
Adam). The trace has to hold the layers that the selector will see, in the same order; capture it with
`--queries all`, of a text that is not the one to be judged on.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from pathlib import Path

import numpy as np

from trace_file import CaptureError, LayerTrace, TraceInfo, read_trace

ROPES = {"kept": 0, "half": 1, "interleaved": 2}


def undo_rope(x: np.ndarray, positions: np.ndarray, info: TraceInfo, rope: str) -> np.ndarray:
    """x [n, D] of these positions [n], as it was before they turned it."""
    if rope == "kept":
        return x
    half = info.head_dim // 2
    angles = positions[:, None] * info.rope_theta ** (-2.0 * np.arange(half) / info.head_dim)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    out = np.empty_like(x)
    a, b = (slice(half), slice(half, None)) if rope == "half" else (slice(0, None, 2), slice(1, None, 2))
    out[:, a] = cos * x[:, a] + sin * x[:, b]
    out[:, b] = cos * x[:, b] - sin * x[:, a]
    return out


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-20)


def spherical_kmeans(
    x: np.ndarray, clusters: int, iterations: int, random: np.random.Generator
) -> np.ndarray:
    """Centroids [clusters, D] of norm 1; a cluster that loses its last row gets one at random."""
    centroids = x[random.choice(len(x), clusters, replace=False)]
    for _ in range(iterations):
        nearest = np.argmax(x @ centroids.T, axis=1)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, x)
        empty = np.bincount(nearest, minlength=clusters) == 0
        sums[empty] = x[random.choice(len(x), int(empty.sum()))]
        centroids = unit(sums)
    return centroids


def bucket_mass(
    q: np.ndarray, positions: np.ndarray, keys: np.ndarray, buckets: np.ndarray, clusters: int,
    distance: int,
) -> np.ndarray:
    """[n, clusters]: the share of each query's attention to far keys that lies in each bucket."""
    logits = q @ keys.T * float(q.shape[1]) ** -0.5
    far = np.arange(len(keys))[None, :] <= (positions - distance)[:, None]
    logits = np.where(far, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    one_hot = np.zeros((len(keys), clusters), np.float32)
    one_hot[np.arange(len(keys)), buckets] = 1
    mass = weights.astype(np.float32) @ one_hot
    return mass / mass.sum(axis=1, keepdims=True)


class Network:
    """D -> hidden -> clusters with Adam's moments."""

    def __init__(self, sizes: tuple[int, int, int], random: np.random.Generator) -> None:
        dim, hidden, clusters = sizes
        self.parameters = [
            random.normal(0, np.sqrt(2 / dim), (dim, hidden)).astype(np.float32),
            np.zeros(hidden, np.float32),
            random.normal(0, np.sqrt(1 / hidden), (hidden, clusters)).astype(np.float32),
            np.zeros(clusters, np.float32),
        ]
        self.first = [np.zeros_like(p) for p in self.parameters]
        self.second = [np.zeros_like(p) for p in self.parameters]
        self.steps = 0

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w1, b1, w2, b2 = self.parameters
        hidden = np.maximum(x @ w1 + b1, 0)
        z = hidden @ w2 + b2
        p = np.exp(z - z.max(axis=1, keepdims=True))
        return hidden, p / p.sum(axis=1, keepdims=True)

    def train(self, x: np.ndarray, y: np.ndarray, rate: float) -> None:
        hidden, p = self.forward(x)
        dz = (p - y) / len(x)
        dh = (dz @ self.parameters[2].T) * (hidden > 0)
        gradients = [x.T @ dh, dh.sum(axis=0), hidden.T @ dz, dz.sum(axis=0)]
        self.steps += 1
        for i, gradient in enumerate(gradients):
            self.first[i] = 0.9 * self.first[i] + 0.1 * gradient
            self.second[i] = 0.999 * self.second[i] + 0.001 * gradient**2
            first = self.first[i] / (1 - 0.9**self.steps)
            second = self.second[i] / (1 - 0.999**self.steps)
            self.parameters[i] -= rate * first / (np.sqrt(second) + 1e-8)


def recall(scores: np.ndarray, mass: np.ndarray, visited: int) -> float:
    """Mean share of the mass in the `visited` buckets of highest score."""
    top = np.argpartition(-scores, visited - 1, axis=1)[:, :visited]
    return float(np.take_along_axis(mass, top, axis=1).sum(axis=1).mean())


def train_layer(
    layer: LayerTrace, info: TraceInfo, args: argparse.Namespace, random: np.random.Generator
) -> tuple[list[np.ndarray], list[tuple[float, float]]]:
    """The layer's part of the file, and per query head bucket recall of centroids and network."""
    tokens = len(layer.k)
    positions = np.arange(args.distance, tokens)
    held_out = positions >= tokens - tokens // 16
    group = info.num_query_heads // info.num_kv_heads
    centroids, networks, recalls = [], [], []
    for h in range(info.num_kv_heads):
        keys = layer.k[:, h].astype(np.float32)
        routed = unit(undo_rope(keys, np.arange(tokens), info, args.rope))
        centroids.append(spherical_kmeans(routed, args.clusters, args.iterations, random))
        buckets = np.argmax(routed @ centroids[h].T, axis=1)
        for head in range(h * group, (h + 1) * group):
            q = layer.q[positions, head].astype(np.float32)
            x = undo_rope(q, positions, info, args.rope)
            y = bucket_mass(q, positions, keys, buckets, args.clusters, args.distance)
            network = Network((info.head_dim, args.hidden, args.clusters), random)
            # Inputs of unit spread train alike in all heads; the scale goes into the first layer.
            spread = x.std()
            seen = np.flatnonzero(~held_out)
            for epoch in range(args.epochs):
                random.shuffle(seen)
                rate = args.rate * 0.5 * float(1 + np.cos(np.pi * epoch / args.epochs))
                for batch in np.array_split(seen, max(len(seen) // 64, 1)):
                    network.train(x[batch] / spread, y[batch], rate)
            network.parameters[0] /= spread
            _, p = network.forward(x[held_out])
            recalls.append((
                recall(x[held_out] @ centroids[h].T, y[held_out], args.visited),
                recall(p, y[held_out], args.visited),
            ))
            networks.append(network)
    parts = [np.stack(centroids)] + [p for network in networks for p in network.parameters]
    return parts, recalls


def run(args: argparse.Namespace) -> None:
    trace = read_trace(args.trace)
    info = trace.info
    if not info.rope_applied:
        raise CaptureError(f"{args.trace} holds keys before rope; capture one after it")
    if args.rope is None:
        args.rope = info.rope_layout
    tokens = len(trace.tokens)
    if args.distance < 1 or tokens - args.distance < 1024:
        raise CaptureError(
            f"--distance {args.distance} leaves {tokens - args.distance} of {tokens} positions to "
            "train on, fewer than 1024; capture more tokens or give a smaller distance")
    for number, layer in trace.layers.items():
        if layer.first_query_position > args.distance:
            raise CaptureError(
                f"layer {number} has queries from position {layer.first_query_position} on; capture "
                "the trace with --queries all")
    random = np.random.default_rng(args.seed)
    header = struct.pack(
        "<8I", len(trace.layers), info.num_kv_heads, info.num_query_heads, info.head_dim,
        args.clusters, args.hidden, ROPES[args.rope], 0)
    partial = args.out.with_name(args.out.name + ".partial")
    with open(partial, "wb") as file:
        file.write(b"SIKVSAP1" + header)
        for number, layer in trace.layers.items():
            start = time.monotonic()
            # Queries are looked up by position.
            padding = np.zeros((layer.first_query_position, *layer.q.shape[1:]), layer.q.dtype)
            whole = LayerTrace(layer.k, layer.v, np.concatenate([padding, layer.q]), 0)
            parts, recalls = train_layer(whole, info, args, random)
            for part in parts:
                file.write(np.ascontiguousarray(part, "<f4").tobytes())
            centroid, network = np.mean(recalls, axis=0)
            print(f"layer {number}: mass in {args.visited} of {args.clusters} buckets, last 1/16 of the "
                  f"text: {centroid:.3f} by centroids, {network:.3f} by networks "
                  f"({time.monotonic() - start:.0f} s)", flush=True)
    partial.rename(args.out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--distance", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=20, help="of k-means")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--visited", type=int, default=32, help="buckets of the printed recall")
    parser.add_argument("--rope", choices=list(ROPES), help="default: the trace's layout, undone")
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args(arguments))
    except CaptureError as error:
        print(f"train_saap.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
