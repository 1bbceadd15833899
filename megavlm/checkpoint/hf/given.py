"""What a Hugging Face directory, or several, say of a model: its branches, template, image plan and tokenizer.

Configuration and the headers of the weights are read, no weights; nothing here imports Megatron-Core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megavlm.config.architecture import BRANCHES
from megavlm.config.errors import UserError
from megavlm.config.fields import from_tree
from megavlm.config.schema import ModelConfig
from megavlm.data.chat_files import has_template
from megavlm.data.media import plan_kinds
from megavlm.data.tokenizer import find_tokenizer, load_tokenizer, template_of
from megavlm.families.composing import with_tower
from megavlm.families.family import Family, config_file
from megavlm.families.known import detect, scattered
from megavlm.families.preprocessor import PREPROCESSOR, PROCESSOR, geometry
from megavlm.families.presets import expand_presets
from megavlm.families.towers import FeatureLayer
from megavlm.weights.source import CONFIG, Source, check_pointer

Tree = dict[str, Any]


def make_model(branches: Mapping[str, Tree], where: str, template: str | None = None) -> ModelConfig:
    """Return the model that ``branches`` describe; a part that is not among them is a stand-in.

    Args:
        branches: of the parts.
        where: the source, for messages.
        template: name of the chat template; None for the default.

    Raises:
        UserError: a value is out of range.
    """
    own = {name: dict(branch) if isinstance(branch, Mapping) else branch for name, branch in branches.items()}
    tree = {"preset": "tiny", **({} if template is None else {"template": template}), **own}
    expanded = expand_presets({"model": tree})["model"]
    # The whole model's own preset is no fact about it.
    expanded["preset"] = None
    try:
        return from_tree(ModelConfig, expanded)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: gives model.{key} = {first.get('input')!r}: {first['msg']}") from None


@dataclass
class SourceOfParts:
    """A source, and the parts that are taken from it."""

    source: Source
    family: Family
    style: str
    parts: tuple[str, ...]
    branches: Tree

    @staticmethod
    def open(path: Path, parts: Sequence[str] | None = None, feature_layer: FeatureLayer = -2) -> SourceOfParts:
        """Open a directory or file and recognise its family.

        Args:
            path: the directory or file.
            parts: what is taken of it; None for all.
            feature_layer: see :class:`megavlm.weights.source.Source`.

        Raises:
            UserError: it is of no known family, or has not got the parts.
        """
        source = Source(path, feature_layer)
        try:
            family = detect(source)
            for part in parts or ():
                if part not in family.parts:
                    there = " and ".join(family.parts)
                    raise UserError(f"{path}: is a {family.title}; it has no {part}, only {there}")
            _check_merged(source, family)
            branches = family.branches(source)
            return SourceOfParts(source, family, family.style_of(source), tuple(parts or family.parts), branches)
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # text for a number, say
            where = source.directory / CONFIG
            raise UserError(f"{where}: a value is not of the kind that it should be: {error}") from error


_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")


def _check_merged(source: Source, family: Family) -> None:
    """Check that no adapter lies beside the weights of a tower or a language model.

    Raises:
        UserError: one does; both are named.
    """
    beside = next((source.directory / name for name in _ADAPTER_FILES if (source.directory / name).is_file()), None)
    if beside is None or family.parts == ("connector",) or not source.path.is_dir():
        return
    weights = next(iter(source.tensors.values())).file.name if source.tensors else "weights"
    raise UserError(
        f"{beside}: a LoRA beside {weights}, and nothing says whether it is merged into that; move it elsewhere if it "
        "is, else convert the base alone, and it with --adapter"
    )


def open_whole(path: Path, vision: Path | None, feature_layer: FeatureLayer) -> list[SourceOfParts]:
    """Open a checkpoint for all that it has, with the tower that it only names.

    Args:
        path: the checkpoint.
        vision: where its tower is, if the user says so.
        feature_layer: of a tower that comes alone.

    Raises:
        UserError: a tower is given to a checkpoint that has one, or none to one that has not.
    """
    whole = SourceOfParts.open(path, None, feature_layer)
    return with_tower(whole, vision, lambda tower, taken: SourceOfParts.open(tower, ["vision"], taken))


@dataclass
class Understood:
    """What sources say of the model that they make."""

    branches: Tree
    """Of the parts, and ``image`` and ``template`` where the sources say them."""
    model: ModelConfig
    """The same as a checked model; a part that no source has is a stand-in."""
    parts: list[str]
    """Parts that are there, in the order of the model."""
    tokenizer: Path | None
    """The tokenizer's file."""
    rows: int | None
    """Of the vocabulary as it came."""
    where: str
    """The sources, for messages."""
    fresh: list[str] = field(default_factory=list)
    """What is initialised rather than converted."""
    notes: list[str] = field(default_factory=list)
    """What is otherwise here than the sources' own files say."""


def understand(given: Sequence[SourceOfParts], fresh: Mapping[str, Tree], home: str | None) -> Understood:
    """Return the model that sources make, without reading weights.

    Args:
        given: sources; no part may be given twice.
        fresh: branches of the parts that are initialised.
        home: family that a composed model is exported as.

    Raises:
        UserError: the sources are wrong, or do not fit together.
    """
    branches = {part: one.branches[part] for one in given for part in one.parts} | dict(fresh)
    if "image" in given[0].branches and (len(given) == 1 or given[0].family.name == home):
        branches["image"] = given[0].branches["image"]
        check_processor(given[0].source.directory, branches["image"], branches["vision"])
        if "video" in given[0].branches:
            branches["video"] = given[0].branches["video"]
    elif len(given) == 1 and given[0].family.image_plan is not None:
        branches["image"] = {"kind": given[0].family.image_plan}
    elif len(given) > 1:
        branches |= _needed_plan(given)
    if len(given) == 1 and "template" in given[0].branches:
        branches["template"] = given[0].branches["template"]
    parts = [part for part in BRANCHES if part in branches]
    tokenizer = next(
        (t for one in given if "language" in one.parts for t in [find_tokenizer(one.source.folders[""])] if t), None
    )
    if tokenizer is not None:
        check_pointer(tokenizer)
    for one in given:
        if tokenizer is not None and "language" in one.parts:
            _check_ids(one, tokenizer)
    template = next((one.family.template for one in given if "language" in one.parts), None)
    grown: list[str] = []
    notes = [
        note
        for one in given
        if "vision" in one.parts and "image" not in branches
        for note in [geometry(one.source)]
        if note
    ]
    notes += [f"{name} is in no file: {why}" for one in given for name, why in one.source.made.items()]
    rows = (branches.get("language") or {}).get("vocab_size")
    if len(given) > 1 or fresh or given[0].family.slotless:
        _grow_vocabulary(branches, tokenizer, template or ModelConfig.template, grown)
    where = ", ".join(str(one.source.path) for one in given)
    model = make_model(branches, where, template)
    speaker = next((one for one in given if "language" in one.parts), None)
    if speaker is not None and tokenizer is not None:
        model = dataclasses.replace(model, template=_template(speaker, tokenizer, model.template, notes))
    return Understood(branches, model, parts, tokenizer, rows, where, grown, notes)


def _needed_plan(given: Sequence[SourceOfParts]) -> Tree:
    """Return the image plan of a source that cannot be without it; empty where pictures may be squashed.

    That is the one that gives the connector, where a vector of its plan is part of that or it goes with no other, or
    the one that gives a tower which takes pictures of any size, or two towers, which take two renderings of each.
    """
    for one in given:
        image = one.branches.get("image") or {"kind": one.family.image_plan}
        kind = plan_kinds().get(str(image.get("kind")))
        connects = "connector" in one.parts
        bound = connects and (one.family.plan_of_connector or (kind is not None and kind.plan.newline))
        if not bound and "vision" in one.parts:
            tower = make_model({"vision": one.branches["vision"]}, str(one.source.path)).vision
            bound = tower.packed or len(tower.towers) > 1
        if bound:
            return {"image": image}
    return {}


def open_directory(
    path: Path, vision: Path | None = None, feature_layer: FeatureLayer = -2
) -> tuple[list[SourceOfParts], str | None]:
    """Open a Hugging Face directory for all that it has.

    Args:
        path: a whole checkpoint (one that is published in pieces as well), or a part alone.
        vision: where its tower is, if it only names one and the user says so.
        feature_layer: of a tower that comes alone.

    Returns:
        The sources, and the family that an export is written in unless another is asked for.

    Raises:
        UserError: it is of no known family, or damaged.
    """
    family, places = scattered(path)
    if places and vision is None:
        given = [SourceOfParts.open(place, [part]) for part, place in places.items()]
    else:
        given = open_whole(path, vision, feature_layer)
    whole = family or (given[0].family if len(given) > 1 else None)
    return given, whole.name if whole is not None else None


def check_processor(directory: Path, image: Tree, vision: Tree) -> None:
    """Check that a checkpoint says how pictures become pixels.

    Raises:
        UserError: it does not.
    """
    if not image:
        side = None if vision.get("spatial_merge_size") else vision.get("image_size")  # pictures of any size
        pixels = "patches" if side is None else f"{side} x {side} pixels"
        raise UserError(
            f"{directory}: neither {PREPROCESSOR} nor {PROCESSOR} is there to say how a picture becomes the "
            f"{pixels} that {CONFIG}'s tower takes; download it too"
        )


def _grow_vocabulary(branches: Tree, tokenizer: Path | None, template: str, fresh: list[str]) -> None:
    """Make room in the embedding for special tokens that a text tokenizer lacks, such as those around an image."""
    if tokenizer is None or "language" not in branches:
        return
    needed = load_tokenizer(tokenizer, template_of(template, tokenizer)).vocab_size
    rows = branches["language"]["vocab_size"]
    if needed > rows:
        grown = -(-needed // 64) * 64
        branches["language"] = {**branches["language"], "vocab_size": grown}
        fresh.append(f"{grown - rows} rows of the embedding and output layer, for the tokens that {tokenizer} lacks")


_IMAGE_NAMES = {
    "image": ("<IMG_CONTEXT>", "<imgpad>", "<|image_pad|>", "<|image|>", "<image>", "<image_placeholder>"),
    "image_start": ("<img>", "<|vision_start|>", "<start_of_image>"),
}
_APART = ("<image_soft_token>",)
"""Slots of those that say of them and of an image's start by themselves (Gemma 3)."""


def _check_ids(one: SourceOfParts, path: Path) -> None:
    """Check that config.json and the tokenizer mean the same tokens, where both have them.

    Raises:
        UserError: they do not; both are named.
    """
    ids = one.family.tokens(one.source)
    tokenizer = load_tokenizer(path, template_of(one.family.template or ModelConfig.template, path))
    for key, names in _IMAGE_NAMES.items():
        if key == "image" and "image_start" in ids:
            names = _APART  # Qwen's configuration says where an image starts; the rest is counted from there
        there = {name: tokenizer.encode(name) for name in names if name not in tokenizer.added}
        unknown = tokenizer.encode("<|no such token|>")  # one token too, where all that is unknown is one
        there = {name: found for name, found in there.items() if len(found) == 1 and found != unknown}
        if key in ids and there and [ids[key]] not in there.values():
            known = ", ".join(f"{name} the id {number}" for name, (number,) in there.items())
            raise UserError(
                f"{config_file(one.source)}: the {key.replace('_', ' ')} token has the id {ids[key]}, but {path} gives "
                f"{known}; correct one"
            )


def _template(one: SourceOfParts, tokenizer: Path, default: str, notes: list[str]) -> str:
    """Return what the conversations of a whole model are written in."""
    reasons: list[str] = []
    for name in one.family.templates(one.source):
        try:
            template = template_of(name, tokenizer)
            load_tokenizer(tokenizer, template)
            template.check_training()
        except UserError as error:
            reasons.append(str(error))
            continue
        if len(reasons) > 0 and has_template(tokenizer):
            notes.append(f"{reasons[0]}; {name} is taken instead")
        return name
    if reasons:
        notes.append(
            f"none of the templates of {one.family.title} goes with its tokenizer ({reasons[-1]}); {default} is taken, "
            "which these weights may never have seen: set model.template in the recipe"
        )
    return default
