"""What a rule makes of a checkpoint's parameters, to be read while the tensors before are being written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megavlm.checkpoint.finite import check_finite, narrowed, vanished
from megavlm.checkpoint.hf.shapes import Rule, same_bits
from megavlm.checkpoint.hf.sink import Entry
from megavlm.checkpoint.stream import CheckpointReader


class RuleToWrite:
    """The tensors of one rule, in Hugging Face's names and shapes.

    Args:
        rule: which.
        reader: of the checkpoint.
        dtype: number type to convert to; None keeps each tensor's.
        checked: turn them back, and compare with what the checkpoint holds.

    Attributes:
        names: what Hugging Face calls them.
        nbytes: their size in memory.
        vanished: how many values a narrower type made 0, once they are read.
    """

    def __init__(self, rule: Rule, reader: CheckpointReader, dtype: torch.dtype | None, *, checked: bool) -> None:
        self._rule, self._reader, self._dtype, self._checked = rule, reader, dtype, checked
        self.names, self.vanished = rule.row.theirs, 0
        self.nbytes = sum(map(math.prod, rule.shapes)) * reader.dtype(rule.slots[0]).itemsize

    def read(self) -> list[Tensor]:
        """Return them.

        Raises:
            RuntimeError: turned back they are not the checkpoint's, which is a bug.
            UserError: a value is not finite, or the number type has no room for it.
        """
        rule, reader = self._rule, self._reader
        ours = [reader.read(slot) for slot in rule.slots]
        tensors = rule.to_theirs(ours)
        back = rule.to_ours(tensors) if self._checked else ours
        for slot, one, there in zip(rule.slots, back, ours, strict=True):
            if not same_bits(one, there):
                raise RuntimeError(f"{slot.key}: what is written, turned back, differs from the checkpoint")
        for name, tensor in zip(self.names, tensors, strict=True):
            check_finite(tensor, f"{reader.path}: {name}")
        dtype = self._dtype
        if dtype is None:
            return tensors
        cast = [narrowed(tensor, dtype, f"--dtype: {name}") for name, tensor in zip(self.names, tensors, strict=True)]
        self.vanished = sum(map(vanished, tensors, cast))
        return cast


def number_type(rule: Rule, reader: CheckpointReader, dtype: torch.dtype | None) -> torch.dtype:
    """Return the number type in which a rule's tensors are written: ``dtype``, or the checkpoint's."""
    return dtype or reader.dtype(rule.slots[0])


def rule_entries(rule: Rule, dtype: torch.dtype) -> list[Entry]:
    """Return what a rule writes, in order."""
    return [Entry(name, shape, dtype) for name, shape in zip(rule.row.theirs, rule.shapes, strict=True)]
