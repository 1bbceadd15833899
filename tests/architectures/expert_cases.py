"""Language models with experts, compared with Transformers' models of the same weights, which are mapped by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from samples import recipe
from torch import Tensor, nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers_cases import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LENGTHS,
    VOCAB,
    close,
    fill,
    gradients_of,
    load,
    qkv,
    random_positions,
)  # fmt: skip

from megavlm.config.architecture import LANGUAGE
from megavlm.layers.experts import routers_of
from megavlm.layers.segments import packed_segments
from megavlm.models.build import build_context

LAYERS, EXPERTS, WIDTH, FFN = 4, 8, 20, 72


@dataclass(frozen=True)
class Case:
    """Transformers' classes and what they are told, and our preset and what it is told."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    theirs: dict[str, Any]
    preset: str
    ours: dict[str, Any] = field(default_factory=dict)


QWEN3 = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": WIDTH, "attention_bias": False}
OURS = {"num_moe_experts": EXPERTS, "moe_ffn_hidden_size": WIDTH, "moe_router_topk": 3}
DEEPSEEK = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
GROUPED = {
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_num_groups": 2,
    "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5, "moe_router_topk": 2,
}  # fmt: skip
CASES = {
    "qwen3-moe": Case(Qwen3MoeConfig, Qwen3MoeForCausalLM, {**QWEN3, "norm_topk_prob": True}, "qwen3", OURS),
    "qwen3-moe, softmax before, every second layer": Case(
        Qwen3MoeConfig, Qwen3MoeForCausalLM, {**QWEN3, "norm_topk_prob": False, "decoder_sparse_step": 2}, "qwen3",
        {**OURS, "moe_router_pre_softmax": True, "moe_layer_freq": (0, 1, 0, 1)},
    ),
    "mixtral": Case(
        MixtralConfig, MixtralForCausalLM,
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": WIDTH, "sliding_window": None},
        "llama", {**OURS, "moe_router_topk": 2, "rotary_base": 1_000_000},
    ),
    "qwen2-moe, shared experts with a gate": Case(
        Qwen2MoeConfig, Qwen2MoeForCausalLM,
        {**QWEN3, "attention_bias": True, "norm_topk_prob": False, "shared_expert_intermediate_size": 28}, "qwen2",
        {**OURS, "moe_router_pre_softmax": True, "moe_shared_expert_intermediate_size": 28}
        | {"moe_shared_expert_gate": True},
    ),
    "glm-4.5, sigmoid with bias and groups, the first dense": Case(
        Glm4MoeConfig, Glm4MoeForCausalLM,
        {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH, "n_shared_experts": 2}
        | {"first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True, **DEEPSEEK}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "qwen3",
        {**OURS, **GROUPED, "moe_layer_freq": (0, 1, 1, 1), "moe_shared_expert_intermediate_size": 2 * WIDTH}
        | {"add_qkv_bias": True, "rotary_percent": 0.5},
    ),
}  # fmt: skip


def mapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Transformers' tensors in our names and layouts; experts are stacked there."""
    out = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    for i in range(LAYERS):
        mine, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in state:
                out[f"{mine}self_attention.linear_qkv.{kind}"] = qkv(state, theirs + "self_attn.", kind, GROUPS)
        names = {
            "self_attention.linear_proj": "self_attn.o_proj",
            "mlp.linear_fc2": "mlp.down_proj",
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
            "self_attention.q_layernorm": "self_attn.q_norm",
            "self_attention.k_layernorm": "self_attn.k_norm",
            "mlp.router": "mlp.gate",
        }
        for shared in ("shared_expert", "shared_experts"):
            names["mlp.shared_experts.linear_fc2"] = f"mlp.{shared}.down_proj"
            if f"{theirs}mlp.{shared}.up_proj.weight" in state:
                parts = [state[f"{theirs}mlp.{shared}.{name}_proj.weight"] for name in ("gate", "up")]
                out[f"{mine}mlp.shared_experts.linear_fc1.weight"] = torch.cat(parts)
                out[f"{mine}mlp.shared_experts.linear_fc2.weight"] = state[f"{theirs}mlp.{shared}.down_proj.weight"]
        if f"{theirs}mlp.shared_expert_gate.weight" in state:
            out[f"{mine}mlp.shared_experts.gate_weight"] = state[f"{theirs}mlp.shared_expert_gate.weight"]
        out |= {
            f"{mine}{a}.weight": state[f"{theirs}{b}.weight"]
            for a, b in names.items()
            if f"{theirs}{b}.weight" in state
        }
        if f"{theirs}mlp.up_proj.weight" in state:
            parts = [state[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            out[f"{mine}mlp.linear_fc1.weight"] = torch.cat(parts)
        for expert in range(EXPERTS):
            for a, b in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
                if f"{theirs}mlp.experts.{b}" in state:
                    name = f"{mine}mlp.experts.local_experts.{expert}.{a}.weight"
                    out[name] = state[f"{theirs}mlp.experts.{b}"][expert]
    return out


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """Return Transformers' model and ours with its weights, and with the same biases of experts."""
    config = case.config(
        vocab_size=VOCAB, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        max_position_embeddings=16384, hidden_size=HIDDEN, rms_norm_eps=1e-6, tie_word_embeddings=False,
        **{"intermediate_size": FFN, "head_dim": HEAD_DIM, **case.theirs},
    )  # fmt: skip
    reference = case.model(config)
    fill(reference)
    language = {
        "preset": case.preset, "vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_hidden_size": FFN,
        "num_layers": LAYERS, "num_attention_heads": HEADS, "num_query_groups": GROUPS, "kv_channels": HEAD_DIM,
        "max_position_embeddings": 16384, **case.ours,
    }  # fmt: skip
    made = recipe(model={"preset": "tiny", "language": language})
    ours = LANGUAGE.find(case.preset).build(made.model.language, build_context(made))
    load(ours, mapped(dict(reference.named_parameters())))
    generator = torch.Generator().manual_seed(11)
    for layer, router in routers_of(ours):
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.rand(EXPERTS, generator=generator))
            reference.model.layers[layer].mlp.gate.e_score_correction_bias.copy_(router.expert_bias)
    return reference, ours


def compare(name: str) -> None:
    """Compare the logits of a pack of two segments, and all gradients."""
    reference, ours = pair(CASES[name])
    tokens = torch.randint(0, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(6))
    borders = np.cumsum([0, *LENGTHS]).astype(np.int32)
    packed = packed_segments(borders, tokens.device, None)
    logits = ours(
        input_ids=tokens, position_ids=random_positions(1)[None], attention_mask=None, packed_seq_params=packed
    )
    expected = torch.cat([reference(input_ids=part).logits for part in tokens.split(LENGTHS, dim=1)], dim=1)
    close(logits, expected, "logits")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    wanted, idle = mapped(gradients_of(reference)), 0
    for parameter_name, parameter in ours.named_parameters():
        assert parameter.grad is not None, parameter_name
        close(parameter.grad, wanted[parameter_name], parameter_name)
        idle += not wanted[parameter_name].any()
    # Nobody was sent to some experts, perhaps; they have a gradient of zero then, and not none.
    assert idle <= 2 * EXPERTS and not any(wanted[n].eq(0).all() for n in wanted if "local_experts" not in n)
