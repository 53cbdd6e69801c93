"""The evaluations of one run, on disk as they happen: eval_pairs.jsonl first, eval.json from it."""

from __future__ import annotations

import json
from typing import Any

from dpo_lora.evaluation import figures as room
from dpo_lora.evaluation.metrics import HIGHER_IS_BETTER
from dpo_lora.evaluation.scores import PairScores
from dpo_lora.evaluation.statistics import DRAWS, SEED
from dpo_lora.files import append_jsonl, read_jsonl, write_json
from dpo_lora.rundir import RunDir, trim_jsonl
from dpo_lora.schema import RunSettings


class Record:
    """Every evaluation of a run."""

    def __init__(self, run: RunDir, settings: RunSettings):
        self.run = run
        self.beta, self.confidence = settings.dpo.beta, settings.eval.confidence
        self.metric = settings.train.keep_best
        self.history: list[dict[str, Any]] = []  # headline figures of every evaluation, with its step
        self._file: dict[str, Any] = {}
        self._before: dict[str, Any] | None = None
        self._after: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = None

    def clear(self) -> None:
        """Forget what an earlier attempt at this run left."""
        self.run.eval_file.unlink(missing_ok=True)
        self.run.eval_pairs_file.unlink(missing_ok=True)

    def restore(self, last_step: int) -> None:
        """Go on from the files of an interrupted run, without what came after ``last_step``."""
        if self.run.eval_file.exists():
            saved = json.loads(self.run.eval_file.read_text(encoding="utf-8"))
            self.history = [row for row in saved["history"] if row["step"] <= last_step]
            self._before, self._after, self._best = saved["before"], saved["after"], saved["best"]
            # A run killed after its last evaluation is not evaluated again.
            self._file = {name: saved[name] for name in ("baselines", "samples") if name in saved}
        trim_jsonl(self.run.eval_pairs_file, last_step)
        best = self.best_step()
        if best is None:
            self._best = None
        elif self._best is None or self._best["step"] != best:  # the one noted last came after ``last_step``
            rows = (row for row in read_jsonl(self.run.eval_pairs_file) if row["step"] == best)
            self._best = {"step": best, **room.figures(PairScores.from_rows(rows), self.beta, self.confidence)}

    def has(self, step: int) -> bool:
        """Whether ``step`` was evaluated last."""
        return bool(self.history) and self.history[-1]["step"] == step

    def add(self, step: int, scores: PairScores) -> dict[str, float]:
        """Note an evaluation; its figures as ``eval/...`` numbers for the log."""
        found = {"step": step, **room.figures(scores, self.beta, self.confidence)}
        self.history.append({"step": step, **room.headline(found)})
        self._after = found
        if step == 0:
            self._before = found
        if self.best_step() == step:
            self._best = found
        append_jsonl(self.run.eval_pairs_file, [{"step": step, **row} for row in scores.rows(self.beta)])
        self._file["baselines"] = room.baselines(scores, self.confidence)
        self._write()
        return room.flat(found)

    def best_step(self) -> int | None:
        """The evaluation after the start with the best ``train.keep_best``; the earlier of equals."""
        if self.metric is None:
            return None
        name = self.metric.removeprefix("eval/")
        sign = 1 if HIGHER_IS_BETTER[self.metric] else -1
        trained = [row for row in self.history if row["step"] > 0 and row[name] is not None]
        return max(trained, key=lambda row: (sign * row[name], -row["step"]))["step"] if trained else None

    def evaluations_since_best(self) -> int:
        best = self.best_step()
        return 0 if best is None else sum(row["step"] > best for row in self.history)

    def keep_best(self) -> None:
        """Make the best evaluation the run's result: its adapter is the one that is saved."""
        self._after = self._best
        self._write()

    def add_samples(self, summary: dict[str, Any]) -> None:
        """The figures of the latest samples."""
        self._file["samples"] = summary
        self._write()

    def _write(self) -> None:
        write_json(
            self.run.eval_file,
            {
                "confidence": self.confidence,
                "beta": self.beta,
                "bootstrap": {"draws": DRAWS, "seed": SEED, "unit": "prompt"},
                "chosen_by": self.metric,
                "before": self._before,
                "after": self._after,
                "best": self._best,
                **self._file,
                "history": self.history,
            },
        )
