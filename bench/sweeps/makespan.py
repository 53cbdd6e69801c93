"""Makespan of one sweep, made twice: dpo-lora's own launcher against Hydra's basic launcher with stock TRL.

    python bench/sweeps/makespan.py [--side ours|stock] [--rows FILE.jsonl] [--steps 12] [--heldout 8] [--out FILE.json]

Eight trials over beta, learning rate and rank on the embedded 135M model, same pairs, same steps, scores
before and after, from an empty reference cache (the converted base model is there for both). Times are of
whole processes, imports included; each side alone on the machine. Stock runs its trials one after the other
and each is the same work, so --stock-trials may measure the first few and add the rest at their median; the
file says how many were run. Writes JSON; a side that is not run keeps the figures that the file holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPACE = {"beta": "0.05,0.1", "rate": "1e-4,2e-4", "rank": "8,16"}
PAIRS_PER_STEP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["ours", "stock"])
    parser.add_argument(
        "--rows",
        type=Path,
        default=ROOT / "data" / "explainer.jsonl",
        help="pairs: the first train, the last are held out",
    )
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps of {PAIRS_PER_STEP} pairs a trial")
    parser.add_argument("--heldout", type=int, default=8, help="held-out pairs, scored before and after")
    parser.add_argument("--stock-trials", type=int, choices=[1, 2, 4, 8], default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or ROOT / "bench" / "results" / f"sweep_makespan_{options.rows.stem}.json"
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {"machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}}
    found |= {
        "sweep": {
            **SPACE,
            "rows": options.rows.name,
            "steps": options.steps,
            "pairs_per_step": PAIRS_PER_STEP,
            "heldout": options.heldout,
            "trials": 8,
        }
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_pairs(folder, options.rows, options.steps * PAIRS_PER_STEP, options.heldout)
        if options.side in (None, "ours"):
            found["ours"] = ours(folder, options.steps)
        if options.side in (None, "stock"):
            found["stock"] = stock(folder, options.steps, options.stock_trials)
    if "ours" in found and "stock" in found:
        found["times_faster"] = round(found["stock"]["seconds"] / found["ours"]["seconds"], 2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def _write_pairs(folder: Path, file: Path, train: int, heldout: int) -> None:
    rows = file.read_text(encoding="utf-8").splitlines()
    rows = [json.dumps({k: json.loads(r)[k] for k in ("id", "prompt", "chosen", "rejected")}) + "\n" for r in rows]
    (folder / "train.jsonl").write_text("".join(rows[:train]))
    (folder / "heldout.jsonl").write_text("".join(rows[-heldout:]))


def ours(folder: Path, steps: int) -> dict[str, Any]:
    """The sweep by ``dpo-lora train -m``, and where each trial's time went."""
    outputs = folder / "outputs"
    words = [
        f"dpo.beta={SPACE['beta']}", f"train.learning_rate={SPACE['rate']}", f"lora.r={SPACE['rank']}",
        "lora.alpha=32", "data=local", f"data.path={folder / 'train.jsonl'}",
        f"data.heldout_path={folder / 'heldout.jsonl'}", "data.heldout_share=0.1", "train=cpu",
        f"train.max_steps={steps}", f"train.pairs_per_step={PAIRS_PER_STEP}", "train.warmup=0", "eval.samples=0",
        "tracking=none", f"outputs={outputs}",
    ]  # fmt: skip
    _borrow_model(folder / "cache")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dpo_lora", "train", "-m", *words],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DPO_LORA_CACHE": str(folder / "cache")},
    )
    seconds = time.monotonic() - begun
    sweep = Path(done.stdout.strip().splitlines()[-1])
    runs = [json.loads(file.read_text()) for file in sweep.glob(f"{'[0-9a-f]' * 16}/run.json")]
    ended = [json.loads(file.read_text()) for file in sweep.glob(f"{'[0-9a-f]' * 16}/outcome.json")]
    assert len(runs) == 8 and all(run["status"] == "finished" for run in runs)
    assert all(run["training"]["pairs"] == steps * PAIRS_PER_STEP for run in runs)
    spans = [e["seconds"] for e in ended]
    training = [r["timings"]["training_seconds"] for r in runs]
    scoring = [r["timings"]["evaluation_seconds"] for r in runs]
    summary = json.loads((sweep / "sweep.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "in_the_sweep": summary["sittings"],
        "trial_seconds": round(statistics.median(spans), 2),
        "trial_training_seconds": round(statistics.median(training), 2),
        "trial_scoring_seconds": round(statistics.median(scoring), 2),
        "trial_start_and_end_seconds": round(
            statistics.median(s - t - e for s, t, e in zip(spans, training, scoring, strict=True)), 2
        ),
        "reference_pairs_computed_in_trials": sum(r["engine"]["reference_cache"]["pairs_computed"] for r in runs),
        "reference_pairs_in_cache": _cached(folder / "cache" / "reference"),
        "best": summary["ranking"][0]["varied"],
    }


def _borrow_model(cache: Path) -> None:
    """A cache that holds the converted base model and nothing else."""
    from dpo_lora import embedded

    converted = embedded.ensure()
    (cache / "models").mkdir(parents=True)
    (cache / "models" / converted.name).symlink_to(converted)


def _cached(folder: Path) -> int:
    """Pairs whose log-probabilities were written into a reference cache, each time they were."""
    from safetensors.numpy import load_file

    return sum(len(load_file(file)["keys"]) for file in folder.rglob("*.safetensors"))


def stock(folder: Path, steps: int, count: int) -> dict[str, Any]:
    """The same sweep by a plain Hydra app; its first ``count`` trials."""
    from dpo_lora import embedded

    outputs = folder / "stock"
    space = {
        name: values if number < count.bit_length() - 1 else values.split(",")[0]
        for number, (name, values) in enumerate(reversed(SPACE.items()))
    }  # the last name changes fastest
    words = [
        f"model={embedded.ensure()}", f"train={folder / 'train.jsonl'}", f"heldout={folder / 'heldout.jsonl'}",
        f"beta={space['beta']}", f"learning_rate={space['rate']}", f"rank={space['rank']}", f"steps={steps}",
        f"pairs_per_step={PAIRS_PER_STEP}", f"hydra.sweep.dir={outputs}", "hydra/launcher=basic",
    ]  # fmt: skip
    begun = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "bench/sweeps/stock.py"), "-m", *words], check=True, cwd=folder)
    seconds = time.monotonic() - begun
    spans = [json.loads(file.read_text())["seconds"] for file in outputs.glob("*/stock.json")]
    assert len(spans) == count
    return {
        "seconds": round(seconds + (8 - count) * statistics.median(spans), 1),
        "trials_run": count,
        "seconds_of_these": round(seconds, 1),
        "trial_seconds": [round(s, 2) for s in spans],
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
