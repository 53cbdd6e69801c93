"""The compiled attention computes the masked attention of the pair layout, with every width of vectors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.engine.test_attention import ALL, dense, plan_of

from dpo_lora.engine.native import attention, library
from dpo_lora.engine.runs import ScoreRule

LONG = [((600, 40, 30),), ((20, 560, 1), (7, 9, 520))]
"""More keys than the backward pass takes at a time."""
TOLERANCE = 1e-5


def tensors(plan, heads=4, key_heads=2, size=32, seed=0):
    """q, k, v and the gradient of the output, [T, H, D]."""
    torch.manual_seed(seed)
    return [torch.randn(plan.tokens, count, size) for count in (heads, key_heads, key_heads, heads)]


def both_ways(kernel, plan, q, k, v, upstream, window=None):
    out, levels = kernel.attend(q, k, v, plan, 0.3, window)
    return [out, *kernel.attend_backward(upstream, q, k, v, out, levels, plan, 0.3, window)]


def by_definition(plan, q, k, v, upstream, window=None):
    leaves = [x.double().transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
    out = dense(*leaves, plan, ScoreRule(0.3, window=window))[0]
    out.backward(upstream.double())
    return [out, *(x.grad[0].transpose(0, 1) for x in leaves)]


@pytest.mark.parametrize("window", [None, 1, 7, 100, 530])
@pytest.mark.parametrize(
    "segments, opening", [*ALL, *((segments, 0) for segments in LONG), (((600, 40, 30), (2, 5, 9)), 530)], ids=str
)
def test_forward_and_backward(segments, opening, window, vectors):
    plan = plan_of(*segments, opening=opening)
    given = tensors(plan)
    for ours, right in zip(
        both_ways(attention, plan, *given, window), by_definition(plan, *given, window), strict=True
    ):
        assert (ours - right).abs().max() <= TOLERANCE * right.abs().max().clamp_min(1)


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (4, 1, 80), (2, 2, 128), (3, 1, 256)])
def test_every_kind_of_heads(heads, key_heads, size, vectors):
    plan = plan_of((50, 40, 30), (3, 70, 2))
    given = tensors(plan, heads, key_heads, size)
    for ours, right in zip(both_ways(attention, plan, *given), by_definition(plan, *given), strict=True):
        assert (ours - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("opening", [0, 8])
def test_the_same_bits_by_any_number_of_threads(opening, vectors):
    plan = plan_of((90, 70, 90), (3, 130, 2), (1, 1, 1), opening=opening)
    given = tensors(plan)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            found.append(both_ways(attention, plan, *given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("size", [1e3, 1e5, 1e8], ids=str)
def test_scores_of_a_diverged_training_leave_finite_gradients(size, vectors):
    """Of scores near 1e10 torch's kernel, and so stock TRL, makes infinite ones (tests/engine/test_attention.py)."""
    plan = plan_of((520, 30, 60))
    q, k, v, upstream = tensors(plan)
    ours = both_ways(attention, plan, q * size, k * size, v, upstream)
    assert all(bool(x.isfinite().all()) for x in ours)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_is_not_hidden(which, bad, vectors):
    """The definition spreads it further, to keys that no query saw; but no tensor is finite here that is not there."""
    plan = plan_of((20, 30, 10))
    given = tensors(plan)
    given[which][5, 0, 3] = bad
    ours, right = both_ways(attention, plan, *given), by_definition(plan, *given)
    assert not all(bool(x.isfinite().all()) for x in right)
    for own, expected in zip(ours, right, strict=True):
        assert bool(own.isfinite().all()) is bool(expected.isfinite().all())


LIMITED = """
import resource, torch
from dpo_lora.engine.batching import is_out_of_memory
from dpo_lora.engine.native import attention, library
from dpo_lora.engine.packing import plan_pairs

def prepared(shared):
    row = [5] * shared
    plan = plan_pairs([((row + [6], shared), (row + [7], shared))])
    torch.manual_seed(0)
    q, k, v = (torch.randn(plan.tokens, 4, 16) for _ in range(3))
    out, stats, *grads = torch.empty_like(q), torch.empty(plan.tokens, 4, 2), *map(torch.empty_like, (q, k, v))
    calls = {"attend": [q, k, v, out, stats], "attend_backward": [q, q, k, v, out, stats, *grads]}
    attention._runs(plan)
    return [lambda name=name: attention._call(name, calls[name], q, k, plan, 0.3, 100) for name in calls], [out, *grads]

def leave(mebibytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))

assert library.loaded() is not None
torch.set_num_threads(4)
"""


def said_by(script: str) -> str:
    """What a process of its own says that limits its memory, as Linux can."""
    if library.found_compiler() is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C++ compiler and Linux's limits")
    command = [sys.executable, "-c", LIMITED + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_that_runs_out_is_an_error_of_python():
    script = """
calls, _ = prepared(60_000)
leave(50)  # room for four stacks, not for four times 19 MB
for call in calls:
    try:
        call()
    except MemoryError as error:
        print(is_out_of_memory(error))
"""
    assert said_by(script).split() == ["True", "True"]


def test_fewer_threads_than_asked_for_do_the_work():
    script = """
calls, results = prepared(200)
for call in calls:
    call()
expected = [x.clone() for x in results]
for x in results:
    x.zero_()
leave(4)  # no stack of a thread fits
for call in calls:
    call()
print(all(map(torch.equal, expected, results)))
"""
    assert said_by(script).split() == ["True"]
