"""A base and its adapters read as one checkpoint of whole weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from megavlm.architectures.adapters import adapter_of
from megavlm.checkpoint.base import base_of, holds_adapters
from megavlm.checkpoint.derived import write_derived
from megavlm.checkpoint.finite import check_finite, narrowed
from megavlm.checkpoint.manifest import check_shards
from megavlm.checkpoint.paths import read_tree
from megavlm.checkpoint.slots import Slot, find_slots
from megavlm.checkpoint.stream import CheckpointReader, ParameterToWrite
from megavlm.config.errors import UserError
from megavlm.config.fields import from_tree
from megavlm.config.lora import linear_of
from megavlm.config.schema import LoraConfig, ModelConfig


def recipe_branches(checkpoint: Path) -> tuple[ModelConfig, LoraConfig]:
    """Return model and adapters that a checkpoint's recipe describes.

    Raises:
        UserError: it is damaged.
    """
    path = checkpoint / "recipe.yaml"
    tree = read_tree(checkpoint)
    try:
        model = from_tree(ModelConfig, tree["model"])
        return model, from_tree(LoraConfig, tree.get("lora") or {})
    except (ValidationError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged: {str(error).splitlines()[0]}") from None


class MergedReader(CheckpointReader):
    """Reads parameters of a base with what the adapters of a checkpoint add to them.

    The sum is made in fp32 and rounded to the base's number type. Weights that were in 4 bits in training are added to
    what they were quantised from, as PEFT's users do.

    Args:
        checkpoint: one with adapters.
        base: where their base may lie if it has been moved.

    Raises:
        UserError: as :func:`megavlm.checkpoint.base.base_of`.
    """

    def __init__(self, checkpoint: Path, base: Path | None = None) -> None:
        super().__init__(checkpoint)
        self.base = CheckpointReader(base_of(checkpoint, base))
        self.model, self.lora = recipe_branches(checkpoint)

    def dtype(self, slot: Slot) -> torch.dtype:
        """Return the number type of a parameter: the base's."""
        return self.base.dtype(slot)

    def read(self, slot: Slot) -> Tensor:
        """Return a merged parameter.

        Raises:
            UserError: also where a value is not finite, or would not be in the base's number type.
        """
        where = f"{self.path}: {slot.key}"
        if slot.key in self.tensors():
            return narrowed(super().read(slot), self.base.dtype(slot), where)
        weight = self.base.read(slot)
        prefix, linear = slot.key.removesuffix(".weight"), linear_of(slot.key)
        if linear is None or not slot.key.startswith("language.decoder."):
            return weight
        adapter = adapter_of(linear, self.model.language, self.lora)
        if adapter is None:
            return weight
        rows, width = slot.shape
        shapes = {"lora_a": (adapter.rank * adapter.count, width), "lora_b": (adapter.b_rows(rows), adapter.rank)}
        low, up = (
            super(MergedReader, self).read(dataclasses.replace(slot, key=f"{prefix}.{name}", shape=shape)).float()
            for name, shape in shapes.items()
        )
        added = adapter.expand(low.t(), up, rows).t()
        whole = weight.float() + adapter.scale * added
        check_finite(whole, where)
        return narrowed(whole, weight.dtype, where)


def open_reader(checkpoint: Path, base: Path | None = None) -> CheckpointReader:
    """Return a reader of whole weights, merged where ``checkpoint`` holds adapters (for ``base``)."""
    return MergedReader(checkpoint, base) if holds_adapters(checkpoint) else CheckpointReader(checkpoint)


def check_contents(reader: CheckpointReader) -> None:
    """Check that what is read, of adapters their base too, is what was saved, as far as a manifest says so.

    Raises:
        UserError: a file has other contents; the message names it.
    """
    check_shards(reader.path)
    if isinstance(reader, MergedReader):
        check_shards(reader.base.path)


def merge(checkpoint: Path, out: Path, base: Path | None = None) -> int:
    """Write adapters and their base as one checkpoint of whole weights, for any layout.

    Process groups of one process must be up.

    Args:
        checkpoint: one with adapters.
        out: directory to write; it must not exist, or be empty.
        base: where their base may lie if it has been moved.

    Returns:
        The bytes that were written.

    Raises:
        UserError: there are no adapters, or their base is gone.
    """
    if not holds_adapters(checkpoint):
        raise UserError(f"{checkpoint}: has no adapters to merge; its weights are whole")
    reader = MergedReader(checkpoint, base)
    check_contents(reader)
    pieces = [
        ParameterToWrite(slot, reader.dtype(slot), lambda slot=slot: reader.read(slot))  # type: ignore[misc]
        for slot in find_slots(reader.model).values()
    ]
    tree = {key: branch for key, branch in read_tree(checkpoint).items() if key != "lora"}
    return write_derived(checkpoint, out, pieces, tree)
