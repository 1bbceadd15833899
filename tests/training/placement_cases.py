"""Short trainings with tower and connector on the first stage or on all ranks; see test_placement."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any, ClassVar

from megavlm.parallel.device import prepare_device

prepare_device()

import cross_cases  # noqa: E402
import job_files  # noqa: E402
import levels_cases  # noqa: E402
import numpy as np  # noqa: E402
import tiles_cases  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from run_cases import four_of  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.config.checks import check_recipe  # noqa: E402
from megavlm.config.help import to_tree  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.device_batch import Batch, share_packs  # noqa: E402
from megavlm.data.media import Arrangement, arrange, plan_of  # noqa: E402
from megavlm.data.positions import positions_of  # noqa: E402
from megavlm.data.read_pack import ReadPack  # noqa: E402
from megavlm.data.spans import spans_of  # noqa: E402
from megavlm.parallel.state import is_reader, process_groups  # noqa: E402
from megavlm.training import handover, vision  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.heldout import HeldOut, validate  # noqa: E402
from megavlm.training.spread import PictureSpread  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

Job = dict[str, Any]
GRIDS = ((1, 2, 2), (1, 4, 2), (1, 6, 8), (2, 2, 4))
"""Pictures of a packed tower, one of them huge and one a film; a block of 2 x 2 patches is a token."""


def run_jobs(jobs: dict[str, Job]) -> dict[str, dict[str, Any]]:
    """Do one after the other; return by name what each gives on this rank.

    Neighbours of one layout share their process groups: Megatron-Core's DistributedDataParallel is held by hooks that
    the garbage collector does not see, and so are gloo's groups, whose threads wake all the time, until a process ends.
    """
    recipes = {name: made(job["recipe"]) for name, job in jobs.items()}
    found = {}
    for _, names in itertools.groupby(recipes, lambda name: _sizes(recipes[name])):
        alike = list(names)
        first = recipes[alike[0]]
        with process_groups(first.parallel, first.training.seed):
            for name in alike:
                check_recipe(recipes[name])
                found[name] = train(jobs[name], recipes[name])
    return found


def _sizes(recipe: Recipe) -> tuple[Any, ...]:
    """Return what process groups follow from."""
    one = recipe.parallel
    virtual = one.virtual_pipeline_model_parallel_size
    sizes = one.tensor_model_parallel_size, one.context_parallel_size, one.pipeline_model_parallel_size
    return *sizes, virtual, recipe.training.seed


def train(job: Job, recipe: Recipe) -> dict[str, Any]:
    """Do a job where its process groups are up."""
    Counted.calls.clear()
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "moved": False}
    job_files.make_weights(job, made)
    torch.manual_seed(recipe.training.seed)
    training = build_training(recipe, IMAGE_TOKEN)
    job_files.load(job, training, recipe)
    spread = None if training.vision is None else PictureSpread(recipe)
    (first, last), following = job["steps"], None
    for step in range(first, last):
        training.scheduler.step(1)
        batches = fetch(job, recipe, step, spread) if following is None else following
        if training.vision is not None and training.vision.ahead and step + 1 < last:
            following = fetch(job, recipe, step + 1, spread)
            training.vision.encode_ahead(following)
        found["moved"] |= any(batch.shared is not None and batch.shared.moved for batch in batches)
        result = train_step(training.chunks, training.optimizer, batches, num_sources=1, vision=training.vision)
        found["loss"].append(result.loss)
        found["grad_norm"].append(result.grad_norm)
    found["calls"] = dict(Counted.calls)
    with training.settled():
        packs = read(recipe, 7, (), alike=job.get("alike", False))
        held_out = HeldOut("few", packs if is_reader() else None, len(packs))
        found["validation"] = validate(training.chunks, [held_out], training.vision, spread)
        found["copies"] = copies(training.modules)
        found["held"] = sum(len(values) for values in found["copies"].values()) // 4
        job_files.save(job, training, recipe, last)
    return found


class Counted:
    """Counts calls of a function or class that a module of the trainer uses."""

    calls: ClassVar[Counter[str]] = Counter()

    def __init__(self, module: Any, name: str) -> None:
        self.name, self.plain = name, getattr(module, name)
        setattr(module, name, self)

    def __call__(self, *args: Any) -> Any:
        self.calls[self.name] += 1
        return self.plain(*args)


Counted(handover, "exchange")
Counted(vision, "SideWork")


def fetch(job: Job, recipe: Recipe, step: int, spread: Any) -> list[Batch]:
    """Return this rank's micro-batches of a step."""
    packs = read(recipe, step, job.get("without", ()), alike=job.get("alike", False))
    if job.get("short"):
        packs = [_short(one, step) for one in packs]
    return share_packs(packs if is_reader() else None, len(packs), spread)


def _short(read: ReadPack, step: int) -> ReadPack:
    """The same positions in other segments, of 1 to 40: the last of each predicts nothing, and the next begins at 0."""
    pack, rng, bounds = read.pack, np.random.default_rng(step), [0]
    while bounds[-1] < len(pack.tokens):
        bounds.append(min(bounds[-1] + int(rng.choice([1, 1, 2, 3, 5, 17, 40])), len(pack.tokens)))
    labels, lengths = pack.labels.copy(), np.diff(bounds)
    labels[np.array(bounds[1:]) - 1] = -100
    other = dataclasses.replace(
        pack, labels=labels, cu_seqlens=np.array(bounds, np.int32), segment_sources=np.zeros(len(lengths), np.int32),
        position_ids=pack.position_ids
        if pack.position_ids.ndim > 1
        else np.concatenate([np.arange(length) for length in lengths]),
        loss_weights=rng.uniform(0.5, 2, len(labels)).astype(np.float32),
    )  # fmt: skip
    return dataclasses.replace(read, pack=other)


def made(branches: dict[str, Any]) -> Recipe:
    """Return the recipe of a job; its model may be that of another test."""
    others = {
        "tiles": lambda: tiles_cases.recipe(tiles_cases.ANYRES), "levels": levels_cases.recipe,
        "pictures": cross_cases.recipe,
    }  # fmt: skip
    if not isinstance(branches.get("model"), str):
        return tiny_recipe(**branches)
    model = others[branches["model"]]()
    rest = {name: branch for name, branch in branches.items() if name != "model"}
    return tiny_recipe(**rest, model=to_tree(model)["model"], data=to_tree(model)["data"])


def read(recipe: Any, step: int, without: Any, *, alike: bool = False) -> list[ReadPack]:
    """Return this replica's packs of a step; in the steps ``without`` nobody has a picture, with "one" one replica.

    With ``alike`` all pictures are four tokens, whatever the tower and the connector.
    """
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    count, plan = recipe.training.global_batch_size, plan_of(recipe.model)
    if recipe.model.language.cross_layers:
        drawn = cross_cases.packs(recipe, count, step)
        mine = [ReadPack(pack, torch.from_numpy(px), arrange(plan, pack.layouts(plan) or [])) for pack, px in drawn]
    elif alike:
        mine = [_of_four_tokens(pack, pixels, recipe.model) for pack, pixels in random_packs(count, step)]
    elif recipe.model.vision.packed:
        mine = [_of_any_size(pack, recipe, step * 100 + i) for i, (pack, _) in enumerate(random_packs(count, step))]
    elif recipe.model.vision.deepstack:
        drawn = levels_cases.packs(plan, positions_of(recipe.model, IMAGE_TOKEN), count, step)
        mine = [ReadPack(pack, torch.from_numpy(pixels)) for pack, pixels in drawn]
    elif plan.fixed:
        mine = [ReadPack(pack, torch.from_numpy(pixels)) for pack, pixels in random_packs(count, step)]
    else:
        drawn = tiles_cases.packs(plan, count, step)
        mine = [ReadPack(pack, torch.from_numpy(px), arrange(plan, pack.layouts(plan) or [])) for pack, px in drawn]
    if step in without:
        mine = [_text(one) for one in mine]
    elif "one" in without:  # replica has some; or, in one process, what that one had of the two
        mine = [one if i % 2 else _text(one) for i, one in enumerate(mine)]
    mine = [_of_model(one, recipe, step) for one in mine]
    return mine[rank::size]


def _of_model(read: ReadPack, recipe: Recipe, seed: int) -> ReadPack:
    """The same with what the model asks for beside: positions of three numbers, spans that see both ways."""
    pack, rng = read.pack, np.random.default_rng(seed)
    spans = spans_of(recipe.model, IMAGE_TOKEN)
    if getattr(recipe.model.language, "rotary_sections", None) and pack.position_ids.ndim == 1:
        moved = np.sort(rng.integers(0, 20, (3, len(pack.tokens))), axis=1)
        pack = dataclasses.replace(pack, position_ids=np.stack([pack.position_ids] * 3) + moved)
    if spans is not None:
        pieces = np.split(pack.tokens, pack.cu_seqlens[1:-1])
        prefixes = [int(rng.integers(1, len(piece))) for piece in pieces]
        pack = dataclasses.replace(pack, two_way_spans=spans.pack(pieces, prefixes))
    return dataclasses.replace(read, pack=pack)


def _text(read: ReadPack) -> ReadPack:
    """The same without pictures."""
    pack = dataclasses.replace(
        read.pack, tokens=np.where(read.pack.tokens == IMAGE_TOKEN, 7, read.pack.tokens), images=[], image_shapes=[]
    )
    return ReadPack(pack, read.pixels[:0])


def _of_four_tokens(pack: Any, pixels: Any, model: Any) -> ReadPack:
    """Give pictures of a pack as the tower takes them: patches with a grid, where it takes pictures of any size."""
    vision, count = model.vision, len(pixels)
    if not vision.packed:
        shape = (count, *vision.pixel_shape)  # of a pair, several squares of each picture
        shown = np.resize(pixels, shape) if count else np.zeros(shape, np.uint8)
        return ReadPack(pack, torch.from_numpy(shown), four_of(model, count))
    side, row = 2 * vision.spatial_merge_size, 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = np.resize(pixels, (count * side**2, row)) if count else np.zeros((0, row), np.uint8)
    grid = np.tile(np.array([[1, side, side]], np.int64), (count, 1))
    return ReadPack(pack, torch.from_numpy(patches), Arrangement(4 * count, None, grid=grid) if count else None)


def _of_any_size(pack: Any, recipe: Any, seed: int) -> ReadPack:
    """Give a pack pictures of other sizes: as many image tokens as they have blocks, one after the other."""
    rng = np.random.default_rng(seed)
    tokens = np.where(pack.tokens == IMAGE_TOKEN, 7, pack.tokens)
    labels = pack.labels.copy()
    grids = [GRIDS[int(rng.integers(len(GRIDS)))] for _ in range(seed % 3)]
    at = 1
    for frames, rows, columns in grids:
        slots = frames * rows * columns // 4
        tokens[at : at + slots], labels[at : at + slots] = IMAGE_TOKEN, -100
        at += slots + 1
    pixels = rng.integers(0, 256, (sum(int(np.prod(g)) for g in grids), recipe.model.vision.patch_values))
    one = dataclasses.replace(pack, tokens=tokens, labels=labels, images=[b""] * len(grids), image_shapes=[])
    if not grids:
        return ReadPack(one, torch.from_numpy(pixels.astype(np.uint8)))
    return ReadPack(one, torch.from_numpy(pixels.astype(np.uint8)), Arrangement(at, None, grid=np.array(grids)))


def copies(modules: list[Any]) -> dict[str, bytes]:
    """Return the weights of tower and connector on this rank."""
    return {
        name: parameter.detach().float().numpy().tobytes()
        for module in modules
        for name, parameter in module.named_parameters()
        if name.split(".")[0] in ("vision", "connector")
    }
