#!/usr/bin/env python3
"""Times the CPU scan's peer: FAISS IndexPQFastScan (PQ32x4fs), inner product, one thread.

The same 16 bytes of code per vector as an index plane at D = 128. Several copies of the index are
searched in turn, so that every search finds its codes outside the caches, as a decode step does:
between two scans of one head, all other heads of all other layers were scanned.
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

import faiss
import numpy

DIM = 128
CODE_BYTES = 16


def build(codes, copies, rng):
    index = faiss.index_factory(DIM, "PQ32x4fs", faiss.METRIC_INNER_PRODUCT)
    index.train(rng.standard_normal((4096, DIM), dtype=numpy.float32))
    for begin in range(0, codes, 65536):
        count = min(65536, codes - begin)
        index.add(rng.standard_normal((count, DIM), dtype=numpy.float32))
    return [index] + [faiss.clone_index(index) for _ in range(copies - 1)]


def time_search(indexes, queries, k, seconds):
    for i, index in enumerate(indexes):
        index.search(queries[i : i + 1], k)
    times = []
    deadline = time.perf_counter() + seconds
    run = 0
    while len(times) < 15 or time.perf_counter() < deadline:
        index = indexes[run % len(indexes)]
        query = queries[run % len(queries) : run % len(queries) + 1]
        begin = time.perf_counter_ns()
        index.search(query, k)
        times.append((time.perf_counter_ns() - begin) / 1e3)
        run += 1
    return statistics.median(times), len(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", type=int, nargs="+", default=[131072, 1048576])
    parser.add_argument("--k", type=int, nargs="+", default=[100, 2048, 9830])
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--footprint-mb", type=int, default=256, help="code bytes rotated through")
    parser.add_argument("--json", help="also write the result here")
    args = parser.parse_args()

    faiss.omp_set_num_threads(1)
    rng = numpy.random.default_rng(1)
    queries = rng.standard_normal((256, DIM), dtype=numpy.float32)
    rows = []
    for codes in args.codes:
        copies = max(2, (args.footprint_mb << 20) // (codes * CODE_BYTES))
        indexes = build(codes, copies, rng)
        for k in args.k:
            median, runs = time_search(indexes, queries, k, args.seconds)
            rows.append({"codes": codes, "k": k, "median_us": round(median, 2), "runs": runs})
            print(f"faiss {codes} codes, k {k}: {median:.1f} us", file=sys.stderr)
        del indexes
    result = {"peer": "faiss-cpu PQ32x4fs, 1 thread", "version": faiss.__version__, "rows": rows}
    print(json.dumps(result))
    if args.json:
        with open(args.json, "w") as out:
            json.dump(result, out)


if __name__ == "__main__":
    main()
