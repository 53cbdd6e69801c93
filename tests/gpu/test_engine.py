"""The pair engine on a CUDA device: flash and flex kernels, equality with TRL in float32 and within bfloat16's
noise, out-of-memory halved, and a training by the command line."""

from __future__ import annotations

import json

import pytest
import torch
from tests.engine import worlds
from tests.engine.test_attention import ALL, dense, plan_of
from tests.engine.test_head import BEST_IS_FIRST, world
from tests.engine.test_head import dense as dense_head

from dpo_lora.dpo.trainer import PairTrainer
from dpo_lora.engine import compiled, gpu_passes, head
from dpo_lora.engine.attention import KERNELS, default_kernel
from dpo_lora.engine.batching import TokenBudget
from dpo_lora.engine.forward import PackedForward
from dpo_lora.engine.head import HeadRule, token_scores
from dpo_lora.engine.runs import ScoreRule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
HEAD_DIM = 64


def inputs(plan, dtype):
    torch.manual_seed(0)
    shapes = ((1, heads, plan.tokens, HEAD_DIM) for heads in (4, 2, 2))
    return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("segments", "opening"), ALL, ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype", "softcap", "tolerance"),
    [
        ("varlen", torch.bfloat16, None, 2e-2),
        ("flex", torch.bfloat16, None, 2e-2),
        ("flex", torch.float32, None, 5e-3),  # its products may round to TF32
        ("flex", torch.float32, 2.0, 5e-3),
    ],
)
@pytest.mark.parametrize("window", [None, 7])
def test_kernels_forward_and_backward(window, kernel, dtype, softcap, tolerance, segments, opening):
    plan, rule = plan_of(*segments, opening=opening).to(DEVICE), ScoreRule(0.125, softcap, window)
    tensors = inputs(plan, dtype)
    exact = [x.detach().double().cpu().requires_grad_() for x in tensors]
    out = KERNELS[kernel](*tensors, plan, rule)
    expected = dense(*exact, plan.to("cpu"), rule)
    torch.manual_seed(1)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    out.backward(upstream.to(DEVICE, dtype))
    expected.backward(upstream)
    for ours, right in zip([out, *(x.grad for x in tensors)], [expected, *(x.grad for x in exact)], strict=True):
        assert worlds.close(ours.detach().cpu(), right.detach()) < tolerance


def step(trainer, batch):
    with torch.autocast("cuda", torch.bfloat16, enabled=trainer.model.dtype == torch.bfloat16):
        loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    return loss.detach().double().cpu(), worlds.gradients(trainer.model).double().cpu()


def stock_and_packed(tmp_path, dtype, name="llama", seed=0, opening=0, shape=None, **engine):
    """(loss, gradients) of stock, of packed in `dtype`, of stock in float32, all of the same numbers; the kernel."""
    rows = worlds.pairs(6, seed=seed, longest=40, opening=opening)
    base = worlds.model(name, seed=seed, max_position_embeddings=256, **(shape or {})).to(dtype)
    trainer = worlds.trainer(base, rows, tmp_path, use_cpu=False)
    batch = {k: v.to(DEVICE) for k, v in trainer.data_collator(rows).items()}
    trainer.model.to(DEVICE)
    stock = step(trainer, batch)
    packed = PackedForward(trainer.model, **engine)
    packed.install()
    try:
        ours = step(trainer, batch)
    finally:
        packed.detach()
    trainer.model.float()
    return stock, ours, step(trainer, batch), packed.kernel


def test_float32_equals_trl(tmp_path):
    stock, ours, _, kernel = stock_and_packed(tmp_path, torch.float32, shape={"head_dim": 16})
    assert kernel == "flex"
    assert worlds.close(ours[0], stock[0]) < 1e-4
    assert worlds.close(ours[1], stock[1]) < 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("engine", [{}, {"recompute": True}, {"layers": "plain"}], ids=str)
def test_bfloat16_is_as_near_to_float32_as_trl_is(engine, name, tmp_path):
    assert_as_near(tmp_path, name, **engine)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "phi3"])
def test_bfloat16_with_a_window_shorter_than_the_pairs(name, tmp_path):
    assert_as_near(tmp_path, name, {"sliding_window": 16, **worlds.WINDOWS[name]})


def assert_as_near(tmp_path, name, shape=None, **engine):
    noise = torch.zeros(2, dtype=torch.float64)  # of stock's gradients and of ours
    for seed in range(5):
        stock, ours, exact, kernel = stock_and_packed(
            tmp_path, torch.bfloat16, name, seed, opening=15 * (seed % 2), shape=shape, **engine
        )
        assert kernel == "varlen"
        assert worlds.close(ours[0], exact[0]) < 1e-2
        noise += torch.tensor([worlds.close(got[1], exact[1]) ** 2 for got in (stock, ours)])
    assert 0 < noise[1] < 1.2 * noise[0]


def test_layers_are_written_out_and_compiled(tmp_path, monkeypatch):
    """The flash kernel is called by `gpu_passes`, and nothing fell back to plain passes in this process."""
    calls, flash = [], gpu_passes.flash
    monkeypatch.setattr(gpu_passes, "flash", lambda *args: calls.append(args) or flash(*args))
    stock_and_packed(tmp_path, torch.bfloat16)
    assert len(calls) == 4, "a call for each layer of the policy and of the reference"
    assert not compiled._refused


@pytest.mark.parametrize("rule", [HeadRule(), HeadRule(2.0, 5.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_heads_tiles_add_up_to_the_whole_vocabulary(bias, rule):
    """Three tiles of a vocabulary, compiled; compared are the first tokens, among them equal logits of two tiles."""
    tokens, width, compared = 4096, head._TILE_ELEMENTS["cuda"] // 4096, 64
    hidden, lm_head, labels = world(tokens, 2 * width + 7232, width, bias)
    exact = hidden[:compared].double().requires_grad_()
    right = dense_head(exact, lm_head, labels[:compared], rule)
    right["log_probs"].sum().backward()

    states = hidden.to(DEVICE, torch.bfloat16).requires_grad_()
    found = token_scores(states, lm_head.to(DEVICE, torch.bfloat16), labels.to(DEVICE), rule, head.STATISTICS)
    found["log_probs"].sum().backward()
    assert not compiled._refused
    found = {name: value[:compared].cpu() for name, value in found.items()}
    assert right["is_top1"][: len(BEST_IS_FIRST)].tolist() == BEST_IS_FIRST
    assert torch.equal(found.pop("is_top1"), right.pop("is_top1"))
    for name, value in found.items():
        torch.testing.assert_close(value.double(), right[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert worlds.close(states.grad[:compared].cpu(), exact.grad) < 1e-2  # the tiles' weights are bfloat16


def test_flash_is_chosen_where_it_serves():
    assert default_kernel(DEVICE, torch.bfloat16, None, 64) == "varlen"
    assert default_kernel(DEVICE, torch.bfloat16, 50.0, 64) == "flex"
    assert default_kernel(DEVICE, torch.float32, None, 64) == "flex"
    assert default_kernel(DEVICE, torch.float32, None, 8) == "sdpa"


def test_a_step_that_does_not_fit_is_cut_until_it_does():
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    budget = TokenBudget(start=64, ceiling=64, floor=1)

    def run(batches):
        for batch in batches:  # a row of 16 tokens takes a quarter of the device, one of 64 all of it
            torch.empty(batch.tokens * total // 64, dtype=torch.uint8, device=DEVICE)
        return len(batches)

    assert budget.run([8] * 8, run, lambda: None) > 1
    assert budget.tokens < 64


def test_what_layers_keep_waits_on_the_host_where_computing_again_is_not_enough(cli, tiny_overrides, monkeypatch):
    """A single pair's first two tries are refused: both measures are taken, and the losses stay."""
    losses, refusals = [], []
    compute_loss = PairTrainer.compute_loss

    def refused_twice(self, *args, **kwargs):
        if self.model.training and len(refusals) < 2:
            refusals.append(1)
            raise torch.OutOfMemoryError("as the test wants it")
        return compute_loss(self, *args, **kwargs)

    for cramped in (False, True):
        if cramped:
            monkeypatch.setattr(PairTrainer, "compute_loss", refused_twice)
        words = ["train=gpu", "train.pairs_per_step=1", "train.micro_batch=null", "train.log_every=1"]
        run = cli("train", *tiny_overrides, *words).run
        manifest = json.loads((run / "run.json").read_text())
        assert manifest["engine"]["layers"] == "written out"
        both = ["gradient_checkpointing", "activation_offloading"]
        assert manifest["training"]["relief"] == (both if cramped else [])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize("words", [[], ["train.gradient_checkpointing=true"]], ids=str)
def test_a_training_packed_and_stock(cli, tiny_overrides, words):
    losses = {}
    for engine in ("packed", "stock"):
        run = cli(
            "train",
            *tiny_overrides,
            "train=gpu",
            "train.pairs_per_step=4",
            "train.log_every=1",
            f"train.engine={engine}",
            *words,
        ).run
        manifest = json.loads((run / "run.json").read_text())
        assert manifest["engine"]["engine"] == engine
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[engine] = [row["loss"] for row in rows if "loss" in row]
    assert len(losses["packed"]) > 0
    assert losses["packed"] == pytest.approx(losses["stock"], abs=2e-2)
