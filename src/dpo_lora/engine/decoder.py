"""Runs a whole backbone by `layer.py` where every module is exactly what that file computes; else says no.

The modules are read, not changed: no forward is replaced, no hook set. The reading is repeated for every
pass, so a switched adapter, a merged weight or a new hook is seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

from dpo_lora.engine.layer import LayerParts, Rotation, normalise, normalise_backward, run_layer
from dpo_lora.engine.lowrank import read_projection, watched
from dpo_lora.engine.packing import PairPlan

_FAMILIES = {
    "Llama": modeling_llama,
    "Mistral": modeling_mistral,
    "Qwen2": modeling_qwen2,
}


def run_decoder(backbone: nn.Module, plan: PairPlan, recompute: bool = False) -> Tensor | None:
    """Last hidden states [T, hidden] of the plan's row, or None if the backbone must run its own forward.

    recompute keeps only each layer's input for the backward pass and computes the rest again; the model's own
    gradient checkpointing asks for the same.
    """
    checkpointing = getattr(backbone, "gradient_checkpointing", False) and backbone.training
    layers = read_layers(backbone, recompute or checkpointing)
    if layers is None:
        return None
    x = backbone.embed_tokens(plan.input_ids)
    cos, sin = backbone.rotary_emb(x, position_ids=plan.position_ids)
    half = cos.shape[-1] // 2
    rotation = Rotation(*(t[0, :, None, :half].contiguous() for t in (cos, sin)))
    x = x[0]
    for parts in layers:
        x = run_layer(x, parts, rotation, plan)
    return _FinalNorm.apply(x, backbone.norm.weight, backbone.norm.variance_epsilon)


def read_layers(backbone: nn.Module, recompute: bool = False) -> list[LayerParts] | None:
    """Every layer's parts, or None if one module of the backbone is not exactly as expected."""
    family = next((f for f, m in _FAMILIES.items() if type(backbone) is getattr(m, f"{f}Model")), None)
    weight = backbone.get_input_embeddings().weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    if family is None or autocast or weight.dtype not in (torch.float32, torch.float64):
        return None
    if not _is_norm(backbone.norm, family) or watched(backbone):
        return None
    layers = []
    for layer in backbone.layers[: backbone.config.num_hidden_layers]:
        parts = _read_layer(layer, family, weight.dtype, recompute)
        if parts is None:
            return None
        layers.append(parts)
    return layers


def _is_norm(module: nn.Module, family: str) -> bool:
    expected = getattr(_FAMILIES[family], f"{family}RMSNorm")
    return type(module) is expected and not module.weight.requires_grad and not watched(module)


def _read_layer(layer: nn.Module, family: str, dtype: torch.dtype, recompute: bool) -> LayerParts | None:
    module = _FAMILIES[family]
    attention, mlp = layer.self_attn, layer.mlp
    kinds = {layer: f"{family}DecoderLayer", attention: f"{family}Attention", mlp: f"{family}MLP"}
    if any(type(part) is not getattr(module, kind) for part, kind in kinds.items()):
        return None
    if watched(*kinds) or not isinstance(mlp.act_fn, SiLUActivation | nn.SiLU):
        return None
    if not (_is_norm(layer.input_layernorm, family) and _is_norm(layer.post_attention_layernorm, family)):
        return None
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = [*(getattr(attention, n) for n in names), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    read = [read_projection(linear) for linear in linears]
    if any(p is None or p.weight.dtype != dtype for p in read):
        return None
    if attention.attention_dropout and attention.training:
        return None
    return LayerParts(
        attention_norm=layer.input_layernorm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        epsilon=layer.input_layernorm.variance_epsilon,
        qkv=(read[0], read[1], read[2]),
        output=read[3],
        gate_up=(read[4], read[5]),
        down=read[6],
        head_dim=attention.head_dim,
        scale=attention.scaling,
        recompute=recompute,
    )


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        out, inverse = normalise(x, weight, epsilon)
        ctx.save_for_backward(x, inverse, weight)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, inverse, weight = ctx.saved_tensors
        return normalise_backward(grad.clone(), x, inverse, weight), None, None
