"""Films for tests of families: what Transformers computes of a picture and a film, in the form of a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules
from megavlm.config.schema import Recipe
from megavlm.data.films.plan import FilmLayout, FilmShape
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES

FILM = (41, 30, 23, 6.0)
"""Width, height, frames, rate: 23 frames of four seconds."""
PICTURE = (64, 30)
"""Height and width."""


def shown(recipe: Recipe, *, picture: bool) -> tuple[Tensor, Tensor, list[Any]]:
    """Return [S] ids with slots of -1 for a picture's and -2 for a film's, normal pixels, and the layouts."""
    generator, plan = torch.Generator().manual_seed(5), plan_of(recipe.model)
    layouts: list[Any] = [plan.plan(PICTURE[1], PICTURE[0], 2)] if picture else []
    layouts.append(plan.of(FilmShape(*FILM, shown=1 + picture)))
    # Words from 3 on: the row of the token that fills batches gets no gradient in Transformers.
    pieces = [torch.randint(3, 100, (5,), generator=generator)]
    for layout in layouts:
        film = isinstance(layout, FilmLayout)
        for run in layout.runs:
            words = torch.randint(3, 100, (3,), generator=generator)
            pieces.append(words if isinstance(run, str) else torch.full((run,), -2 if film else -1))
        pieces.append(torch.randint(3, 100, (4,), generator=generator))
    makers: list[Any] = [plan.maker(layout) for layout in layouts]
    shapes = [maker.pixels_of(layout) for maker, layout in zip(makers, layouts, strict=True)]
    pixels = torch.randn(sum(shape[0] for shape in shapes), *shapes[0][1:], generator=generator)
    return torch.cat(pieces), pixels, layouts


def given(model: PreTrainedModel, ids: Tensor, pixels: Tensor, layouts: list[Any]) -> dict[str, Any]:
    """Return what Transformers' classes take of it."""
    config, kind = model.config, model.config.model_type
    # GLM-4.1V writes an image's token for films too, and InternVL knows no other.
    film = config.image_token_id if kind in ("glm4v", "internvl") else config.video_token_id
    found: dict[str, Any] = {
        "input_ids": torch.where(ids == -1, config.image_token_id, torch.where(ids == -2, film, ids))[None],
        "attention_mask": torch.ones(1, len(ids)),
    }
    last = layouts[-1]
    if kind == "internvl":
        return found | {"pixel_values": pixels}
    if kind == "llava_onevision":
        return found | {"pixel_values_videos": pixels[None]}
    grids = torch.tensor([layout.patches for layout in layouts])
    first = int(grids[:-1].prod(1).sum())
    found |= {"pixel_values_videos": pixels[first:], "video_grid_thw": grids[-1:]}
    found["mm_token_type_ids"] = ((ids == -1).int() + 2 * (ids == -2).int())[None]
    if first:
        found |= {"pixel_values": pixels[:first], "image_grid_thw": grids[:-1]}
    if kind == "qwen2_5_vl":
        frames = len(set(last.indices))
        found["second_per_grid_ts"] = [2 / (frames / last.film.frames * last.film.rate)]
    return found


def write_film_reference(model: PreTrainedModel, recipe: Recipe, path: Path) -> None:
    """Write what Transformers computes of one sample, its gradients by the canonical names."""
    # The class of GLM-4.1V takes no pictures beside films; the others' here are of tiles.
    picture = model.config.model_type.startswith("qwen")
    ids, pixels, layouts = shown(recipe, picture=picture)
    labels = torch.where(ids < 0, -100, ids)
    labels[:3] = -100
    out = model(**given(model, ids, pixels, layouts))
    loss = F.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=-100)
    loss.backward()
    stored = {
        "s0.input_ids": torch.where(ids < 0, model.config.image_token_id, ids)[None], "s0.pixel_values": pixels,
        "s0.film_shapes": torch.tensor([FILM], dtype=torch.float64), "s0.labels": labels[None],
        "s0.logits": out.logits.detach(), "s0.loss": loss.detach().reshape(1), "s0.image_features": features(
            model, given(model, ids, pixels, layouts)
        ),
    }  # fmt: skip
    if picture:
        stored["s0.image_sizes"] = torch.tensor([PICTURE])
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    family = FAMILIES[model.config.model_type]
    with alone():
        rules = make_rules(
            family, recipe.model, family.modules or next(iter(family.styles)), family_slots(family, recipe.model)
        )
    for rule in rules:
        for name, gradient in zip(rule.row.ours, rule.to_ours([theirs.pop(n) for n in rule.row.theirs]), strict=True):
            stored["gradient." + name] = gradient
    assert not theirs
    for part in ("vision", "connector", "language"):
        largest = max(float(value.abs().max()) for name, value in stored.items() if f"gradient.{part}." in name)
        stored["largest." + part] = torch.tensor(largest)
    save_file({name: value.contiguous().clone() for name, value in stored.items()}, path)


@torch.no_grad()
def features(model: Any, asked: dict[str, Any]) -> Tensor:
    """Return [T, E] of the slots of a picture, then of a film."""
    found = []
    if "image_grid_thw" in asked:
        found += model.get_image_features(asked["pixel_values"], image_grid_thw=asked["image_grid_thw"]).pooler_output
    if "video_grid_thw" in asked:
        films = asked["pixel_values_videos"], asked["video_grid_thw"]
        found += model.get_video_features(films[0], video_grid_thw=films[1]).pooler_output
    elif "pixel_values_videos" in asked:
        inner = model.config
        found.append(model.get_video_features(
            asked["pixel_values_videos"], vision_feature_layer=inner.vision_feature_layer,
            vision_feature_select_strategy=inner.vision_feature_select_strategy,
        ).pooler_output.flatten(0, 1))  # fmt: skip
    else:
        found.append(model.get_image_features(asked["pixel_values"]).pooler_output.flatten(0, 1))
    return torch.cat(found)
