"""Parity: a checkpoint's logits, image features and losses against those that another implementation stored.

Runs at any layout, one sample at a time, through Megatron-Core's forward-only schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megavlm.checkpoint import assets
from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.paths import resolve
from megavlm.config.errors import UserError
from megavlm.config.schema import Recipe
from megavlm.data.batch import IGNORE_INDEX, make_pack
from megavlm.data.device_batch import Batch, arrangement_on, make_batch
from megavlm.data.films.plan import FilmShape
from megavlm.data.media import Arrangement, ImageLayout, ImagePlan, arrange, plan_of
from megavlm.data.positions import own_grids
from megavlm.data.tokenizer import find_tokenizer, image_tokens, load_tokenizer, template_of
from megavlm.inference.checkpoint import recipe_at_layout
from megavlm.models.build import build_model, unwrap
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel import pipeline
from megavlm.parallel.device import local_device
from megavlm.parallel.layout import describe
from megavlm.parallel.state import agreed, is_first_stage, is_last_stage, process_groups
from megavlm.weights.source import Source

logger = logging.getLogger(__name__)

WHAT = ("logits", "image_features", "loss")
_GIVEN = ("input_ids", "pixel_values", "image_sizes", "film_shapes", "labels")


@dataclass
class Sample:
    """One sample of a reference file."""

    name: str
    ids: Tensor
    """[S] int64."""
    pixels: Tensor
    """[V, 3, H, W], normalised views."""
    layouts: list[ImageLayout]
    """Of its images."""
    labels: Tensor | None
    """[S] int64, not shifted; IGNORE_INDEX where there is nothing to predict."""
    expected: dict[str, Tensor]
    """Of WHAT, what the file has."""


def read_reference(path: Path, recipe: Recipe) -> list[Sample]:
    """Read ``sN.*`` from a safetensors file.

    Raises:
        UserError: the file is damaged, has no samples, or they are of another model.
    """
    source, plan = Source(path), plan_of(recipe.model)
    names = sorted({name.split(".")[0] for name in source.tensors if name.endswith(".input_ids")})
    if not names:
        raise UserError(f"{path}: has no s0.input_ids; a reference holds sN.input_ids, sN.logits and so on")
    samples = []
    for name in names:
        own = {key: source.get(f"{name}.{key}") for key in (*_GIVEN, *WHAT)
               if f"{name}.{key}" in source}  # fmt: skip
        pixels = own.get("pixel_values", torch.zeros(0, *plan.row))
        if pixels.shape[1:] != plan.row:
            wanted = ", ".join(map(str, ("N", *plan.row)))
            raise UserError(f"{path}: {name}.pixel_values is {list(pixels.shape)}; the model takes [{wanted}]")
        rows, vocab = own["logits"].size(-1) if "logits" in own else 0, recipe.model.language.output_rows
        if rows and rows != vocab:
            raise UserError(f"{path}: {name}.logits are for {rows} tokens, the model has {vocab}")
        labels = own["labels"].flatten() if "labels" in own else None
        expected = {key: own[key] for key in WHAT if key in own}
        layouts = _layouts(plan, own, len(pixels), f"{path}: {name}")
        samples.append(Sample(name, own["input_ids"].flatten().long(), pixels, layouts, labels, expected))
    return samples


def _layouts(plan: ImagePlan, own: Mapping[str, Tensor], views: int, where: str) -> list[ImageLayout]:
    """Return the layouts of a sample's images, from their sizes where these count, and of the films behind them.

    Raises:
        UserError: the sizes are missing, or make other views than there are.
    """
    films = own.get("film_shapes", torch.zeros(0, 4)).reshape(-1, 4).tolist()
    if plan.fixed and not films:
        return [plan.plan(plan.side, plan.side)] * views
    if views and "image_sizes" not in own and not films:
        raise UserError(f"{where}.image_sizes is missing: [N, 2] height and width, on which the views of images depend")
    sizes = own["image_sizes"].reshape(-1, 2).tolist() if "image_sizes" in own and views else []
    shown = len(sizes) + len(films)
    layouts: list[ImageLayout] = [plan.plan(int(width), int(height), shown) for height, width in sizes]
    layouts += [plan.of(FilmShape(int(w), int(h), int(n), rate, shown)) for w, h, n, rate in films]
    made = sum(_rows(plan, layout) for layout in layouts)
    if made != views:
        what = "patches" if plan.packed else "views"
        raise UserError(f"{where}.pixel_values: {views} {what}, but images of these image_sizes make {made}")
    return layouts


def _rows(plan: ImagePlan, layout: ImageLayout) -> int:
    maker: Any = plan.maker(layout)
    return int(maker.pixels_of(layout)[0])


def verify(checkpoint: Path, reference: Path, overrides: Sequence[str], tolerance: float) -> int:
    """Compare and report; return 0, or 1 where a difference is above ``tolerance``.

    Args:
        checkpoint: a checkpoint, or a run's output_dir.
        reference: a safetensors file, see :func:`read_reference`.
        overrides: keys of the checkpoint's recipe, for the layout and ``training.precision`` (fp32 unless given).
        tolerance: largest absolute difference.

    Raises:
        UserError: the checkpoint is no whole model, the base of adapters is gone, or the reference does not fit it.
    """
    path = resolve(checkpoint)
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path}: holds parts of a model only; compose a whole one with hf_to_megatron --language ...")
    recipe = recipe_at_layout(path, ["training.precision=fp32", *overrides])
    samples = read_reference(reference, recipe)
    tokens = _tokens(path, recipe)
    for sample in samples:
        _fill_slots(sample, tokens)
    with process_groups(recipe.parallel, recipe.training.seed):
        chunks = build_model(recipe, tokens["image"])
        with agreed(f"loading {path}"):
            load(path, modules=[unwrap(chunk) for chunk in chunks], base=recipe.checkpoint.load)
        logger.info("%s, %s", describe(recipe.parallel, dist.get_world_size()), recipe.training.precision)
        worst = torch.zeros(len(WHAT), dtype=torch.float64)
        for sample in samples:
            with pipeline.evaluating(chunks):
                found = _compare(chunks, sample, recipe)
            worst = torch.maximum(worst, found)
            logger.info("%s: %s", sample.name, _show(sample, found))
    bad = bool((worst > tolerance).any())
    verdict = "above" if bad else "within"
    logger.info("largest differences: %s; %s the tolerance of %g", _figures(worst), verdict, tolerance)
    return int(bad)


def _tokens(checkpoint: Path, recipe: Recipe) -> dict[str, int]:
    """Return the ids of ``image`` and, where known, ``image_start``.

    Raises:
        UserError: nothing tells the image token.
    """
    tokens = assets.read_record(checkpoint).get("tokens") or {}
    if "image" in tokens:
        return dict(tokens)
    folder = checkpoint / assets.FOLDER
    path = Path(recipe.data.tokenizer) if recipe.data.tokenizer else find_tokenizer(folder) if folder.is_dir() else None
    if path is None or not path.is_file():
        raise UserError(
            f"{checkpoint}: has no tokenizer, so the image token is unknown; give --set data.tokenizer=FILE"
        )
    return image_tokens(load_tokenizer(path, template_of(recipe.model.template, path)))


def _fill_slots(sample: Sample, tokens: dict[str, int]) -> None:
    """Put the image token into every slot: Qwen's own processor writes the bytes of a path there.

    Raises:
        UserError: the slots are not as many as the images need.
    """
    start = tokens.get("image_start")
    if start is not None and len(sample.pixels):
        starts = (sample.ids == start).nonzero().flatten().tolist()
        for position, layout in zip(starts, sample.layouts, strict=False):
            sample.ids[position + 1 : position + 1 + layout.tokens] = tokens["image"]
    there, needed = int((sample.ids == tokens["image"]).sum()), sum(layout.tokens for layout in sample.layouts)
    if there != needed:
        raise UserError(f"{sample.name}: {there} image slots, but its {len(sample.layouts)} images take {needed}")


def _compare(chunks: Sequence[Any], sample: Sample, recipe: Recipe) -> Tensor:
    """Return the largest difference in each of WHAT, on all ranks; zero where there is nothing to compare."""
    found = torch.zeros(len(WHAT), dtype=torch.float64)
    model = unwrap(chunks[0])
    if is_first_stage() and len(sample.pixels) and "image_features" in sample.expected:
        arranged = features_of_sample(model, sample, recipe)
        found[1] = _largest(arranged, sample.expected["image_features"].flatten(0, -2))
    length = len(sample.ids)
    if "logits" in sample.expected:
        logits = forward_sample(chunks, sample, recipe)
        if is_last_stage():
            found[0] = _largest(logits, sample.expected["logits"].flatten(0, -2))
    if "loss" in sample.expected and sample.labels is not None:
        outputs = _forward(chunks, sample, recipe, with_labels=True)
        if is_last_stage():
            counted = F.pad(sample.labels[1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX
            mean = outputs[0][:length].cpu()[counted].mean()
            found[2] = _largest(mean.reshape(1), sample.expected["loss"].reshape(1))
    found = found.to(local_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.cpu()


def _largest(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours.double().cpu() - theirs.double()).abs().max()
    return float(torch.nan_to_num(difference, nan=float("inf")))


def features_of_sample(model: VisionLanguageModel, sample: Sample, recipe: Recipe) -> Tensor:
    """Return [T, E] of a sample's image slots, on the first stage."""
    arrangement = arrange(plan_of(recipe.model), sample.layouts)
    grid = None if arrangement.grid is None else torch.from_numpy(arrangement.grid)
    features = model.encode_images(sample.pixels.to(local_device()), grid)
    assert features is not None
    index, weight = arrangement_on(arrangement, local_device())
    # Behind them, those of a deepstack's levels: the reference has the tower's last layer's.
    return model.arranged(features, index, weight)[:, : recipe.model.language.hidden_size]


def forward_sample(chunks: Sequence[Any], sample: Sample, recipe: Recipe) -> Tensor:
    """Run one sample; the last stage returns its [S, V] logits, the others nothing of meaning."""
    outputs = _forward(chunks, sample, recipe, with_labels=False)
    if not is_last_stage():
        return torch.empty(0)
    whole = gather_from_tensor_model_parallel_region(outputs[0])
    return whole[: len(sample.ids), : recipe.model.language.output_rows]


def _forward(chunks: Sequence[Any], sample: Sample, recipe: Recipe, *, with_labels: bool) -> list[Tensor]:
    """Run one sample; the last stage returns [S, V / TP] logits, or [S] losses."""
    arrangement = arrange(plan_of(recipe.model), sample.layouts)
    batch = _batch(sample, arrangement, recipe, unwrap(chunks[0]))

    def step(model: Any, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return model(**batch.inputs(with_labels=with_labels)), lambda output: output[0]

    return pipeline.run(chunks, [batch], step, batch.tokens.size(1))


def _batch(sample: Sample, arrangement: Arrangement, recipe: Recipe, model: VisionLanguageModel) -> Batch:
    """Make a pack of one sample, padded to a multiple of TP."""
    length = len(sample.ids) + -len(sample.ids) % recipe.parallel.tensor_model_parallel_size
    labels = None if sample.labels is None else [sample.labels]
    grids = [own_grids(recipe.model, sample.layouts)]
    pack = make_pack(
        [sample.ids],
        length,
        labels=labels,
        pad_token=model.padding_token,
        positions=model.own_positions,
        grids=grids,
        spans=model.two_way_spans,
    )
    return make_batch(pack, sample.pixels if is_first_stage() else None, local_device(), arrangement)


def _show(sample: Sample, found: Tensor) -> str:
    has = [what for what in WHAT if what in sample.expected]
    return f"{len(sample.ids)} tokens, {len(sample.pixels)} images: " + ", ".join(
        f"{what} {float(found[WHAT.index(what)]):.1e}" for what in has
    )


def _figures(worst: Tensor) -> str:
    return ", ".join(f"{what} {float(value):.2e}" for what, value in zip(WHAT, worst, strict=True))
