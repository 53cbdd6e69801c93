"""Batches prepared on all cores, in order, few in memory at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice

from dpo_lora.preferences.prepare import Columns, Recipe, prepare
from dpo_lora.preferences.sources.rows import Batch

_SMALL = 4  # batches; up to here starting processes costs more than it brings


def run(recipe: Recipe, batches: Iterator[Batch]) -> Iterator[Columns]:
    """All batches prepared.

    Raises:
        UserError: the first row, in order, that cannot be read or converted.
    """
    head = list(islice(batches, _SMALL))
    if len(head) < _SMALL:
        yield from (prepare(recipe, batch) for batch in head)
        return
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Forked workers share this process' memory; they touch no accelerator and start no threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with (
        _one_thread_a_process(),
        ProcessPoolExecutor(workers, context, initializer=_start, initargs=(recipe,)) as pool,
    ):
        waiting: deque[Future[Columns]] = deque()
        try:
            for batch in chain(head, batches):
                waiting.append(pool.submit(_work, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_thread_a_process() -> Iterator[None]:
    """Tokenizers without threads of their own: with a process a core they would only queue."""
    name = "TOKENIZERS_PARALLELISM"
    was = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if was is None:
            del os.environ[name]
        else:
            os.environ[name] = was


_recipe: Recipe | None = None


def _start(recipe: Recipe) -> None:
    global _recipe  # noqa: PLW0603  # a worker process has one job; it is handed over once, not with each batch
    _recipe = recipe


def _work(batch: Batch) -> Columns:
    assert _recipe is not None
    return prepare(_recipe, batch)
