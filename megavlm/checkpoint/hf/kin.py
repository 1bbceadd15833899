"""What an export knows of where its weights come from: a family of the same tower, added rows, what learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint import assets
from megavlm.checkpoint.base import base_of, holds_adapters
from megavlm.checkpoint.derived import DERIVED_FROM
from megavlm.checkpoint.hf.given import make_model
from megavlm.checkpoint.hf.trained import was_trained
from megavlm.checkpoint.paths import read_run, read_tree, resolve
from megavlm.config.architecture import architecture_of
from megavlm.config.errors import UserError
from megavlm.config.fields import meaning_of
from megavlm.config.help import to_tree
from megavlm.config.json_object import read_json
from megavlm.config.schema import ModelConfig
from megavlm.data.tokenizer import find_tokenizer, load_tokenizer, template_of
from megavlm.families.family import Family, Tower
from megavlm.families.known import FAMILIES
from megavlm.families.towers import transformers_vision
from megavlm.weights.kinds import holds_model
from megavlm.weights.source import CONFIG


@dataclass
class Kin:
    """The family that the weights came in, where the one to write has the same tower under other names."""

    tower: Tower
    prefix: str
    """Of the tower's names there."""


def kin_of(checkpoint: Path, family: Family, model: ModelConfig, record: Mapping[str, Any]) -> Kin | None:
    """Return what another family kept of the tower; None where that is another one, or a part of it changed."""
    folder, other = checkpoint / assets.FOLDER, FAMILIES.get(str(record.get("family")))
    path = folder / CONFIG
    if other is None or not path.is_file() or not {"vision"} <= {*family.parts} & {*other.parts}:
        return None
    tower, prefix = (
        other.tower_of(read_json(path), folder),
        other.styles.get(record.get("style") or "", {}).get("tower"),
    )
    if tower is None or prefix is None or "tower" not in family.styles[family.style_for(model)]:
        return None
    there = make_model({"vision": transformers_vision(*tower, str(path))}, str(path))
    return None if differing("vision", model, there) else Kin(tower, prefix)


def without_slot(
    checkpoint: Path, family: Family, model: ModelConfig, record: Mapping[str, Any], template: str, *, original: bool
) -> ModelConfig:
    """Return the model with as many rows of the vocabulary as came in, where nothing but an image's slot was added."""
    rows, folder = record.get("rows"), checkpoint / assets.FOLDER
    if not original or not family.slotless or not isinstance(rows, int) or rows >= model.language.vocab_size:
        return model
    path = find_tokenizer(folder)
    tokenizer = load_tokenizer(path, template_of(template, path)) if path else None
    if tokenizer is None or tokenizer.vocab_size - len(tokenizer.added) > rows:
        return model
    if len(tokenizer.added) > 1 and was_trained(checkpoint):
        return model  # conversations are written with the others
    return dataclasses.replace(model, language=dataclasses.replace(model.language, vocab_size=rows))


def tower_learnt(checkpoint: Path, base: Path | None = None) -> bool:
    """Whether a training changed the tower: this one, or one whose weights it began with.

    Where one of these is no longer there, nobody knows: the tower then counts as changed, so that it is not lost.
    ``base``: where the base of adapters may lie if it has been moved.
    """
    seen: set[Path] = set()
    here: Path | None = checkpoint
    while here is not None:
        seen.add(here.resolve())
        if not (here / "recipe.yaml").is_file():
            return False
        tree, run = read_tree(here), read_run(here)
        frozen = ((tree.get("modules") or {}).get("vision") or {}).get("freeze", False)
        if int(run.get("step") or 0) > 0 and not frozen:
            return True
        if "converted_from" in run:
            return False
        before = str(run[DERIVED_FROM]) if DERIVED_FROM in run else (tree.get("checkpoint") or {}).get("load")
        if holds_adapters(here):
            try:
                before = str(base_of(here, base))
            except UserError:
                return True
        if before is None or holds_model(Path(before)):
            return False
        try:
            here = resolve(Path(before))
        except FileNotFoundError:
            return True
        if here.resolve() in seen:  # merged before what it was made of was kept
            return True
    return False


def check_tower_kept(checkpoint: Path, family: Family, base: Path | None = None) -> None:
    """Check that a tower that learned is written.

    Raises:
        UserError: the family's files only name one.
    """
    if family.with_tower_trained and tower_learnt(checkpoint, base):
        raise UserError(
            f"--family {family.name}: the tower learned, or the checkpoints that training began with are not"
            f" there to tell, and the family's files only name one; take --family {family.with_tower_trained}, which"
            " holds it"
        )


def differing(part: str, model: ModelConfig, other: ModelConfig) -> list[str]:
    """Return the keys of a part whose values two models do not share, of those that a published file says."""
    wanted, there = getattr(model, part), getattr(other, part)
    if architecture_of(model, part) is not architecture_of(other, part):
        return [f"model.{part}.preset"]
    return [
        f"model.{part}.{key}"
        for key in to_tree(model)[part]
        if key != "preset" and meaning_of(wanted, key).published and getattr(wanted, key) != getattr(there, key)
    ]
