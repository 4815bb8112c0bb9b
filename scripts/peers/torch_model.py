#!/usr/bin/env python3
"""Times transformers as the peer of `sikv throughput --model random`: Llama-3.1-8B with random weights.

Decode: one token for each of `batch` sequences whose static cache holds `context` random tokens, with
PyTorch's scaled_dot_product_attention, eager and, with --compile, as transformers recommends
(torch.compile, reduce-overhead; minutes); the batch is what the largest dense cache holds on 80 GB, or less where
that does not fit. TTFT: the prefill of one sequence into a dynamic cache, which takes the fused causal
kernels, up to its first token.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SHAPES = ["15x32768", "7x65536", "3x131072"]
LLAMA_3_1_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072 + 1024,
    "rope_theta": 500000.0,
    "use_cache": True,
}


def make_model():
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**LLAMA_3_1_8B), attn_implementation="sdpa", dtype=torch.float16
        )
    return model.eval()


def filled_cache(model, batch, context, room):
    config = model.config
    cache = StaticCache(config=config, max_cache_len=context + room)
    cache.early_initialization(
        batch,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
        torch.float16,
        torch.device("cuda"),
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        if hasattr(layer, "cumulative_length"):  # transformers 5, which ignores cache_position
            layer.cumulative_length.fill_(context)
    return cache


def step_times(forward, model, batch, context, steps, warmup):
    """Seconds of each step behind `warmup` others."""
    cache = filled_cache(model, batch, context, steps + warmup)
    token = torch.ones(batch, 1, dtype=torch.long, device="cuda")
    times = []
    for step in range(warmup + steps):
        position = torch.full((1,), context + step, dtype=torch.long, device="cuda")
        torch.cuda.synchronize()
        begun = time.monotonic()
        logits = forward(
            input_ids=token,
            past_key_values=cache,
            cache_position=position,
            position_ids=position.expand(batch, 1),
        ).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        torch.cuda.synchronize()
        times.append(time.monotonic() - begun)
    return times[warmup:]


def measure_decode(model, batch, context, args, compiled):
    forward = model.forward
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(model.forward, mode="reduce-overhead")
    row = {"kind": "decode", "context": context, "compiled": compiled}
    while batch > 0:
        try:
            times = step_times(forward, model, batch, context, args.steps, args.warmup)
            step = statistics.fmean(times)
            row.update(batch=batch, step_ms=round(1e3 * step, 3), tokens_per_s=round(batch / step, 2))
            return row
        except torch.cuda.OutOfMemoryError:
            pass  # its traceback holds the cache up to here
        torch.cuda.empty_cache()
        batch -= 1
    row["error"] = "not one sequence fits"
    return row


def measure_first_token(model, context):
    tokens = torch.randint(0, model.config.vocab_size, (1, context), device="cuda")
    times = []
    for _ in range(2):
        torch.cuda.synchronize()
        begun = time.monotonic()
        model(input_ids=tokens, past_key_values=DynamicCache(), logits_to_keep=1).logits.argmax(-1)
        torch.cuda.synchronize()
        times.append(time.monotonic() - begun)
    return {"kind": "first_token", "batch": 1, "context": context, "first_token_s": round(times[-1], 4)}


def attempt(row, work):
    """What a peer cannot do is a row that says so, not the end of the others."""
    try:
        row = work()
    except Exception as error:  # noqa: BLE001
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    torch.cuda.empty_cache()
    print(json.dumps(row), file=sys.stderr)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="batch x context")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape]
    found = environment.environment(
        ROOT,
        "scripts/bench_gpu_model",
        "",
        {"torch": torch.__version__, "transformers": transformers.__version__},
    )
    found["gpu"] = torch.cuda.get_device_name()
    rows = []

    def add(row):
        rows.append(row)
        args.json.write_text(json.dumps({"environment": found, "rows": rows}, indent=1) + "\n")

    with torch.inference_mode():
        model = make_model()
        for batch, context in shapes:
            add(attempt({"kind": "first_token", "context": context}, lambda: measure_first_token(model, context)))
            for compiled in [False, True] if args.compile else [False]:
                add(
                    attempt(
                        {"kind": "decode", "context": context, "compiled": compiled},
                        lambda: measure_decode(model, batch, context, args, compiled),
                    )
                )


main()
