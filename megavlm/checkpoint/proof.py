"""A save proves itself: what is in the files of a checkpoint is what the ranks had in memory.

1. Before anything is written, every parameter is there, in the model's own shape and place (:mod:`.placement`); so are
   its masters and moments, and Megatron-Core has said nothing about lost or corrupt data.
2. Each rank takes checksums of what it alone knows: of the weights that it writes, and of its own share of masters and
   moments, as the optimizer works on them. They are its claims. Of an asynchronous save a thread takes them, and the
   next update waits for it (:func:`until`): not the passes before it, which change none of this.
3. When a rank has written its files, it reads them back, by the same shares, and compares each master with its weight:
   equal in fp32, equal when rounded in 16 bits. This may happen in a thread.
4. The first rank compares: every claim of any rank is found in a file, and every number in a file is claimed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import mmap
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megavlm.checkpoint import checksum, optimizer_state
from megavlm.checkpoint.optimizer_state import MASTERS, STATE
from megavlm.checkpoint.placement import Part, parts

Place = tuple[str, tuple[int, ...]]
Piece = tuple[str, tuple[int, ...], int, int]
"""Key, offset of a part in the tensor of that key, and a range of the flattened part."""

_LOSS = re.compile(
    r"corrupt|\blost\b|\bloss of data\b|data loss|padded with zeros|\bmissing\b|\btruncat", re.IGNORECASE
)
_STEP = 1 << 22


class ProofError(RuntimeError):
    """A checkpoint would not hold what was to be saved; the message names the tensor."""


@dataclass
class Proof:
    """What is known of one save on one rank.

    Attributes:
        claims: checksums of what this rank has in memory.
        cuts: where another rank has a share of a part that this one writes, by place: how the part is cut.
        rounded: places of weights in FP8, which say little about their masters.
        found: checksums of what this rank finds in its files.
        problems: what is wrong with them.
    """

    claims: dict[Piece, int] = field(default_factory=dict)
    cuts: dict[Place, list[tuple[int, int]]] = field(default_factory=dict)
    rounded: set[Place] = field(default_factory=set)
    found: dict[Piece, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


_OF_A_SHARE = ("param", *optimizer_state.MOMENTS)
"""What a distributed optimizer has of each share."""


class _Seen:
    """Checksums of memory that is the same under two names: in fp32 a master is its weight."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}

    def checksum(self, tensor: Tensor) -> int:
        """Return the checksum of a tensor in one piece."""
        place = tensor.data_ptr(), tensor.nbytes
        if place not in self._known:
            self._known[place] = checksum.checksum(tensor)
        return self._known[place]


@contextlib.contextmanager
def losses_are_errors() -> Iterator[None]:
    """Make an error of what Megatron-Core logs inside the block about lost or corrupt data.

    Raises:
        ProofError: it did; the message holds the first line of it.
    """
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megatron")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    said = next((line for line in heard if _LOSS.search(line)), None)
    if said is not None:
        raise ProofError(f"Megatron-Core says: {said.splitlines()[0]}")


class Witness:
    """Knows a rank's model and optimizer before they are turned into what is written.

    Args:
        state: :func:`megavlm.checkpoint.slots.model_state` of the chunks, with what is saved alone.
        optimizer: Megatron-Core's, or None.
        described: :func:`megavlm.checkpoint.optimizer_state.describe` of it.
    """

    def __init__(self, state: dict[str, Any], optimizer: Any, described: Any) -> None:
        self.optimizer = optimizer
        self.entries = {id(entry.data): entry for chunk in state.values() for entry in chunk.values()}
        self.parts = {name: parts(entry) for name, entry in self.entries.items()}
        self.rounded = {
            part.place
            for name, entry in self.entries.items()
            if is_float8tensor(entry.data)
            for part in self.parts[name]
        }
        self.described: dict[Place, Tensor] = {}
        for entry in nested_values(described or {}):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                self.described[parts(entry)[0].place] = entry.data

    def examine(self, sharded: Any) -> None:
        """Compare the shapes of masters and moments with those of their parameters.

        Args:
            sharded: the tensors that will be written, after Megatron-Core's ``save_preprocess``.

        Raises:
            ProofError: naming the first that differs, or is missing.
        """
        self.tensors = [one for one in nested_values(sharded) if isinstance(one, ShardedTensor)]
        if self.optimizer is None:
            return
        written = {(one.key, tuple(one.global_offset)): one for one in self.tensors if one.key.startswith(STATE)}
        names: dict[int, tuple[str, ...]] = {id(param): _OF_A_SHARE for param in optimizer_state.shares(self.optimizer)}
        for param, _, held in optimizer_state.in_memory(self.optimizer):
            names[id(param)] = tuple(held)
        problems: list[str] = []
        for param_id, wanted in names.items():
            for name, part in ((name, part) for name in wanted for part in self.parts[param_id]):
                key = f"{STATE}{name}.{part.key}"
                problems.extend(_misshapen(written.get((key, part.offset)), key, part))
        raise_first(problems)

    def testify(self) -> Proof:
        """Return this rank's claims, after :meth:`examine`; no collective, and for any thread."""
        proof, seen = Proof(rounded=self.rounded), _Seen()
        for name, entry in self.entries.items():
            if is_main_replica(entry.replica_id) and not is_float8tensor(entry.data):
                self._claim(proof, seen, "", entry, self.parts[name], 0, entry.data.detach().reshape(-1))
        for one in self.tensors:  # weights in FP8 are written in another type
            place = one.key, tuple(one.global_offset)
            if place in self.rounded and is_main_replica(one.replica_id):
                proof.claims[*place, 0, one.data.numel()] = checksum.checksum(one.data)
        if self.optimizer is not None:
            self._testify_of_state(proof, seen)
        return proof

    def _testify_of_state(self, proof: Proof, seen: _Seen) -> None:
        cut = optimizer_state.shares(self.optimizer)
        for param, start, held in optimizer_state.in_memory(self.optimizer):
            entry = self.entries[id(param)]
            replica = entry.replica_id
            if param in cut and isinstance(replica, tuple):
                replica = replica[:-1]  # its copies on other data-parallel ranks have other shares of the state
            if is_main_replica(replica):
                for name, share in held.items():
                    self._claim(proof, seen, f"{STATE}{name}.", entry, self.parts[id(param)], start, share)
        for param, ranges in cut.items():
            for part in self.parts[id(param)]:
                if part.start is not None:
                    inside = [one for bounds in ranges if (one := _inside(part, *bounds))]
                    for name in _OF_A_SHARE:
                        proof.cuts[f"{STATE}{name}.{part.key}", part.offset] = inside

    def _claim(
        self, proof: Proof, seen: _Seen, prefix: str, entry: Any, own: list[Part], start: int, share: Tensor
    ) -> None:
        """Claim numbers of a parameter, or of the part ``prefix`` of its state, from its element ``start`` on."""
        if all(part.start is not None for part in own):
            for part in own:
                bounds = _inside(part, start, start + share.numel())
                if bounds:
                    first = bounds[0] + (part.start or 0) - start
                    values = share[first : first + bounds[1] - bounds[0]]
                    proof.claims[prefix + part.key, part.offset, *bounds] = seen.checksum(values)
            return
        # Parts whose numbers are strewn over the parameter: all of it is claimed, if this rank's share of it is right.
        whole = self.described.get((prefix + own[0].key, own[0].offset)) if prefix else entry.data.detach()
        if whole is None or not torch.equal(whole.reshape(-1)[start : start + share.numel()].cpu(), share.cpu()):
            proof.problems.append(f"{prefix}{entry.key}: is not what this rank has in memory")
            return
        for one in nested_values(dataclasses.replace(entry, key=prefix + entry.key, data=whole).build()):
            proof.claims[one.key, tuple(one.global_offset), 0, one.data.numel()] = checksum.checksum(one.data)


def until(taken: threading.Event, optimizer: Any) -> Callable[[], None]:
    """Let the next update of an optimizer wait until claims are taken; return what ends this."""
    inner = [one.optimizer for one in optimizer_state.each(optimizer)] if optimizer is not None else []
    handles = [one.register_step_pre_hook(lambda *_: taken.wait() and None) for one in inner]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _inside(part: Part, start: int, stop: int) -> tuple[int, int] | None:
    """Return what of a range of a parameter lies in one of its parts, in elements of the part."""
    assert part.start is not None
    count = torch.Size(part.shape).numel()
    low, high = max(start - part.start, 0), min(stop - part.start, count)
    return (low, high) if low < high else None


def _misshapen(one: ShardedTensor | None, key: str, part: Part) -> Iterator[str]:
    if one is None:
        yield f"{key}: would not be in the checkpoint"
    elif (tuple(one.local_shape), tuple(one.global_shape)) != (part.shape, part.whole):
        yield f"{key}: has the shape {list(one.global_shape)} in the checkpoint, but the model's is {list(part.whole)}"


@dataclass(frozen=True)
class _Numbers:
    """Where the numbers of a tensor lie in a file."""

    data: mmap.mmap
    start: int
    dtype: torch.dtype
    count: int

    def read(self, first: int, stop: int) -> Tensor:
        offset = self.start + first * self.dtype.itemsize
        return torch.frombuffer(self.data, dtype=self.dtype, count=stop - first, offset=offset)

    def checksum(self, first: int, stop: int) -> int:
        size = self.dtype.itemsize
        return checksum.checksum_of(self.data, self.start + first * size, (stop - first) * size)


def read_back(proof: Proof, directory: Path, written: Iterable[tuple[Any, Tensor]]) -> None:
    """Take the checksums of what this rank has written, and compare masters with weights.

    Args:
        proof: :attr:`Proof.found` and :attr:`Proof.problems` are filled in.
        directory: the checkpoint.
        written: torch's WriteResult of each tensor, and the tensor as it was handed to the writer.

    Raises:
        OSError: a file cannot be read.
    """
    files: dict[str, mmap.mmap] = {}
    located: dict[Place, _Numbers] = {}
    for result, tensor in written:
        place, info = (result.index.fqn, tuple(result.index.offset)), result.storage_data
        count = tensor.numel()
        if not count:
            continue
        if info.relative_path not in files:
            with (directory / info.relative_path).open("rb") as file:
                files[info.relative_path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = files[info.relative_path]
        try:
            start, size = checksum.numbers_of(memoryview(data)[info.offset : info.offset + info.length])
        except ValueError as error:
            proof.problems.append(f"{place[0]}: {error}")
            continue
        if size != count * tensor.dtype.itemsize or not tensor.is_contiguous():
            proof.problems.append(f"{place[0]}: {size} bytes in the file for {list(tensor.shape)} of {tensor.dtype}")
            continue
        located[place] = numbers = _Numbers(data, info.offset + start, tensor.dtype, count)
        for first, stop in proof.cuts.get(place, [(0, count)]):
            proof.found[*place, first, stop] = numbers.checksum(first, stop)
    for master in MASTERS:
        prefix = f"{STATE}{master}."
        for (key, offset), numbers in located.items():
            weight = (key.removeprefix(prefix), offset)
            if key.startswith(prefix) and weight in located and weight not in proof.rounded:
                whole = proof.found.get((key, offset, 0, numbers.count))  # where it is not cut
                same = numbers.dtype is located[weight].dtype and whole == proof.found.get((*weight, 0, numbers.count))
                if whole is None or not same:
                    proof.problems.extend(_unequal(key, numbers, located[weight]))


def _unequal(key: str, master: _Numbers, weight: _Numbers) -> Iterator[str]:
    for first in range(0, master.count, _STEP):
        stop = min(first + _STEP, master.count)
        ours, theirs = master.read(first, stop), weight.read(first, stop)
        if not torch.equal(ours.to(weight.dtype), theirs):
            yield f"{key}: are not the masters of the weight, from element {first} on"
            return


def verdict(proofs: Sequence[Proof]) -> None:
    """Compare what all ranks claim with what all have found.

    Raises:
        ProofError: naming the first tensor.
    """
    problems = [problem for proof in proofs for problem in proof.problems]
    found = {piece: value for proof in proofs for piece, value in proof.found.items()}
    claimed = set()
    for rank, proof in enumerate(proofs):
        for piece, value in proof.claims.items():
            key, offset, first, stop = piece
            what = f"elements {first} to {stop} of the part at {list(offset)}"
            if piece not in found:
                problems.append(f"{key}: {what}, which rank {rank} has, are in no file")
            elif found[piece] != value:
                problems.append(f"{key}: {what} are others in the file than rank {rank} has in memory")
            claimed.add(piece)
    for key, offset, first, stop in found.keys() - claimed:
        problems.append(f"{key}: elements {first} to {stop} of the part at {list(offset)} come from no rank's memory")
    raise_first(problems)


def raise_first(problems: Sequence[str]) -> None:
    """Raise what the first of several problems is, and how many more there are; nothing if there are none.

    Raises:
        ProofError: there are some.
    """
    if problems:
        rest = len(problems) - 1
        raise ProofError(problems[0] + (f" (and {rest} more)" if rest else ""))
