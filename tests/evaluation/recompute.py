"""A second program: every figure of a run's eval.json again, from eval_pairs.jsonl and samples.jsonl.

Needs numpy and nothing of the project; written from docs/evaluation.md.

    python tests/evaluation/recompute.py RUN
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np


def wilson(p: float, n: int, confidence: float) -> list[float]:
    """The two roots of (p - q)^2 = z^2 q (1 - q) / n in q."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    roots = np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p])
    return sorted(float(r.real) for r in roots)


def mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def resample(prompts: list[str], statistic, confidence: float, draws: int, seed: int) -> list[float]:
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    names = sorted(members)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = rng.integers(0, len(names), size=len(names))
        value = statistic(np.concatenate([members[names[d]] for d in drawn]))
        if value is not None and not math.isnan(value):
            values.append(value)
    return [float(q) for q in np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])]


def length_controlled(win, longer) -> float:
    """Half the accuracy where the preferred answer is longer, half where it is shorter; equal lengths are in both."""
    if not longer.sum() or not (1 - longer).sum():
        return math.nan
    return float(((win * longer).sum() / longer.sum() + (win * (1 - longer)).sum() / (1 - longer).sum()) / 2)


def figures(rows: list[dict], beta: float, confidence: float, draws: int, seed: int) -> dict:
    rows = sorted(rows, key=lambda r: (r["id"], r["pair"]))
    col = {k: np.array([r[k] for r in rows], dtype=float) for k in rows[0] if isinstance(rows[0][k], int | float)}
    n = len(rows)
    reward_chosen = beta * (col["policy_chosen"] - col["reference_chosen"])
    reward_rejected = beta * (col["policy_rejected"] - col["reference_rejected"])
    margin = reward_chosen - reward_rejected
    tie = np.abs(margin / beta) <= 1e-6 * (col["tokens_chosen"] + col["tokens_rejected"])
    win = np.where(tie, 0.5, np.where(margin > 0, 1.0, 0.0))
    longer = np.where(
        col["tokens_chosen"] > col["tokens_rejected"],
        1.0,
        np.where(col["tokens_chosen"] < col["tokens_rejected"], 0.0, 0.5),
    )
    for name, again in (("reward_chosen", reward_chosen), ("reward_rejected", reward_rejected), ("win", win)):
        assert np.allclose(col[name], again, atol=1e-12), name
    prompts = [r["prompt"] for r in rows]
    probability = np.array([1 / (1 + math.exp(-m)) for m in margin])
    sure = np.maximum(probability, 1 - probability)
    calibration, gap = [], 0.0
    for k in range(5):
        low, high = 0.5 + k / 10, 0.5 + (k + 1) / 10
        inside = (sure >= low - 1e-15) & ((sure < high) if k < 4 else (sure <= 1))
        calibration.append(
            {
                "from": low,
                "to": high,
                "pairs": int(inside.sum()),
                "confidence": mean(sure[inside]),
                "accuracy": mean(win[inside]),
            }
        )
        if inside.any():
            gap += inside.sum() / n * abs(float(win[inside].mean() - sure[inside].mean()))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    half = z * math.sqrt(float(np.sum((margin - margin.mean()) ** 2)) / (n - 1) / n) if n > 1 else None

    def groups(labels: list[str]) -> list[dict]:
        found = []
        for label in dict.fromkeys(sorted(labels)):
            at = np.array([x == label for x in labels])
            share = float(win[at].mean())
            found.append(
                {
                    "name": label,
                    "pairs": int(at.sum()),
                    "accuracy": share,
                    "accuracy_interval": wilson(share, int(at.sum()), confidence),
                    "margin": float(margin[at].mean()),
                }
            )
        return found

    names = ["under 0.5", "0.5 to 0.8", "0.8 to 1.25", "1.25 to 2", "2 and over"]
    ratio = col["tokens_chosen"] / col["tokens_rejected"]
    buckets = [names[sum(r >= edge for edge in (0.5, 0.8, 1.25, 2.0))] for r in ratio]
    topics = [r["topic"] for r in rows]
    controlled = length_controlled(win, longer)
    again = lambda statistic: resample(prompts, statistic, confidence, draws, seed)  # noqa: E731
    return {
        "pairs": n,
        "prompts": len(set(prompts)),
        "ties": int(tie.sum()),
        "accuracy": float(win.mean()),
        "accuracy_interval": wilson(float(win.mean()), n, confidence),
        "accuracy_bootstrap": again(lambda i: win[i].mean()),
        "accuracy_length_controlled": None if math.isnan(controlled) else controlled,
        "accuracy_length_controlled_bootstrap": again(lambda i: length_controlled(win[i], longer[i])),
        "margin": float(margin.mean()),
        "margin_interval": [None, None] if half is None else [margin.mean() - half, margin.mean() + half],
        "margin_bootstrap": again(lambda i: margin[i].mean()),
        "reward_chosen": float(reward_chosen.mean()),
        "reward_rejected": float(reward_rejected.mean()),
        "loss": float(np.mean([-math.log(p) for p in probability])),
        "log_ratio_per_token_chosen": float(reward_chosen.sum() / beta / col["tokens_chosen"].sum()),
        "log_ratio_per_token_rejected": float(reward_rejected.sum() / beta / col["tokens_rejected"].sum()),
        "brier": float(np.mean((probability - 1) ** 2)),
        "calibration_error": float(gap),
        "calibration": calibration,
        "by_topic": groups([t or "none" for t in topics]) if any(topics) else [],
        "by_length": sorted(groups(buckets), key=lambda g: names.index(g["name"])),
    }


def baselines(rows: list[dict], confidence: float) -> dict:
    share = float(
        np.mean(
            [
                (r["tokens_chosen"] > r["tokens_rejected"]) + 0.5 * (r["tokens_chosen"] == r["tokens_rejected"])
                for r in rows
            ]
        )
    )
    return {"coin": 0.5, "longer_wins": share, "longer_wins_interval": wilson(share, len(rows), confidence)}


def repeated(text: str) -> float:
    words = text.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def answers(rows: list[dict], confidence: float, draws: int, seed: int) -> dict:
    found: dict = {"step": rows[0]["step"], "prompts": len({r["id"] for r in rows})}
    for decoding in ("greedy", "sampled"):
        mine = [r for r in rows if r["decoding"] == decoding]
        found[decoding] = {
            side: {
                "tokens": mean([r[side]["tokens"] for r in mine]),
                "ended": mean([1.0 if r[side]["ended"] else 0.0 for r in mine]),
                "repetition": mean([repeated(r[side]["text"]) for r in mine]),
            }
            for side in ("reference", "policy")
        }
        found[decoding]["unchanged"] = sum(r["policy"]["text"] == r["reference"]["text"] for r in mine)
    drawn = [r for r in rows if r["decoding"] == "sampled"]
    total = np.array([r["kl"]["sum"] for r in drawn])
    tokens = np.array([r["kl"]["tokens"] for r in drawn])
    found["kl_per_token"] = float(total.sum() / tokens.sum()) if tokens.sum() else None
    ids = [r["id"] for r in drawn]
    statistic = lambda i: total[i].sum() / tokens[i].sum() if tokens[i].sum() else None  # noqa: E731
    found["kl_per_token_interval"] = resample(ids, statistic, confidence, draws, seed)
    return found


def mismatches(said, found, path: str = "") -> list[str]:
    """Where two trees of numbers differ by more than 1e-9."""
    if isinstance(found, dict):
        return [m for k in found for m in mismatches(said[k], found[k], f"{path}/{k}")]
    if isinstance(found, list):
        if len(said) != len(found):
            return [f"{path}: {len(said)} entries, {len(found)} found"]
        return [m for i, (a, b) in enumerate(zip(said, found, strict=True)) for m in mismatches(a, b, f"{path}[{i}]")]
    if isinstance(found, float) and isinstance(said, int | float):
        return [] if abs(said - found) <= 1e-9 else [f"{path}: {said} said, {found} found"]
    return [] if said == found else [f"{path}: {said!r} said, {found!r} found"]


def count(tree) -> int:
    if isinstance(tree, dict | list):
        return sum(map(count, tree.values() if isinstance(tree, dict) else tree))
    return 1


def check(run: Path) -> tuple[int, list[str]]:
    """How many figures were recomputed, and those that differ."""
    lines = lambda name: [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]  # noqa: E731
    said, pairs = json.loads((run / "eval.json").read_text(encoding="utf-8")), lines("eval_pairs.jsonl")
    how = (said["confidence"], said["bootstrap"]["draws"], said["bootstrap"]["seed"])
    steps: dict[int, list[dict]] = {}
    for row in pairs:
        steps.setdefault(row["step"], []).append(row)
    found = {step: figures(rows, said["beta"], *how) for step, rows in steps.items()}
    wrong, seen = [], 0
    for part in ("before", "after", "best"):
        if said[part] is not None:
            again = found[said[part]["step"]]
            assert set(said[part]) == {*again, "step"}, set(said[part]) ^ set(again)
            wrong += mismatches(said[part], again, part)
            seen += count(again)
    for entry in said["history"]:
        again = {k: found[entry["step"]][k] for k in entry if k != "step"}
        wrong += mismatches(entry, again, f"history@{entry['step']}")
        seen += count(again)
    again = baselines(pairs[: len(steps[pairs[0]["step"]])], said["confidence"])
    wrong += mismatches(said["baselines"], again, "baselines")
    seen += count(again)
    if said.get("samples"):
        rows = [row for row in lines("samples.jsonl") if row["step"] == said["samples"]["step"]]
        again = answers(rows, *how)
        assert set(said["samples"]) == set(again)
        wrong += mismatches(said["samples"], again, "samples")
        seen += count(again)
    return seen, wrong


if __name__ == "__main__":
    number, differing = check(Path(sys.argv[1]))
    print("\n".join(differing) or f"{number} figures recomputed, none differs by more than 1e-9")
    sys.exit(bool(differing))
