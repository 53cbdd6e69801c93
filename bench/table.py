"""The results in bench/results as tables of docs/performance.md: python bench/table.py [FOLDER]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def head(*cells: str) -> None:
    row(*cells)
    row("---", *("--:" for _ in cells[1:]))


def speed(files: list[Path]) -> None:
    results = [r for file in files for r in json.loads(file.read_text())["results"]]
    order = ("short", "medium", "long", "chat", "polite", "helpful")
    results.sort(key=lambda r: order.index(r["workload"]))
    head("workload", *results[0]["ratios"], "rounds")
    for r in results:
        ratios = ("did not fit" if v is None else f"{v:.2f}" for v in r["ratios"].values())
        row(r["workload"], *ratios, str(r["rounds"]))
    print()
    ways = list(results[0]["pairs_per_second"])
    head("workload", *(f"{way}: pairs/s, tokens/s, share" for way in ways), "GFLOP/s measured", "loss differs")
    for r in results:
        cells = (
            f"{r['pairs_per_second'][way]:.2f}, {r['tokens_per_second'][way]:.0f}, {r['matmul_share'][way]:.0%}"
            for way in ways
        )
        row(r["workload"], *cells, f"{r['matmul_gflops']:.0f}", f"{r['largest_loss_difference']:.0e}")
    for r in results:
        for name, times in r["ablations"].items():
            print(f"\n{r['workload']}, {name}: {times:.2f} times as long as ours-cached", end="")
    print()


def memory(file: Path) -> None:
    print()
    found = json.loads(file.read_text())["memory"]
    head("peak memory, MiB", *next(iter(found.values())), "ours / stock")
    for workload, ways in found.items():
        share = ways["ours"]["peak"] / ways["stock"]["peak"]
        row(workload, *(f"{way['peak'] / 2**20:.0f}" for way in ways.values()), f"{share:.2f}")


def gpu(file: Path) -> None:
    content = json.loads(file.read_text())
    print(f"\n{content['machine'].get('gpu', 'no GPU')}, {content['settings']['shape']}\n")
    head("workload, pairs a step", "ours / stock", "cached", "tuned", "share, cached", "GiB: stock, ours", "tokens/s")
    for r in content["results"]:
        ratios = [r["ratios"].get(k) for k in ("ours / stock", "ours-cached / stock", "ours-cached / tuned")]
        peaks = (r["peak_bytes"][way] / 2**30 for way in ("stock", "ours"))
        row(
            f"{r['workload']}, {r['pairs_per_step']}",
            *("-" if v is None else f"{v:.2f}" for v in ratios),
            f"{r['matmul_share']['ours-cached']:.0%} of {r['matmul_tflops']:.0f}",
            ", ".join(f"{v:.1f}" for v in peaks),
            f"{r['tokens_per_second']['ours-cached']:.0f}",
        )
        if r["ablations"]:
            noted = ", ".join(f"{k} {v:.2f} ({r['peak_bytes'][k] / 2**30:.1f} GiB)" for k, v in r["ablations"].items())
            row(f"times as long as ours-cached: {noted}")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for file in sorted(folder.glob("gpu-cuda*.json")):
        gpu(file)
    for device in ("cpu", "cuda"):
        by_shape: dict[str, list[Path]] = {}
        for file in sorted(folder.glob(f"engine-{device}-*.json")):
            by_shape.setdefault(json.loads(file.read_text())["settings"]["shape"], []).append(file)
        for shape, files in by_shape.items():
            print(f"\n{shape}\n")
            speed(files)
        for file in sorted(folder.glob(f"memory-{device}*.json")):
            memory(file)


if __name__ == "__main__":
    main()
