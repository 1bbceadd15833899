"""Rules between keys: each broken by the smallest change of a recipe that is accepted."""

from __future__ import annotations

import re

import pytest

from megavlm.config.checks import check_paths, check_recipe, remarks
from megavlm.config.load import RecipeError, load_recipe, shipped_recipes
from megavlm.families.presets import expand_presets
from megavlm.planning.layout import with_parallel

TP2 = "parallel.tensor_model_parallel_size=2"
TP3 = "parallel.tensor_model_parallel_size=3"
PP2 = "parallel.pipeline_model_parallel_size=2"
PP3 = "parallel.pipeline_model_parallel_size=3"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
FIRST = "parallel.num_layers_in_first_pipeline_stage"
LAYERS = "model.language.num_layers"


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        ([], 8),
        ([TP2, "parallel.sequence_parallel=true"], 2),
        ([TP2, PP2], 8),
        ([PP2, VPP2], 2),
        ([PP2, VPP2, f"{FIRST}=2", f"{LAYERS}=6"], 2),
        ([PP2, f"{FIRST}=1"], 2),
        ([PP3, f"{FIRST}=2"], 3),
        (["parallel.recompute_granularity=full", "parallel.recompute_num_layers=2"], 1),
        (["model.connector.preset=linear"], 1),
        (["optimizer.schedule=WSD", "optimizer.wsd_decay_steps=4", "optimizer.warmup_steps=6"], 1),
        (["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"], 1),
        (["modules.vision.freeze=true", "modules.language.freeze=true", "modules.vision.layer_decay=0.9"], 1),
        (["data.sequence_length=26"], 1),
        (["model.vision.image_size=60"], 1),
        (["model.language.rope_scaling=linear", "model.language.rope_scaling_factor=2"], 1),
        (["loss.kind=task_mean"], 1),
        (["loss.kind=task_mean", "data.train.0.task=b", "data.train.1={path: /b}", "data.train.0.name=c"], 1),
        (["loss.kind=task_mean", "data.train.0.loss_weight=2", "data.train.1={path: /b, loss_weight: 3}"], 1),
        (["logging.profile_steps=[1,1]", "logging.profile_ranks=[1,0]", "logging.memory_snapshot_steps=[2,10]"], 2),
    ],
)
def test_accepted(load, overrides, world_size):
    check_recipe(load(*overrides), world_size)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model.vision.image_size=7"],
            "model.vision.image_size: 7 is smaller than one patch (model.vision.patch_size 8)",
        ),
        (["model.vision.num_attention_heads=5"], "model.vision.hidden_size: 96 is not divisible"),
        (["model.connector.num_queries=15"], "model.connector.num_queries: 15 is not a square number"),
        (["model.connector.head_dim=48"], "model.connector.head_dim: 48 is no divisor of model.language.hidden_size"),
        (["model.connector.head_dim=null"], "model.connector.head_dim: the resampler needs it"),
        (["model.connector.num_queries=null"], "model.connector.num_queries: the resampler needs it"),
        (
            ["model.connector.preset=linear", "model.connector.num_queries=16"],
            "model.connector.num_queries: belongs to the resampler and the resampler_2d, not to 'linear'; set it to",
        ),
        (
            ["model.connector.preset=mlp2x_gelu", "model.connector.head_dim=32"],
            "model.connector.head_dim: belongs to the resampler and the resampler_2d, not to 'mlp2x_gelu'; set it to",
        ),
        (
            ["model.language.hidden_size=126", "model.connector.head_dim=2"],
            "model.language.hidden_size: 126 is not div",
        ),
        (
            ["model.language.num_query_groups=3"],
            "model.language.num_attention_heads: 4 is not divisible by model.langua",
        ),
        (["model.language.rope_scaling_factor=4"], "model.language.rope_scaling_factor: 4 has no effect without"),
        (["model.language.rotary_sections=[2,3,4]"], "model.language.rotary_sections: [2, 3, 4] are not the pairs of"),
        (["model.language.rotary_sections=[16]"], "model.language.rotary_sections: [16] are not the pairs of time"),
        (
            ["model.language.rotary_sections_interleaved=true"],
            "model.language.rotary_sections_interleaved: has no effect without model.language.rotary_sections; set",
        ),
        (
            ["model.language.rotary_sections=[4,6,6]", "model.language.rotary_sections_interleaved=true"],
            "model.language.rotary_sections: [4, 6, 6] do not take turns over 16 pairs: row and column have at most 5",
        ),
        (["model.language.rotary_percent=0.1"], "model.language.rotary_percent: 0.1 of 32 channels are 3, and"),
        (
            ["model.language.rotary_interleaved=true", "engine.apply_rope_fusion=on"],
            "engine.apply_rope_fusion: Transformer Engine's kernel turns whole heads by one position",
        ),
        (["model.language.use_logn_attn=true"], "model.language.use_logn_attn: needs model.language.seq_length"),
        (["model.language.seq_length=2048"], "model.language.seq_length: has no effect without"),
        (["model.language.kv_channels=33"], "model.language.kv_channels: 33 is odd"),
        ([f"{FIRST}=2"], f"{FIRST}: needs parallel.pipeline_model_parallel_size > 1"),
        ([VPP2], "parallel.virtual_pipeline_model_parallel_size: needs parallel.pipeline_model_parallel_size > 1"),
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel: needs parallel.tensor_model_parallel_size > 1",
        ),
        (["parallel.recompute_num_layers=2"], "parallel.recompute_num_layers: only goes with"),
        (
            ["parallel.recompute_granularity=selective", "parallel.recompute_num_layers=2"],
            "parallel.recompute_num_layers: only goes with parallel.recompute_granularity 'full'",
        ),
        (
            ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=3"],
            "parallel.recompute_num_layers: 3 does not divide the layers of a model chunk (4)",
        ),
        (["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce"),
        (["parallel.ddp_bucket_size=1000"], "parallel.ddp_bucket_size: needs parallel.overlap_grad_reduce"),
        (
            [
                "parallel.overlap_param_gather=true",
                "parallel.overlap_grad_reduce=true",
                "parallel.use_distributed_optimizer=false",
            ],
            "parallel.overlap_param_gather: needs parallel.use_distributed_optimizer",
        ),
        (["data.sequence_length=25"], "data.sequence_length: 25 is too short: one image takes 18 positions"),
        (["data.train.1.path=/x/train"], "data.train.1.name: 'train' is the name of data.train.0 as well"),
        (["optimizer.min_lr=1"], "optimizer.min_lr: 1 is above optimizer.lr (0.001)"),
        (["optimizer.schedule=WSD"], "optimizer.wsd_decay_steps: the WSD schedule needs it"),
        (["optimizer.wsd_decay_steps=4"], "optimizer.wsd_decay_steps: the cosine schedule has none"),
        (
            ["optimizer.schedule=WSD", "optimizer.wsd_decay_steps=4", "optimizer.warmup_steps=7"],
            "optimizer.wsd_decay_steps: with optimizer.warmup_steps it makes 11 steps, above training.train_steps (10)",
        ),
        (["optimizer.warmup_steps=10"], "optimizer.warmup_steps: 10 must be below training.train_steps (10)"),
        (["modules.connector.layer_decay=0.9"], "modules.connector.layer_decay: only the vision tower"),
        (["modules.language.layer_decay=0.9"], "modules.language.layer_decay: only the vision tower"),
        (["data.train.0.task=ocr"], "data.train.0.task: has no effect with loss.kind token_mean"),
        (["data.train.0.loss_weight=2"], "data.train.0.loss_weight: has no effect with loss.kind token_mean"),
        (
            ["loss.kind=task_mean", "data.validation.0={path: /v, loss_weight: 2}"],
            "data.validation.0.loss_weight: only data.train has tasks",
        ),
        (
            ["loss.kind=task_mean", "data.train.0.task=b", "data.train.1={path: /b, loss_weight: 2}"],
            "data.train.1.loss_weight: 2, but data.train.0 of the same task 'b' has 1; give both the same",
        ),
        (
            [f"modules.{part}.freeze=true" for part in ("vision", "connector", "language")],
            "modules: all three parts are frozen",
        ),
        (
            ["logging.profile_steps=[4,3]"],
            "logging.profile_steps: [4, 3] is no first and last step of 1 to",
        ),
        (
            ["logging.profile_steps=[0,3]"],
            "logging.profile_steps: [0, 3] is no first and last step of 1 to",
        ),
        (["logging.memory_snapshot_steps=[2,11]"], "logging.memory_snapshot_steps: [2, 11] is no first and last step"),
        (["logging.profile_ranks=[-1]"], "logging.profile_ranks: -1 is no rank; they count from 0"),
        (["logging.profile_ranks=[]"], "logging.profile_ranks: the list must have at least one entry; add one"),
        (["logging.profile_steps=5"], "logging.profile_steps: expected list of 2 or null, got 5"),
    ],
)
def test_refused_on_one_process(refused, overrides, expected):
    (line,) = refused(*overrides)
    assert line.startswith(expected), line
    assert ";" in line, "a remedy is named"


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([PP3], 3, "parallel.pipeline_model_parallel_size: model.language.num_layers (4) is not divisible by it (3)"),
        ([PP2, f"{FIRST}=4"], 2, f"{FIRST}: 4 of 4 layers leaves 0"),
        (
            [PP3, f"{FIRST}=1"],
            3,
            f"{FIRST}: 1 of 4 layers leaves 3, which do not split evenly over the 2 other stages;",
        ),
        ([PP2, VPP2, f"{LAYERS}=6"], 2, "parallel.virtual_pipeline_model_parallel_size: the layers of a stage (3)"),
        (
            [PP2, VPP2, f"{FIRST}=1"],
            2,
            "parallel.virtual_pipeline_model_parallel_size: the layers of a stage (1 in the first, 3 in the others)",
        ),
        (
            [PP2, VPP2, f"{LAYERS}=8", "parallel.recompute_granularity=full", "parallel.recompute_num_layers=4"],
            2,
            "parallel.recompute_num_layers: 4 does not divide the layers of a model chunk (2)",
        ),
        (
            [TP2, PP2],
            2,
            "parallel.tensor_model_parallel_size: 2 x parallel.pipeline_model_parallel_size (2) = 4 does not",
        ),
        ([], 3, "training.global_batch_size: 8 is not divisible by the data-parallel size (3)"),
        (["model.vision.image_std=[0.2,0,0.2]"], 1, "model.vision.image_std: [0.2, 0.0, 0.2] must be above 0, as pix"),
        (
            [PP2, VPP2, "training.global_batch_size=3"],
            2,
            "training.global_batch_size: 3 gives 3 micro-batches per data-parallel rank; the interleaved schedule ",
        ),
        (
            [TP2, "parallel.sequence_parallel=true", "data.sequence_length=257"],
            2,
            "data.sequence_length: 257 is not divisible by parallel.tensor_model_parallel_size, as sequence_par",
        ),
        (
            ["logging.profile_ranks=[0,2]"],
            2,
            "logging.profile_ranks: there is no rank 2 among the 2 processes of this job; name ranks from 0 to 1",
        ),
    ],
)
def test_refused_on_several_processes(refused, overrides, world_size, expected):
    (line,) = refused(*overrides, world_size=world_size)
    assert line.startswith(expected), line


CUT = ["model.vision.tensor_parallel=shard", "model.connector.tensor_parallel=shard"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.vision.num_layers=3", "model.vision.num_attention_heads"),
        ("model.vision.ffn_hidden_size=384", "model.vision.num_attention_heads"),
        ("model.language.ffn_hidden_size=352", "model.language.ffn_hidden_size"),
        ("model.language.num_layers=4", "model.language.num_attention_heads"),
        ("model.language.num_layers=4", "model.language.num_query_groups"),
        ("model.connector.head_dim=32", "model.connector.head_dim"),
    ],
)
def test_tensor_parallel_size_divides_heads_and_widths(load, override, key):
    with pytest.raises(RecipeError) as error:
        check_recipe(load(TP3, *CUT, override), 3)
    (line,) = (line for line in str(error.value).splitlines() if line.startswith(f"{key}: "))
    assert line.endswith("tensor_parallel to auto") == (not key.startswith("model.language")), line


@pytest.mark.parametrize("how", ["auto", "replicate"])
def test_towers_and_connectors_that_do_not_divide_are_not_cut(load, how):
    """Of what is wrong above, the language model's is left."""
    kept = [f"model.{part}.tensor_parallel={how}" for part in ("vision", "connector")]
    with pytest.raises(RecipeError) as error:
        check_recipe(load(TP3, *kept, "model.vision.ffn_hidden_size=385", "model.connector.head_dim=32"), 3)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all(line.startswith("model.language.") for line in lines)


TP = "parallel.tensor_model_parallel_size"
HEADS = "model.language.num_attention_heads=24"
SHARED = {
    # query groups, width of a head, TP: what is wrong; None where all is well
    (1, 32, 4): None,
    (2, 32, 4): None,
    (4, 32, 8): None,
    (2, 2, 8): r"model\.language\.kv_channels: the 2 x 2 rows .* divisible by .* \(8\); set .* to one of 1, 2, 4$",
    (
        6,
        32,
        4,
    ): r"model\.language\.num_query_groups: 6 is neither .* \(4\).*; set .* to one of 1, 2, 3, 6, 12, 24$",
    (3, 32, 2): r"model\.language\.num_query_groups: 3 is neither .* \(2\).*; set .* to one of 1, 3, 6, 12, 24$",
}


@pytest.mark.parametrize("case", SHARED)
def test_ranks_share_key_value_heads_evenly(load, case):
    """The remedy is a layout: a published model's heads are what they are."""
    (groups, width, tp), expected = case, SHARED[case]
    words = [f"model.language.num_query_groups={groups}", f"model.language.kv_channels={width}", HEADS]
    recipe = load(*words, f"{TP}={tp}")

    def lines_of(size):
        try:
            check_recipe(with_parallel(recipe, tensor_model_parallel_size=size))
        except RecipeError as error:
            lines = str(error).splitlines()
            return [line for line in lines if line.startswith(("model.language.num_query", "model.language.kv_"))]
        return []

    if expected is None:
        assert lines_of(tp) == []
        return
    (line,) = lines_of(tp)
    assert re.match(expected, line), line
    for size in re.search("one of (.*)$", line)[1].split(", "):
        assert lines_of(int(size)) == []


def test_a_tower_mlp_that_does_not_split(load):
    with pytest.raises(RecipeError, match=r"^model\.vision\.ffn_hidden_size: 385 is not divisible"):
        check_recipe(load(TP2, *CUT, "model.vision.ffn_hidden_size=385"))
    check_recipe(load(TP2, "model.vision.ffn_hidden_size=385"))


def test_a_connector_width_that_does_not_split(load):
    odd = ["model.language.hidden_size=127", "model.connector.preset=linear"]
    with pytest.raises(RecipeError, match=r"^model\.language\.hidden_size: 127 is not divisible .* to auto$"):
        check_recipe(load(TP2, *CUT, *odd))
    check_recipe(load(TP2, *odd))


def test_the_suggested_first_stage_is_accepted(load):
    with pytest.raises(RecipeError, match="take one of 2"):
        check_recipe(load(PP3, f"{FIRST}=1"))
    check_recipe(load(PP3, f"{FIRST}=2"))


def test_same_name_in_training_and_validation_is_fine(load):
    check_recipe(load("data.validation.0.path=/other/train"))
    with pytest.raises(RecipeError, match=r"data\.validation\.1\.name"):
        check_recipe(load("data.validation.0.path=/a/x", "data.validation.1={path: /b/y, name: x}"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.tokenizer=/absent/t.model"], "data.tokenizer: no file '/absent/t.model'"),
        (["data.train.0.path=/absent"], "data.train.0.path: no file or directory '/absent'"),
        (
            ["data.validation.0.path=/usr", "data.validation.0.images=/absent"],
            "data.validation.0.images: no directory '/absent'",
        ),
        (["checkpoint.load=/absent"], "checkpoint.load: no checkpoint '/absent'"),
        (["output_dir=/etc/passwd"], "output_dir: '/etc/passwd' is a file"),
    ],
)
def test_paths(refused, overrides, expected):
    (line,) = refused(*overrides)
    assert line.startswith(expected)


def test_paths_that_exist(load):
    check_paths(load())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_keep_the_rules(name):
    recipe = load_recipe(name, (), expand_presets)
    check_recipe(recipe)
    parallel = recipe.parallel
    ranks = max(parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size * parallel.expert_tensor_ranks)
    least = ranks * parallel.pipeline_model_parallel_size
    for copies in (1, 2):
        check_recipe(recipe, least * copies)


_LORA = ["lora.rank=4", "lora.targets=[c_attn]", "checkpoint.load=x"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.dropout=0.1"], "lora.dropout: has no effect without lora.rank"),
        (["lora.quantize=nf4"], "lora.quantize: has no effect without lora.rank"),
        ([*_LORA[:1], *_LORA[2:]], "lora.targets: names no layer; name some of attn.c_attn, attn.c_proj"),
        ([*_LORA, "lora.targets=[q_proj]"], "lora.targets: 'q_proj' is none of the language model's layers"),
        ([*_LORA, "lora.targets=[attn]"], "lora.targets: 'attn' is none of"),
        (_LORA[:2], "checkpoint.load: lora.rank needs the weights that the adapters are for"),
        ([*_LORA, "modules.language.freeze=true"], "modules.language.freeze: true, but with lora.rank"),
        (
            [*_LORA, "model.language.tie_word_embeddings=true", "lora.train_head=true"],
            "lora.train_head: the model's embedding and output layer are one weight",
        ),
        (
            [*_LORA, "lora.quantize=nf4", "parallel.tensor_model_parallel_size=2"],
            "lora.quantize: a shard of the weights that model.language.hidden_size makes is no multiple of 64 x 256",
        ),
    ],
)
def test_rules_of_adapters(overrides, message, refused):
    assert [line for line in refused(*overrides) if line.startswith(message)]


def test_targets_are_the_names_of_published_checkpoints():
    """As PEFT lists them for Qwen v1 and for Llama (w2 and gate_proj are the gates)."""
    from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE, QWEN_LANGUAGE
    from megavlm.weights.targets import targets_in

    def named(table):
        return [(t.path, t.linear.rpartition(".")[2], t.part, t.parts) for t in targets_in(table)]

    assert named(QWEN_LANGUAGE) == [
        ("attn.c_attn", "linear_qkv", 0, 1), ("attn.c_proj", "linear_proj", 0, 1), ("mlp.w2", "linear_fc1", 0, 2),
        ("mlp.w1", "linear_fc1", 1, 2), ("mlp.c_proj", "linear_fc2", 0, 1),
    ]  # fmt: skip
    assert named(LLAMA_LANGUAGE) == [
        ("self_attn.q_proj", "linear_qkv", 0, 3), ("self_attn.k_proj", "linear_qkv", 1, 3),
        ("self_attn.v_proj", "linear_qkv", 2, 3), ("self_attn.o_proj", "linear_proj", 0, 1),
        ("mlp.gate_proj", "linear_fc1", 0, 2), ("mlp.up_proj", "linear_fc1", 1, 2),
        ("mlp.down_proj", "linear_fc2", 0, 1),
    ]  # fmt: skip


def test_samples_beyond_the_positions_are_remarked_on(load):
    """As InternVL's dynamic scaling would have them, which is not applied: allowed, and said."""
    longest = load().model.language.max_position_embeddings
    assert remarks(load(f"data.sequence_length={longest}")) == []
    (line,) = remarks(load(f"data.sequence_length={2 * longest}"))
    assert (
        line.startswith(f"data.sequence_length: samples may have {2 * longest} tokens") and f"{longest} or less" in line
    )
    check_recipe(load(f"data.sequence_length={2 * longest}"))


PAST_ITS_POSITIONS = {"imp_v1_3b", "imp_v1_5_3b", "tinyllava_3_1b"}
"""Their authors train Phi-2, whose positions end at 2048, on samples of 3072 tokens."""


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_stay_within_the_positions(name):
    said = remarks(load_recipe(name, [], expand_presets))
    if name.partition("/")[0] not in PAST_ITS_POSITIONS:
        assert said == []
        return
    (line,) = said
    assert line.startswith("data.sequence_length: samples may have 3072 tokens") and "end at 2048" in line


def test_a_connector_of_a_billion_layers(load):
    with pytest.raises(RecipeError, match="mlp1000000000x_gelu has more layers than a connector has"):
        check_recipe(load("model.connector.preset=mlp1000000000x_gelu"))
