"""Reading on token by token says what the model's own cached pass says, row by row under its adapter."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.engine import worlds

from dpo_lora.engine.continuing import BASE, CachedSteps

# Two prompts, the first padded on the left, asked under each of two adapters.
PROMPTS = torch.tensor([[0, 0, 0, 7, 8, 9], [3, 4, 5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def adapted(name: str, **changes: object) -> torch.nn.Module:
    """A tiny model with two different LoRA adapters, "default" active."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(worlds.model(name, **changes), config)
    model.add_adapter("ref", config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.1)
    return model.eval()


@torch.no_grad()
def own(model: torch.nn.Module, adapters: tuple[str, ...], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits after the last token, by the whole forward pass of each adapter's rows."""
    names = {"adapter_names": [name for name in adapters for _ in PROMPTS]} if adapters else {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **names).logits[:, -1]


@pytest.mark.parametrize("adapters", [(), ("default", BASE), ("default", "ref")], ids=["as it is", "base", "two"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_logits_are_those_of_a_whole_pass(name: str, adapters: tuple[str, ...]) -> None:
    model = adapted(name)
    copies = max(1, len(adapters))
    ids, mask = PROMPTS.repeat(copies, 1), MASK.repeat(copies, 1)
    steps = CachedSteps.of(model, adapters, room=10)
    assert steps is not None
    new, seen = ids, mask
    for token in range(4):
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        found = steps(new, seen, positions)
        expected = own(model, adapters, ids, seen)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if adapters:
            policy, reference = found.chunk(2)
            assert (policy - reference).abs().max() > 0.05, "both halves had one adapter"
        new = torch.arange(11 + token, 11 + token + len(ids))[:, None]
        ids, seen = torch.cat([ids, new], 1), torch.cat([seen, seen.new_ones(len(ids), 1)], 1)
    assert model.active_adapter == "default"


def test_other_models_keep_their_own_forward() -> None:
    assert CachedSteps.of(adapted("gpt2"), (), room=10) is None
    assert CachedSteps.of(adapted("gemma2"), (), room=10) is None
    assert CachedSteps.of(adapted("mistral", sliding_window=8), (), room=10) is None
    assert CachedSteps.of(adapted("mistral", sliding_window=8), (), room=8) is not None
    assert CachedSteps.of(adapted("llama").to(torch.bfloat16), (), room=10) is None
    watched = adapted("llama")
    watched.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert CachedSteps.of(watched, (), room=10) is None
