#!/usr/bin/env python3
"""Compare two KV traces: are they the same capture, up to rounding?

Root attributes, tokens, layers and shapes must be equal. For every array the largest difference is
reported as a share of the array's largest magnitude:

    error = max |a - b| / max |a|

Two correct fp32 forward passes differ in the order of their sums (about 1e-6) and, where such a
difference straddles a rounding boundary, by one fp16 step, at most 2^-10 = 9.8e-4 of the largest
magnitude. The default tolerance is that step.

Exit code 0: same, 1: different, 2: a file cannot be read.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np

import cli
from trace_file import Trace, read_trace

EXIT_DIFFERENT = 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="compare_traces.py", description="Compare two KV traces up to rounding."
    )
    parser.add_argument("expected", type=Path)
    parser.add_argument("actual", type=Path)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=2.0**-10,
        metavar="X",
        help="largest difference as a share of the largest magnitude (default: 2^-10)",
    )
    options = parser.parse_args(arguments)
    problems = compare(read_trace(options.expected), read_trace(options.actual), options.tolerance)
    for problem in problems:
        print(f"DIFFERENT: {problem}")
    if not problems:
        print(f"same up to {options.tolerance:.2g} of each array's largest magnitude")
    return EXIT_DIFFERENT if problems else 0


def compare(expected: Trace, actual: Trace, tolerance: float) -> list[str]:
    """Print the differences array by array; return what is not the same, one sentence each."""
    problems = [
        f"attribute {name} is {asdict(actual.info)[name]!r}, expected {value!r}"
        for name, value in asdict(expected.info).items()
        if asdict(actual.info)[name] != value
    ]
    if not np.array_equal(expected.tokens, actual.tokens):
        problems.append("tokens are not equal")
    if list(expected.layers) != list(actual.layers):
        problems.append(f"layers are {list(actual.layers)}, expected {list(expected.layers)}")

    print("array           max |a|     max |a-b|   error      values that differ")
    for layer in expected.layers.keys() & actual.layers.keys():
        for name in ("k", "v", "q", "w_o"):
            a = getattr(expected.layers[layer], name)
            b = getattr(actual.layers[layer], name)
            label = f"layers/{layer}/{name}"
            if a is None and b is None:
                continue
            if a is None or b is None or a.shape != b.shape:
                problems.append(f"{label} has not the same shape in both")
                continue
            a, b = a.astype(np.float64), b.astype(np.float64)
            largest = np.abs(a).max()
            difference = np.abs(a - b).max()
            error = difference / largest if largest else difference
            print(
                f"{label:<15} {largest:<11.5g} {difference:<11.3g} {error:<10.2g} "
                f"{np.mean(a != b):.3%}"
            )
            if not error <= tolerance:
                problems.append(f"{label} is off by {error:.2g}, tolerance {tolerance:.2g}")
    return problems


if __name__ == "__main__":
    cli.run_command(main)
