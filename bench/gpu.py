"""The pair engine beside stock TRL on a GPU, interleaved in one process: speed and peak memory by pairs a step.

    python bench/gpu.py [--workload short ...] [--pairs-per-step 4 16 64] [--rounds 3]

The ways are those of bench/engine.py; stock-tuned takes the largest batch that fits, found by halving. Shares are of
the matrix-product rate measured in the same minutes at 8192 tokens. Each case is written as it is measured, so what
an interrupted run has seen is kept.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]

from bench.record import write  # noqa: E402
from bench.variants import Bench  # noqa: E402
from bench.workloads import SHAPES, WORKLOADS, make_rows, matmul_rate  # noqa: E402

RATIOS = {
    "ours / stock": ("stock", "ours"),
    "ours-cached / stock": ("stock", "ours-cached"),
    "ours / tuned+reference": ("tuned+reference", "ours"),
    "ours-cached / tuned": ("stock-tuned", "ours-cached"),
}
ABLATIONS = {
    "the model's own layers": {"layers": "plain"},
    "recompute": {"recompute": True},
    "no statistics": {"statistics": ()},
    "2048 tokens": {"budget": 2048},
    "4096 tokens": {"budget": 4096},
    "16384 tokens": {"budget": 16384},
    "16384 tokens, recompute": {"budget": 16384, "recompute": True},
    "one row": {"budget": None},
    "one row, recompute": {"budget": None, "recompute": True},
}


class Case:
    """One workload at one number of pairs a step: runs ways, keeps their seconds, peaks and losses."""

    def __init__(self, bench: Bench, args: argparse.Namespace) -> None:
        self.bench, self.args = bench, args
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.losses: dict[str, list[float]] = {}
        self.rates: list[float] = []

    def run(self, key: str, way) -> float | None:
        """Seconds of one epoch by this way; None where it does not fit."""
        on_gpu = self.args.device == "cuda"
        self.rates.append(matmul_rate(self.args.shape, self.args.device, self.bench.dtype))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            took, losses = way()
        except torch.OutOfMemoryError:
            took, losses = None, []
        if took is None:
            self.bench.model.zero_grad()
            torch.cuda.empty_cache()
            return None
        self.seconds.setdefault(key, []).append(took)
        self.losses[key] = losses
        self.peaks[key] = torch.cuda.max_memory_allocated() if on_gpu else 0
        return took

    def tuned_batch(self) -> int | None:
        """The largest batch of the tuned way that fits; warms it up."""
        sizes = itertools.takewhile(bool, (self.bench.pairs_per_step >> halvings for halvings in itertools.count()))
        return next((n for n in sizes if self.run("tried", partial(self.bench.tuned, n)) is not None), None)

    def measure(self, ablations: bool) -> dict:
        bench = self.bench
        for way in (bench.stock, lambda: (bench.reference(bench.pairs_per_step), []), lambda: bench.ours(False)):
            self.run("warm-up", way)
        batch = self.tuned_batch()
        ways = {
            "stock": bench.stock,
            "ours": lambda: bench.ours(False),
            "stock-tuned": lambda: bench.tuned(batch),
            "stock-reference": lambda: (bench.reference(bench.pairs_per_step), []),
            "ours-cached": lambda: bench.ours(True),
        }
        if batch is None:
            del ways["stock-tuned"]
        extra = {k: (lambda v=v: bench.ours(True, **v)) for k, v in ABLATIONS.items()} if ablations else {}
        for way in extra.values():
            self.run("warm-up", way)
        for _ in range(self.args.rounds):
            for key, way in {**ways, **extra}.items():
                self.run(key, way)
        return self.summary(batch, [k for k in extra if k in self.seconds])

    def summary(self, batch: int | None, ablations: list[str]) -> dict:
        bench, seconds = self.bench, {k: v for k, v in self.seconds.items() if k not in ("warm-up", "tried")}
        if "stock-tuned" in seconds:
            both = zip(seconds["stock-tuned"], seconds["stock-reference"], strict=True)
            seconds["tuned+reference"] = [sum(each) for each in both]
        middle = {k: statistics.median(v) for k, v in seconds.items()}
        rate = statistics.median(self.rates)
        timed = [k for k in ("stock", "stock-tuned", "ours", "ours-cached") if k in middle]
        cached = ("stock-tuned", "ours-cached")
        return {
            "pairs_per_step": bench.pairs_per_step,
            "pairs": len(bench.rows),
            "real_tokens": bench.real_tokens(),
            "tuned_batch": batch,
            "budget": bench.budget,
            "seconds": seconds,
            "pairs_per_second": {k: len(bench.rows) / middle[k] for k in timed},
            "tokens_per_second": {k: bench.real_tokens() / middle[k] for k in timed},
            "matmul_tflops": rate / 1e12,
            "matmul_share": {k: bench.useful_flops(k in cached) / middle[k] / rate for k in timed},
            "ratios": {
                name: statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
                for name, (slow, fast) in RATIOS.items()
                if slow in seconds
            },
            "peak_bytes": {k: v for k, v in self.peaks.items() if k in middle},
            "ablations": {k: middle[k] / middle["ours-cached"] for k in ablations},
            "largest_loss_difference": max(
                abs(a - b) / abs(b) for a, b in zip(self.losses["ours"], self.losses["stock"], strict=True)
            ),
        }


def show(r: dict) -> None:
    print(f"{r['workload']}, {r['pairs_per_step']} pairs a step, {r['real_tokens']} tokens in {r['pairs']} pairs")
    print("    " + ", ".join(f"{k} {v:.2f}" for k, v in r["ratios"].items()))
    shares = ", ".join(f"{k} {v:.0%}" for k, v in r["matmul_share"].items())
    print(f"    of {r['matmul_tflops']:.0f} TFLOP/s: {shares}")
    print("    GiB: " + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in r["peak_bytes"].items()))
    tokens = ", ".join(f"{k} {v:.0f}" for k, v in r["tokens_per_second"].items())
    print(f"    tokens/s: {tokens}; loss differs {r['largest_loss_difference']:.1e}")
    if r["ablations"]:
        print("    times ours-cached: " + ", ".join(f"{k} {v:.2f}" for k, v in r["ablations"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--pairs-per-step", type=int, nargs="+", default=[64, 16, 4])
    parser.add_argument("--skip", nargs="*", default=["chat:64"], help="WORKLOAD:PAIRS; the default takes minutes")
    parser.add_argument("--pairs", type=int, default=16, help="in all; at least one step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=8192, help="tokens per micro-batch")
    parser.add_argument("--ablate", nargs="*", default=["medium:64"], help="WORKLOAD:PAIRS, measured piece by piece")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    began, results = time.monotonic(), []
    vocabulary = SHAPES[args.shape]["vocab_size"]
    any_rows = make_rows(WORKLOADS["short"], 4, vocabulary)
    bench = Bench(args.shape, any_rows, args.device, getattr(torch, args.dtype), args.budget)
    print(f"model made after {time.monotonic() - began:.0f} s", flush=True)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    cases = [(count, workload) for count in args.pairs_per_step for workload in args.workload]
    for count, workload in cases:
        if f"{workload}:{count}" not in args.skip:
            bench.rows = make_rows(WORKLOADS[workload], max(count, args.pairs), vocabulary)
            bench.pairs_per_step = count
            measured = Case(bench, args).measure(f"{workload}:{count}" in args.ablate)
            results.append({"workload": workload, "rounds": args.rounds, **measured})
            show(results[-1])
            print(f"    {time.monotonic() - began:.0f} s since the start", flush=True)
            write(args.out / f"gpu-{args.device}.json", args.device, {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
