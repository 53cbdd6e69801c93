"""Fifty optimizer steps by stock TRL and by the pair engine from the same start: python bench/curve.py [--steps N].

Both take the same pairs, one a step, in fp32 with AdamW; stock computes its reference in each step. Printed is the
largest difference of the loss along the way, and how far both adapters end apart. No time is claimed here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]

from bench.record import write  # noqa: E402
from bench.variants import Bench  # noqa: E402
from bench.workloads import SHAPES, WORKLOADS, make_rows  # noqa: E402

PAIRS = 1  # a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--workload", choices=WORKLOADS, default="short")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = make_rows(WORKLOADS[args.workload], PAIRS * args.steps, SHAPES[args.shape]["vocab_size"])
    bench = Bench(args.shape, rows, "cpu", torch.float32, 1280, pairs_per_step=PAIRS)
    ours, ours_end = bench.ours(False)[1], bench.adapter()
    with bench.checkpointing(False):
        stock = bench.epoch([[step] for step in bench.steps()], cached=False)[1]
    stock_end = bench.adapter()
    moved = (stock_end - torch.cat([p.flatten() for p in bench.start])).norm()
    result = {
        "shape": args.shape,
        "workload": args.workload,
        "steps": args.steps,
        "pairs_per_step": PAIRS,
        "stock": stock,
        "ours": ours,
        "largest_difference": max(abs(a - b) for a, b in zip(stock, ours, strict=True)),
        "adapters_apart_of_their_way": float((ours_end - stock_end).norm() / moved),
    }
    print(
        f"{args.steps} steps: loss {stock[0]:.4f} -> {stock[-1]:.4f}, largest difference "
        f"{result['largest_difference']:.1e}; the adapters end {result['adapters_apart_of_their_way']:.1e} of "
        "their way apart"
    )
    write(args.out / "curve-cpu.json", "cpu", result)


if __name__ == "__main__":
    main()
