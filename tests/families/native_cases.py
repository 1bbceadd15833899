"""What tests of the families of pictures of any size share: samples, Transformers' numbers of them, greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from qwen2_vl_models import IMAGE
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.media import arrange, plan_of
from megavlm.data.positions import own_grids
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.inference.generate import generate
from megavlm.inference.prompt import Prompt
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups

LAYOUT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
]
SIZES = [[41, 90], [64, 30]]
"""Height and width of pictures."""


def convert(source: Path, out: Path) -> Recipe:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return load_recipe(out / "recipe.yaml", [], expand_presets)


def prompt(recipe: Recipe, sizes: list[list[int]], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids with the slots of pictures of these sizes, their patches and their grid."""
    generator = torch.Generator().manual_seed(seed)
    layouts = [plan_of(recipe.model).plan(width, height, len(sizes)) for height, width in sizes]
    parts = [torch.randint(0, 100, (5,), generator=generator)]
    for layout in layouts:
        text = torch.randint(0, 100, (4,), generator=generator)
        parts += [torch.tensor([116]), torch.full((layout.tokens,), IMAGE), torch.tensor([117]), text]
    grid = torch.tensor([layout.patches for layout in layouts]).reshape(-1, 3)
    pixels = torch.randn(int(grid.prod(1).sum()), 96, generator=generator)
    return torch.cat(parts), pixels, grid


def inputs(ids: Tensor, pixels: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """Return what Transformers' classes take."""
    shown = {"pixel_values": pixels, "image_grid_thw": grid} if len(grid) else {}
    return {
        "input_ids": ids[None], "attention_mask": torch.ones(1, len(ids)),
        "mm_token_type_ids": (ids == IMAGE).int()[None], **shown,
    }  # fmt: skip


def write_reference(model: PreTrainedModel, recipe: Recipe, path: Path) -> None:
    """Write what Transformers computes of one sample, its gradients by the canonical names."""
    ids, pixels, grid = prompt(recipe, SIZES, 2)
    labels = torch.where(ids == IMAGE, -100, ids)
    labels[:3] = -100
    features = torch.cat(tuple(model.get_image_features(pixels, image_grid_thw=grid).pooler_output))
    out = model(**inputs(ids, pixels, grid))
    loss = F.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=-100)
    loss.backward()
    stored = {
        "s0.input_ids": ids[None], "s0.pixel_values": pixels, "s0.image_sizes": torch.tensor(SIZES),
        "s0.labels": labels[None], "s0.logits": out.logits.detach(), "s0.loss": loss.detach().reshape(1),
        "s0.image_features": features.detach(),
    }  # fmt: skip
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    family = FAMILIES[model.config.model_type]
    with alone():
        rules = make_rules(family, recipe.model, "modules", family_slots(family, recipe.model))
    for rule in rules:
        for name, gradient in zip(rule.row.ours, rule.to_ours([theirs.pop(n) for n in rule.row.theirs]), strict=True):
            assert gradient.abs().max() > 0, name
            stored["gradient." + name] = gradient
    assert not theirs
    for part in ("vision", "connector", "language"):
        largest = max(float(value.abs().max()) for name, value in stored.items() if f"gradient.{part}." in name)
        stored["largest." + part] = torch.tensor(largest)
    save_file({name: value.contiguous().clone() for name, value in stored.items()}, path)


def answers_are_theirs(model: PreTrainedModel, directory: Path) -> None:
    """Check greedy answers of a model that is saved in ``hf``: of pictures that are not square, two, one and none."""
    recipe = convert(directory / "hf", directory / "m")
    plan = plan_of(recipe.model)
    shown = [(sizes, *prompt(recipe, sizes, seed)) for seed, sizes in enumerate((SIZES, SIZES[:1], []))]
    expected = []
    for _, ids, pixels, grid in shown:
        whole = model.generate(**inputs(ids, pixels, grid), do_sample=False, max_new_tokens=8, eos_token_id=None,
                               pad_token_id=0)  # fmt: skip
        expected.append(whole[0, len(ids) :].tolist())
    with process_groups(recipe.parallel, 1):
        chunks = build_model(recipe, IMAGE)
        load(directory / "m", modules=[unwrap(chunk) for chunk in chunks])
        prompts = []
        for sizes, ids, pixels, _ in shown:
            layouts = [plan.plan(width, height, len(sizes)) for height, width in sizes]
            own = arrange(plan, layouts) if layouts else None
            prompts.append(Prompt(ids.numpy(), pixels, own, own_grids(recipe.model, layouts)))
        answers = generate(chunks, prompts, max_new_tokens=8, stop_ids=[], vocab_size=128, pack_length=256)
    assert answers == expected


def merged(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return tree | {key: merged(tree[key], value) if isinstance(value, dict) else value for key, value in values.items()}
