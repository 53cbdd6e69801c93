"""What a trial does with the pruner's answer."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_lora.callbacks import StopSignal
from dpo_lora.sweeps import pruning
from dpo_lora.sweeps.trial import Trial


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial("0" * 16, "1" * 16, 0, {}, [], {}, tmp_path)


def _evaluate(trial: Trial, step: int = 2) -> None:
    (callback,) = pruning.asking(trial.path)
    state = SimpleNamespace(global_step=step, max_steps=4)
    metrics: Any = {"eval/accuracy": 0.5, "eval/loss": float("nan")}
    callback.on_evaluate(None, state, None, metrics)


def _answers(trial: Trial, *, stop: bool, first: Any = lambda: None) -> threading.Thread:
    """Once it is asked: do ``first``, then answer."""

    def run() -> None:
        while not (asked := pruning.questions(trial)):
            time.sleep(0.01)
        first()
        pruning.answer(trial, asked[0], stop=stop)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize(("stop", "received"), [(True, signal.SIGTERM), (False, None)])
def test_a_trial_stops_itself(trial: Trial, stop: bool, received: signal.Signals | None) -> None:
    assert pruning.asking(trial.path) == []
    pruning.open_for(trial)
    with StopSignal() as told:
        told.in_training = True
        thread = _answers(trial, stop=stop)
        _evaluate(trial)
        thread.join()
    assert told.received == received
    assert pruning.was_stopped(trial) == stop
    assert json.loads((pruning.folder(trial.path) / "2.question").read_text()) == {"accuracy": 0.5, "loss": None}


def test_a_trial_that_was_told_while_it_waits_is_not_told_twice(trial: Trial) -> None:
    """The second signal of two ends a run in mid-step, without a checkpoint."""
    pruning.open_for(trial)
    with StopSignal() as told:
        told.in_training = True

        def ctrl_c() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            while told.received is None:
                time.sleep(0.01)

        thread = _answers(trial, stop=True, first=ctrl_c)
        try:
            _evaluate(trial)
        except KeyboardInterrupt:
            pytest.fail("told twice")
        thread.join()
    assert told.received == signal.SIGTERM


def test_nothing_is_asked_where_nothing_is_left_to_save(trial: Trial) -> None:
    pruning.open_for(trial)
    for step in (0, 4):
        _evaluate(trial, step)
    assert pruning.questions(trial) == []
