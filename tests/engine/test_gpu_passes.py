"""What the engine computes by on a GPU, run as written on a CPU: equal to stock TRL, the flash kernel emulated.

tests/gpu runs the compiled kernels themselves.
"""

from __future__ import annotations

import pytest
import torch
from tests.engine import worlds
from tests.engine.test_attention import emulated_flash
from tests.engine.test_forward import compare

from dpo_lora.engine import compiled, decoder, gpu_passes
from dpo_lora.engine.forward import PackedForward


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Layers by `gpu_passes`, attention by a plain emulation of the flash kernel; the calls of it, a list."""
    calls = []

    def flash(q, keys, values, segments, scale, window):
        calls.append(len(q))
        return emulated_flash(q, keys, values, segments, scale, window), q.new_empty(0)

    def flash_backward(grad, q, keys, values, out, levels, segments, scale, window):
        leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
        with torch.enable_grad():
            return torch.autograd.grad(emulated_flash(*leaves, segments, scale, window), leaves, grad)

    monkeypatch.setattr(decoder, "passes_for", lambda weight: gpu_passes)
    monkeypatch.setattr(gpu_passes, "flash", flash)
    monkeypatch.setattr(gpu_passes, "flash_backward", flash_backward)
    return calls


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("opening", [0, 15])
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_equal_trl(as_on_gpu, recompute, opening, name, tmp_path):
    compare(worlds.model(name), worlds.pairs(4, opening=opening), tmp_path, engine={"recompute": recompute})
    assert len(as_on_gpu) == 2 * (2 + recompute), "a call for each layer of the policy and of the reference"


@pytest.mark.parametrize("name", worlds.WINDOWS)
def test_layers_with_a_sliding_window_equal_trl(as_on_gpu, name, tmp_path):
    compare(worlds.windowed(name), worlds.pairs(4, opening=6), tmp_path)
    assert len(as_on_gpu) == (4 if name in ("gemma3", "mistral", "qwen2", "qwen3") else 0)


def test_adapters_of_different_ranks_and_scales(as_on_gpu, tmp_path):
    """Some projections without an adapter, the rest with ranks and scales of their own."""
    lora = {
        "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {"v_proj": 8, "up_proj": 2},
        "alpha_pattern": {"q_proj": 3, "down_proj": 5},
    }
    for dtype in (torch.float32, torch.bfloat16):
        base = worlds.model("llama", max_position_embeddings=256).to(dtype)
        trainer = worlds.trainer(base, worlds.pairs(5), tmp_path, lora=lora)
        stock, ours = both(trainer, trainer.data_collator(worlds.pairs(5)))
        assert worlds.close(ours[1], stock[1]) < (1e-5 if dtype is torch.float32 else 5e-2)
        assert len(as_on_gpu) == 4
        as_on_gpu.clear()


def step(trainer, batch):
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.model.dtype == torch.bfloat16):
        loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    return loss.detach().double(), worlds.gradients(trainer.model)


def both(trainer, batch):
    """(loss, gradients) of stock and of ours."""
    stock = step(trainer, batch)
    packed = PackedForward(trainer.model)
    packed.install()
    try:
        return stock, step(trainer, batch)
    finally:
        packed.detach()


def in_bfloat16(seed, tmp_path):
    """(loss, gradients) in bfloat16 of stock and of ours, and the exact ones, all of the same numbers."""
    rows = worlds.pairs(6, seed=seed, longest=40)
    base = worlds.model("llama", seed=seed, max_position_embeddings=256).to(torch.bfloat16)
    trainer = worlds.trainer(base, rows, tmp_path)
    assert {p.dtype for name, p in trainer.model.named_parameters() if "lora" in name} == {torch.float32}
    batch = trainer.data_collator(rows)
    stock, ours = both(trainer, batch)
    trainer.model.float()  # the same numbers
    return stock, ours, step(trainer, batch)


def test_float32_adapters_on_bfloat16_weights_are_as_near_to_float32_as_trl_is(as_on_gpu, tmp_path):
    noise = torch.zeros(2, dtype=torch.float64)  # of stock's gradients and of ours
    for seed in range(5):
        stock, ours, exact = in_bfloat16(seed, tmp_path)
        assert ours[1].dtype == torch.float32
        assert worlds.close(ours[0], exact[0]) < 1e-2
        noise += torch.tensor([worlds.close(got[1], exact[1]) ** 2 for got in (stock, ours)])
    assert 0 < noise[1] < 1.2 * noise[0]
    assert len(as_on_gpu) == 5 * 4, "a call for each layer of the policy and of the reference"


def test_what_cannot_be_compiled_runs_as_written(monkeypatch, caplog):
    class RefusalError(Exception):
        pass

    def refuse(*_):
        raise RefusalError("no C compiler\nand a traceback")

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(compiled, "_kernel", lambda *_: (refuse, lambda *_: None, RefusalError))
    double = compiled.compiled(0)(lambda x: x * 2)
    x = torch.ones(2, 2).as_subclass(OnGpu)
    assert double(x).sum() == double(x).sum() == 8
    assert [record.getMessage().count("no C compiler") for record in caplog.records] == [1], "told once"
    assert "traceback" not in caplog.text
