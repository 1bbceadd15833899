"""Every registered family, over every point of :class:`whole.WholeFamily`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from peft import PeftModel
from published_totals import SOURCES
from test_round_trips import CASES, make
from torch import Tensor
from trained_only import PARTS as OTHER_PARTS
from trained_only import TRAINED_ONLY
from transformers import PreTrainedModel
from whole import Lack, Published, Shown, Source, WholeFamily
from whole_cases import Proof
from whole_rows import ROWS
from whole_source import asked, write_reference

from megavlm.architectures.context import BuildContext
from megavlm.architectures.decoders.decoder.build import padded_vocab_size
from megavlm.checkpoint.distributed import load
from megavlm.cli import main
from megavlm.config.architecture import MODELS
from megavlm.config.checks import check_recipe
from megavlm.config.errors import UserError
from megavlm.config.load import SHIPPED, load_recipe, shipped_recipes
from megavlm.config.schema import ModelConfig, ParallelConfig, Recipe
from megavlm.config.split import tensor_ranks
from megavlm.data.media import plan_of
from megavlm.evaluation.parity import Sample, forward_sample
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets, load_presets
from megavlm.models.build import MODULES, build_model, unwrap
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel import pipeline
from megavlm.parallel.state import process_groups
from megavlm.planning.gpus import choose_gpu
from megavlm.planning.search import evaluate
from megavlm.planning.workload import assume_workload

LAYOUT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
]
FOUR = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
# Logits, features and losses are of the order of 1; gradients are compared with the largest of their part.
ABSOLUTE, GRADIENTS = 2e-4, 5e-5
SLOW = (
    "codefuse_vlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "llava_onevision1_5",
    "imp", "mipha", "moe_llava", "llava_phi", "allava", "xtuner", "dense_connector", "minigpt4", "minigemini",
)  # fmt: skip
"""Families whose parts other short tests have at both layouts: test_{qwen2_vl,qwen3_vl,glm4v}.py, qwen_vl, bunny, hpt,
blip2, tests/architectures/test_{reducers,pairs}.py."""
REPOSITORY = Path(__file__).parents[2]
EVERY = {**ROWS, **TRAINED_ONLY}
SIZES = (1, 2, 4, 8)  # tensor-parallel
SHORT_SIZES = ("llava_1_5_7b", "llava_1_6_mistral_7b", "llava_onevision_0_5b", "internvl3_5_1b", "qwen_vl_7b")
"""Presets that ``make test`` counts; of the others test-families does."""


def family(name: str) -> pytest.MarkDecorator:
    """Return the mark of a row's tests."""
    return pytest.mark.family(name, **({"parts": OTHER_PARTS[name]} if name in OTHER_PARTS else {}))


def rows(point: str, *, long: bool = False, slow: tuple[str, ...] = ()) -> list[Any]:
    """Return the families that have a point; tests of ``slow`` ones, or of all, are long."""
    return [
        pytest.param(name, marks=[family(name), *([pytest.mark.long] if long or name in slow else [])])
        for name, row in EVERY.items()
        if point not in row.lacks()
    ]


def each(point: str, short: tuple[str, ...] = ()) -> list[Any]:
    """Return (family, name) of every entry of a point that has several; those not in ``short`` are long."""
    return [
        pytest.param(name, entry, marks=[family(name), *([] if entry in short or not short else [pytest.mark.long])])
        for name, row in EVERY.items()
        if point not in row.lacks()
        for entry in getattr(row, point)
    ]


def point(name: str, which: str) -> Any:
    """Return what a family has."""
    found = getattr(EVERY[name], which)
    assert not isinstance(found, Lack)
    return found


def test_every_family_has_a_row_and_a_reason_for_what_it_lacks() -> None:
    load_presets()
    assert ROWS.keys() == FAMILIES.keys()
    for name, row in EVERY.items():
        for lacked, why in row.lacks().items():
            assert len(why.reason) > 20, f"{name} lacks {lacked} and does not say why"
        own = {one.name for one in dataclasses.fields(WholeFamily)}
        assert all(getattr(row, one) not in (None, (), {}, "") for one in own), name
    # What is a point of no family is a point that nobody tries.
    assert {one.name for one in dataclasses.fields(WholeFamily)} == {
        key for row in ROWS.values() for key in vars(row) if key not in row.lacks()
    }


def test_every_checkpoint_preset_and_recipe_is_in_one_row() -> None:
    """Whatever is registered is tried by the row of its family."""
    load_presets()
    tried = [case for row in ROWS.values() if not isinstance(row.checkpoints, Lack) for case in row.checkpoints]
    assert sorted(tried) == sorted(CASES)
    for name, row in ROWS.items():
        assert isinstance(row.checkpoints, Lack) or all(CASES[case] == name for case in row.checkpoints)
    counted = [preset for row in EVERY.values() if not isinstance(row.presets, Lack) for preset in row.presets]
    assert sorted(counted) == sorted(set(MODELS.names()) - {"tiny"})
    staged = [recipe for row in EVERY.values() if not isinstance(row.recipes, Lack) for recipe in row.recipes]
    others = {"quickstart", "quickstart_lora", "any/lora", "any/sft"}
    elsewhere = {name for name in shipped_recipes() if name.startswith(("qwen_vl", "codefuse", "belle"))}
    assert sorted(staged) == sorted(set(shipped_recipes()) - others - elsewhere)


def convert(source: Path, out: Path) -> Recipe:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return load_recipe(out / "recipe.yaml", [], expand_presets)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def converted(source: Source, name: str, directory: Path) -> Recipe:
    """Convert the tiny model, once in this module, and write what its source computes."""
    directory.mkdir(exist_ok=True)
    if not (directory / "reference.safetensors").is_file():
        source.save(directory / "hf")
        recipe = convert(directory / "hf", directory / "m")
        write_reference(source, name, recipe, directory / "reference.safetensors")
    return load_recipe(directory / "m" / "recipe.yaml", [], expand_presets)


@pytest.mark.proves("tp2_pp2_sp")
@pytest.mark.parametrize("name", rows("source", slow=SLOW))
def test_the_source_is_computed_at_one_process_and_cut_over_four(name: str, folder: Path) -> None:
    """The image plan comes from the checkpoint; then :func:`whole_cases.prove` at both layouts."""
    recipe = converted(point(name, "source"), name, folder / name)
    check_pictures(name, recipe)
    proven(name, folder / name)


@pytest.mark.proves("tp4_sp")
@pytest.mark.parametrize("name", rows("source", long=True))
def test_four_tensor_parallel_ranks(name: str, folder: Path) -> None:
    """The weights of the tower cut in four where they can be; key/value heads that ranks share."""
    converted(point(name, "source"), name, folder / name)
    proven(name, folder / name, layout=FOUR)


@pytest.mark.proves("uneven")
@pytest.mark.parametrize("name", rows("uneven", long=True))
def test_the_same_where_two_ranks_divide_no_heads(name: str, folder: Path) -> None:
    source = point(name, "uneven")
    recipe = converted(source, name, folder / f"{name}-uneven")
    assert tensor_ranks(recipe.model, "vision", 2) == 1
    # HPT's pictures are large beside its tiny parts, and the test's own hold those of the other rank's share.
    proven(name, folder / f"{name}-uneven", 5.0 if name == "hpt" else 2.0)


@pytest.mark.proves("others", entry="other")
@pytest.mark.parametrize(("name", "other"), each("others", ("none of them is short",)))
def test_the_same_of_other_parts(name: str, other: str, folder: Path) -> None:
    directory = folder / f"{name}-{other}"
    converted(point(name, "others")[other], name, directory)
    proven(name, directory)


@pytest.mark.parametrize("name", rows("template"))
def test_the_template_is_that_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    """Of one with a tokenizer, where the family has one in ``answers``."""
    row = ROWS[name]
    if isinstance(row.answers, Lack):
        source = make(point(name, "checkpoints")[0], tmp_path / "hf")
    else:
        source = row.answers(tmp_path / "hf")
    recipe = convert(source, tmp_path / "m")
    assert recipe.model.template == point(name, "template")
    if isinstance(row.source, Lack):
        check_pictures(name, recipe)


def check_pictures(name: str, recipe: Recipe) -> None:
    """Check what the recipe of a converted checkpoint says of pictures."""
    wanted = point(name, "image")
    assert {key: getattr(recipe.model.image, key) for key in wanted} == dict(wanted)


def proven(name: str, directory: Path, share: float = 1.0, layout: list[str] = LAYOUT) -> None:
    """Check all that one process and a layout of four have to give; ``share``: see :func:`planned`."""
    from megavlm.weights.source import Source as File

    where = str(directory / "m"), str(directory / "reference.safetensors")
    wanted = File(directory / "reference.safetensors")
    expected = [wanted.get(f"s{number}.answer").tolist() for number in range(len(asked(28)))]
    assert len({tuple(answer) for answer in expected}) > 1
    held = not isinstance(ROWS[name].planner, Lack)
    one = of_one_process(*where, held)
    many: list[Proof] = ranks.run("whole_cases:prove", *where, layout, world=4, timeout=600, planned=held)
    parts = {*MODULES} - {*FIXED.get(name, ())}
    names = (key.removeprefix("gradient.") for key in wanted.tensors if key.startswith("gradient."))
    parameters = {key for key in names if key.split(".")[0] in parts}
    assert set(one.packed) == parameters - set(UNTRAINED.get(name, ()))
    assert set().union(*(rank.packed for rank in many)) == set(one.packed)
    assert {part for key in one.packed for part in [key.split(".")[0]]} == parts
    loss = float(wanted.get("mean_loss"))
    for rank in (one, *many):
        assert max(rank.largest.values()) <= ABSOLUTE, rank.largest
        for found in (rank.packed, rank.alone):
            worst = max(found, key=lambda key: found[key])
            assert found[worst] <= GRADIENTS, (worst, found[worst])
        assert rank.loss == pytest.approx((loss, loss), rel=1e-5)
        assert rank.answers == expected
        assert rank.steps[0] > rank.steps[1] > rank.steps[2]
        assert rank.steps == pytest.approx(one.steps, rel=5e-4)  # Adam makes much of a gradient that is nearly 0
    assert one.steps[0] == pytest.approx(loss, rel=1e-5)
    if held:
        stages = sorted({rank.stage for rank in many})
        planned(name, [[one], *([rank for rank in many if rank.stage == stage] for stage in stages)], share)


@functools.cache
def of_one_process(checkpoint: str, reference: str, held: bool) -> Proof:
    """Return what one process finds, with which each layout is compared; once for a checkpoint of this module."""
    (one,) = ranks.run("whole_cases:prove", checkpoint, reference, [], world=1, planned=held)
    return one


UNTRAINED = dict.fromkeys(("qwen_vl", "codefuse_vlm", "minicpm_v", "minicpm_v_2"), ("connector.pos_embed",))
"""Parameters that are not trained here, nor there."""
FIXED = {"chameleon": ("vision", "connector")}  # codes, through which no gradient goes


def planned(name: str, stages: list[list[Proof]], share: float) -> None:
    """Check the planner's figures against each stage's ranks; they may be off by ``share`` of what the row says."""
    for found in stages:
        assert found[0].planned.keys() == point(name, "planner").keys()
        for key, off in point(name, "planner").items():
            # Ranks that hold a whole tower share out the pictures: the plan is that of the one with most of them.
            real = max(rank.planned[key][1] for rank in found)
            assert found[0].planned[key][0] == pytest.approx(real, rel=max(share * off, 1e-9)), (key, found[0].stage)


@pytest.mark.proves("check")
@pytest.mark.parametrize("name", rows("answers", long=True))
def test_greedy_answers_are_those_of_its_class(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Through the command that users run, with the processor, on a wide and a tall picture and on none."""
    hf = point(name, "answers")(tmp_path / "hf")
    with caplog.at_level(logging.INFO):
        assert main(["convert", "check", "--hf", str(hf)]) == 0, caplog.text
    assert caplog.text.count("greedy answers: equal") == 3 and "all within the tolerance" in caplog.text


@pytest.mark.parametrize("name", rows("answers"))
def test_files_that_disagree_or_lack(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json and tokenizer on the image token; a tower, and no file that says how pictures become its pixels."""
    hf, family = point(name, "answers")(tmp_path / "hf"), FAMILIES[name]
    path = hf / "config.json"
    tree = json.loads(path.read_text())
    tokens = [key for key in ("image_token_id", "image_token_index") if key in tree]
    assert bool(tokens) != family.slotless
    if tokens:
        path.write_text(json.dumps({**tree, **{key: tree[key] - 1 for key in tokens}}))
        line = refused(hf, tmp_path / "m", capsys)
        words = (str(path), str(hf / "tokenizer.json"), str(tree[tokens[0]]), str(tree[tokens[0]] - 1))
        assert all(word in line for word in words), line
        path.write_text(json.dumps(tree))
    if family.preprocesses and family.read_as is None:  # else it is said in config.json
        (hf / "preprocessor_config.json").unlink()
        line = refused(hf, tmp_path / "m", capsys)
        views = "patches" if point(name, "image")["kind"] == "native" else "28 x 28 pixels"
        assert "neither preprocessor_config.json nor" in line and f"{views} that config.json's tower takes" in line


def refused(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Convert what cannot be converted; return the line that says so."""
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 2
    assert not out.exists()
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("megavlm: error: ")]
    return line


@pytest.mark.proves("adapters")
@pytest.mark.parametrize("name", rows("lora", long=True))
def test_adapters_go_to_peft_and_back(name: str, folder: Path, tmp_path: Path) -> None:
    """The same logits in PEFT, in the merged model, and after coming back bit for bit."""
    from test_peft import adapted, bits, close

    source = point(name, "source")
    recipe = converted(source, name, folder / name)
    hf, base = folder / name / "hf", folder / name / "m"
    sample = source.shown(recipe.model, *asked(28)[2])
    saved = adapted(base, tmp_path / "run", point(name, "lora"), [])
    expected = logits_of(saved, sample, source.image)
    assert (expected - logits_of(base, sample, source.image)).abs().max() > 0.01  # the adapters matter
    command("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "peft")
    in_class = isinstance(source.model, PreTrainedModel)  # else it is written out, and PEFT puts the adapters into it
    both = PeftModel.from_pretrained(source.loaded(hf) if in_class else source.model, tmp_path / "peft").eval()
    given = {"input_ids": sample.ids[None], **sample.given, "attention_mask": torch.ones_like(sample.ids[None])}
    with torch.no_grad():
        close(both(**given).logits[0] if in_class else source.logits(sample), expected)
    both.unload()
    command("merge", "--megatron", saved, "--out", tmp_path / "merged")
    close(logits_of(tmp_path / "merged", sample, source.image), expected)
    command("hf-to-megatron", "--adapter", tmp_path / "peft", "--base", base, "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)


def command(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def logits_of(checkpoint: Path, sample: Shown, image: int) -> Tensor:
    """Return the logits of a checkpoint."""
    recipe = load_recipe(checkpoint / "recipe.yaml", [], expand_presets)
    with process_groups(recipe.parallel, 1), torch.no_grad():
        chunks = build_model(recipe, image)
        load(checkpoint, modules=[unwrap(chunk) for chunk in chunks])
        with pipeline.evaluating(chunks):
            return forward_sample(chunks, Sample("s", sample.ids, sample.views, sample.layouts, None, {}), recipe)


# Sizes.


def model_of(preset: str) -> ModelConfig:
    """Return a preset whose vocabulary is padded for tensor parallelism alone."""
    tree = {"preset": preset, "language": {"vocab_divisor": 1}}
    return dataclasses.replace(recipe_of(tree, 1).model, preset=preset)


def recipe_of(model: dict[str, Any], tensor: int) -> Recipe:
    own = f"model={json.dumps(model)}", f"parallel.tensor_model_parallel_size={tensor}"
    more = ("parallel.pipeline_model_parallel_size=1", "data.balance_images=false")  # not all have a cost
    return load_recipe("internvl3_8b/sft", [*own, *more], expand_presets)


@contextlib.contextmanager
def groups(tensor: int) -> Iterator[None]:
    """Be the last of ``tensor`` ranks; no collective does anything, but in the groups of one that a whole tower has."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=tensor - 1, world_size=tensor)
    try:
        mpu.initialize_model_parallel(tensor, 1, create_gloo_process_groups=False)
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


Shapes = dict[str, torch.Size]


def shapes(model: ModelConfig, tensor: int) -> Shapes:
    """Return the shapes of the parameters that the last of ``tensor`` ranks holds."""
    with groups(tensor), torch.device("meta"):
        context = BuildContext(ParallelConfig(tensor_model_parallel_size=tensor), initialize=False)
        return {name: p.shape for name, p in VisionLanguageModel(model, context, 0).named_parameters()}


def counted(model: ModelConfig, own: Shapes, whole: Shapes, tensor: int) -> int:
    """Return the parameters that all tensor-parallel ranks hold, as one process would have them.

    What is cut lies on each rank once, along one axis; what a rank has whole, all of them have, and it counts once.
    Rows that pad the vocabulary to a multiple of the ranks do not count.
    """
    assert own.keys() == whole.keys()
    rows = padded_vocab_size(model.language, BuildContext(ParallelConfig(tensor_model_parallel_size=tensor)))
    total = 0
    for name, shape in own.items():
        there = whole[name]
        if shape == there:
            total += there.numel()
            continue
        (axis,) = (axis for axis, (a, b) in enumerate(zip(shape, there, strict=True)) if a != b)
        vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        assert shape[axis] * tensor == (rows if vocabulary else there[axis]), (name, shape, there)
        assert tensor_ranks(model, name.split(".")[0], tensor) == tensor, name
        total += shape.numel() * tensor - ((rows - there[axis]) * there[1] if vocabulary else 0)
    return total


def rounded(number: int, like: str) -> str:
    scale, digits = {"M": 1e6, "B": 1e9}[like[-1]], len(like[:-1].partition(".")[2])
    return f"{number / scale:.{digits}f}{like[-1]}"


@pytest.mark.proves("sizes", entry="preset")
@pytest.mark.parametrize(("name", "preset"), each("presets", SHORT_SIZES))
def test_a_preset_has_the_published_size_at_every_tensor_parallel_size(name: str, preset: str) -> None:
    model, row = model_of(preset), EVERY[name]
    published: Published = point(name, "presets")[preset]
    alone = shapes(model, 1)
    whole = sum(shape.numel() for shape in alone.values())
    # Rows that the output layer has here because the embedding has them.
    more = (model.language.vocab_size - model.language.output_rows) * model.language.hidden_size
    if isinstance(row.built, Lack):
        assert whole == published.count
    else:
        with torch.device("meta"):
            theirs, behind = row.built(model)
        there = sum(p.numel() for p in theirs.parameters())
        assert whole - more == there - sum(p.numel() for module in behind for p in module.parameters())
        assert published.count == (there if isinstance(published.count, int) else rounded(there, published.count))
        assert FAMILIES[name].refusal(model) is None
    for tensor in SIZES[1:]:
        if tensor in published.refused:
            with pytest.raises(UserError, match=re.escape(published.refused[tensor])):
                check_recipe(recipe_of({"preset": preset}, tensor))
        else:
            check_recipe(recipe_of({"preset": preset}, tensor))
            assert counted(model, shapes(model, tensor), alone, tensor) == whole, tensor


def test_every_total_was_read_somewhere_or_is_called_unchecked() -> None:
    """In :mod:`published_totals` with all digits, or in docs/families.md by name."""
    rows = [row.presets for row in EVERY.values() if not isinstance(row.presets, Lack)]
    counts = {preset: found.count for presets in rows for preset, found in presets.items()}
    assert SOURCES.keys() <= counts.keys()
    assert all(isinstance(counts[preset], int) for preset in SOURCES)
    words = (REPOSITORY / "docs" / "families.md").read_text().partition("Unchecked:")[2].partition(".\n")[0]
    assert sorted(re.findall(r"`(\w+)`", words)) == sorted(counts.keys() - SOURCES.keys())


@pytest.mark.family("internvl")
@pytest.mark.parametrize("size", ["1b", "38b", "78b"])
def test_two_generations_on_one_language_model_are_one_shape(size: str) -> None:
    older, newer = (dataclasses.replace(model_of(f"internvl{v}_{size}"), preset=None) for v in ("2_5", "3"))
    assert older == newer


# Recipes.


@pytest.mark.proves("recipes", entry="recipe")
@pytest.mark.parametrize(("name", "recipe"), each("recipes"))
def test_a_recipe_has_the_numbers_of_its_script(name: str, recipe: str) -> None:
    found, stage = load_recipe(recipe, [], expand_presets), point(name, "recipes")[recipe]
    check_recipe(found)
    optimizer, training, modules = found.optimizer, found.training, found.modules
    preset = recipe.split("/")[0]
    assert found.model.preset == preset
    assert tuple(part for part in MODULES if not getattr(modules, part).freeze) == stage.trains
    assert (optimizer.lr, optimizer.min_lr, optimizer.schedule) == (stage.lr, stage.least, "cosine")
    assert (modules.vision.lr_multiplier, modules.connector.lr_multiplier) == (stage.tower, stage.connector)
    assert (None if found.lora.rank is None else (found.lora.rank, found.lora.alpha)) == stage.lora
    warmup = round(0.03 * stage.steps) if stage.warmup is None else stage.warmup
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (stage.decay, warmup)
    assert (training.train_steps, training.global_batch_size) == (stage.steps, stage.batch)
    assert (found.data.sequence_length, training.precision) == (stage.length, "bf16")
    adam = (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps, optimizer.clip_grad)
    assert adam == stage.adam
    assert found.model.template == (stage.template or model_of(preset).template)
    assert plan_of(found.model).plan(640, 480).tokens == stage.tokens
    assert found.output_dir == f"runs/{recipe}"
    assert found.checkpoint.load == (f"runs/{stage.after}" if stage.after else "/path/to/checkpoint")


@pytest.mark.proves("recipes", entry="recipe")
@pytest.mark.parametrize(
    ("name", "recipe"), [one for one in each("recipes") if "headers" not in EVERY[one.values[0]].lacks()]
)
def test_a_recipe_says_what_the_planner_predicts_of_it(name: str, recipe: str) -> None:
    """And where its numbers are from: a file, and the commit."""
    head = "\n".join(
        line.removeprefix("#").strip()
        for line in (SHIPPED / f"{recipe}.yaml").read_text().partition("output_dir:")[0].splitlines()
    ).replace("\n", " ")
    assert re.search(r"Numbers: .*github\.com/[\w/.-]+, .* @ [0-9a-f]{8}", head)
    said = re.search(point(name, "headers"), head)
    assert said is not None, head
    found = load_recipe(recipe, [], expand_presets)
    plan = evaluate(found, int(said["gpus"]), choose_gpu("h100-80g"), assume_workload(found))
    assert plan.layout.tensor == int(said["tensor"]) and plan.layout.pipeline == int(said["pipeline"] or 1)
    assert plan.fullest / 2**30 == pytest.approx(float(said["memory"]), abs=0.51)
    assert plan.time.step == pytest.approx(float(said["seconds"]), rel=0.1 if float(said["seconds"]) < 1 else 0.03)
    assert plan.gpu_hours == pytest.approx(float(said["hours"]), rel=0.02, abs=0.51)
