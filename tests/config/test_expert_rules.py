"""Rules of experts: each broken by the smallest change of a recipe that is accepted."""

from __future__ import annotations

import pytest

from megavlm.config.checks import check_recipe
from megavlm.config.load import RecipeError

L, P = "model.language.", "parallel."
EXPERTS = [f"{L}num_moe_experts=8", f"{L}moe_ffn_hidden_size=32"]
SIGMOID = [f"{L}moe_router_score_function=sigmoid", f"{L}moe_router_enable_expert_bias=true"]
GROUPS = [f"{L}moe_router_num_groups=4", f"{L}moe_router_group_topk=2", f"{L}moe_router_topk=4"]
SHARED = [f"{L}moe_shared_expert_intermediate_size=48"]
TP2 = [f"{P}tensor_model_parallel_size=2", f"{P}sequence_parallel=true"]
CP3 = f"{P}context_parallel_size=3"
EP2 = [f"{P}expert_model_parallel_size=2"]
BIASES = [f"{L}add_bias_linear=true"]
FROZEN = ["modules.vision.freeze=true", "modules.connector.freeze=true"]
NF4 = "lora.quantize=nf4"
LORA = ["lora.rank=4", "checkpoint.load=unused"]


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (EXPERTS, 1),
        ([*EXPERTS, f"{L}moe_layer_freq=2"], 1),
        ([*EXPERTS, f"{L}moe_layer_freq=[0, 1, 1, 1]", *SIGMOID, *GROUPS, *SHARED], 1),
        ([*EXPERTS, *EP2], 2),
        ([*EXPERTS, *TP2, *SHARED], 2),
        ([*EXPERTS, *TP2, *EP2], 2),
        ([*EXPERTS, *TP2, *EP2, f"{P}expert_tensor_parallel_size=2"], 4),
        ([*EXPERTS, *EP2, *BIASES, *TP2], 4),
        ([*EXPERTS, *EP2, f"{P}pipeline_model_parallel_size=2"], 4),
        ([*EXPERTS, *LORA, "lora.targets=[attn.c_attn]"], 1),
        ([*EXPERTS, *LORA, "lora.targets=[all-linear]"], 1),
        ([*EXPERTS, *TP2, *EP2, f"{P}expert_tensor_parallel_size=2", *LORA, "lora.targets=[gate_proj]"], 4),
        ([*EXPERTS, *SHARED, *LORA, "lora.targets=[attn.c_attn,experts.up_proj]"], 1),
        ([*EXPERTS, *SHARED, *LORA, "lora.targets=[all-linear]", NF4], 1),
        ([*EXPERTS, *EP2, *LORA, "lora.targets=[shared_experts.up_proj]", *SHARED, NF4], 2),
        ([*EXPERTS, *EP2, f"{P}expert_tensor_parallel_size=2", *LORA, "lora.targets=[attn.c_attn]"], 4),
        ([*EXPERTS, *EP2, *LORA, "lora.targets=[gate_proj]", *FROZEN], 2),  # nothing beside experts is trainable
        ([*EXPERTS, *TP2, *EP2, "logging.panel_interval=10"], 2),
        ([*EXPERTS, *EP2, "logging.panel_interval=5"], 2),
        # Of ranks 0 to 5, 2 and 3 share experts, and are of two replicas.
        ([*EXPERTS, *EP2, CP3, "logging.panel_interval=5"], 6),
        ([*EXPERTS, *EP2, f"{P}context_parallel_size=4", "logging.panel_interval=10"], 4),
        ([*EXPERTS, f"{L}moe_router_topk=1", f"{L}moe_router_pre_softmax=true"], 1),
    ],
)
def test_accepted(load, overrides, world_size):
    check_recipe(load(*overrides), world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([f"{L}moe_aux_loss_coeff=0.01"], 1, f"{L}moe_aux_loss_coeff: has no effect without {L}num_moe_experts"),
        (EP2, 2, f"{P}expert_model_parallel_size: the language model has no experts; set it to 1"),
        (
            [f"{P}expert_tensor_parallel_size=1"],
            1,
            f"{P}expert_tensor_parallel_size: the language model has no experts",
        ),
        ([*EXPERTS, f"{L}moe_layer_freq=0"], 1, f"{L}moe_layer_freq: every 0 layers cannot be"),
        ([*EXPERTS, f"{L}moe_layer_freq=[0, 1]"], 1, f"{L}moe_layer_freq: is no list of 0 and 1 for 4 layers"),
        ([*EXPERTS, f"{L}moe_layer_freq=[0, 1, 2, 1]"], 1, f"{L}moe_layer_freq: is no list of 0 and 1 for 4 layers"),
        ([*EXPERTS, f"{L}moe_layer_freq=[0, 0, 0, 0]"], 1, f"{L}moe_layer_freq: gives no layer experts"),
        ([*EXPERTS, f"{L}moe_router_topk=9"], 1, f"{L}moe_router_topk: 9 is more than the experts"),
        ([*EXPERTS, f"{L}moe_router_topk=1"], 1, f"{L}moe_router_topk: of one chosen expert softmax is 1"),
        (
            [*EXPERTS, SIGMOID[1]],
            1,
            f"{L}moe_router_enable_expert_bias: goes with {L}moe_router_score_function sigmoid",
        ),
        (
            [*EXPERTS, SIGMOID[0], f"{L}moe_router_pre_softmax=true"],
            1,
            f"{L}moe_router_pre_softmax: has no effect with",
        ),
        (
            [*EXPERTS, f"{L}moe_router_bias_update_rate=0.01"],
            1,
            f"{L}moe_router_bias_update_rate: has no effect without {L}moe_router_enable_expert_bias",
        ),
        ([*EXPERTS, GROUPS[0]], 1, f"{L}moe_router_num_groups: needs {L}moe_router_group_topk; set both"),
        (
            [*EXPERTS, *GROUPS, f"{L}moe_router_num_groups=3"],
            1,
            f"{L}moe_router_num_groups: 3 does not divide 8 experts",
        ),
        (
            [*EXPERTS, *GROUPS, f"{L}moe_router_group_topk=5"],
            1,
            f"{L}moe_router_group_topk: 5 is more than the 4 groups",
        ),
        ([*EXPERTS, *GROUPS, f"{L}moe_router_topk=3"], 1, f"{L}moe_router_topk: 3 experts of 2 groups of 2 are not"),
        ([*EXPERTS, f"{L}moe_shared_expert_gate=true"], 1, f"{L}moe_shared_expert_gate: has no effect without"),
        ([*EXPERTS, *SHARED, *BIASES], 1, f"{L}moe_shared_expert_intermediate_size: shared experts have no biases"),
        (
            [*EXPERTS, *TP2, f"{L}moe_shared_expert_intermediate_size=47"],
            2,
            f"{L}moe_shared_expert_intermediate_size: 47",
        ),
        ([*EXPERTS, *TP2, f"{L}moe_ffn_hidden_size=31"], 2, f"{L}moe_ffn_hidden_size: 31"),
        ([*EXPERTS, f"{P}expert_model_parallel_size=3"], 3, f"{L}num_moe_experts: 8"),
        (
            [*EXPERTS, *EP2],
            3,
            f"{P}expert_model_parallel_size: 2 x ranks of an expert (1) x pipeline stages (1) = 2 does",
        ),
        ([*EXPERTS, TP2[0]], 2, f"{P}sequence_parallel: with experts, {P}tensor_model_parallel_size (2) needs it"),
        ([*EXPERTS, *TP2, f"{P}expert_tensor_parallel_size=1"], 2, f"{P}expert_tensor_parallel_size: 1 without"),
        ([*EXPERTS, *TP2, *BIASES], 2, f"{P}expert_tensor_parallel_size: experts with biases"),
        (
            [*EXPERTS, f"{L}moe_router_load_balancing_type=none", f"{L}moe_aux_loss_coeff=0.1"],
            1,
            f"{L}moe_aux_loss_coeff",
        ),
        ([*EXPERTS, f"{P}vision_placement=all_ranks"], 1, f"{P}vision_placement: all_ranks is not proven with experts"),
        ([*EXPERTS, "engine.fp8=hybrid"], 1, "engine.fp8: layers with experts are not proven in FP8"),
        ([*EXPERTS, "engine.cuda_graph_impl=transformer_engine"], 1, "engine.cuda_graph_impl: how many tokens"),
        # Experts in all layers, and no MLP's layers; Mixtral's names are for Llamas.
        ([*EXPERTS, *LORA, "lora.targets=[w1]"], 1, "lora.targets: 'w1' is none of the language model's layers"),
        ([*EXPERTS, *LORA, "lora.targets=[experts.3.up_proj]"], 1, "lora.targets: 'experts.3.up_proj' is none of"),
        (
            [*EXPERTS, *LORA, "lora.targets=[shared_experts.up_proj]"],
            1,
            "lora.targets: 'shared_experts.up_proj' is none",
        ),
        (
            [*EXPERTS, *EP2, f"{P}expert_tensor_parallel_size=2", *LORA, "lora.targets=[down_proj]"],
            4,
            f"{P}expert_tensor_parallel_size: 2 ranks share an expert, which with adapters one rank has",
        ),
        (
            [*EXPERTS, *TP2, *EP2, f"{P}expert_tensor_parallel_size=2", *LORA, "lora.targets=[up_proj]", NF4],
            4,
            "lora.quantize: a shard of the weights that model.language.moe_ffn_hidden_size makes is no multiple of",
        ),
        (
            [*EXPERTS, *SHARED, *TP2, *LORA, "lora.targets=[up_proj]", NF4],
            2,
            "lora.quantize: a shard of the weights that model.language.moe_shared_expert_intermediate_size makes is no",
        ),
    ],
)
def test_refused(load, overrides, world_size, expected):
    with pytest.raises(RecipeError) as caught:
        check_recipe(load(*overrides), world_size)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert any(line.startswith(expected) for line in lines), lines
