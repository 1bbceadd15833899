"""What ranks do with a converted family, all in one start: every point that needs the model at a layout."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from internvl_cases import canonical_name, shard_of  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from saved_tensors import saved_tensors  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megavlm.architectures.context import BuildContext  # noqa: E402
from megavlm.architectures.decoders.decoder.build import padded_vocab_size  # noqa: E402
from megavlm.checkpoint.distributed import load  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.config.split import is_replicated, tensor_ranks  # noqa: E402
from megavlm.data.batch import make_pack  # noqa: E402
from megavlm.data.device_batch import Batch, make_batch  # noqa: E402
from megavlm.data.media import arrange, plan_of, views_of  # noqa: E402
from megavlm.data.positions import own_grids, positions_of  # noqa: E402
from megavlm.data.spans import spans_of  # noqa: E402
from megavlm.evaluation.parity import WHAT, Sample, _compare, read_reference  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.inference.generate import generate  # noqa: E402
from megavlm.inference.prompt import Prompt  # noqa: E402
from megavlm.models.build import MODULES  # noqa: E402
from megavlm.parallel import pipeline  # noqa: E402
from megavlm.parallel.device import local_device  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.planning.activations import held_by  # noqa: E402
from megavlm.planning.layout import layout_of  # noqa: E402
from megavlm.planning.parameters import static_bytes  # noqa: E402
from megavlm.planning.stage_flops import chunk_flops  # noqa: E402
from megavlm.training.build import TrainingModel, build_training  # noqa: E402
from megavlm.training.step import run_batches, train_step  # noqa: E402
from megavlm.weights.source import Source  # noqa: E402

PLAIN = ("training.precision=fp32", "parallel.use_distributed_optimizer=false", "optimizer.lr=1e-3")
PLAIN += ("optimizer.warmup_steps=0", "optimizer.schedule=constant", "parallel.transformer_impl=torch")


@dataclass
class Proof:
    """What one rank found."""

    stage: int
    largest: dict[str, float]
    """Differences of logits, features and losses of the samples, one by one."""
    packed: dict[str, float] = field(default_factory=dict)
    """Of gradients of the samples in one pack, by parameter, as a share of the largest of the part."""
    alone: dict[str, float] = field(default_factory=dict)
    """The same of the samples each in a micro-batch of its own."""
    loss: tuple[float, float] = (0.0, 0.0)
    """Of the pack, and of the samples one by one."""
    answers: list[list[int]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    """Losses of three optimizer steps."""
    planned: dict[str, tuple[float, float]] = field(default_factory=dict)
    """What the planner says, and what is: weights, gradients, activations (bytes), operations."""


def prove(checkpoint: str, reference: str, layout: list[str], *, planned: bool = True) -> Proof:
    """Compare with the reference of :func:`whole_source.write_reference`, and train three steps.

    ``planned``: hold the planner against it too.
    """
    path, wanted = Path(checkpoint), Source(Path(reference))
    recipe = load_recipe(path / "recipe.yaml", [*PLAIN, *layout], expand_presets)
    samples, image = read_reference(Path(reference), recipe), int(wanted.get("image_token"))
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, image)
        load(path, modules=training.modules)
        training.optimizer.reload_model_params()
        proof = Proof(mpu.get_pipeline_model_parallel_rank(), _differences(training, recipe, samples))
        tokens = sum(len(sample.ids) for sample in samples)
        length = tokens + -tokens % 8
        pack = _pack(recipe, image, samples, length)
        if planned:
            proof.planned = _planned(training, recipe, pack, samples, length)
        proof.packed, first = _gradients(training, recipe, [pack], wanted)
        proof.alone, second = _gradients(
            training, recipe, [_pack(recipe, image, [one], length) for one in samples], wanted
        )
        proof.loss = (first, second)
        proof.answers = _answers(training, recipe, samples, length)
        for _ in range(3):
            training.scheduler.step(1)
            proof.steps.append(train_step(training.chunks, training.optimizer, [pack], num_sources=1).loss)
    return proof


def _differences(training: TrainingModel, recipe: Recipe, samples: list[Sample]) -> dict[str, float]:
    worst = torch.zeros(len(WHAT), dtype=torch.float64)
    for sample in samples:
        with pipeline.evaluating(training.chunks):
            worst = torch.maximum(worst, _compare(training.chunks, sample, recipe))
    return dict(zip(WHAT, worst.tolist(), strict=True))


def _pack(recipe: Recipe, image: int, samples: list[Sample], length: int) -> Batch:
    labels = [sample.labels.numpy() for sample in samples if sample.labels is not None]
    grids = [own_grids(recipe.model, sample.layouts) for sample in samples]
    ids = [sample.ids.numpy() for sample in samples]
    pack = make_pack(
        ids, length, labels=labels, positions=positions_of(recipe.model, image), grids=grids,
        spans=spans_of(recipe.model, image),
    )  # fmt: skip
    pixels = torch.cat([sample.pixels for sample in samples])
    layouts = [layout for sample in samples for layout in sample.layouts]
    arrangement = arrange(plan_of(recipe.model), layouts)
    return make_batch(pack, pixels if is_first_stage() else None, local_device(), arrangement)


def _gradients(
    training: TrainingModel, recipe: Recipe, batches: list[Batch], wanted: Source
) -> tuple[dict[str, float], float]:
    """Return each parameter's difference, as a share of the largest gradient of its part, and the mean loss."""
    tensor = mpu.get_tensor_model_parallel_world_size()
    replicated = {part for part in MODULES if is_replicated(recipe.model, part, tensor)}
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    ((total, count),) = run_batches(training.chunks, batches, num_sources=1).tolist()
    found = {}
    for module in training.modules:
        first = module.decoder.layers[0].layer_number - 1
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            key = canonical_name(name, first)
            if key == "language.output_layer.weight" and recipe.model.language.tie_word_embeddings:
                key = "language.embedding.word_embeddings.weight"  # the last stage's copy, whose gradient is the sum
            scale = float(wanted.get("largest." + key.split(".")[0]))
            expected = wanted.get("gradient." + key)
            if key.split(".")[0] not in replicated:
                expected = shard_of(expected, parameter)
            found[key] = float((parameter.main_grad - expected).abs().max()) / scale
    return found, total / count


def _answers(training: TrainingModel, recipe: Recipe, samples: list[Sample], length: int) -> list[list[int]]:
    plan = plan_of(recipe.model)
    prompts = [
        Prompt(one.ids.numpy(), one.pixels, arrange(plan, one.layouts), own_grids(recipe.model, one.layouts))
        for one in samples
    ]
    with pipeline.evaluating(training.chunks):
        return generate(
            training.chunks, prompts, max_new_tokens=6, stop_ids=[], vocab_size=recipe.model.language.vocab_size,
            pack_length=length + 8,
        )  # fmt: skip


def _planned(
    training: TrainingModel, recipe: Recipe, pack: Batch, samples: list[Sample], length: int
) -> dict[str, tuple[float, float]]:
    """Return the planner's figures of this rank's stage beside the real ones."""
    stage = mpu.get_pipeline_model_parallel_rank()
    layout = layout_of(recipe, dist.get_world_size())
    (chunk,) = layout.chunks_of(stage)
    layouts = [one for sample in samples for one in sample.layouts]
    grids = [grid for one in layouts for grid in one.grids]
    views = grids if recipe.model.vision.packed else sum(views_of(plan_of(recipe.model), one) for one in layouts)
    lengths = [*(len(sample.ids) for sample in samples), length - sum(len(sample.ids) for sample in samples)]
    static = static_bytes(recipe, layout, stage)
    work = chunk_flops(
        recipe, layout, chunk, tokens=length, squared_lengths=sum(one**2 for one in lengths), images=views
    )
    with saved_tensors(p for one in training.chunks for p in one.parameters()) as saved:
        run_batches(training.chunks, [pack], num_sources=1)
    # Attention as plain matrix products: torch does not count its fused form on CPUs.
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # its hooks do not go with what Megatron-Core's blocks return without a graph
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run_batches(training.chunks, [pack], num_sources=1, forward_only=True)
    once = _once(recipe, layout.tensor, length, grids, first=chunk.first, last=chunk.last)
    tables = [p for one in training.chunks for p in one.parameters()]
    buffers = [buffer.grad_data for one in training.chunks for buffer in one.buffers]
    return {
        "weights": (static.weights, _bytes(tables)),
        "gradients": (static.gradients, _bytes(buffers)),
        "activations": (held_by(recipe, layout, chunk, length, views).kept, saved.bytes),
        # torch counts the whole square of attention, as the planner does of one that is mostly prefix.
        "operations": (
            work.total + work.attention * (recipe.model.language.two_way != "prefix") + once,
            counter.get_total_flops(),
        ),
    }


class _NoModules(contextlib.nullcontext[None]):
    """Counts all under one name."""

    parents = frozenset({"Global"})


def _bytes(tensors: list[Any]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _once(
    recipe: Recipe, tensor: int, tokens: int, grids: list[tuple[int, int, int]], *, first: bool, last: bool
) -> float:
    """Return the operations that a planner leaves out: rows that pad the vocabulary, tables fitted to a grid."""
    model = recipe.model
    vision, language, found = model.vision, model.language, 0.0
    if last:
        rows = padded_vocab_size(language, BuildContext(recipe.parallel)) - language.output_rows
        found += 2 * tokens * language.hidden_size * rows / tensor
    if first and getattr(vision, "positional_interpolation", "") == "bicubic_antialias":  # others gather rows
        side, width = vision.positional_grid, vision.hidden_size
        found += sum(2 * rows * side * width * (side + columns) for rows, columns in {grid[1:] for grid in grids})
    if first and not vision.packed:
        patches = getattr(vision, "low", vision).patches_per_image  # of a pair, the one with a table
        queries = getattr(model.connector, "num_queries", 0) or 0
        ranks, inner = tensor_ranks(model, "connector", tensor), getattr(model.connector, "hidden_size", 0)
        if queries and inner:  # they look at each other, and are projected for their first look, once
            found += (10 * queries * inner**2 + 4 * queries**2 * inner) / ranks
            queries = 0
        table = getattr(vision, "positional_grid", 0)  # convolutions have none
        for rows, width in ((table**2, vision.hidden_size), (queries, language.hidden_size)):
            found += 2 * rows * patches * width * int(rows not in (0, patches))
        found += 2 * queries * language.hidden_size**2 / ranks
    return found
