#!/usr/bin/env python3
"""Times dense attention's peer: one decode step of PyTorch's scaled_dot_product_attention on the CPU.

One query position, Hkv KV heads of D channels, G query heads each, no mask. Every type is tried with
grouped-query attention as PyTorch offers it (enable_gqa), folded (the G heads of a KV head as G
query rows of one head, which reads each K and V once), and folded without the fused kernel (matmul,
softmax, matmul). Several copies of K and V are used in turn,
so that every step finds its tokens outside the caches, as a decode step does.
"""

import argparse
import json
import os
import statistics
import sys
import time

# These force a kernel or a cache size on OpenBLAS that may not be this machine's.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)

import torch
from torch.nn.functional import scaled_dot_product_attention

PEERS = {
    "folded": "SDPA, GQA folded into query rows",
    "enable_gqa": "SDPA, enable_gqa",
    "matmul": "matmul, softmax, matmul",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def attend(layout, q, k, v):
    """q [Hkv, G, D], k and v [Hkv, T, D] -> [Hkv, G, D]."""
    heads, group, dim = q.shape
    if layout == "folded":
        return scaled_dot_product_attention(q[None], k[None], v[None])[0]
    if layout == "matmul":
        return torch.softmax((q * dim**-0.5) @ k.mT, -1) @ v
    out = scaled_dot_product_attention(
        q.reshape(1, heads * group, 1, dim), k[None], v[None], enable_gqa=True
    )
    return out.reshape(heads, group, dim)


def check(layout, dtype, args):
    """Against softmax(q k / sqrt(D)) v in fp64, on few tokens."""
    shape = (args.kv_heads, 1000, args.head_dim)
    k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    q = torch.randn(args.kv_heads, args.group, args.head_dim).to(dtype)
    out = attend(layout, q, k, v).double()
    weights = torch.softmax(q.double() @ k.double().mT / args.head_dim**0.5, -1)
    error = (out - weights @ v.double()).abs().max().item()
    if not error < 0.02:
        sys.exit(f"torch_decode: {layout} {dtype} is off by {error}")


def time_steps(layout, copies, queries, seconds):
    for k, v in copies:
        attend(layout, queries[0], k, v)
    times = []
    deadline = time.perf_counter() + seconds
    while len(times) < 9 or time.perf_counter() < deadline:
        k, v = copies[len(times) % len(copies)]
        q = queries[len(times) % len(queries)]
        begin = time.perf_counter_ns()
        attend(layout, q, k, v)
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=2.0, help="per type and layout")
    parser.add_argument("--json", help="also write the result here")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    rows = []
    for name in args.dtypes:
        dtype = DTYPES[name]
        shape = (args.kv_heads, args.context, args.head_dim)
        copies = [
            (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(2)
        ]
        queries = [
            torch.randn(args.kv_heads, args.group, args.head_dim).to(dtype) for _ in range(8)
        ]
        for layout in PEERS:
            check(layout, dtype, args)
            times = time_steps(layout, copies, queries, args.seconds)
            row = {
                "peer": f"torch {torch.__version__}, {name}, {PEERS[layout]}",
                "context": args.context,
                "median_us": round(statistics.median(times), 1),
                "least_us": round(min(times), 1),
                "runs": len(times),
            }
            rows.append(row)
            print(f"{row['median_us']:10.1f} us  {row['peer']}", file=sys.stderr)
        del copies
    result = {"version": torch.__version__, "threads": args.threads, "rows": rows}
    print(json.dumps(result))
    if args.json:
        with open(args.json, "w") as out:
            json.dump(result, out)


if __name__ == "__main__":
    main()
