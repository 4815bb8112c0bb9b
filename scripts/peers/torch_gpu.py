#!/usr/bin/env python3
"""Times dense attention's peers on a GPU: one decode step of one layer, and the card's copy rate.

One query position of every sequence, Hkv KV heads of D channels, G query heads each, fp16, no mask.
Peers are the backends of PyTorch's scaled_dot_product_attention, with grouped-query attention as they
offer it (enable_gqa) and folded (the G heads of a KV head as G query rows, which reads K and V once),
and FlashInfer's paged decode where it is installed. Each peer is compared with fp64 first. The steps
of several layers are captured in one CUDA graph, so many that more than --cold-mb lie between two
uses of a layer's tokens; a time is a replay's divided by its layers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    torch, missing = None, error  # --help works all the same

# Members of SDPBackend.
BACKENDS = {"FlashAttention": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
SHAPES = ["8x131072", "16x65536", "8x32768", "1x131072", "1x32768"]


def sdpa(backend, folded):
    """A function of q [B, Hkv, G, D], k and v [B, Hkv, T, D] -> [B, Hkv, G, D]."""

    def attend(q, k, v):
        batch, heads, group, dim = q.shape
        with sdpa_kernel(backend):
            if folded:
                return scaled_dot_product_attention(q, k, v)
            out = scaled_dot_product_attention(
                q.reshape(batch, heads * group, 1, dim), k, v, enable_gqa=True
            )
            return out.reshape(batch, heads, group, dim)

    return attend


def flashinfer_decode(tensor_cores):
    """FlashInfer's batch decode over pages of 16 tokens that lie in order."""
    import flashinfer

    plans = {}

    def attend(q, k, v):
        batch, heads, group, dim = q.shape
        page = 16
        pages = k.shape[2] // page
        key = (batch, k.shape[2])
        if key not in plans:
            workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=tensor_cores
            )
            starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages
            wrapper.plan(
                starts,
                torch.arange(batch * pages, dtype=torch.int32, device="cuda"),
                torch.full((batch,), page, dtype=torch.int32, device="cuda"),
                heads * group,
                heads,
                dim,
                page,
                q_data_type=q.dtype,
                kv_data_type=k.dtype,
            )
            plans[key] = wrapper

        # A page is [Hkv, 16, D]: the same bytes as k in another order, which no time depends on.
        def paged(x):
            return x.view(batch * pages, heads, page, dim)

        out = plans[key].run(q.reshape(batch, heads * group, dim), (paged(k), paged(v)))
        return out.view(batch, heads, group, dim)

    attend.order_of_tokens = "pages"
    return attend


def peers():
    found = {}
    for name, backend in BACKENDS.items():
        found[f"{name}, GQA folded into query rows"] = sdpa(getattr(SDPBackend, backend), folded=True)
        found[f"{name}, enable_gqa"] = sdpa(getattr(SDPBackend, backend), folded=False)
    version = f"PyTorch {torch.__version__} SDPA"
    found = {f"{version}, {name}": attend for name, attend in found.items()}
    try:
        import flashinfer
    except ImportError:
        return found
    for name, tensor_cores in (("CUDA cores", False), ("tensor cores", True)):
        found[f"FlashInfer {flashinfer.__version__} decode, {name}"] = flashinfer_decode(tensor_cores)
    return found


def check(attend, args):
    """Relative error against softmax(q k / sqrt(D)) v in fp64, on few tokens."""
    shape = (2, args.kv_heads, 1024, args.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(2, args.kv_heads, args.group, args.head_dim, device="cuda", dtype=torch.float16)
    out = attend(q, k, v).double()
    if getattr(attend, "order_of_tokens", "") == "pages":

        def in_order(x):
            pages = x.view(2, -1, args.kv_heads, 16, args.head_dim)
            return pages.transpose(1, 2).reshape(shape)

        k, v = in_order(k), in_order(v)
    weights = torch.softmax(q.double() @ k.double().mT / args.head_dim**0.5, -1)
    expected = weights @ v.double()
    return ((out - expected).norm() / expected.norm()).item()


WARM_SECONDS = 0.05  # as the project's own benches


def event_times(work, runs):
    """Milliseconds of each call of work()."""
    begun = time.monotonic()
    while time.monotonic() - begun < WARM_SECONDS:
        work()
        torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in times]


def replay_times(run_layers, replays):
    """Milliseconds of each replay of what run_layers() launches, as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_layers()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_layers()
    return event_times(graph.replay, replays)


def summary(times_ms, layers, bytes_per_layer):
    us = sorted(1e3 * t / layers for t in times_ms)
    median = statistics.median(us)
    return {
        "median_us": round(median, 2),
        "p95_us": round(us[min(len(us) - 1, int(0.95 * len(us)))], 2),
        "bytes": bytes_per_layer,
        "tb_per_s": round(bytes_per_layer / median / 1e6, 3),
    }


def driver_version():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def measure_copy(runs):
    """A device-to-device copy of 1 GiB, bytes read and written; not recorded, as that slows it."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = event_times(lambda: target.copy_(source), runs)
    return summary(times, 1, 2 * source.numel())


def measure_shape(batch, context, args):
    bytes_per_layer = 2 * 2 * batch * context * args.kv_heads * args.head_dim
    layers = max(2, -(-(args.cold_mb << 20) // bytes_per_layer))
    shape = (batch, args.kv_heads, context, args.head_dim)
    kv = [
        tuple(torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2))
        for _ in range(layers)
    ]
    q = torch.randn(
        batch, args.kv_heads, args.group, args.head_dim, device="cuda", dtype=torch.float16
    )
    rows = []
    for name, attend in peers().items():
        row = {"batch": batch, "context": context, "peer": name}
        try:
            row["check"] = float(f"{check(attend, args):.2g}")
            if not row["check"] < 5e-3:
                raise RuntimeError(f"off by {row['check']}")
            times = replay_times(lambda: [attend(q, k, v) for k, v in kv], args.replays)
            row.update(summary(times, layers, bytes_per_layer))
            row["layers"] = layers
            print(
                f"{batch:3d} x {context:6d} {row['median_us']:9.1f} us {row['tb_per_s']:6.2f} TB/s  {name}",
                file=sys.stderr,
            )
        except RuntimeError as error:  # a backend that does not take the shape
            row["refused"] = str(error).splitlines()[0]
            print(f"{batch:3d} x {context:6d} refused: {row['refused']}  {name}", file=sys.stderr)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/bench_peers",
        description=__doc__,
        epilog="PEER_PYTHON (python3) is the interpreter that runs it, with PyTorch for CUDA.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="BATCHxCONTEXT ...")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--replays", type=int, default=100, help="timed steps")
    parser.add_argument("--cold-mb", type=int, default=200, help="traffic between two uses of a layer")
    parser.add_argument("--json", help="write the result here, not to the standard output")
    args = parser.parse_args()

    if torch is None:
        sys.exit(
            f"bench_peers: {sys.executable} cannot import PyTorch ({missing}): set PEER_PYTHON to an "
            "interpreter with PyTorch for CUDA"
        )
    if not torch.cuda.is_available():
        sys.exit("bench_peers: PyTorch sees no GPU on this machine")
    torch.manual_seed(1)
    copy = measure_copy(args.replays)
    print(f"copy of 1 GiB {copy['median_us']:.1f} us {copy['tb_per_s']:.2f} TB/s", file=sys.stderr)
    rows = []
    for shape in args.shapes:
        batch, context = map(int, shape.split("x"))
        rows += measure_shape(batch, context, args)
        torch.cuda.empty_cache()
    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "cudnn": torch.backends.cudnn.version(),
        },
        "what": f"fp16, {args.kv_heads} KV heads, {args.group} query heads each, D = {args.head_dim}",
        "copy": copy,
        "rows": rows,
    }
    if args.json:
        with open(args.json, "w") as out:
            json.dump(result, out, indent=1)
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
