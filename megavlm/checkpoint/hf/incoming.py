"""Hugging Face checkpoints to a Megatron distributed checkpoint that any layout loads."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megavlm import __version__
from megavlm.architectures.context import BuildContext
from megavlm.checkpoint import assets
from megavlm.checkpoint.finite import check_finite
from megavlm.checkpoint.hf.accounting import Account, check_source
from megavlm.checkpoint.hf.given import SourceOfParts, Understood, make_model, understand
from megavlm.checkpoint.hf.recipe import converted_recipe
from megavlm.checkpoint.hf.shapes import Rule, Tree, alone, family_slots, make_rules, same_bits
from megavlm.checkpoint.hf.sink import Entry, ShardedWriter
from megavlm.checkpoint.placement import expert_biases
from megavlm.checkpoint.publish import publishing
from megavlm.checkpoint.readback import ReadBack
from megavlm.checkpoint.slots import Slot, build_part, find_slots
from megavlm.checkpoint.stream import CheckpointReader, ParameterToWrite, write_checkpoint
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.models.build import MODULES
from megavlm.weights.source import Source

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What a conversion did."""

    parts: dict[str, str]
    """Where each part comes from."""
    tensors: int = 0
    bytes: int = 0
    ignored: dict[str, list[str]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    """What was initialised rather than converted."""
    notes: list[str] = field(default_factory=list)
    """What is otherwise here than the source's own files say."""
    verified: bool = False

    def lines(self) -> list[str]:
        """Return the report for people."""
        lines = [f"{part}: {origin}" for part, origin in self.parts.items()]
        lines += [f"initialised: {what}" for what in self.fresh]
        lines += [f"ignored: {len(names)} x {why} ({names[0]})" for why, names in self.ignored.items()]
        if self.carried:
            lines.append(f"carried beside the model: {len(self.carried)} tensors ({self.carried[0]})")
        lines += [f"note: {note}" for note in self.notes]
        state = "read back and bit-identical" if self.verified else "not read back (--no-verify)"
        lines.append(f"{self.tensors} tensors, {self.bytes / 2**30:.2f} GiB: {state}")
        return lines


def convert(
    given: Sequence[SourceOfParts],
    out: Path,
    *,
    seed: int,
    fresh: Mapping[str, Tree],
    base: Tree | None,
    verify: bool,
    home: str | None = None,
) -> Report:
    """Convert whole or composed checkpoints.

    Args:
        given: sources; no part may be given twice.
        out: directory to write; it must not exist, or be empty.
        seed: of the parts that are initialised.
        fresh: branches of the parts that are initialised.
        base: raw recipe whose other branches the converted recipe takes; None for defaults.
        verify: turn each tensor back and compare it, and read all that was written back from the disk.
        home: family that an export of a composed model is written in unless another is asked for.

    Raises:
        UserError: the sources are wrong, or do not fit together.
    """
    found = understand(given, fresh, home)
    branches, model, parts, where = found.branches, found.model, found.parts, found.where
    report = Report(dict.fromkeys(fresh, "initialised"), fresh=found.fresh, notes=found.notes)
    recipe = None
    dtype = _dtype(given)
    if len(parts) == len(MODULES):
        recipe = converted_recipe(model, out, base, dtype, where)
    with alone(seed):
        slots = find_slots(model, parts)
        plans = [_MatchedSource(one, branches, slots, checked=verify) for one in given]
        pieces = [piece for plan in plans for piece in plan.pieces]
        for part in fresh:
            pieces += _initialise(part, model, slots, dtype, report)
        report.tensors = sum(len(plan.taken) for plan in plans)
        total = sum(torch.Size(piece.slot.shape).numel() * piece.dtype.itemsize for piece in pieces)
        report.bytes = total
        for plan in plans:
            plan.tell(report, whole=plan.given is given[0] and _comes_home(given, parts, home))
        with publishing(out, needed_bytes=total) as partial:
            with (
                tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None) as bar,
                ReadBack() if verify else contextlib.nullcontext() as read_back,
            ):
                write_checkpoint(partial, pieces, bar.update, read_back)
            _write_rest(partial, given, plans, found, recipe, report, home, dtype)
            if read_back is not None:
                _check_index(partial, pieces)
                assert read_back.bytes == total, f"{read_back.bytes} of {total} bytes were compared"
                report.verified = True
    return report


class _MatchedSource:
    """One source held against its family's rules, and the pieces that are taken from it."""

    def __init__(self, given: SourceOfParts, branches: Tree, slots: Mapping[str, Slot], *, checked: bool) -> None:
        self.given, self.checked = given, checked
        self._last: tuple[Rule, list[Tensor]] | None = None
        source, family = given.source, given.family
        own_model = make_model({**branches, **given.branches}, str(source.path))
        own_slots = family_slots(family, own_model)
        rules = make_rules(family, own_model, given.style, own_slots)
        self.account: Account = check_source(source, family, given.style, own_model, rules)
        self.rules: list[Rule] = [rule for rule in rules if rule.part in given.parts]
        self.taken = [name for rule in self.rules for name in rule.row.theirs]
        self.left = sorted(set(self.account.used) - set(self.taken))
        self.pieces = [piece for rule in self.rules for piece in self._pieces(rule, slots)]

    def tell(self, report: Report, *, whole: bool) -> None:
        """Add to the report; of a composed model nothing is carried."""
        family = self.given.family
        for part in self.given.parts:
            report.parts[part] = f"{self.given.source.path} ({family.title})"
        for why, names in self.account.ignored.items():
            report.ignored.setdefault(why, []).extend(names)
        if self.left:
            other = " and ".join(part for part in family.parts if part not in self.given.parts)
            report.ignored.setdefault(f"{other} of {self.given.source.path}, which is not asked for", []).extend(
                self.left
            )
        if whole:
            report.carried += self.account.carried
        elif self.account.carried:
            report.ignored.setdefault("belongs to what is not taken", []).extend(self.account.carried)

    def read(self, rule: Rule) -> list[Tensor]:
        """Return Hugging Face's tensors of a rule."""
        return [self.given.source.get(name) for name in rule.row.theirs]

    def _pieces(self, rule: Rule, slots: Mapping[str, Slot]) -> list[ParameterToWrite]:
        pieces = []
        dtype = self.given.source.tensors[rule.row.theirs[0]].dtype
        assert isinstance(dtype, torch.dtype)
        for i, name in enumerate(rule.row.ours):
            slot, own = slots[name], rule.slots[i]
            if slot.shape != own.shape and not (slot.vocabulary and slot.shape[1:] == own.shape[1:]):
                raise UserError(
                    f"{self.given.source.path}: {' and '.join(rule.row.theirs)} is made for another model: it gives "
                    f"{name} the shape {list(own.shape)}, the other parts ask for {list(slot.shape)}"
                )
            pieces.append(ParameterToWrite(slot, dtype, self._reader(rule, i, slot)))
        return pieces

    def _reader(self, rule: Rule, index: int, slot: Slot) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = self._ours(rule)[index]
            return _grown(tensor, slot) if tuple(tensor.shape) != slot.shape else tensor

        return read

    def _ours(self, rule: Rule) -> list[Tensor]:
        """Return the canonical tensors of a rule, checked once; those of several are asked for one after the other."""
        if self._last is not None and self._last[0] is rule:
            return self._last[1]
        self._last = None
        theirs = self.read(rule)
        for name, one in zip(rule.row.theirs, theirs, strict=True):
            check_finite(one, f"{self.given.source.path}: {name}")
        ours = rule.to_ours(theirs)
        if self.checked:
            for name, back, there in zip(rule.row.theirs, rule.to_theirs(ours), theirs, strict=True):
                if not same_bits(back, there):
                    raise RuntimeError(f"{name}: what is written, turned back, differs from its source")
        if len(ours) > 1:  # all experts of a layer, say: views of what is mapped
            self._last = rule, ours
        return ours


_NEW_ROWS_STD = 0.02


def _grown(tensor: Tensor, slot: Slot) -> Tensor:
    """Append rows to an embedding, the same for the same slot."""
    generator = torch.Generator().manual_seed(slot.shape[0])
    rows = torch.randn(slot.shape[0] - tensor.size(0), *slot.shape[1:], generator=generator) * _NEW_ROWS_STD
    return torch.cat([tensor, rows.to(tensor.dtype)])


def _dtype(given: Sequence[SourceOfParts]) -> torch.dtype:
    """Return the type of the language model's weights, or of any others."""
    order = sorted(given, key=lambda one: "language" not in one.parts)
    types = [info.dtype for info in order[0].source.tensors.values() if isinstance(info.dtype, torch.dtype)]
    return max(set(types), key=types.count) if types else torch.float32


def _initialise(
    part: str, model: ModelConfig, slots: Mapping[str, Slot], dtype: torch.dtype, report: Report
) -> list[ParameterToWrite]:
    """Build a part with its initial weights and return them."""
    module = build_part(part, model, BuildContext(ParallelConfig(), dtype=dtype))
    state = {f"{part}.{name}": value.detach().cpu() for name, value in module.named_parameters()}
    count = sum(value.numel() for value in state.values())
    state |= {f"{part}.{name}": value for name, value in expert_biases(module)}
    own = {name: slot for name, slot in slots.items() if name.split(".", 1)[0] == part}
    assert set(own) == set(state), sorted(set(own) ^ set(state))
    report.fresh.append(f"{part}: {getattr(model, part).preset}, {count:,} parameters")

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: state[name][: own[name].shape[0]] if own[name].vocabulary else state[name]

    return [ParameterToWrite(slot, state[name].dtype, reader(name)) for name, slot in own.items()]


def _write_rest(
    partial: Path,
    given: Sequence[SourceOfParts],
    plans: Sequence[_MatchedSource],
    found: Understood,
    recipe: str | None,
    report: Report,
    home: str | None,
    dtype: torch.dtype,
) -> None:
    """Write what a checkpoint has beside its tensors."""
    one = given[0]
    whole = _comes_home(given, found.parts, home)
    if whole:
        for name, directory in one.source.folders.items():
            assets.copy_files(assets.small_files(directory), partial / assets.FOLDER / name)
        for name, tree in one.family.extra_files(one.source).items():
            (partial / assets.FOLDER / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        if report.carried:
            _write_carried(partial / assets.FOLDER / assets.CARRIED, one.source, report.carried)
    elif found.tokenizer is not None:
        assets.copy_files(assets.tokenizer_files(found.tokenizer.parent), partial / assets.FOLDER)
    record = {
        "family": one.family.name if whole else None,
        "style": one.style if whole else None,
        "home": home,
        "rows": found.rows,
        "dtype": str(dtype).removeprefix("torch."),
        "parts": found.parts,
        "feature_layer": one.source.feature_layer if whole else None,
        "tokens": next((t for g in given if "language" in g.parts for t in [g.family.tokens(g.source)]), {}),
        "model": {name: found.branches[name] for name in (*found.parts, "image", "video") if name in found.branches},
        "origin": report.parts,
        "initialised": report.fresh,
        "ignored": report.ignored,
        "carried": report.carried,
        "megavlm": __version__,
    }
    assets.write_record(partial, record)
    if recipe is not None:
        (partial / "recipe.yaml").write_text(recipe, encoding="utf-8")
    run: dict[str, Any] = {"step": 0, "megavlm": __version__, "converted_from": report.parts}
    (partial / "run.json").write_text(json.dumps(run, indent=2), encoding="utf-8")


def _comes_home(given: Sequence[SourceOfParts], parts: Sequence[str], home: str | None) -> bool:
    """Whether an export gives back what came in: one checkpoint taken whole, or one whose tower is apart."""
    one = given[0]
    if {part for each in given for part in each.parts} != set(parts):
        return False  # some were initialised
    return one.parts == tuple(one.family.parts) and (len(given) == 1 or one.family.name == home)


def _write_carried(directory: Path, source: Source, names: Sequence[str]) -> None:
    directory.mkdir(parents=True)
    entries = []
    for name in names:
        info = source.tensors[name]
        if not isinstance(info.dtype, torch.dtype):
            raise UserError(f"{source.path}: {name} is of type {info.dtype}; only floating point is converted")
        entries.append(Entry(name, info.shape, info.dtype))
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    writer = ShardedWriter(directory, entries)
    try:
        for entry in entries:
            tensor = source.get(entry.name)
            check_finite(tensor, f"{source.path}: {entry.name}")
            writer.put(entry.name, tensor)
        writer.close()
    finally:
        writer.abort()


def _check_index(checkpoint: Path, pieces: Sequence[ParameterToWrite]) -> None:
    """Check that every parameter is found again under its name, type and shape; its numbers were compared already.

    Raises:
        RuntimeError, UserError: there is a bug here.
    """
    reader = CheckpointReader(checkpoint)
    for piece in pieces:
        reader.check(piece.slot)
        if reader.dtype(piece.slot) is not piece.dtype:
            raise RuntimeError(f"{piece.slot.key}: what was written differs from what was to be")
