"""The compiled passes compute what torch's do, and whole models through them what stock TRL computes."""

from __future__ import annotations

import pytest
import torch
from tests.engine import worlds
from tests.engine.test_forward import compare

from dpo_lora.engine import cpu_passes
from dpo_lora.engine.decoder import read_layers
from dpo_lora.engine.native import passes

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
"""Widths of whole vectors, whatever a vector's width."""


def results(module, count, threads=1):
    """Of every pass, on random values of so many tokens."""
    torch.manual_seed(0)
    x, grad, beside, weight = torch.randn(count, 64), torch.randn(count, 64), torch.randn(count, 64), torch.randn(64)
    gate, up, upstream = (torch.randn(count, 96) * 3 for _ in range(3))
    q, k = torch.randn(count, 4, 32), torch.randn(count, 2, 32)
    cos, sin = torch.randn(count, 1, 16), torch.randn(count, 1, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        normed, inverse = module.normalise(x, weight, 1e-5)
        found = [normed, inverse, module.normalise_again(x, inverse, weight)]
        found += [module.normalise_backward(grad, x, inverse, weight, each) for each in (None, beside)]
        found += [each for sign in (1.0, -1.0) for each in module.rotate(q.clone(), k.clone(), cos, sin, sign)]
        for activation in ("silu", "gelu"):
            active, slope = module.gated_again(gate, up, activation)
            found += [module.gated(gate, up, activation), active.clone()]
            found += module.gated_backward(upstream.clone(), gate, up, slope, activation)
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_every_pass(count, vectors):
    for ours, right in zip(results(passes, count), results(cpu_passes, count), strict=True):
        assert torch.allclose(ours, right, rtol=1e-5, atol=1e-5)


def test_the_same_bits_by_any_number_of_threads(vectors):
    alone = results(passes, 3000)
    for threads in (2, 5):
        assert all(map(torch.equal, alone, results(passes, 3000, threads)))


@pytest.mark.parametrize("value", [-1e4, -89.0, 89.0, 1e4, float("nan"), float("inf")])
def test_far_out_values_of_a_gate(value, vectors):
    gate, up, grad = torch.full((1, 16), value), torch.full((1, 16), 2.0), torch.full((1, 16), 3.0)
    active, slope = cpu_passes.gated_again(gate, up, "silu")
    right = [active.clone(), *cpu_passes.gated_backward(grad.clone(), gate, up, slope, "silu")]
    ours = [passes.gated(gate, up, "silu"), *passes.gated_backward(grad.clone(), gate, up, None, "silu")]
    for own, expected in zip(ours, right, strict=True):
        assert torch.allclose(own, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_every_architecture(name, recompute, vectors, tmp_path):
    base = worlds.model(name, **WIDE)
    layers = read_layers(base.base_model.requires_grad_(False))
    assert layers is not None and layers[0].passes is passes
    compare(base, worlds.pairs(4), tmp_path, engine={"recompute": recompute})


@pytest.mark.parametrize("opening", [0, 6])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2", "qwen3"])
def test_windows_and_what_all_pairs_begin_with(name, opening, vectors, tmp_path):
    base = worlds.model(name, sliding_window=8, **worlds.WINDOWS[name], **WIDE)
    assert read_layers(base.base_model.requires_grad_(False))[0].passes is passes
    compare(base, worlds.pairs(4, opening=opening), tmp_path)


@pytest.mark.parametrize("changed", [{"hidden_size": 66}, {"intermediate_size": 98}, {"head_dim": 18}], ids=str)
def test_widths_that_do_not_fill_vectors_are_left_to_torch(changed, vectors, tmp_path):
    base = worlds.model("qwen3", **{**WIDE, **changed})
    assert read_layers(base.base_model.requires_grad_(False))[0].passes is cpu_passes
    compare(base, worlds.pairs(4), tmp_path)


def test_two_rows_at_once(vectors, tmp_path):
    compare(worlds.model("llama", **WIDE), worlds.pairs(6, opening=3), tmp_path, engine={"lanes": 2})


def test_a_norm_of_another_format_is_left_to_torch(vectors):
    base = worlds.model("qwen3", **WIDE)
    assert read_layers(base.base_model.requires_grad_(False))[0].passes is passes
    base.model.layers[1].self_attn.q_norm.double()
    assert read_layers(base.base_model)[0].passes is cpu_passes


def test_a_layer_that_was_narrowed_is_left_to_torch(vectors):
    base = worlds.model("llama", **WIDE).requires_grad_(False)
    mlp = base.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(64, 90, bias=False).requires_grad_(False) for _ in range(2))
    mlp.down_proj = torch.nn.Linear(90, 64, bias=False).requires_grad_(False)
    assert read_layers(base.base_model)[0].passes is cpu_passes


def test_threads_that_are_bound_are_left_to_torch(vectors, monkeypatch):
    monkeypatch.setattr(passes, "threads_are_bound", lambda: True)
    base = worlds.model("llama", **WIDE)
    assert read_layers(base.base_model.requires_grad_(False))[0].passes is cpu_passes


def test_float64_is_left_to_torch(vectors):
    base = worlds.model("llama", **WIDE).double()
    assert read_layers(base.base_model.requires_grad_(False))[0].passes is cpu_passes
