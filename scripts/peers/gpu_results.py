#!/usr/bin/env python3
"""Joins what scripts/bench_gpu measured: rows with the best dense peer of their shape beside them.

    scripts/peers/gpu_results.py FOLDER docs/results

FOLDER holds peers.json (scripts/bench_peers), decode.json, encode.json and scan.json (the benches).
Written are docs/results/<gpu>/decode.json, encode.json, scan.json and decode.svg.
"""

import json
import math
import os
import pathlib
import re
import sys

import environment

COMMAND = "scripts/bench_gpu"


def folder_name(gpu):
    """NVIDIA H100 80GB HBM3 -> h100"""
    words = gpu.lower().replace("nvidia", "").split()
    return "-".join(words[:2]) if words[0] in ("geforce", "rtx") else words[0]


def load(path):
    return json.loads(path.read_text()) if path.exists() else None


def rounded(x):
    return float(f"{x:.4g}") if isinstance(x, float) else x


def write(path, result):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"written: {path}")


def describe_environment(bench, peers):
    found = environment.environment(".", COMMAND, bench["environment"].get("compiler", ""), {})
    # Of the machine that ran the bench, should that be another.
    machine = bench["environment"]
    found.update({name: machine[name] for name in ("cpu", "cores", "os") if name in machine})
    found["gpu"] = peers["gpu"]
    found["driver"] = peers["versions"].get("driver", "")
    found["peers"] = peers["versions"]
    if "SIKV_COMMIT" not in os.environ and bench["environment"].get("commit", "unknown") != "unknown":
        found["commit"] = bench["environment"]["commit"]
    return found


def is_dense(row):
    return row["budget"] is None


def us(row):
    """Scans that happen in some steps only are judged by the mean."""
    return row["mean_us"] if "scan_every" in row["pipeline"] else row["median_us"]


def join(bench, peers):
    dense = {}
    for row in peers["rows"]:
        if "median_us" in row:
            dense.setdefault((row["batch"], row["context"]), []).append((row["median_us"], row["peer"]))
    for row in filter(is_dense, bench["rows"]):
        key = (row["batch"], row["context"])
        dense.setdefault(key, []).append((row["median_us"], "sikv " + row["pipeline"]))
    rows = []
    for row in bench["rows"]:
        best_us, best = min(dense[row["batch"], row["context"]])
        result = {name: rounded(value) for name, value in row.items() if name != "stages_us"}
        result["stages_us"] = {name: rounded(x) for name, x in row.get("stages_us", {}).items()}
        result.update(dense_best=best, dense_best_us=best_us, speedup=rounded(best_us / us(row)))
        rows.append(result)
    return rows


# ---- the plot -----------------------------------------------------------------------------------

WIDTH, HEIGHT = 920, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 390, 30, 50
COLOURS = [
    "#1f6feb", "#2da44e", "#bf8700", "#cf222e", "#8250df", "#8c959f", "#24292f",
    "#58a6ff", "#7ee787", "#e3b341", "#db61a2", "#1b7c83",
]
OPTIONS = {"rerank {}": r"rerank=(\d+)", "scan every {}": r"scan_every=(\d+)", "refresh": "refresh_cosine"}


def dense_bytes(row):
    """Of fp16 K and V."""
    return 4.0 * row["batch"] * row["context"] * row["kv_heads"] * row["head_dim"]


def roofline(rows, peers, copy_tb_per_s):
    """Time of a step over the bytes it must move, on logarithmic axes; the line is the copy rate."""
    names = []
    points = []
    for row in rows:
        name = row["pipeline"].split(" > ")
        options = [
            text.format(*found.groups())
            for text, pattern in OPTIONS.items()
            if (found := re.search(pattern, row["pipeline"]))
        ]
        codecs = name[0].replace("rot_lm(layout=lines)+rot_lm(layout=lines)", "rot_lm+rot_lm lines")
        label = ", ".join([codecs] + options)
        if is_dense(row):
            label = "dense_attention"
        points.append((label, row["bytes"], us(row)))
    for best_us, size in {(row["dense_best_us"], dense_bytes(row)) for row in rows}:
        points.append(("best dense", size, best_us))
    for label, _, _ in points:
        if label not in names:
            names.append(label)
    xs, ys = [p[1] / 1e6 for p in points], [p[2] for p in points]
    x0, x1 = math.log10(min(xs) / 1.5), math.log10(max(xs) * 1.5)
    y0, y1 = math.log10(min(ys) / 2), math.log10(max(ys) * 1.5)

    def at(mb, time):
        x = LEFT + (math.log10(mb) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (math.log10(time) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]

    def text(x, y, words, anchor="middle", extra=""):
        svg.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#24292f"{extra}>{words}</text>')

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for power in range(math.ceil(x0), math.floor(x1) + 1):
        x, _ = at(10.0**power, 10**y0)
        svg.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}" stroke="#d0d7de"/>')
        text(x, bottom + 18, f"{10.0**power:g}")
    for power in range(math.ceil(y0), math.floor(y1) + 1):
        _, y = at(10**x0, 10.0**power)
        svg.append(f'<line x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="#d0d7de"/>')
        text(LEFT - 8, y + 4, f"{10.0**power:g}", "end")
    # us = MB / (TB/s), within the frame.
    first, last = max(x0, y0 + math.log10(copy_tb_per_s)), min(x1, y1 + math.log10(copy_tb_per_s))
    (ax, ay), (bx, by) = (at(10**x, 10**x / copy_tb_per_s) for x in (first, last))
    svg.append(f'<line x1="{ax}" y1="{ay}" x2="{bx}" y2="{by}" stroke="#24292f" stroke-dasharray="5 4"/>')
    for label, size, time in points:
        x, y = at(size / 1e6, time)
        colour = COLOURS[names.index(label) % len(COLOURS)]
        svg.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}" fill-opacity="0.8"/>')
    svg.append(f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" '
               'fill="none" stroke="#24292f"/>')
    text((LEFT + right) / 2, HEIGHT - 12, "MB that a step must move")
    text(18, (TOP + bottom) / 2, "us per step and layer",
         extra=f' transform="rotate(-90 18 {(TOP + bottom) / 2})"')
    text((LEFT + right) / 2, 18, f"{peers['gpu']}: dashed, the copy rate of {copy_tb_per_s:.2f} TB/s")
    for i, label in enumerate(names):
        y = TOP + 16 + 20 * i
        svg.append(f'<circle cx="{right + 18}" cy="{y - 4}" r="4.5" fill="{COLOURS[i % len(COLOURS)]}"/>')
        text(right + 30, y, label, "start")
    svg.append("</svg>")
    return "\n".join(svg) + "\n"


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(pathlib.Path, sys.argv[1:])
    peers, decode, encode, scan = (
        load(source / f"{name}.json") for name in ("peers", "decode", "encode", "scan")
    )
    if peers is None:
        sys.exit(f"gpu_results: {source} has no peers.json")
    target /= folder_name(peers["gpu"])
    target.mkdir(parents=True, exist_ok=True)
    if decode and decode["rows"]:
        rows = join(decode, peers)
        copy = max(peers["copy"]["tb_per_s"], rounded(decode.get("copy_tb_per_s", 0.0)))
        write(target / "decode.json", {
            "environment": describe_environment(decode, peers),
            "what": "one decode step of attention of one layer, from q ready to out written; fp16, "
            "median and mean over steps of one graph of all layers, whose tokens leave the L2 "
            "between two uses; bytes: what a step must move",
            "copy_tb_per_s": copy,
            "rows": rows,
            "dense": peers["rows"],
        })
        (target / "decode.svg").write_text(roofline(rows, peers, copy))
        for row in rows:
            print(f"{row['batch']:3d} x {row['context']:6d} {row.get('budget_text', ''):>6} {us(row):8.1f} us "
                  f"{row['speedup']:6.1f}x {row['pipeline']}")
    if encode and (encode["rows"] or encode["append"]):
        write(target / "encode.json", {
            "environment": describe_environment(encode, peers),
            "what": "fit and encode of fp16 K and V of whole prompts; bytes: K and V read once, codes "
            "written once; append: one token per sequence, per layer, page encodes included in the mean",
            "copy_tb_per_s": rounded(encode["copy_tb_per_s"]),
            "rows": [{k: rounded(v) for k, v in row.items()} for row in encode["rows"]],
            "append": [{k: rounded(v) for k, v in row.items()} for row in encode["append"]],
        })
    # Its bench does not say what it runs on: another of the run does.
    if scan and (decode or encode):
        copy = max(peers["copy"]["tb_per_s"], scan["copy_tb_per_s"])
        write(target / "scan.json", {
            "environment": describe_environment(decode or encode, peers),
            "what": "the scan of rot_lm keys alone, 8 KV heads, D 128: 6-bit tables, histogram, scores "
            "written to memory; the selector has 512 threads a block; bytes: codes, and scores of two "
            "bytes",
            "rows": [
                {k: rounded(v) for k, v in row.items()}
                | {"copy_tb_per_s": rounded(copy), "share_of_copy": rounded(row["tb_per_s"] / copy)}
                for row in scan["rows"]
            ],
        })


if __name__ == "__main__":
    main()
