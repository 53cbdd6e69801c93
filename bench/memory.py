"""Peak memory of one optimizer step, each way in a process of its own, and how time grows with the work.

    python bench/memory.py [--workload short ...] [--growth]

On a CPU the peak is the resident set of the process, on CUDA what the allocator gave out; both hold the weights.
Doubled work (`--growth`): every length of `short` doubled, and the number of pairs doubled, both by ours-cached.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]

from bench.record import write  # noqa: E402
from bench.variants import AUTO, Bench  # noqa: E402
from bench.workloads import PAIRS_PER_STEP, SHAPES, WORKLOADS, make_rows  # noqa: E402

WAYS = {
    "stock": lambda bench: bench.stock(),
    "stock-tuned": lambda bench: bench.tuned(8),
    "ours": lambda bench: bench.ours(False),
    "ours-one-row": lambda bench: bench.ours(False, budget=None),
    "ours-cached": lambda bench: bench.ours(True),
}


def made(args: argparse.Namespace, means: tuple[int, int, int], pairs: int) -> Bench:
    rows = make_rows(means, pairs, SHAPES[args.shape]["vocab_size"])
    for row in rows:
        row["ref_chosen_logps"] = row["ref_rejected_logps"] = -10.0
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    return Bench(args.shape, rows, args.device, dtype, args.budget or None, args.pairs_per_step)


def peak(args: argparse.Namespace) -> int:
    """Bytes, of this process so far (CPU) or of the allocator (CUDA)."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    short = WORKLOADS["short"]
    cases = {"short": (short, 1), "tokens doubled": (tuple(2 * n for n in short), 1), "pairs doubled": (short, 2)}
    found: dict[str, dict[str, float]] = {}
    for key, (means, more) in cases.items():
        bench = made(args, means, more * args.pairs_per_step)
        bench.ours(True)
        seconds = statistics.median(bench.ours(True)[0] for _ in range(3))
        found[key] = {"seconds": seconds, "real_tokens": bench.real_tokens()}
    for key, value in found.items():
        value |= {f"times_{name}": value[name] / found["short"][name] for name in ("seconds", "real_tokens")}
        print(
            f"{key}: {value['times_real_tokens']:.2f} times the tokens, {value['times_seconds']:.2f} times the seconds"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int, default=AUTO, help="tokens per micro-batch; -1: as in training; 0: none")
    parser.add_argument("--pairs-per-step", type=int, default=PAIRS_PER_STEP)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        bench = made(args, WORKLOADS[args.workload[0]], args.pairs_per_step)
        before = peak(args)
        WAYS[args.child](bench)
        print(json.dumps({"before": before, "peak": peak(args)}))
        return
    memory: dict[str, dict[str, dict[str, int]]] = {}
    words = [w for k, v in vars(args).items() if k in ("shape", "device", "threads", "budget", "pairs_per_step")
             for w in (f"--{k.replace('_', '-')}", str(v))]  # fmt: skip
    for workload in args.workload:
        memory[workload] = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--child", way, "--workload", workload, *words]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            memory[workload][way] = found = json.loads(output.splitlines()[-1])
            print(f"{workload} {way}: {found['peak'] / 2**20:.0f} MiB ({found['before'] / 2**20:.0f} before the step)")
    step = "" if args.pairs_per_step == PAIRS_PER_STEP else f"-{args.pairs_per_step}"
    if memory:
        write(args.out / f"memory-{args.device}{step}.json", args.device, {"memory": memory})
    if args.growth:
        write(args.out / f"growth-{args.device}{step}.json", args.device, {"growth": growth(args)})


if __name__ == "__main__":
    main()
