"""What a training has gone through: pairs, tokens and seconds, over all legs of a run that was resumed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from dpo_lora.files import write_json

_FILE = "progress.json"


@dataclass
class Progress:
    """Counters that checkpoints carry, and a clock that stands still while the run evaluates or rests."""

    pairs: int = 0
    tokens: int = 0  # prompt once and both answers of each pair
    _past: float = 0.0  # seconds of training before the clock was started last
    _begun: float | None = None
    _logged: tuple[int, float] = (0, 0.0)  # tokens and seconds at the last row

    @property
    def seconds(self) -> float:
        """Of training, without evaluations."""
        return self._past + (0.0 if self._begun is None else time.monotonic() - self._begun)

    def start(self) -> None:
        self._begun = time.monotonic()
        self._logged = (self.tokens, self.seconds)

    def stop(self) -> None:
        self._past, self._begun = self.seconds, None

    def pause(self, seconds: float) -> None:
        """Take off what went by without training."""
        if self._begun is not None:
            self._begun += seconds

    def figures(self) -> dict[str, float]:
        """For a row of metrics: totals, and tokens a second since the row before."""
        tokens, seconds = self._logged
        self._logged = (self.tokens, self.seconds)
        rate = (self.tokens - tokens) / max(self._logged[1] - seconds, 1e-9)
        return {"pairs": self.pairs, "tokens": self.tokens, "tokens_per_second": rate}

    def save(self, checkpoint: Path) -> None:
        write_json(checkpoint / _FILE, {"pairs": self.pairs, "tokens": self.tokens, "seconds": self.seconds})

    def restore(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint carries."""
        known = json.loads((checkpoint / _FILE).read_text(encoding="utf-8"))
        self.pairs, self.tokens, self._past = known["pairs"], known["tokens"], known["seconds"]
