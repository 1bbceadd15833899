"""Adapters of a language model: which of its linear layers have some, how they begin, and what learns beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megavlm.config.lora import (
    CROSS_LINEARS,
    EXPERT_LINEARS,
    IMAGE_LINEARS,
    LINEARS,
    OF_IMAGES,
    SHARED_LINEARS,
    known_targets,
    targets_of,
)
from megavlm.config.schema import LanguageConfig, LoraConfig
from megavlm.layers.lora import (
    LORA,
    Adapter,
    FrozenColumnParallelLinear,
    FrozenRowParallelLinear,
    initial_a,
    seed_dropout,
)

FrozenLinear = FrozenColumnParallelLinear | FrozenRowParallelLinear


def adapter_of(linear: str, language: LanguageConfig, lora: LoraConfig) -> Adapter | None:
    """Return the adapters of a linear layer, named inside a layer of the language model; None for none."""
    assert lora.rank is not None
    own = [target for target in targets_of(lora, language) if target.linear == linear]
    if not own:
        return None
    parts, grouped = own[0].parts, False
    sizes: tuple[int, ...] = (1,)
    if parts == 3:
        width = language.kv_channels
        sizes, grouped = (language.num_attention_heads // language.num_query_groups * width, width, width), True
    elif linear in CROSS_LINEARS and parts == 2:
        sizes, grouped = (language.kv_channels, language.kv_channels), True
    elif parts == 2:
        sizes = (1, 1)
    present = tuple(any(target.part == i for target in own) for i in range(parts))
    halves = linear.removesuffix(OF_IMAGES).endswith("linear_fc1") and getattr(language, "gated_linear_unit", True)
    halves = halves or linear.endswith("in_proj")  # what is mixed, and its gate
    return Adapter(lora.rank, lora.alpha / lora.rank, lora.dropout, sizes, present, grouped, halves)


def adapted_linears(language: LanguageConfig, lora: LoraConfig) -> dict[str, ModuleSpec] | None:
    """Return the linear layers of a layer, by their last names; None for a model without adapters.

    Those of experts, ``experts.linear_fc1`` and ``experts.linear_fc2``, and of shared ones (``shared_experts.``..) are
    there if they have adapters or are kept in 4 bits; those of attention to pictures under their whole names; those for
    image tokens (``linear_qkv.vision``, ..) where the model has such weights.
    """
    if lora.rank is None:
        return None
    found, named = {}, {target.linear for target in known_targets(language)}
    for linear in LINEARS:
        adapter = adapter_of(linear, language, lora)
        name = linear if linear in CROSS_LINEARS else linear.partition(".")[2]
        changed = adapter is not None or (linear in named and lora.quantize is not None)
        if linear in (*EXPERT_LINEARS, *SHARED_LINEARS) and not changed:
            continue
        if linear in IMAGE_LINEARS and linear not in named:
            continue
        last = name.removesuffix(OF_IMAGES)
        column = last.endswith(("qkv", "fc1", "linear_q", "linear_kv", "in_proj", "q_proj", "up_proj"))
        kind = FrozenColumnParallelLinear if column else FrozenRowParallelLinear
        params = {"adapter": adapter, "quantize": lora.quantize is not None}
        found[name] = ModuleSpec(module=kind, params=params)
    return found


def frozen_linears(language: GPTModel) -> Iterator[tuple[int, str, FrozenLinear]]:
    """Yield number (from 0, in the whole model), name inside the layer, and layer.

    Of this rank's experts, with their numbers in the whole model.
    """
    for layer in language.decoder.layers:
        modules = dict(layer.named_modules())
        named = [(name, modules.get(name)) for name in LINEARS]  # a layer with experts has no MLP of its own
        experts = modules.get("mlp.experts")
        if isinstance(experts, SequentialMLP):
            first = experts.ep_group.rank() * len(experts.local_experts)
            for number, expert in enumerate(experts.local_experts, start=first):
                prefix = f"mlp.experts.local_experts.{number}."
                named += [(prefix + name, getattr(expert, name)) for name in ("linear_fc1", "linear_fc2")]
        for name, linear in named:
            if isinstance(linear, FrozenLinear):
                yield layer.layer_number - 1, name, linear


def has_adapters(model: nn.Module) -> bool:
    """Whether some of the model's linear layers may have adapters, or quantised weights."""
    return any(isinstance(module, FrozenLinear) for module in model.modules())


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return name.rpartition(".")[2] in LORA


def prepare_adapters(language: GPTModel, lora: LoraConfig, seed: int) -> None:
    """Freeze a chunk's own weights but those that the recipe lets learn, and give the adapters their first values."""
    for name, parameter in language.named_parameters():
        kept = (
            (lora.train_embeddings and name.startswith("embedding."))
            or (lora.train_head and name.startswith("output_layer."))
            or (lora.train_norms and parameter.dim() == 1 and name.endswith(".weight"))
        )
        parameter.requires_grad_(is_adapter(name) or kept)
    if lora.dropout:
        seed_dropout(seed, experts=any(linear.is_expert for *_, linear in frozen_linears(language)))
    for number, name, linear in frozen_linears(language):
        rank, size = linear.tp_group.rank(), linear.tp_group.size()
        if linear.adapter is None:
            continue
        shape = (linear.lora_a.shape[0], linear.input_size)
        whole = initial_a(shape, seed, f"{number}.{name}")
        cut = isinstance(linear, FrozenRowParallelLinear)
        with torch.no_grad():
            linear.lora_a.copy_(whole.chunk(size, dim=1)[rank] if cut else whole)


def trained_keys(model: Any) -> set[str]:
    """Return the names of the parameters of a chunk that learn."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
