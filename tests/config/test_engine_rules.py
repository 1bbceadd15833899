"""Rules of the engine branch: each broken by the smallest change of a recipe that is accepted."""

from __future__ import annotations

import pytest

from megavlm.config.checks import check_recipe
from megavlm.config.engine import for_inference
from megavlm.config.load import RecipeError, load_recipe
from megavlm.config.schema import EngineConfig
from megavlm.families.presets import expand_presets

FP8 = "engine.fp8=hybrid"
DELAYED = "engine.fp8_recipe=delayed"
BLOCKWISE = "engine.fp8_recipe=blockwise"
MXFP8 = "engine.fp8_recipe=mxfp8"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
OVERLAP = "engine.tp_comm_overlap=true"
GRAPHS = "engine.cuda_graph_impl=transformer_engine"
ENDS = "engine.first_last_layers_bf16=true"


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([FP8], 1),
        (["engine.fp8=e4m3", BLOCKWISE], 1),
        ([FP8, MXFP8], 1),
        ([FP8, DELAYED, "engine.fp8_margin=1", "engine.fp8_amax_history_len=16", "engine.fp8_wgrad=false"], 1),
        ([FP8, ENDS, "engine.num_layers_at_start_in_bf16=2"], 1),
        ([FP8, *TP2, OVERLAP], 2),
        ([FP8, "engine.fp8_param_gather=true"], 1),
        ([FP8, "engine.vision_bf16=false", "engine.connector_bf16=false"], 1),
        (["engine.cross_entropy_loss_fusion=on", "engine.cross_entropy_fusion_impl=te"], 1),
        (["training.precision=fp32"], 1),
        ([GRAPHS, "parallel.recompute_granularity=selective"], 1),
    ],
)
def test_accepted(load, overrides, world_size):
    check_recipe(load(*overrides), world_size)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["engine.fp8_recipe=delayed"], "engine.fp8_recipe: has no effect without engine.fp8"),
        (["engine.vision_bf16=false"], "engine.vision_bf16: has no effect without engine.fp8"),
        ([FP8, "training.precision=fp32"], "engine.fp8: needs training.precision bf16"),
        ([FP8, "parallel.transformer_impl=torch"], "engine.fp8: plain torch layers have no FP8"),
        ([FP8, "engine.fp8_margin=1"], "engine.fp8_margin: belongs to engine.fp8_recipe delayed, not to tensorwise"),
        ([FP8, DELAYED, ENDS], "engine.first_last_layers_bf16: not with engine.fp8_recipe delayed"),
        ([FP8, DELAYED, "engine.vision_bf16=false"], "engine.vision_bf16: must be true with engine.fp8_recipe delayed"),
        (
            [FP8, "engine.num_layers_at_end_in_bf16=2"],
            "engine.num_layers_at_end_in_bf16: has no effect without engine.first_last_layers_bf16",
        ),
        (
            [FP8, ENDS, "engine.num_layers_at_end_in_bf16=5"],
            "engine.num_layers_at_end_in_bf16: 5 is more than the layers of a pipeline stage (4)",
        ),
        (
            [FP8, "engine.fp8_param_gather=true", "parallel.use_distributed_optimizer=false"],
            "engine.fp8_param_gather: needs parallel.use_distributed_optimizer",
        ),
        ([FP8, MXFP8, "engine.fp8_param_gather=true"], "engine.fp8_param_gather: not with engine.fp8_recipe mxfp8"),
        ([FP8, "data.sequence_length=264"], "data.sequence_length: 264 is not divisible by 16 x 1"),
        ([FP8, *TP2, "data.sequence_length=272"], "data.sequence_length: 272 is not divisible by 16 x 2"),
        ([FP8, MXFP8, "data.sequence_length=272"], "data.sequence_length: 272 is not divisible by 32 x 1"),
        ([FP8, BLOCKWISE, *TP2, "data.sequence_length=384"], "data.sequence_length: 384 is not divisible by 128 x 2"),
        (
            [FP8, BLOCKWISE, *TP2, "model.language.hidden_size=160", "model.connector.head_dim=40"],
            "model.language.hidden_size: 160 is not divisible by 128",
        ),
        (
            [FP8, "model.language.ffn_hidden_size=360"],
            "model.language.ffn_hidden_size: 360 gives no multiple of 16, as tensorwise FP8 asks; set engine.fp8 to",
        ),
        (
            [FP8, *TP2, "model.language.ffn_hidden_size=336"],
            "model.language.ffn_hidden_size: 336 over parallel.tensor_model_parallel_size (2) gives no multiple of 16",
        ),
        (
            [FP8, "engine.vision_bf16=false", "model.vision.class_token=true"],
            "model.vision.image_size: 65 positions of an image gives no multiple of 16",
        ),
        (
            [FP8, "engine.connector_bf16=false", "model.connector.num_queries=4"],
            "model.connector.num_queries: 4 gives no multiple of 16, as tensorwise FP8 asks; set engine.connector_bf16",
        ),
        ([GRAPHS, "training.precision=fp32"], "engine.cuda_graph_impl: needs training.precision bf16"),
        ([GRAPHS, "parallel.transformer_impl=torch"], "engine.cuda_graph_impl: is Transformer Engine's"),
        ([GRAPHS, "parallel.recompute_granularity=full"], "engine.cuda_graph_impl: not with parallel.recompute_gran"),
        ([GRAPHS, "modules.language.freeze=true"], "engine.cuda_graph_impl: a frozen language model has no backward"),
        ([OVERLAP], "engine.tp_comm_overlap: needs parallel.sequence_parallel"),
        ([OVERLAP, *TP2, "parallel.transformer_impl=torch"], "engine.tp_comm_overlap: is Transformer Engine's"),
        ([FP8, BLOCKWISE, OVERLAP, *TP2], "engine.tp_comm_overlap: has no buffers for blockwise FP8"),
        (
            ["training.precision=fp32", "engine.cross_entropy_loss_fusion=on"],
            "engine.cross_entropy_loss_fusion: needs training.precision bf16",
        ),
        (
            ["engine.cross_entropy_fusion_impl=te"],
            "engine.cross_entropy_fusion_impl: te needs engine.cross_entropy_loss_fusion on",
        ),
    ],
)
def test_refused(load, overrides, expected):
    with pytest.raises(RecipeError) as caught:
        check_recipe(load(*overrides), 2 if TP2[0] in overrides else 1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith(expected)
    assert ";" in lines[0], "no remedy"


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_14b_fits_fp8_in_every_recipe_and_module(tensor):
    sharded = "true" if tensor > 1 else "false"
    common = [f"parallel.tensor_model_parallel_size={tensor}", f"parallel.sequence_parallel={sharded}", FP8]
    for scaling in ("tensorwise", "blockwise", "mxfp8"):
        recipe = load_recipe(
            "codefuse_vl_14b",
            [*common, f"engine.fp8_recipe={scaling}", "engine.vision_bf16=false", "engine.connector_bf16=false"],
            expand_presets,
        )
        check_recipe(recipe, 8)


def test_evaluation_leaves_the_engine_out(load):
    recipe = load(FP8, "engine.fp8_param_gather=true", "engine.gradient_accumulation_fusion=on")
    plain = for_inference(recipe)
    assert plain.engine == EngineConfig() and plain.model == recipe.model
    check_recipe(plain, 1)
