"""The cache gives what TRL would compute, notices damage, survives rivals, stays small, and finds what it
has."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine import worlds

from dpo_lora.engine.batching import TokenBudget
from dpo_lora.engine.forward import PackedForward
from dpo_lora.engine.reference_cache import ReferenceCache, row_key, scope_of, sequence_log_probs
from dpo_lora.engine.reference_pass import fingerprint_adapter, fingerprint_config, reference_pass


def tokens(rows, max_length=None, mode="keep_start"):
    return [worlds.truncate_pair(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"], max_length, mode) for r in rows]


def fake(rows):
    return [tuple(np.arange(len(ids) - start, dtype=np.float32) for ids, start in row) for row in rows]


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, rows):
        self.calls += len(rows)
        return fake(rows)


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("max_length", [None, 9])
def test_equal_to_trl(ld_alpha, max_length, tmp_path):
    rows = worlds.pairs(6)
    trainer = worlds.trainer(worlds.model(), rows, tmp_path / "run", ld_alpha=ld_alpha, max_length=max_length)
    batch = trainer.data_collator(rows)
    expected = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), 1)
    packed = PackedForward(trainer.model)
    cache = ReferenceCache(tmp_path / "cache", 10**9)
    state = torch.get_rng_state()
    compute = reference_pass(packed, TokenBudget(60, 60))
    fetched = worlds.fetch(cache, "s", tokens(rows, max_length), compute, rows_per_shard=2)
    got = torch.tensor([sequence_log_probs(v, ld_alpha) for v in fetched.values])
    assert worlds.close(got, expected) < 1e-5
    assert torch.equal(torch.get_rng_state(), state) and trainer.model.training

    counting = Counting()
    again = worlds.fetch(cache, "s", tokens(rows, max_length)[::-1], counting)
    assert counting.calls == 0 and again.computed == 0
    for a, b in zip(again.values[::-1], fetched.values, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_only_new_rows_are_computed(tmp_path):
    cache, counting = ReferenceCache(tmp_path, 10**9), Counting()
    worlds.fetch(cache, "s", tokens(worlds.pairs(5)), counting)
    fetched = worlds.fetch(cache, "s", tokens(worlds.pairs(8)), counting)  # the first five are the same
    assert (fetched.found, fetched.computed, counting.calls) == (5, 3, 8)
    assert worlds.fetch(cache, "other", tokens(worlds.pairs(5)), counting).computed == 5


def test_a_killed_build_keeps_its_shards(tmp_path):
    cache = ReferenceCache(tmp_path, 10**9)
    counting = Counting()

    def dies(rows):
        if counting.calls >= 4:
            raise KeyboardInterrupt
        return counting(rows)

    with pytest.raises(KeyboardInterrupt):
        worlds.fetch(cache, "s", tokens(worlds.pairs(8)), dies, rows_per_shard=2)
    assert worlds.fetch(cache, "s", tokens(worlds.pairs(8)), counting, rows_per_shard=2).found == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_corruption_is_noticed_and_rebuilt(damage, tmp_path, caplog):
    cache, counting = ReferenceCache(tmp_path, 10**9), Counting()
    good = worlds.fetch(cache, "s", tokens(worlds.pairs(4)), counting, rows_per_shard=2)
    victim = cache._shards("s")[0]
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes({"flip": bytes(data), "cut": bytes(data[:40]), "empty": b""}[damage])
    fetched = worlds.fetch(cache, "s", tokens(worlds.pairs(4)), counting)
    assert fetched.computed == 2 and "corrupt" in caplog.text
    assert victim.with_suffix(".corrupt").exists()
    for a, b in zip(fetched.values, good.values, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(cache.verify().values())


def test_a_shard_that_cannot_be_read_is_as_good_as_absent_and_stays(tmp_path, caplog, monkeypatch):
    """It may be another user's, whom it serves well: it is not damaged, and not ours to set aside."""
    cache, counting = ReferenceCache(tmp_path, 10**9), Counting()
    good = worlds.fetch(cache, "s", tokens(worlds.pairs(4)), counting, rows_per_shard=2)
    victim = cache._shards("s")[0]
    read_bytes = Path.read_bytes

    def refused(path):
        if path == victim:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    victim.chmod(0)
    if os.access(victim, os.R_OK):  # root reads it all the same
        monkeypatch.setattr(Path, "read_bytes", refused)
    # All that is missing goes to one shard of another name, beside this one.
    fetched = worlds.fetch(cache, "s", tokens(worlds.pairs(6)), counting)
    assert (fetched.found, fetched.computed) == (2, 4)
    assert "cannot be read" in caplog.text and "corrupt" not in caplog.text
    assert victim.exists() and not victim.with_suffix(".corrupt").exists()
    for a, b in zip(fetched.values, good.values, strict=False):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_others_may_read_what_is_written(tmp_path):
    worlds.fetch(ReferenceCache(tmp_path, 10**9), "s", tokens(worlds.pairs(4)), fake)
    files = list((tmp_path / "s").iterdir())
    assert len(files) == 2, "a shard and what the scope stands for"
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_verify_list_remove(tmp_path):
    cache = ReferenceCache(tmp_path, 10**9)
    worlds.fetch(cache, "s", tokens(worlds.pairs(4)), fake, about={"base": "x"}, rows_per_shard=2)
    (info,) = cache.list_scopes()
    assert (info.scope, info.about, info.shards) == ("s", {"base": "x"}, 2) and info.size > 0
    victim = cache._shards("s")[1]
    victim.write_bytes(b"x")
    assert sorted(cache.verify().values()) == [False, True]
    cache.remove("s")
    assert cache.list_scopes() == []
    with pytest.raises(ValueError, match="no entry"):
        cache.remove("../s")


def test_oldest_goes_first_and_the_scope_in_use_stays(tmp_path):
    cache = ReferenceCache(tmp_path, 10**9)
    for number, scope in enumerate(("old", "new")):
        worlds.fetch(cache, scope, tokens(worlds.pairs(4)), fake)
        os.utime(cache._shards(scope)[0], (number, number))
    one = cache.list_scopes()[0].size
    small = ReferenceCache(tmp_path, int(one * 2.6))
    worlds.fetch(small, "mine", tokens(worlds.pairs(4)), fake)
    assert {i.scope for i in cache.list_scopes() if i.shards} == {"new", "mine"}
    tiny = ReferenceCache(tmp_path, 1)
    worlds.fetch(tiny, "mine", tokens(worlds.pairs(5)), fake)
    assert {i.scope for i in cache.list_scopes() if i.shards} == {"mine"}


def _build(folder, barrier, results):
    counting = Counting()
    barrier.wait()
    fetched = worlds.fetch(ReferenceCache(folder, 10**9), "s", tokens(worlds.pairs(40)), counting, rows_per_shard=3)
    results.put((counting.calls, [v[0].tolist() for v in fetched.values]))


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_build, args=(tmp_path, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    (calls_a, values_a), (calls_b, values_b) = results.get(timeout=60), results.get(timeout=60)
    for worker in workers:
        worker.join()
    assert calls_a + calls_b == 40 and values_a == values_b


def test_keys_tell_apart_what_differs():
    a = (([1, 2, 3], 1), ([1, 2, 4], 1))
    others = [(([1, 2, 3], 2), ([1, 2, 4], 1)), (([1, 2, 3, 1], 1), ([2, 4], 1)), (a[1], a[0])]
    assert len({row_key(x) for x in (a, *others)}) == 4
    assert scope_of(base="a", dtype="f") != scope_of(base="b", dtype="f")


def test_the_configs_fingerprint_is_of_what_a_model_computes_by(tmp_path):
    """Weights have their own (`dpo_lora.model.weights_fingerprint`), and so has a continued adapter."""
    plain = fingerprint_config(worlds.model())
    assert fingerprint_config(worlds.model(seed=1)) == plain
    adapted = worlds.trainer(worlds.model(), worlds.pairs(2), tmp_path).model
    assert fingerprint_config(adapted) == plain
    assert fingerprint_adapter(adapted) is None
    aside = {"_name_or_path": "elsewhere", "use_cache": False, "_attn_implementation": "eager"}
    assert fingerprint_config(worlds.model(**aside)) == plain
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    others = [
        worlds.model(rms_norm_eps=1e-5),
        worlds.model(rope_parameters=scaled),
        worlds.model(rope_parameters={**scaled, "factor": 4.0}),
        worlds.model("qwen2"),
        worlds.model("mistral"),
        worlds.model("mistral", sliding_window=16),
    ]
    assert len({plain, *map(fingerprint_config, others)}) == 1 + len(others)


def test_a_continued_adapters_fingerprint_is_of_its_weights_and_scale(tmp_path):
    model = worlds.trainer(worlds.model(), worlds.pairs(2), tmp_path).model
    model.add_adapter("ref", model.peft_config["default"])
    names = [fingerprint_adapter(model)]
    assert fingerprint_adapter(model) == names[0] is not None
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B.default" in n).add_(1)
    assert fingerprint_adapter(model) == names[0], "the adapter that is trained is no reference"
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B.ref" in n).view(-1)[0] += 1e-3
    names.append(fingerprint_adapter(model))
    model.peft_config["ref"].lora_alpha = 99
    names.append(fingerprint_adapter(model))
    assert len(set(names)) == 3
