"""A Megatron distributed checkpoint, saved at any layout, to a Hugging Face directory."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megavlm.checkpoint import assets
from megavlm.checkpoint.ahead import ReadAhead
from megavlm.checkpoint.finite import narrowed
from megavlm.checkpoint.hf.given import make_model
from megavlm.checkpoint.hf.kin import Kin, check_tower_kept, differing, kin_of, tower_learnt, without_slot
from megavlm.checkpoint.hf.pickled import write_pickle, write_pieces
from megavlm.checkpoint.hf.rule_writing import RuleToWrite, number_type, rule_entries
from megavlm.checkpoint.hf.shapes import Rule, Tree, alone, family_slots, make_rules, same_bits
from megavlm.checkpoint.hf.sink import SHARD_BYTES, Entry, FolderedWriter
from megavlm.checkpoint.hf.trained import was_trained, write_pixels, write_trained
from megavlm.checkpoint.merged import check_contents, open_reader
from megavlm.checkpoint.paths import read_tree
from megavlm.checkpoint.publish import publishing
from megavlm.checkpoint.readback import ReadBack
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.config.architecture import BRANCHES
from megavlm.config.errors import UserError
from megavlm.config.help import to_tree
from megavlm.config.json_object import read_json
from megavlm.config.saved import model_with_defaults
from megavlm.config.schema import DataConfig, ModelConfig
from megavlm.data.tokenizer import Tokenizer, find_tokenizer, image_tokens, load_tokenizer, template_of
from megavlm.families.family import Family
from megavlm.families.films import unsaid_films
from megavlm.families.known import FAMILIES
from megavlm.families.preprocessor import PREPROCESSOR, PROCESSOR
from megavlm.families.towers import FeatureLayer
from megavlm.models.build import MODULES
from megavlm.weights.source import CONFIG, Source

logger = logging.getLogger(__name__)

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLANS = ("image", "video")
"""The branch of ``model`` that is no part of it: it has no weights."""


@dataclass
class Export:
    """What an export did."""

    family: str
    tensors: int = 0
    bytes: int = 0
    files: int = 0
    carried: int = 0
    constants: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """Keys of the model in which the written config.json differs from the original one."""
    vanished: int = 0
    """Values that are too small for the number type asked for, and became 0."""
    trained: list[str] = field(default_factory=list)
    """Small files that say what was trained here, instead of what came along."""
    unsaid: list[str] = field(default_factory=list)
    """Keys of the recipe that no file of the family has a place for."""
    untouched: bool = False
    """No step was taken here: the small files are those that the weights came with."""
    verified: bool = False

    def lines(self) -> list[str]:
        """Return the report for people."""
        lines = [f"family: {self.family}"]
        if self.changed:
            lines.append(f"config.json: written anew for {', '.join(self.changed)}")
        lines += [f"as trained here: {line}" for line in self.trained]
        lines += [f"the family cannot say: {line}" for line in self.unsaid]
        if self.untouched:
            lines.append(
                "not trained here: chat template, stop ids and preprocessor are those that the weights came with"
            )
        if self.carried:
            lines.append(f"carried: {self.carried} tensors that training does not touch, as they came")
        if self.constants:
            lines.append(f"without an effect, written for the loader: {', '.join(self.constants)}")
        if self.vanished:
            lines.append(f"too small for the number type asked for: {self.vanished:,} values became 0; bf16 keeps them")
        state = "read back and bit-identical" if self.verified else "not read back (--no-verify, or another --dtype)"
        lines.append(f"{self.tensors} tensors, {self.bytes / 2**30:.2f} GiB in {self.files} files: {state}")
        return lines


def export(
    checkpoint: Path,
    out: Path,
    *,
    family_name: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = True,
    base: Path | None = None,
    names: str | None = None,
) -> Export:
    """Write a Hugging Face directory.

    Args:
        checkpoint: a published checkpoint.
        out: directory to write; it must not exist, or be empty.
        family_name: family to write; None for the one that the weights came from, or the first that fits.
        dtype: number type to convert to; None keeps each tensor's.
        shard_bytes: largest size of a file.
        verify: check the shards by the manifest, turn each tensor back, and read what was written from the disk.
        base: where the base of adapters may lie if it has been moved.
        names: naming of the tensors, one of the family's ``styles``; None for the one that the weights came with.

    Raises:
        UserError: the checkpoint is damaged or of another model, or no family can hold it.
    """
    record = assets.read_record(checkpoint)
    branches = model_branches(checkpoint, record)
    model = make_model(branches, str(checkpoint))
    name = family_name or record.get("family") or record.get("home")
    came = FAMILIES.get(str(name))
    if family_name is None and came is not None and came.with_tower_trained and tower_learnt(checkpoint, base):
        name = came.with_tower_trained  # the tower that is named elsewhere is not this one any more
    family = choose_family(name, model, [part for part in MODULES if part in branches], asked=family_name is not None)
    check_tower_kept(checkpoint, family, base)
    original = record.get("family") == family.name
    came_with = record["style"] if original and record.get("style") in family.styles else family.style_for(model)
    style = _checked_style(names or came_with, family, came_with)
    model = without_slot(checkpoint, family, model, record, template_name(checkpoint), original=original)
    kin = None if original else kin_of(checkpoint, family, model, record)
    reader = open_reader(checkpoint, base)
    result = Export(f"{family.name} ({family.title})")
    with alone():
        rules = make_rules(family, model, style, family_slots(family, model))
        rules.sort(key=lambda rule: -number_type(rule, reader, dtype).itemsize)  # the larger first: all stay aligned
        extra = _extra(checkpoint, family, model, came_with, result, kin, original=original, dtype=dtype)
        if style != came_with:
            extra = _renamed(extra, family.styles[came_with], family.styles[style])
        entries = [e for rule in rules for e in rule_entries(rule, number_type(rule, reader, dtype))]
        others = [Entry(name, tuple(t.shape), t.dtype) for name, t in extra.items()]
        # In front: MiniGemini's code opens only the first file for its towers. All must stay aligned.
        first = all(one.dtype.itemsize >= entries[0].dtype.itemsize for one in others) if entries else True
        entries = others + entries if first else entries + others
        result.tensors, result.bytes = len(entries), sum(entry.nbytes for entry in entries)
        if verify:
            check_contents(reader)
        with publishing(out, needed_bytes=result.bytes) as partial:
            checked = verify and dtype is None
            early = checked and family.pickle is None and not family.pickles  # torch.save's is read back as such
            with ReadBack() if early else contextlib.nullcontext() as read_back:
                writer = FolderedWriter(partial, entries, shard_bytes, read_back)
                pieces = [RuleToWrite(rule, reader, dtype, checked=early) for rule in rules]
                with contextlib.closing(ReadAhead(pieces)) as ahead:
                    learnt = (pair for piece in pieces for pair in zip(piece.names, ahead.read(piece), strict=True))
                    both = (extra.items(), learnt) if first else (learnt, extra.items())
                    _write_all(writer, itertools.chain(*both), result.bytes)
            result.vanished = sum(piece.vanished for piece in pieces)
            files = write_pickle(partial, family.pickle) if family.pickle is not None else writer.files
            result.files = files + write_pieces(partial, family, model)
            _write_assets(checkpoint, partial, family, model, record, result, kin, original=original)
            _write_meaning(checkpoint, partial, family, model, result, original=original)
            _write_dtype(partial / family.text_folder, entries, record)
            source = Source(partial, _feature_layer(record, family, model, original=original))
            left = _differences(family, source, model)
            assert not left, f"the written config.json gives another model: {left}"
            if checked and not early:
                _verify(source, rules, reader, result.bytes)
            result.verified = checked
    return result


def _checked_style(style: str, family: Family, came_with: str) -> str:
    """Return a naming of the family's tensors.

    Raises:
        UserError: it has no such.
    """
    if style not in family.styles:
        known = ", ".join(family.styles) if len(family.styles) > 1 else f"{came_with} alone"
        raise UserError(f"--names {style}: the tensors of {family.title} are named as {known}")
    return style


def _write_all(writer: FolderedWriter, tensors: Iterable[tuple[str, Tensor]], size: int) -> None:
    """Write tensors as they come, ``size`` bytes together, and end the last file."""
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
            for name, tensor in tensors:
                writer.put(name, tensor, bar.update)
        writer.close()
    finally:
        writer.abort()


def model_branches(checkpoint: Path, record: Mapping[str, Any]) -> dict[str, Tree]:
    """Return the branches of the model that a checkpoint holds, and what becomes of pictures and films (:data:`PLANS`).

    Raises:
        UserError: it has neither a recipe nor a record.
    """
    recipe = checkpoint / "recipe.yaml"
    if recipe.is_file():
        model = read_tree(checkpoint).get("model")
        where: Path = recipe
    elif "model" in record:
        model, where = model_with_defaults(record["model"]), checkpoint / assets.FOLDER / assets.RECORD
    else:
        raise UserError(
            f"{checkpoint}: has neither a recipe.yaml nor a record of a conversion; is it a checkpoint of ours?"
        )
    branches = {name: model[name] for name in (*MODULES, *PLANS) if name in model} if isinstance(model, dict) else {}
    if not branches or not all(isinstance(branch, dict) for branch in branches.values()):
        raise UserError(f"{where}: has no model; restore the file")
    return branches


_NEAREST = 3
"""Families that a refusal names."""


def choose_family(name: str | None, model: ModelConfig, parts: Sequence[str], *, asked: bool) -> Family:
    """Return the family to write.

    Raises:
        UserError: the one asked for cannot hold the model, or none can.
    """
    if name is not None:
        if name not in FAMILIES:
            raise UserError(f"--family {name}: there are {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        missing = [part for part in family.parts if part not in parts]
        reason = f"the checkpoint has no {' and no '.join(missing)}" if missing else family.refusal(model)
        if reason is None:
            return family
        if asked:
            raise UserError(f"--family {name}: {reason}")
    whole = [family for family in FAMILIES.values() if set(family.parts) == set(parts)]
    fitting = [family for family in whole if family.refusal(model) is None]
    if fitting and name is None:
        return fitting[0]
    if fitting and name is not None:
        others = " or ".join(f"--family {family.name}" for family in fitting)
        raise UserError(
            f"the weights came as {name}, which cannot hold the model as it is now ({FAMILIES[name].refusal(model)}); "
            f"another that can is written if you ask for it: {others}"
        )
    raise UserError(_none_fits(name, whole, model, parts))


def _none_fits(name: str | None, whole: Sequence[Family], model: ModelConfig, parts: Sequence[str]) -> str:
    """Return why no family holds a model, by those that come nearest, and which hold its parts.

    The one that the weights came as is first. Of the others those are nearest that least rules out: an architecture
    counts more than anything else, and a rule of the family's own is asked last, when all else fits.
    """

    def distance(family: Family) -> tuple[bool, int, int]:
        return family.name != name, len(family.other_architectures(model)), len(family.early_refusals(model))

    nearest = sorted(whole, key=distance)
    said = [f"{family.name}: {family.refusal(model)}" for family in nearest[:_NEAREST]]
    others = len(nearest) - len(said)
    if others > 0:
        said.append(f"and {others} others, of which --family NAME says why")
    single = [family for family in FAMILIES.values() if len(family.parts) == 1 and family.parts[0] in parts]
    able = [family.name for family in single if family.refusal(model) is None]
    return f"no Hugging Face family holds this model whole ({'; '.join(said) or 'none has ' + ' and '.join(parts)})" + (
        f"; export its parts with --family {' or '.join(able)}" if able else "; nor one of its parts"
    )


def _extra(
    checkpoint: Path,
    family: Family,
    model: ModelConfig,
    style: str,
    result: Export,
    kin: Kin | None,
    *,
    original: bool,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return tensors that are no parameters: carried ones where they are at hand, else constants."""
    carried = checkpoint / assets.FOLDER / assets.CARRIED
    if original and carried.is_dir():
        source = Source(carried)
        result.carried = len(source.tensors)
        tensors = {name: source.get(name) for name in source.tensors}
    elif original:
        return {}
    elif kin is not None:
        tensors, prefix = {}, family.styles[style]["tower"]
        if carried.is_dir():
            kept = Source(carried)
            there = [name for name in kept.tensors if name.startswith(kin.prefix)]
            tensors = {prefix + name.removeprefix(kin.prefix): kept.get(name) for name in there}
        result.carried = len(tensors)
    else:
        constants = family.constants(model, style)
        result.constants = list(constants)
        tensors = {name: torch.full(shape, value) for name, (shape, value) in constants.items()}
    if dtype is not None:
        tensors = {name: narrowed(t, dtype, f"--dtype: {name}") for name, t in tensors.items()}
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _renamed(tensors: Mapping[str, Tensor], came: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, Tensor]:
    """Return tensors under another naming, by what their names begin with; the longest beginning is meant."""
    starts = sorted(came, key=lambda key: -len(came[key]))
    found = {}
    for name, tensor in tensors.items():
        key = next((key for key in starts if name.startswith(came[key])), None)
        found[name if key is None else wanted[key] + name.removeprefix(came[key])] = tensor
    return found


def _write_assets(
    checkpoint: Path,
    partial: Path,
    family: Family,
    model: ModelConfig,
    record: Mapping[str, Any],
    result: Export,
    kin: Kin | None,
    *,
    original: bool,
) -> None:
    """Write configuration and tokenizer files; a part that is one file has none."""
    if family.pickle is not None:
        return
    folder = checkpoint / assets.FOLDER
    files = [path for path in assets.small_files(folder) if path.name != assets.RECORD] if folder.is_dir() else []
    if not original:  # what is said of pictures there is said of another model's
        theirs = {CONFIG, PREPROCESSOR, PROCESSOR, *(name for one in FAMILIES.values() for name in one.own_files)}
        files = [path for path in files if path.name not in theirs]
    assets.copy_files(files, partial / family.text_folder)
    if original:
        assets.copy_folders(folder, partial)
    tokens = _tokens(checkpoint, record, folder)
    if not original:
        config = family.config(model, tokens)
        _write_config(partial, family, {}, family.with_tower(config, *kin.tower) if kin is not None else config)
        return
    source = Source(partial, _feature_layer(record, family, model, original=original))
    result.changed = _differences(family, source, model)
    if result.changed:
        path = partial / family.text_folder / CONFIG
        old = read_json(path) if path.is_file() else {}
        kept = {key: old[key] for key in family.kept_keys if key in old}
        _write_config(partial, family, old, {**family.config(model, tokens), **kept})


def _write_meaning(
    checkpoint: Path, partial: Path, family: Family, model: ModelConfig, result: Export, *, original: bool
) -> None:
    """Write what the small files say after a training; without one they say what they said."""
    changed = dict(family.tower_keys) if "vision" in family.parts and tower_learnt(checkpoint) else {}
    pictures = family.pictures_of(model) if was_trained(checkpoint) else {}
    files = {name: keys for name, keys in pictures.items() if name.endswith(".json") and (partial / name).is_file()}
    changed |= {key: value for key, value in pictures.items() if not key.endswith(".json")}
    for name, keys in {CONFIG: changed, **files}.items():
        if keys:
            text = json.dumps(read_json(partial / name) | keys, indent=2, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
    whole = {"vision", "language"} <= {*family.parts}
    if was_trained(checkpoint) or (whole and family.preprocesses and not original):
        template = template_name(checkpoint)
        result.trained = write_trained(
            partial / family.text_folder, family, model, template, _system_message(checkpoint)
        )
        if family.tower_folder is not None:
            result.trained += write_pixels(partial / family.tower_folder, family, model)
        result.unsaid = family.unsaid(model, template) + _alpha(checkpoint, family) + unsaid_films(model)
        return
    if "language" in family.parts and original:
        result.untouched = True
    if family.tower_folder is not None and not original:
        result.trained = write_pixels(partial / family.tower_folder, family, model)
    if "vision" in family.parts and family.preprocesses:
        lacking = not original and not (partial / PREPROCESSOR).is_file() and not (partial / PROCESSOR).is_file()
        if lacking or "model.vision.image_size" in result.changed:
            result.trained = write_pixels(partial, family, model)


def _alpha(checkpoint: Path, family: Family) -> list[str]:
    """Return the line on what published processors do not do with pictures that are transparent in places."""
    data = (read_tree(checkpoint).get("data") if (checkpoint / "recipe.yaml").is_file() else None) or {}
    if "vision" not in family.parts or data.get("image_alpha", DataConfig.image_alpha) == "drop":
        return []
    return ["data.image_alpha: white was trained; Transformers shows what lies under transparent pixels, as drop does"]


def template_name(checkpoint: Path) -> str:
    """Return what a checkpoint's recipe calls its template; one that is older than the key was Qwen-VL's."""
    model = (read_tree(checkpoint).get("model") if (checkpoint / "recipe.yaml").is_file() else None) or {}
    return str(model.get("template", ModelConfig.template))


def _system_message(checkpoint: Path) -> str | None:
    """Return what conversations without a system turn were trained with; None for the template's own."""
    data = (read_tree(checkpoint).get("data") if (checkpoint / "recipe.yaml").is_file() else None) or {}
    message = data.get("system_message", DataConfig.system_message)
    return None if message is None else str(message)


def _feature_layer(record: Mapping[str, Any], family: Family, model: ModelConfig, *, original: bool) -> FeatureLayer:
    """Return the layer whose features a tower alone gives."""
    return record.get("feature_layer") or -2 if original else family.feature_layer(model)


def _tokens(checkpoint: Path, record: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Return the ids of ``image`` and ``image_start``."""
    if record.get("tokens"):
        return dict(record["tokens"])
    path = find_tokenizer(folder) if folder.is_dir() else None
    if path is None:
        return {}
    tokenizer: Tokenizer = load_tokenizer(path, template_of(template_name(checkpoint), path))
    return image_tokens(tokenizer)


def _write_config(partial: Path, family: Family, old: Tree, new: Tree) -> None:
    """Write ``config.json``, what is new over what was there; the tower's own settings go into their file."""
    for name in [name for name in new if name.endswith(".json")]:
        path = partial / name
        there = read_json(path) if path.parent != partial and path.is_file() else {}
        path.write_text(json.dumps(_merge(there, new[name]), indent=2) + "\n", encoding="utf-8")
    own = {key: value for key, value in new.items() if not key.endswith(".json")}
    if own:
        text = json.dumps(_merge(old, own), indent=2, ensure_ascii=False) + "\n"
        (partial / family.text_folder / CONFIG).write_text(text, encoding="utf-8")


def _write_dtype(partial: Path, entries: Sequence[Entry], record: Mapping[str, Any]) -> None:
    """Name the number type in ``config.json``, unless it is what the weights came with."""
    path = partial / CONFIG
    types = [str(entry.dtype).removeprefix("torch.") for entry in entries]
    main = max(set(types), key=types.count)
    if not path.is_file() or (record.get("dtype") == main and record.get("family") is not None):
        return
    config = read_json(path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    path.write_text(
        json.dumps(config | dict.fromkeys(keys, main), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _merge(old: Tree, new: Tree) -> Tree:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both else value
    return merged


def _differences(family: Family, source: Source, model: ModelConfig) -> list[str]:
    """Return the keys in which the model of a written directory differs from the checkpoint's."""
    try:
        branches = family.branches(source)
    except UserError as error:
        return [str(error)]
    tree = to_tree(model)
    written = make_model({**{part: tree[part] for part in BRANCHES}, **branches}, str(source.path))
    return [key for part in family.parts for key in differing(part, model, written)]


def _verify(source: Source, rules: Sequence[Rule], reader: CheckpointReader, total: int) -> None:
    """Read the written files and compare what they say in canonical form with the checkpoint, bit for bit.

    Raises:
        RuntimeError: something differs: the disk lied, or there is a bug here.
    """
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=None) as bar:
        for rule in rules:
            back = rule.to_ours([source.get(name) for name in rule.row.theirs])
            for slot, ours in zip(rule.slots, back, strict=True):
                if not same_bits(ours, reader.read(slot)):
                    raise RuntimeError(f"{slot.key}: what was written differs from the checkpoint")
                bar.update(ours.nbytes)
