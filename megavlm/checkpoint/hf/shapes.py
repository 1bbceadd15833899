"""From a family's branches to a checked model, its slots, and the rules with the shapes they imply."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.slots import Slot, find_slots
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.families.family import Family
from megavlm.models.build import MODULES
from megavlm.parallel.state import process_groups
from megavlm.weights.rules import Aside, Heads, Row

Tree = dict[str, Any]


@contextlib.contextmanager
def alone(seed: int = 0) -> Iterator[None]:
    """Have process groups of one process, whatever launched it."""
    with process_groups(ParallelConfig(), seed):
        yield


@dataclass(frozen=True)
class Rule:
    """A row for one model: names, canonical slots, and the shapes that Hugging Face's tensors have."""

    part: str
    row: Row
    slots: tuple[Slot, ...]
    heads: Heads
    shapes: tuple[tuple[int, ...], ...]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the canonical tensors."""
        return list(self.row.reshape.to_ours(tensors, self.heads))

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return Hugging Face's tensors."""
        return list(self.row.reshape.to_theirs(tensors, self.heads))


def make_rules(
    family: Family, model: ModelConfig, style: str, slots: Mapping[str, Slot], parts: Sequence[str] | None = None
) -> list[Rule]:
    """Return every rule of a family for a model, or those of some of its parts."""
    rules = []
    for part, row in family.rules(model, style, slots, family.parts if parts is None else parts):
        own = tuple(slots[name] for name in row.ours)
        heads = Heads.of(part, model, row.ours[0])
        theirs = row.reshape.to_theirs([torch.empty(slot.shape, device="meta") for slot in own], heads)
        rules.append(Rule(part, row, own, heads, tuple(tuple(t.shape) for t in theirs)))
    return rules


def family_slots(family: Family, model: ModelConfig) -> dict[str, Slot]:
    """Return the slots of a family's parts, in the order of the model."""
    return find_slots(model, [part for part in MODULES if part in family.parts])


def find_aside(asides: Sequence[Aside], name: str) -> Aside | None:
    """Return the first aside that is about ``name``."""
    return next((aside for aside in asides if aside.takes(name)), None)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits (NaNs included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True  # the same memory
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
