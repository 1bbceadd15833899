"""Recognises what older versions of megavlm saved wrongly, in checkpoints without the mark of a proven save.

* Behind a padded gradient bucket, the distributed optimizer's masters and moments were stored under shifted offsets
  (:mod:`.optimizer_state`). The weights are whole; masters that do not round to them give it away.
* Of parallel layers in a plain container, one tensor-parallel rank's part was stored as the whole (:mod:`.containers`).
  The rest is lost; shapes give it away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megavlm.checkpoint.base import holds_adapters
from megavlm.checkpoint.lost import other_shape, weights_are_rounded
from megavlm.checkpoint.manifest import is_proven
from megavlm.checkpoint.optimizer_state import MASTERS, MOMENTS, STATE, master_name
from megavlm.checkpoint.placement import Part
from megavlm.checkpoint.slots import find_slots
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.config.errors import UserError


def check_shapes(checkpoint: Path, metadata: Metadata, wanted: Iterable[tuple[Part, bool]]) -> None:
    """Compare the shapes in a checkpoint with the model's own.

    Args:
        checkpoint: where it is.
        metadata: its index.
        wanted: parts of what is to be loaded, and whether other lengths are allowed (vocabularies are padded).

    Raises:
        UserError: the first that differs, and whether that is a loss or another model.
    """
    for part, padded in wanted:
        entry = metadata.state_dict_metadata.get(part.key)
        if isinstance(entry, TensorStorageMetadata) and not padded and tuple(entry.size) != part.whole:
            raise UserError(other_shape(checkpoint, part.key, tuple(entry.size), part.whole))


def check_state(checkpoint: Path, share: int = 0, shares: int = 1) -> None:
    """Refuse an optimizer state that is not that of the weights; a proven checkpoint is not asked.

    Args:
        checkpoint: where it is.
        share: which share of the tensors to compare.
        shares: how many shares there are; ranks compare one each.

    Raises:
        UserError: saying that weights alone can be taken, and how.
    """
    if is_proven(checkpoint) or weights_are_rounded(checkpoint):
        return
    shifted = list(_shifted(CheckpointReader(checkpoint), share, shares))
    if shifted:
        rest = f" and {len(shifted) - 1} more" if len(shifted) > 1 else ""
        raise UserError(
            f"{checkpoint}: its optimizer state is shifted: {shifted[0]}{rest} are not the masters of their weights "
            "(an older version counted the padding of gradient buckets); its weights are whole: start from them, with "
            f"a new optimizer state, by checkpoint.load={checkpoint} and another output_dir"
        )


def _shifted(reader: CheckpointReader, share: int, shares: int) -> Iterator[str]:
    tensors = reader.tensors()
    name = master_name(tensors)
    if name is None:
        return
    prefix = f"{STATE}{name}."
    pairs = sorted((key, key.removeprefix(prefix)) for key in tensors if key.startswith(prefix))
    for key, weight in pairs[share::shares]:
        if weight in tensors and not _same(reader, key, weight):
            yield key


def _same(reader: CheckpointReader, master: str, weight: str) -> bool:
    there = reader.tensors()[weight]
    for chunk in reader.tensors()[master].chunks:
        ours = reader.read_region(master, chunk.offsets, chunk.sizes)
        theirs = reader.read_region(weight, chunk.offsets, chunk.sizes)
        if not torch.equal(ours.to(there.properties.dtype), theirs):
            return False
    return True


def examine(checkpoint: Path, *, values: bool = True) -> None:
    """Look for all of it in a checkpoint of a run; process groups of one process must be up.

    Args:
        checkpoint: where it is.
        values: also compare masters with weights, which reads both.

    Raises:
        UserError: the first damage.
    """
    from megavlm.checkpoint.merged import recipe_branches  # noqa: PLC0415 - it reads recipes

    if is_proven(checkpoint):
        return
    model, lora = recipe_branches(checkpoint)
    tensors = CheckpointReader(checkpoint).tensors()
    for slot in find_slots(model, lora=lora).values():
        for key in (slot.key, *(f"{STATE}{name}.{slot.key}" for name in (*MASTERS, *MOMENTS))):
            stored = tuple(tensors[key].size) if key in tensors else None
            if stored is None and key == slot.key and not holds_adapters(checkpoint):
                raise UserError(f"{checkpoint}: {key} is lost: it was never written")
            padded = stored is not None and slot.vocabulary and stored[1:] == slot.global_shape[1:]
            if stored is not None and stored != slot.global_shape and not padded:
                raise UserError(other_shape(checkpoint, key, stored, slot.global_shape))
    if values:
        check_state(checkpoint)
