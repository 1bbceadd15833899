"""The shipped recipes: their numbers, their models on the meta device, and each one trained with smaller dimensions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from ranks import script
from run_data import RunData
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavlm.architectures.context import BuildContext
from megavlm.architectures.decoders.decoder.build import padded_vocab_size
from megavlm.config.load import load_recipe, shipped_recipes
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.families.presets import expand_presets
from megavlm.models.build import MODULES, freeze
from megavlm.models.vlm import VisionLanguageModel, build_chunks

# Facts page, A to C.
TOWER = 1_842_770_688
SIZES = {
    "qwen_vl_7b": {"vision": TOWER, "connector": 92_839_936, "language": 7_721_324_544},
    "14b": {"vision": TOWER, "connector": 142_264_320, "language": 14_167_290_880},
}
ALL, NO_TOWER = ["vision", "connector", "language"], ["connector", "language"]


@dataclasses.dataclass
class Stage:
    """What a recipe must say. Sources: facts page E, and those that the recipe names."""

    pixels: int
    trains: list[str]
    length: int
    batch: int
    lr: tuple[float, float]
    warmup: int | None
    steps: int | None
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    decay: float = 0.05
    layer_decay: float = 1.0
    loss: str = "token_mean"
    layers: tuple[int, ...] = ()
    after: str | None = None


HF: dict[str, Any] = {"eps": 1e-8, "decay": 0.0}
STAGES = {
    "qwen_vl_7b/pretrain": Stage(
        224, ["vision", "connector"], 512, 30720, (2e-4, 1e-6), 500, 50_000, layer_decay=0.95, layers=(32,)
    ),
    "qwen_vl_7b/multitask": Stage(
        448, ALL, 2048, 4096, (5e-5, 1e-5), 400, 19_000,
        layer_decay=0.95, layers=(5, 27), after="qwen_vl_7b/pretrain",
    ),
    "qwen_vl_7b/sft": Stage(
        448, NO_TOWER, 2048, 128, (1e-5, 1e-6), 3000, 8000, layers=(13, 19), after="qwen_vl_7b/multitask"
    ),
    "codefuse_vl_14b/align": Stage(
        448, ["connector"], 2048, 512, (1e-4, 0), None, None,
        betas=(0.9, 0.95), loss="task_mean", layers=(17, 23), **HF,
    ),
    "codefuse_vl_14b/sft": Stage(
        448, ["language"], 2048, 128, (2e-5, 0), None, None,
        betas=(0.9, 0.999), loss="task_mean", layers=(17, 23), after="codefuse_vl_14b/align", **HF,
    ),
    "belle_vl_14b/align": Stage(
        224, ["connector"], 2048, 512, (1e-4, 0), None, None, betas=(0.9, 0.95), layers=(20, 20), **HF
    ),
    "belle_vl_14b/sft": Stage(
        448, NO_TOWER, 2048, 128, (2e-5, 0), None, None,
        betas=(0.9, 0.999), layers=(18, 22), after="belle_vl_14b/align", **HF,
    ),
}  # fmt: skip


def sizes(name: str) -> dict[str, int]:
    """Return the published parameter counts."""
    return SIZES["14b" if "14b" in name else name.partition("/")[0]]


def first_stage(name: str) -> str:
    """Return the first stage of a recipe's system."""
    after = STAGES[name].after
    return name if after is None else first_stage(after)


def load(name: str, *overrides: str) -> Recipe:
    """Return a shipped recipe."""
    return load_recipe(name, overrides, expand_presets)


def test_every_shipped_recipe_is_tested() -> None:
    # Which the rows of tests/families have.
    others = (
        "allava", "bunny", "cobra_", "cogvlm_", "deepseek_vl", "dense_connector", "gemma3_", "glm4", "hpt_", "idefics3",
        "imp_", "internvl", "llama3_2_vision", "llava", "minicpm", "minigemini", "minigpt", "mipha", "mm1", "mobilevlm",
        "moe_llava_", "paligemma", "qwen2_", "qwen3_", "smolvlm", "tinyllava",
    )  # fmt: skip
    own = {name for name in shipped_recipes() if not name.startswith(others)}
    assert own == {"quickstart", "quickstart_lora", "qwen_vl_7b/lora", "qwen_vl_7b/qlora", *STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_numbers(name: str) -> None:
    recipe, stage = load(name), STAGES[name]
    optimizer, training = recipe.optimizer, recipe.training
    assert recipe.model.vision.image_size == stage.pixels
    assert recipe.model.tokens_per_view == 256
    assert recipe.data.sequence_length == stage.length
    assert [module for module in MODULES if not getattr(recipe.modules, module).freeze] == stage.trains
    assert training.global_batch_size == stage.batch
    assert (optimizer.lr, optimizer.min_lr, optimizer.schedule) == (*stage.lr, "cosine")
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (*stage.betas, stage.eps)
    assert (optimizer.weight_decay, optimizer.clip_grad, training.precision) == (stage.decay, 1.0, "bf16")
    if stage.steps is None:  # a number for the user's data: 3 % of it is warm-up
        assert optimizer.warmup_steps == pytest.approx(0.03 * training.train_steps, abs=0.5)
    else:
        assert (optimizer.warmup_steps, training.train_steps) == (stage.warmup, stage.steps)
    assert recipe.modules.vision.layer_decay == stage.layer_decay
    assert {getattr(recipe.modules, module).lr_multiplier for module in MODULES} == {1.0}
    assert recipe.loss.kind == stage.loss
    assert recipe.output_dir == f"runs/{name}"
    assert recipe.checkpoint.load == (f"runs/{stage.after}" if stage.after else "/path/to/checkpoint")


def test_mixtures() -> None:
    weights = {s.name: s.weight for s in load("qwen_vl_7b/multitask").data.train}
    assert weights == {"caption": 19.7, "vqa": 3.6, "grounding": 3.5, "referring_grounding": 8.7} | {
        "grounded_caption": 8.7, "ocr": 24.8, "text": 7.8
    }  # fmt: skip
    assert sum(s.weight for s in load("qwen_vl_7b/pretrain").data.train) == pytest.approx(1400, rel=0.02)  # 1.4 G
    align = load("codefuse_vl_14b/align").data.train
    assert sum(s.weight for s in align) == 5050
    assert [s.name for s in align if s.task == "ocr"] == ["synthdog_en", "synthdog_zh"]


def test_names_before_there_were_stages() -> None:
    assert load("qwen_vl_7b") == load("qwen_vl_7b/sft")
    assert load("codefuse_vl_14b") == load("codefuse_vl_14b/align")


@contextlib.contextmanager
def groups(parallel: ParallelConfig, rank: int) -> Iterator[None]:
    """Be ``rank`` of a job of the smallest size for a layout; no collective does anything."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tensor * pipeline)
    try:
        mpu.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def build(recipe: Recipe, rank: int = 0) -> VisionLanguageModel:
    """Build a rank's part with shapes and no memory, frozen as the recipe says."""
    with groups(recipe.parallel, rank), torch.device("meta"):
        context = BuildContext(recipe.parallel, torch.bfloat16, initialize=False)
        (chunk,) = build_chunks(recipe.model, context, image_token_id=0)
    freeze(chunk, recipe.modules)
    return chunk


def shapes(module: Any) -> dict[str, list[torch.Size]]:
    """Return the shapes of the parameters by name, those of all layers under one."""
    found: dict[str, list[torch.Size]] = {}
    for name, parameter in module.named_parameters() if module is not None else ():
        found.setdefault(re.sub(r"\blayers\.\d+\.", "layers.*.", name), []).append(parameter.shape)
    return found


ONE_RANK = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.num_layers_in_first_pipeline_stage=null",
    "parallel.sequence_parallel=false",
)


@pytest.mark.parametrize("name", STAGES)
def test_the_whole_model_has_the_published_size(name: str) -> None:
    model = build(load(name, *ONE_RANK))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for module in MODULES:
        parameters = list(getattr(model, module).parameters())
        assert sum(p.numel() for p in parameters) == sizes(name)[module]
        fixed = [key for key, p in getattr(model, module).named_parameters() if not p.requires_grad]
        if module in STAGES[name].trains:
            assert fixed == (["pos_embed"] if module == "connector" else [])  # the table of sines stays as it is
        else:
            assert len(fixed) == len(parameters)
    width = model.language.config.hidden_size
    with torch.no_grad(), groups(ParallelConfig(), 0):
        pixels = torch.empty(2, 3, STAGES[name].pixels, STAGES[name].pixels, dtype=torch.bfloat16, device="meta")
        assert model.vision(pixels).shape == ((STAGES[name].pixels // 14) ** 2, 2, 1664)
        assert model.encode_images(pixels).shape == (256, 2, width)


@pytest.mark.parametrize("name", STAGES)
def test_a_rank_holds_its_part(name: str) -> None:
    """On every stage of the recipe's own layout: as many layers as it says, each tensor whole or cut by TP once."""
    recipe = load(name)
    tensor = recipe.parallel.tensor_model_parallel_size
    whole, layers = build(load(name, *ONE_RANK)), []
    rows = padded_vocab_size(recipe.model.language, BuildContext(recipe.parallel))
    total = 0
    for stage in range(recipe.parallel.pipeline_model_parallel_size):
        chunk = build(recipe, rank=stage * tensor + tensor - 1)
        layers.append(len(chunk.language.decoder.layers))
        assert (chunk.vision is not None) == (chunk.connector is not None) == (stage == 0)
        for module in MODULES:
            full = shapes(getattr(whole, module))
            for key, own in shapes(getattr(chunk, module)).items():
                for shape in own:
                    expected = list(full[key][0])
                    if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                        expected[0] = rows
                    cut = [i for i, (a, b) in enumerate(zip(shape, expected, strict=True)) if a != b]
                    assert len(cut) <= 1 and all(shape[i] * tensor == expected[i] for i in cut), (key, shape)
                    total += torch.Size(expected).numel()
    assert tuple(layers) == STAGES[name].layers
    padding = 2 * (rows - recipe.model.language.vocab_size) * recipe.model.language.hidden_size
    assert total == sum(sizes(name).values()) + padding


# Only dimensions, and where things lie. 224 px become 56, 448 become 112, in patches of 14 all the same.
SMALL = (
    "model.vision.hidden_size=48", "model.vision.num_layers=2", "model.vision.num_attention_heads=4",
    "model.vision.ffn_hidden_size=96", "model.vision.positional_grid=4", "model.vision.init_method_std=0.1",
    "model.connector.num_queries=4", "model.connector.head_dim=16",
    "model.language.hidden_size=64", "model.language.ffn_hidden_size=96", "model.language.num_layers=4",
    "model.language.num_attention_heads=4", "model.language.num_query_groups=4", "model.language.kv_channels=16",
    "model.language.vocab_size=512", "data.num_workers=0", "data.shuffle_buffer_size=16",
    "data.packing_buffer_size=16", "training.global_batch_size=8", "optimizer.warmup_steps=1",
    "logging.log_interval=1",
)  # fmt: skip
STEPS = 3
LAYOUTS = {"qwen_vl_7b/pretrain": "TP 1 x PP 1 x DP 4", "codefuse_vl_14b/sft": "TP 1 x PP 2 x DP 2"}


def shrink(name: str, data: RunData, root: Path, steps: int = STEPS) -> list[str]:
    """Return the overrides that make a recipe small; TP 4 becomes 2, and uneven stages stay uneven."""
    recipe, stage = load(name), STAGES[name]
    start = f"checkpoint.load={root / stage.after if stage.after else 'null'}"
    words = [*SMALL, f"model.vision.image_size={stage.pixels // 4}", f"output_dir={root / name}", start]
    words += [f"data.sequence_length={stage.length // 16 + 96}", f"training.train_steps={steps}"]
    words += [f"data.train.{i}.path={data.root / 'train'}" for i in range(len(recipe.data.train))]
    if stage.after is None:
        words += [f"data.tokenizer={data.root / 'tokenizer.model'}"]  # later stages have that of their checkpoint
    if recipe.parallel.tensor_model_parallel_size > 1:
        words += ["parallel.tensor_model_parallel_size=2"]
    if recipe.parallel.num_layers_in_first_pipeline_stage is not None:
        words += ["parallel.num_layers_in_first_pipeline_stage=1"]
    return words


@pytest.fixture(scope="module")
def runs(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Train every recipe 3 steps, stage after stage, and the last stage of one system one step more."""
    root = tmp_path_factory.mktemp("recipes")
    order = sorted(STAGES, key=lambda name: [*STAGES].index(name))
    jobs = [{"name": name, "recipe": name, "overrides": shrink(name, run_data, root)} for name in order]
    again = shrink("belle_vl_14b/sft", run_data, root, STEPS + 1)
    jobs.append({"name": "again", "recipe": "belle_vl_14b/sft", "overrides": again})
    job, out = root / "job.json", root / "results.json"
    job.write_text(json.dumps({"runs": jobs}))
    script(Path(__file__).with_name("recipe_worker.py"), job, out, world=4, timeout=300)
    return root, json.loads(out.read_text())


def metrics(root: Path, name: str) -> list[dict[str, float]]:
    """Return the lines of a run."""
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("name", STAGES)
def test_a_small_run(name: str, runs: tuple[Path, dict[str, Any]]) -> None:
    (root, results), stage = runs, STAGES[name]
    found = results[name]
    assert found["layout"] == LAYOUTS.get(name, "TP 2 x PP 2 x DP 1 + SP")
    assert (found["starts_at"], found["exit_code"]) == (0, 0)
    assert found["trained"] == stage.trains
    lines = metrics(root, name)[:STEPS]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["loss"] < 20 and line["grad_norm"] > 0 for line in lines)
    assert all(line["images_per_second"] > 0 for line in lines)
    assert {key for key in lines[0] if key.startswith("lr/")} == {f"lr/{module}" for module in stage.trains}
    top = f"lr/{stage.trains[-1]}"
    assert (lines[0][top], lines[-1][top]) == pytest.approx(stage.lr)  # its own schedule: 1 step of warm-up, then down
    if name == "codefuse_vl_14b/sft":  # each data set is a task, and all weigh 1
        for line in lines:
            assert line["loss"] == pytest.approx(mean(v for key, v in line.items() if key.startswith("loss/")))
    # With decay d, two layers learn at d and 1 times the rate, what lies below at d ** 2 of it.
    factors = {stage.layer_decay**depth for depth in range(3)} | {1.0}
    assert found["rates"] == pytest.approx(sorted(stage.lr[0] * factor for factor in factors))


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name in STAGES if STAGES[name].after])
def test_a_stage_starts_from_the_weights_of_the_one_before(name: str, runs: tuple[Path, dict[str, Any]]) -> None:
    root, results = runs
    assert results[name]["parent"] == str(root / str(STAGES[name].after) / "checkpoints" / "step-00000003")
    before, start = results[str(STAGES[name].after)]["last_weights"], results[name]["first_weights"]
    for module in MODULES:
        assert start[module] == pytest.approx(before[module], rel=1e-9), module
    for module in STAGES[str(STAGES[name].after)].trains:  # and not those of a new model
        new = results[first_stage(name)]["first_weights"]
        assert start[module] != pytest.approx(new[module], rel=1e-9), module


@pytest.mark.long
@pytest.mark.dist
def test_weights_of_224_px_train_at_448_px_and_resume_there(runs: tuple[Path, dict[str, Any]]) -> None:
    """``again`` has train_steps 4 and still names stage 1 in checkpoint.load: it goes on from its own step 3."""
    root, results = runs
    assert load("belle_vl_14b/align").model.vision.image_size * 2 == load("belle_vl_14b/sft").model.vision.image_size
    assert results["again"]["starts_at"] == STEPS
    assert results["again"]["parent"] == str(root / "belle_vl_14b/sft" / "checkpoints" / "step-00000003")
    assert [line["step"] for line in metrics(root, "belle_vl_14b/sft")] == [1, 2, 3, 4]
