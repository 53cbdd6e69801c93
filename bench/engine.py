"""The pair engine beside stock TRL, interleaved, on the same rows: python bench/engine.py [--quick].

Variants of optimizer steps of 8 pairs (AdamW on the adapters, LoRA all-linear r=16):
  stock          TRL's DPOTrainer with its defaults: batch 8, gradient checkpointing, reference forward each step
  stock-tuned    no gradient checkpointing, rows grouped by length, reference precomputed, the fastest of the batch
                 sizes tried; stock-largest is the same with the largest of them that fits in memory
  ours           packed rows, the engine's own reference pass over these pairs first: a run with an empty cache
  ours-cached    packed rows, reference from the cache
and ablations, each `ours-cached` with one piece replaced. What is compared, within each interleaved round (medians):
  ours / stock                 both compute the reference
  ours-cached / stock          the second run on the same data, against stock's every run
  ours / tuned+reference       stock-tuned with the seconds of its own precomputation for these pairs (one epoch)
  ours-cached / tuned          neither counts the reference
  .../ largest                 the same two with stock-largest
Real tokens: prompt once + both answers; padding and repeated prompts do not count.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import sys
from pathlib import Path

import psutil
import torch

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "src"),
]  # run as a script, uninstalled

from bench.record import write  # noqa: E402
from bench.variants import AUTO, Bench  # noqa: E402
from bench.workloads import FILES, PAIRS_PER_STEP, SHAPES, SHARED, WORKLOADS, matmul_rate, rows_of  # noqa: E402
from dpo_lora.engine.batching import is_out_of_memory  # noqa: E402

ABLATIONS = {
    "no by-hand layers": {"layers": "plain"},
    "no by-hand layers, sdpa": {"layers": "plain", "kernel": "sdpa"},
    "recompute": {"recompute": True},
    "no statistics": {"statistics": ()},
    "no lanes (rows one by one)": {"lanes": 1},
    "no budget": {"budget": None},
    "no C++ (torch's attention and passes)": {"native": False},
    "products by the other library": {"other_products": True},  # oneDNN on Intel's processors, BLAS elsewhere
}


COMPARED = {
    "ours / stock": ("ours", "stock"),
    "ours-cached / stock": ("ours-cached", "stock"),
    "ours / tuned+reference": ("ours", "tuned+reference"),
    "ours-cached / tuned": ("ours-cached", "stock-tuned"),
    "ours / largest+reference": ("ours", "largest+reference"),
    "ours-cached / largest": ("ours-cached", "stock-largest"),
}


def run_workload(name: str, args: argparse.Namespace, dtype: torch.dtype) -> dict:
    rows = rows_of(name, args.pairs, SHAPES[args.shape]["vocab_size"], args.shared)
    bench = Bench(args.shape, rows, args.device, dtype, args.budget, args.pairs_per_step)
    bench.reference()
    bench.ours(False)  # warm the allocator and the thread pool
    tried = {size: tuned_seconds(bench, size) for size in args.tuned_sizes}
    fits = [size for size, took in tried.items() if took is not None]
    best, largest = min(fits, key=tried.get), max(fits)
    variants = {
        "stock": bench.stock,
        "ours": lambda: bench.ours(False),
        "stock-tuned": lambda: bench.tuned(best),
        "stock-reference": lambda: (bench.reference(best), []),
        "ours-cached": lambda: bench.ours(True),
    }
    if largest != best:
        variants["stock-largest"] = lambda: bench.tuned(largest)
    for ablation in args.ablations or (ABLATIONS if args.ablations == [] else ()):
        variants[ablation] = lambda engine=ABLATIONS[ablation]: bench.ours(True, **engine)
    seconds, losses, rates = {k: [] for k in variants}, {}, []
    for _ in range(args.rounds):
        for key, run in variants.items():
            rates.append(matmul_rate(args.shape, args.device, dtype))
            try:
                took, losses[key] = run()
            except RuntimeError as error:  # a result too: this way does not fit
                if not is_out_of_memory(error):
                    raise
                took, losses[key] = float("nan"), [float("nan")] * len(bench.steps())
                bench.model.zero_grad()
            seconds[key].append(took)
            print(f"  {name} {key}: {took:.2f} s", file=sys.stderr, flush=True)
    seconds.setdefault("stock-largest", seconds["stock-tuned"])
    for way in ("tuned", "largest"):
        pairs = zip(seconds[f"stock-{way}"], seconds["stock-reference"], strict=True)
        seconds[f"{way}+reference"] = [steps + reference for steps, reference in pairs]
    rate = statistics.median(rates)
    timed = ("stock", "stock-tuned", "ours", "ours-cached")
    middle = {k: statistics.median(v) for k, v in seconds.items()}

    def ratio(fast: str, slow: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    return {
        "workload": name,
        "pairs": args.pairs,
        "rounds": args.rounds,
        "real_tokens": bench.real_tokens(),
        "tuned_batch_size": best,
        "largest_batch_size": largest,
        "tuned_seconds": tried,
        "seconds": seconds,
        "pairs_per_second": {k: args.pairs / middle[k] for k in timed},
        "tokens_per_second": {k: bench.real_tokens() / middle[k] for k in timed},
        "matmul_gflops": rate / 1e9,
        "matmul_gflops_seen": [r / 1e9 for r in rates],
        "ratios": {k: ratio(*v) for k, v in COMPARED.items()},
        "matmul_share": {k: bench.useful_flops(k.endswith(("tuned", "cached"))) / middle[k] / rate for k in timed},
        "ablations": {k: ratio("ours-cached", k) for k in ABLATIONS if k in seconds},
        "largest_loss_difference": max(
            abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["stock"], strict=True)
        ),
    }


def tuned_seconds(bench: Bench, size: int) -> float | None:
    """Seconds of one tuned epoch at this batch size; None where it does not fit in memory."""
    try:
        return bench.tuned(size)[0]
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has none of its own
        if not is_out_of_memory(error):
            raise
        print(f"  stock-tuned, batch {size}: does not fit", file=sys.stderr, flush=True)
        bench.model.zero_grad()
        return None


def limit_memory() -> None:
    """Let an allocation beyond this machine's free memory fail, instead of the system killing the process."""
    available = psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_DATA, (int(0.95 * available), resource.RLIM_INFINITY))


def print_table(results: list[dict]) -> None:
    for r in results:
        print(f"{r['workload']}: {r['pairs']} pairs, {r['real_tokens']} tokens, {r['rounds']} rounds")
        for k, v in r["ratios"].items():
            print(f"    {k:24} {'did not fit' if math.isnan(v) else f'{v:5.2f} times as fast'}")
        for k, v in r["pairs_per_second"].items():
            tokens, share = r["tokens_per_second"][k], r["matmul_share"][k]
            print(
                f"    {k:24} {v:5.2f} pairs/s, {tokens:5.0f} tokens/s, {share:4.0%} of {r['matmul_gflops']:.0f} GFLOP/s"
            )
        print(f"    loss differs by {r['largest_loss_difference']:.1e} (relative)")
        for k, v in r["ablations"].items():
            print(f"    {k}: takes {v:.2f} times as long as ours-cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step a variant, one round, tuned batch size 2")
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS, *FILES], default=["short", "medium", "long"])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=AUTO, help="tokens per micro-batch; -1: as in training; 0: none")
    parser.add_argument("--tuned-sizes", type=int, nargs="+", default=[2, 4, 8], help="tried for stock-tuned")
    parser.add_argument("--ablations", nargs="*", choices=ABLATIONS, help="which; without a name: all")
    parser.add_argument("--pairs-per-step", type=int, default=PAIRS_PER_STEP)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the pairs of 'helpful' and 'polite'")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.budget = args.budget or None
    if args.quick:
        args.pairs, args.rounds, args.tuned_sizes = args.pairs_per_step, 1, [2]
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        limit_memory()
    dtype = getattr(torch, args.dtype)
    results = [run_workload(name, args, dtype) for name in args.workload]
    print_table(results)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "shared")}
    step = "" if args.pairs_per_step == PAIRS_PER_STEP else f"-{args.pairs_per_step}"
    shape = "" if args.shape == parser.get_default("shape") else f"-{args.shape}"
    path = args.out / f"engine-{args.device}{shape}{step}-{'-'.join(args.workload)}.json"
    write(path, args.device, {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
