"""Runs a whole backbone by `layer.py` where every module is exactly what that file computes; else says no.

The modules are read, not changed: no forward is replaced, no hook set. The reading is repeated for every
pass, so a switched adapter, a merged weight or a new hook is seen.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from dpo_lora.engine import cpu_passes, gpu_passes
from dpo_lora.engine.layer import LayerParts, Rotation, run_layer
from dpo_lora.engine.lowrank import Projection, prepared, read_projection, watched
from dpo_lora.engine.packing import PairPlan

_FAMILIES = {
    "Llama": modeling_llama,
    "Mistral": modeling_mistral,
    "Qwen2": modeling_qwen2,
    "Qwen3": modeling_qwen3,
}


def passes_for(weight: Tensor) -> ModuleType | None:
    """What a layer of this weight's device and format computes by; None where nothing is written for it.

    On a GPU products are in the format of the weights, which autocast, where it is on, must agree with.
    """
    device, dtype = weight.device.type, weight.dtype
    autocast = torch.is_autocast_enabled(device)
    if device == "cpu" and dtype in (torch.float32, torch.float64) and not autocast:
        return cpu_passes
    if device == "cuda" and dtype == torch.bfloat16:
        return gpu_passes if not autocast or torch.get_autocast_dtype(device) == dtype else None
    return None


def run_decoder(backbone: nn.Module, layers: list[LayerParts], plan: PairPlan) -> Tensor:
    """Last hidden states [R, hidden] of the plan's scored rows, by the backbone's layers as `read_layers` gave them."""
    x = backbone.embed_tokens(plan.input_ids)
    with torch.autocast(x.device.type, enabled=False):
        cos, sin = backbone.rotary_emb(x, position_ids=plan.position_ids)
        half = cos.shape[-1] // 2
        rotation = Rotation(*(t[0, :, None, :half].contiguous() for t in (cos, sin)))
        x = x[0]
        for parts in layers[:-1]:
            x = run_layer(x, parts, rotation, plan)
        x = run_layer(x, layers[-1], rotation, plan, plan.scored_rows)
        return _FinalNorm.apply(x, backbone.norm.weight, backbone.norm.variance_epsilon, layers[0].passes)


def read_layers(backbone: nn.Module, recompute: bool = False) -> list[LayerParts] | None:
    """Every layer's parts, or None if one module of the backbone is not exactly as expected.

    recompute: keep only each layer's input for the backward pass and compute the rest again; the model's own gradient
        checkpointing asks for the same.
    """
    recompute = recompute or (getattr(backbone, "gradient_checkpointing", False) and backbone.training)
    family = next((f for f, m in _FAMILIES.items() if type(backbone) is getattr(m, f"{f}Model")), None)
    passes = passes_for(backbone.get_input_embeddings().weight)
    if family is None or passes is None or not _is_norm(backbone.norm, family) or watched(backbone):
        return None
    layers = backbone.layers[: backbone.config.num_hidden_layers]
    read = [_read_layer(layer, family, passes) for layer in layers]
    if any(projections is None for projections in read):
        return None
    groups = iter(prepared([group for q, k, v, o, g, u, d in read for group in ((q, k, v), (o,), (g, u), (d,))]))
    return [
        LayerParts(
            attention_norm=layer.input_layernorm.weight,
            qkv=next(groups),
            output=next(groups),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=next(groups),
            down=next(groups),
            epsilon=layer.input_layernorm.variance_epsilon,
            adapters=tuple(weight for p in projections for weight in (p.down, p.up)),
            head_dim=layer.self_attn.head_dim,
            scale=layer.self_attn.scaling,
            passes=passes,
            head_norms=tuple(norm.weight for norm in _head_norms(layer.self_attn)),
            recompute=recompute,
        )
        for layer, projections in zip(layers, read, strict=True)
    ]


def _is_norm(module: nn.Module, family: str) -> bool:
    expected = getattr(_FAMILIES[family], f"{family}RMSNorm")
    return type(module) is expected and not module.weight.requires_grad and not watched(module)


def _head_norms(attention: nn.Module) -> list[nn.Module]:
    """The norms of q's and of k's heads, where there are any."""
    return [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []


def _read_layer(layer: nn.Module, family: str, passes: ModuleType) -> list[Projection] | None:
    """q, k, v, output, gate, up and down, or None if the layer is not exactly as expected."""
    module = _FAMILIES[family]
    attention, mlp = layer.self_attn, layer.mlp
    kinds = {layer: f"{family}DecoderLayer", attention: f"{family}Attention", mlp: f"{family}MLP"}
    if any(type(part) is not getattr(module, kind) for part, kind in kinds.items()):
        return None
    if watched(*kinds) or not isinstance(mlp.act_fn, SiLUActivation | nn.SiLU):
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)]
    if not all(_is_norm(norm, family) for norm in norms):
        return None
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = [*(getattr(attention, n) for n in names), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    read = [read_projection(linear, mixed=passes is gpu_passes) for linear in linears]
    if any(p is None or p.weight.dtype != layer.input_layernorm.weight.dtype for p in read):
        return None
    return None if attention.attention_dropout and attention.training else read


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon, passes):
        out, inverse = passes.normalise(x, weight, epsilon)
        ctx.save_for_backward(x, inverse, weight)
        ctx.passes = passes
        return out

    @staticmethod
    def backward(ctx, grad):
        x, inverse, weight = ctx.saved_tensors
        return ctx.passes.normalise_backward(grad, x, inverse, weight, None), None, None, None
