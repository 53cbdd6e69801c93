"""The pair engine beside stock TRL, interleaved, on the same rows: python bench/engine.py [--quick].

Variants of one optimizer step (8 pairs, AdamW on the adapters, fp32):
  stock         TRL 1.16 DPOTrainer defaults: batch 8, gradient checkpointing, reference forward each step
  stock-tuned   gradient checkpointing off, reference precomputed, rows grouped by length, best batch size of
  1/2/4/8 ours          packed rows, reference forward each step ours-cached   packed rows, reference
  log-probs from the cache
and the ablations, each `ours-cached` without one piece. Times are medians of interleaved rounds; what is
reported is the ratio inside each round. Real tokens: prompt once + both answers; padding and repeated prompts
do not count.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "src"),
]  # run as a script, uninstalled

from bench.variants import Bench  # noqa: E402
from bench.workloads import PAIRS_PER_STEP, SHAPES, WORKLOADS, make_rows, matmul_rate  # noqa: E402

ABLATIONS = {
    "no by-hand layers": {"layers": "plain"},
    "no by-hand layers, sdpa": {"layers": "plain", "kernel": "sdpa"},
    "recompute": {"recompute": True},
    "no statistics": {"statistics": ()},
    "no budget (one row)": {"budget": None},
}


def run_workload(name: str, args: argparse.Namespace, dtype: torch.dtype) -> dict:
    rows = make_rows(WORKLOADS[name], args.pairs, SHAPES[args.shape]["vocab_size"])
    bench = Bench(args.shape, rows, args.device, dtype, args.budget)
    bench.reference()
    sizes = args.tuned_sizes
    tried = {size: bench.tuned(size)[0] if len(sizes) > 1 else 0.0 for size in sizes}
    best = min(tried, key=tried.get)
    variants = {
        "stock": bench.stock,
        "ours": lambda: bench.ours(False),
        "stock-tuned": lambda: bench.tuned(best),
        "ours-cached": lambda: bench.ours(True),
    }
    if args.ablations:
        variants |= {k: (lambda engine=engine: bench.ours(True, **engine)) for k, engine in ABLATIONS.items()}
    bench.ours(True)  # warm the allocator and the thread pool
    seconds, losses, rates = {k: [] for k in variants}, {}, []
    processor = {k: [] for k in variants}
    for _ in range(args.rounds):
        for key, run in variants.items():
            rates.append(matmul_rate(args.shape, args.device, dtype))
            took, losses[key] = run()
            seconds[key].append(took)
            processor[key].append(bench.processor_seconds)
            print(f"  {name} {key}: {took:.2f} s", file=sys.stderr, flush=True)
    rate = statistics.median(rates)

    def ratio(slow: str, fast: str, times: dict[str, list[float]] = seconds) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    compared = [(a, b) for b in ("stock", "stock-tuned") for a in ("ours", "ours-cached")]

    def share(key: str, cached: bool) -> float:
        return statistics.median(bench.useful_flops(cached) / s for s in seconds[key]) / rate

    return {
        "workload": name,
        "means": WORKLOADS[name],
        "pairs": args.pairs,
        "real_tokens": bench.real_tokens(),
        "tuned_batch_size": best,
        "tuned_seconds": tried,
        "seconds": seconds,
        "matmul_gflops": rate / 1e9,
        "processor_seconds": processor,
        "ratios": {f"{a} / {b}": ratio(b, a) for a, b in compared},
        # of processor time, which other processes on the machine disturb less; meaningful with --threads 1
        "processor_ratios": {f"{a} / {b}": ratio(b, a, processor) for a, b in compared},
        "matmul_share": {
            "stock": share("stock", False),
            "ours": share("ours", False),
            "stock-tuned": share("stock-tuned", True),
            "ours-cached": share("ours-cached", True),
        },
        "ablations": {k: ratio(k, "ours-cached") for k in ABLATIONS if k in seconds},
        "largest_loss_difference": max(
            abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["stock"], strict=True)
        ),
    }


def peak_memory(variant: str, workload: str, args: argparse.Namespace) -> dict:
    """Peak of a fresh process that only makes this variant's steps (CPU: resident set; CUDA: allocated)."""
    command = [
        sys.executable,
        __file__,
        "--child",
        variant,
        "--workload",
        workload,
        "--shape",
        args.shape,
        "--device",
        args.device,
        "--pairs",
        str(PAIRS_PER_STEP),
        "--threads",
        str(args.threads),
        "--dtype",
        args.dtype,
        "--budget",
        str(args.budget or 0),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def child(args: argparse.Namespace, dtype: torch.dtype) -> None:
    rows = make_rows(WORKLOADS[args.workload[0]], PAIRS_PER_STEP, SHAPES[args.shape]["vocab_size"])
    bench = Bench(args.shape, rows, args.device, dtype, args.budget)
    cuda = args.device == "cuda"
    if "cached" in args.child or "tuned" in args.child:
        for row in rows:
            row["ref_chosen_logps"] = row["ref_rejected_logps"] = -10.0
    before = torch.cuda.memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run = {
        "stock": bench.stock,
        "stock-tuned": lambda: bench.tuned(8),
        "ours": lambda: bench.ours(False),
        "ours-cached": lambda: bench.ours(True),
        "ours-one-row": lambda: bench.ours(False, budget=None),
    }
    run[args.child]()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"before": before, "peak": peak}))


def print_table(results: list[dict]) -> None:
    keys = list(results[0]["ratios"])
    print(f"{'workload':9}" + "".join(f"{k:>27}" for k in keys) + f"{'matmul share ours/cached':>27}{'loss diff':>11}")
    for r in results:
        shares = f"{r['matmul_share']['ours']:.0%} / {r['matmul_share']['ours-cached']:.0%}"
        values = "".join(f"{r['ratios'][k]:>26.2f}x" for k in keys)
        print(f"{r['workload']:9}{values}{shares:>27}{r['largest_loss_difference']:>11.1e}")
        values = "".join(f"{r['processor_ratios'][k]:>26.2f}x" for k in keys)
        print(f"  by cpu {values}")
        for k, v in r["ablations"].items():
            print(f"    {k}: takes {v:.2f} times as long as ours-cached")
        for k, v in r.get("memory", {}).items():
            print(f"    peak memory {k}: {v['peak'] / 2**20:.0f} MiB ({v['before'] / 2**20:.0f} before)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step a variant, one round, tuned batch size 2")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["short", "medium", "long"])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=640, help="tokens per micro-batch; 0: no limit")
    parser.add_argument("--tuned-sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="tried for stock-tuned")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.budget = args.budget or None
    if args.quick:
        args.pairs, args.rounds, args.tuned_sizes = PAIRS_PER_STEP, 1, [2]
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.child:
        return child(args, dtype)
    results = [run_workload(name, args, dtype) for name in args.workload]
    if args.memory:
        for r in results:
            r["memory"] = {
                v: peak_memory(v, r["workload"], args) for v in ("stock", "ours", "ours-one-row", "ours-cached")
            }
    print_table(results)
    args.out.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    versions = {m: __import__(m).__version__ for m in ("torch", "transformers", "trl", "peft")}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    if args.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "child")}
    record = {
        "date": stamp,
        "machine": machine,
        "versions": versions,
        "settings": settings,
        "results": results,
    }
    path = args.out / f"engine-{args.device}-{stamp}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
    return None


if __name__ == "__main__":
    main()
