"""Adapters of every registered family whose models are whole: to PEFT and back bit for bit, merged, each kind of layer.

Of each language model that a family is published with (in ``test_round_trips.CASES``): all its layers at once; of the
family's first also every other one, and the ones between: each part of a fused layer then is there once, and once not.
What PEFT itself computes of them test_whole.py and tests/checkpoint/test_peft.py have; here nothing but this package
runs, and what is compared is the live model, which multiplies by A and B, with the merged one, which does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_round_trips import CASES, convert_in, make
from torch import Tensor
from whole_source import with_slots

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.hf.peft import _write_rest, export_adapter, import_adapter
from megavlm.checkpoint.hf.shapes import alone
from megavlm.checkpoint.merged import merge, recipe_branches
from megavlm.checkpoint.slots import find_slots
from megavlm.checkpoint.stream import CheckpointReader, ParameterToWrite, write_checkpoint
from megavlm.config.load import load_recipe
from megavlm.config.lora import known_targets, targets_of
from megavlm.config.schema import LoraConfig, ModelConfig
from megavlm.data.media import pixels_of, plan_of
from megavlm.evaluation.parity import Sample, forward_sample
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets, load_presets
from megavlm.models.build import build_model, unwrap
from megavlm.parallel import pipeline
from megavlm.parallel.state import process_groups

pytestmark = pytest.mark.long

PARTS = ("vision", "connector", "language")


def random_adapters(base: Path, out: Path, targets: tuple[str, ...]) -> Path:
    """Write adapters of random values, as a run with these targets would."""
    lora, generator = LoraConfig(rank=4, alpha=6.0, targets=targets), torch.Generator().manual_seed(len(targets))
    with alone():
        slots = find_slots(recipe_branches(base)[0], ["language"], lora)
        pieces = []
        for name, slot in slots.items():
            if name.endswith((".lora_a", ".lora_b")):
                value = torch.randn(slot.shape, generator=generator) * 0.2
                pieces.append(ParameterToWrite(slot, value.dtype, lambda value=value: value))  # type: ignore[misc]
        assert pieces
        out.mkdir()
        write_checkpoint(out, pieces, lambda _: None)
    _write_rest(base, out, lora)
    return out


def values(checkpoint: Path) -> dict[str, Tensor]:
    """Return every parameter of adapters."""
    model, lora = recipe_branches(checkpoint)
    reader = CheckpointReader(checkpoint)
    with alone():
        slots = find_slots(model, ["language"], lora)
    own = {name: slot for name, slot in slots.items() if name.endswith((".lora_a", ".lora_b"))}
    assert {slot.key for slot in own.values()} == set(reader.tensors())
    return {name: reader.read(slot) for name, slot in own.items()}


def sample_of(model: ModelConfig) -> Sample:
    """Return random words around a random picture."""
    plan, image = plan_of(model), model.language.vocab_size - 1
    layout = plan.plan(40, 30, 1)
    generator = torch.Generator().manual_seed(11)
    pixels = torch.randn(pixels_of(plan, layout), generator=generator)
    return Sample("s", with_slots([layout], image, model.language.vocab_size, 7), pixels, [layout], None, {})


def logits(checkpoint: Path) -> Tensor:
    """Return the logits of a checkpoint, of adapters beside their base."""
    recipe = load_recipe(checkpoint / "recipe.yaml", [], expand_presets)
    with process_groups(recipe.parallel, 1), torch.no_grad():
        chunks = build_model(recipe, recipe.model.language.vocab_size - 1)
        load(checkpoint, modules=[unwrap(chunk) for chunk in chunks])
        with pipeline.evaluating(chunks):
            found = forward_sample(chunks, sample_of(recipe.model), recipe)
        return found[:, (found > -1e30).all(0)]  # Chameleon has the least number for tokens that it may not say


def there_and_back(base: Path, saved: Path, folder: Path) -> None:
    """Export and import; every bit, and what the recipe says."""
    export_adapter(saved, folder / "peft")
    import_adapter(folder / "peft", base, folder / "back")
    before, after = values(saved), values(folder / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
    (model, lora), (_, again) = recipe_branches(saved), recipe_branches(folder / "back")
    assert (lora.rank, lora.alpha) == (again.rank, again.alpha)
    assert {*targets_of(lora, model.language)} == {*targets_of(again, model.language)}


def choices(model: ModelConfig) -> list[tuple[str, ...]]:
    """Return sets of targets: all; every other, and those between."""
    paths = tuple(target.path for target in known_targets(model.language))
    return [one for one in (("all-linear",), paths[::2], paths[1::2]) if one]


def walk(base: Path, model: ModelConfig, folder: Path, *, first: bool) -> None:
    """Try sets of targets."""
    plain = logits(base)
    for number, targets in enumerate(choices(model)[: 3 if first else 1]):
        own = folder / f"set-{number}"
        own.mkdir()
        saved = random_adapters(base, own / "run", targets)
        live = logits(saved)
        assert (live - plain).abs().max() > 1e-3 * plain.abs().max(), "the adapters matter"
        with alone():
            merge(saved, own / "merged")
        torch.testing.assert_close(logits(own / "merged"), live, rtol=0, atol=5e-5 * float(live.abs().max()))
        there_and_back(base, saved, own)


def whole_families() -> list[Any]:
    load_presets()
    names = [name for name, family in FAMILIES.items() if tuple(family.parts) == PARTS and name in CASES.values()]
    return [pytest.param(name, marks=pytest.mark.family(name)) for name in names]


@pytest.mark.parametrize("name", whole_families())
def test_adapters_of_every_layer_go_there_and_back_and_merge(name: str, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    for case in (case for case, family in CASES.items() if family == name):
        base = convert_in(make(case, tmp_path / case / "hf"), tmp_path / case / "m")
        model = recipe_branches(base)[0]
        kind = vars(model.language)
        if not known_targets(model.language) or kind in seen:
            continue
        seen.append(kind)
        walk(base, model, tmp_path / case, first=len(seen) == 1)
    assert seen, "no language model of it names layers for adapters"
