"""Rows computed at once say what one row says: scores, losses, gradients, however the pairs fall."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from tests.engine import worlds
from tests.engine.test_forward import compare

from dpo_lora.engine import lanes as module
from dpo_lora.engine.batching import TokenBudget, cut, pair_tokens
from dpo_lora.engine.forward import PackedForward
from dpo_lora.engine.lanes import divided, lanes_for
from dpo_lora.engine.lowrank import project_backward
from dpo_lora.engine.packing import IGNORED, plan_batch, plan_pairs
from dpo_lora.engine.partition import evenly


@pytest.fixture
def two_threads():
    """As on a machine of two cores; the tests' own processes have one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def planned(rows, trainer):
    batch = trainer.data_collator(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    return batch, labels, plan_batch(batch["input_ids"], batch["attention_mask"], labels)


@pytest.mark.parametrize("opening", [0, 15])
@pytest.mark.parametrize("lanes", [1, 2, 3, 9])
def test_lanes_hold_every_pair_and_entry_once(lanes, opening, tmp_path):
    rows = worlds.pairs(5, opening=opening)
    _, _, plan = planned(rows, worlds.trainer(worlds.model(), rows, tmp_path))
    parts = divided(plan, lanes)
    assert len(parts) == min(lanes, 5)
    assert sorted(s for part in parts for s in part.row.segments) == sorted(plan.segments)
    assert torch.equal(torch.cat([part.entries for part in parts]).sort()[0], torch.arange(len(plan.head_labels)))
    for row, entries in ((part.row, part.entries) for part in parts):
        assert row.opening == plan.opening
        assert row.tokens == plan.opening + sum(map(sum, row.segments))
        for name in ("input_ids", "position_ids"):
            own, whole = getattr(row, name)[0], getattr(plan, name)[0]
            assert torch.equal(own[row.head_rows], whole[plan.head_rows[entries]])
        assert torch.equal(row.head_labels, plan.head_labels[entries])
        assert torch.equal(row.scatter(entries + 1), _sides(plan, entries))


def _sides(plan, entries):
    """The plan's places [2B, L-1] that have one of these entries, of the pairs that do; each entry's number + 1."""
    marked = torch.zeros(len(plan.head_labels), dtype=torch.long)
    marked[entries] = entries + 1
    everything = plan.scatter(marked)
    return everything[(everything > 0).any(1)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("opening", [0, 15])
@pytest.mark.parametrize("engine", [{}, {"recompute": True}], ids=str)
def test_loss_metrics_and_gradients_are_stocks(engine, opening, threads, tmp_path, monkeypatch, two_threads):
    torch.set_num_threads(threads)
    seen = _names_of_threads(monkeypatch)
    compare(worlds.model("llama"), worlds.pairs(5, opening=opening), tmp_path, engine={"lanes": 2, **engine})
    assert len(seen) >= 2 and all(name.startswith("lane") for name, _ in seen)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "gemma3"])
def test_other_architectures(name, tmp_path):
    compare(worlds.model(name), worlds.pairs(5), tmp_path, engine={"lanes": 3})


def test_weighting_reads_its_statistic_from_every_lane(tmp_path):
    compare(worlds.model("llama"), worlds.pairs(5), tmp_path, engine={"lanes": 2}, use_weighting=True)


def _names_of_threads(monkeypatch):
    seen = set()
    score = module.score_in_lanes

    def watched(work, *args):
        def noted(row):
            seen.add((threading.current_thread().name, row.segments))
            return work(row)

        return score(noted, *args)

    monkeypatch.setattr("dpo_lora.engine.forward.score_in_lanes", watched)
    return seen


def _scored(trainer, rows, **engine):
    batch, labels, plan = planned(rows, trainer)
    packed = PackedForward(trainer.model, **engine)
    out = packed(batch["input_ids"], labels, batch["attention_mask"], pair_plan=plan)
    return out, packed


def test_every_run_gives_the_same_bits(tmp_path, two_threads):
    rows = worlds.pairs(6)
    trainer = worlds.trainer(worlds.model(), rows, tmp_path)
    found = []
    for _ in range(3):
        out, packed = _scored(trainer, rows, lanes=2)
        out.log_probs.square().sum().backward()
        found.append((out.log_probs.detach(), worlds.gradients(trainer.model)))
        packed.detach()
    for scores, gradients in found[1:]:
        assert torch.equal(scores, found[0][0]) and torch.equal(gradients, found[0][1])


def test_no_gradient_is_recorded_where_none_is_wanted(tmp_path, two_threads):
    rows = worlds.pairs(4)
    trainer = worlds.trainer(worlds.model(), rows, tmp_path)
    trainer.model.eval()  # a model in training is asked for its log-probabilities alone, as the reference
    whole, packed = _scored(trainer, rows, lanes=1)
    packed.detach()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            out, packed = _scored(trainer, rows, lanes=2)
        packed.detach()
        assert not out.log_probs.requires_grad
        for name in ("log_probs", "entropy", "mean_logits"):
            assert worlds.close(getattr(out, name), getattr(whole, name).detach()) < 1e-5
        assert torch.equal(out.is_top1, whole.is_top1)


def test_a_lanes_error_is_the_callers_and_threads_stay_as_they_were(tmp_path, monkeypatch, two_threads):
    rows = worlds.pairs(4)
    trainer = worlds.trainer(worlds.model(), rows, tmp_path)

    def full(*_args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("dpo_lora.engine.forward.run_decoder", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        _scored(trainer, rows, lanes=2)
    assert torch.get_num_threads() == 2
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2]


def row_of(*lengths, opening=0):
    """A plan of pairs that begin alike and have so many tokens of their own."""
    pairs, token = [], 0
    for length in lengths:
        sides = []
        for _ in range(2):
            sides.append((list(range(opening)) + [1000 + (token := token + 1)] * (length // 2), opening + 1))
        pairs.append(tuple(sides))
    return plan_pairs(pairs)


def test_lanes_are_taken_where_they_pay(two_threads, monkeypatch):
    assert lanes_for(row_of(600, 700)) == 2
    assert lanes_for(row_of(700, 600, 100, 80, opening=60)) == 2
    for row in (row_of(200, 250), row_of(1300), row_of(2000, 100), row_of(400, 400, opening=300)):
        assert lanes_for(row) == 1
    torch.set_num_threads(1)
    assert lanes_for(row_of(600, 700)) == 1
    torch.set_num_threads(2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert lanes_for(row_of(600, 700)) == 1, "both would run on the one processor that is this thread's"


def test_a_lane_out_of_memory_on_its_way_back_costs_the_step_nothing(tmp_path, monkeypatch, two_threads):
    rows = worlds.pairs(6)
    trainer = worlds.trainer(worlds.model(), rows, tmp_path)
    packed = PackedForward(trainer.model, lanes=2)
    packed.install()
    calls = []

    def step(batches):
        for micro in batches:
            batch = trainer.data_collator([rows[i] for i in micro.pairs])
            (trainer._compute_loss(trainer.model, batch, False) * len(micro.pairs) / len(rows)).backward()
        return worlds.gradients(trainer.model)

    sizes = [pair_tokens(row) for row in rows]
    expected = step(cut(sizes, None))
    trainer.model.zero_grad()

    def once(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return project_backward(*args)

    monkeypatch.setattr("dpo_lora.engine.layer.project_backward", once)
    budget = TokenBudget(10_000, 10_000, floor=1, lanes=2)
    found = budget.run(sizes, step, trainer.model.zero_grad)
    assert budget.tokens < 10_000 and worlds.close(found, expected) < 1e-5


def test_micro_batches_fill_their_lanes_alike():
    sizes = [1787, 1181, 1093, 1048, 964, 821, 721, 484]
    batches = cut(sizes, 2560, lanes=2)
    assert sorted(i for batch in batches for i in batch.pairs) == list(range(8))
    assert all(batch.tokens <= 2560 or len(batch.pairs) == 1 for batch in batches)
    assert [batch.pairs for batch in batches] == [(0,), (1, 2), (3, 4), (5, 6), (7,)]
    with_opening = cut(sizes, 2560, lanes=2, opening=100)  # counted once, and a sixteenth of it for each pair
    assert [batch.tokens for batch in with_opening] == [sum(sizes[i] - 94 for i in b.pairs) for b in with_opening]
    assert all(batch.tokens <= 2560 - 100 or len(batch.pairs) == 1 for batch in with_opening)
    assert cut(sizes, None, lanes=2)[0].tokens == sum(sizes)


def test_few_micro_batches_and_little_waiting():
    """Eight pairs of uneven lengths: two micro-batches, in each of which no lane is a tenth longer than the other."""
    sizes = [613, 519, 489, 478, 440, 428, 371, 670]
    loads = [
        [sum(sizes[batch.pairs[i]] for i in group) for group in _halves(sizes, batch)]
        for batch in cut(sizes, 2560, lanes=2)
    ]
    assert len(loads) == 2
    assert all(min(each) > 0.9 * max(each) for each in loads)


def _halves(sizes, batch):
    return evenly([sizes[i] for i in batch.pairs], 2)


def test_evenly_shares_out_everything():
    assert evenly([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert evenly([3], 4) == [[0]]
    assert evenly([], 2) == []
