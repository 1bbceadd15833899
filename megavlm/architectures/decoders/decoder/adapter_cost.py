"""The cost of adapters beside a decoder's layers."""

from __future__ import annotations

import dataclasses

from megavlm.architectures.decoders.decoder.config import DecoderConfig, with_all_keys
from megavlm.config.lora import CROSS_LINEARS, EXPERT_LINEARS, IMAGE_LINEARS, OF_IMAGES, Target, targets_of
from megavlm.config.schema import LoraConfig


def inner_width(language: DecoderConfig) -> int:
    """Return what the MLP's first projection gives, in widths of its inside: gate and up, or one."""
    return 2 if language.gated_linear_unit else 1


def common_width(language: DecoderConfig) -> int:
    """Return the width of the MLP that gets every token of a layer: beside experts, of the shared ones; or 0."""
    if language.num_moe_experts is None:
        return language.ffn_hidden_size
    return language.moe_shared_expert_intermediate_size or 0


def beside(language: DecoderConfig, lora: LoraConfig, *, experts: bool) -> list[Target]:
    """Return the layers of one kind's layer that have adapters: of its experts, or all others.

    Not of attention to pictures: that layer's are in ``cross_cost.py``.
    """
    own = [target for target in targets_of(lora, language) if target.linear not in CROSS_LINEARS]
    return [target for target in own if (target.linear in EXPERT_LINEARS) == experts]


@with_all_keys
def expert_adapter_parameters(language: DecoderConfig, lora: LoraConfig, experts: int, tensor: int) -> list[int]:
    """Return the elements of each adapter parameter of the experts of one language layer on one rank."""
    if language.num_moe_experts is None:
        return []
    assert lora.rank is not None
    hidden, width, shapes = language.hidden_size, language.expert_width, []
    for target in beside(language, lora, experts=True):
        if target.linear.endswith("linear_fc1"):
            rows = inner_width(language) * width if target.parts == 1 else width
            shapes += [lora.rank * hidden, lora.rank * rows // tensor]
        else:
            shapes += [lora.rank * width // tensor, lora.rank * hidden]
    return shapes * (language.num_moe_experts // experts)


@with_all_keys
def adapter_parameters(language: DecoderConfig, lora: LoraConfig, tensor: int) -> list[int]:
    """Return the elements of each adapter parameter of one language layer on one rank, but those of experts."""
    assert lora.rank is not None
    hidden, width, ffn = language.hidden_size, language.kv_channels, common_width(language)
    queries, keys = language.num_attention_heads * width, language.num_query_groups * width
    shapes = []
    for target in beside(language, lora, experts=False):
        linear = target.linear.removesuffix(OF_IMAGES)
        if linear.endswith("linear_qkv"):
            rows = (queries + 2 * keys) if target.parts == 1 else (queries, keys, keys)[target.part]
            shapes += [lora.rank * hidden, lora.rank * rows // tensor]
        elif linear.endswith("linear_fc1"):
            rows = inner_width(language) * ffn if target.parts == 1 else ffn
            shapes += [lora.rank * hidden, lora.rank * rows // tensor]
        else:
            inputs = queries if linear.endswith("linear_proj") else ffn
            shapes += [lora.rank * inputs // tensor, lora.rank * hidden]
    return shapes


@with_all_keys
def adapter_products(language: DecoderConfig, lora: LoraConfig, tensor: int) -> list[int]:
    """Return those of ``adapter_parameters`` that a token is multiplied by.

    With weights of their own for image tokens: those of the kind that has more of them, as if all tokens were of it.
    """
    kinds = [
        [target.path for target in beside(language, lora, experts=False) if (target.linear in IMAGE_LINEARS) == image]
        for image in (False, True)
    ]
    found = (
        adapter_parameters(language, dataclasses.replace(lora, targets=tuple(own)), tensor) for own in kinds if own
    )
    return max(found, key=sum, default=[])


@with_all_keys
def adapter_widths(language: DecoderConfig, lora: LoraConfig, tensor: int) -> tuple[int, int]:
    """Return the numbers of a token that the adapters of one language layer read, and that they add to.

    Of experts, those of all copies that the tensor-parallel ranks have of it.
    """
    hidden, ffn = language.hidden_size, common_width(language) // tensor
    queries, keys = (
        n * language.kv_channels // tensor for n in (language.num_attention_heads, language.num_query_groups)
    )
    own = [*beside(language, lora, experts=False), *beside(language, lora, experts=True)]
    linears = {target.linear.removesuffix(OF_IMAGES).partition(".")[2] for target in own}
    widths = {
        "linear_qkv": (hidden, queries + 2 * keys), "linear_proj": (queries, hidden),
        "linear_fc1": (hidden, inner_width(language) * ffn), "linear_fc2": (ffn, hidden),
    }  # fmt: skip
    if language.num_moe_experts is not None:
        widths |= {f"shared_experts.{name}": widths[name] for name in ("linear_fc1", "linear_fc2")}
        copied, inner = language.moe_router_topk * hidden // tensor, language.moe_router_topk * language.expert_width
        widths["experts.linear_fc1"] = copied, inner_width(language) * inner // tensor
        widths["experts.linear_fc2"] = inner // tensor, copied
    return sum(widths[name][0] for name in linears), sum(widths[name][1] for name in linears)
