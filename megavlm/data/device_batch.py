"""A micro-batch on the devices of a replica: which fields it has, which ranks get each, and how it comes to them.

:data:`FIELDS` is the one list of them, and says all that sending them needs. A new field is a row there, an attribute
of :class:`Batch`, and a line in ``_fields`` (from a pack), ``_batch`` (on its device) and, if the model takes it,
``inputs``.

Shape legend: see :mod:`megavlm.data.batch`; M micro-batches of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.media import Arrangement
from megavlm.data.read_pack import ReadPack
from megavlm.layers.segments import context_split, packed_segments, to_device
from megavlm.parallel.context import common_length, filled_length, split_context
from megavlm.parallel.device import local_device
from megavlm.parallel.encoders import Encoders
from megavlm.parallel.exchange import exchange
from megavlm.parallel.state import is_first_stage, is_last_stage, replica_group, stage_group


@dataclass(frozen=True)
class BatchField:
    """One tensor of a batch."""

    name: str
    stages: Literal["all", "first", "last"]
    """Pipeline stages that get it. What is for the first one alone may be large: no other rank sees its bytes."""
    dtype: torch.dtype
    per_position: bool = False
    """Whether its last dimension is S, so that context parallelism cuts it."""
    whole: bool = False
    """Whether it is not cut all the same: features are put in place before."""
    on_host: bool = False
    """Whether the host reads its values; it stays there, and is small."""


FIELDS = (
    BatchField("cu_seqlens", "all", torch.int64, on_host=True),
    BatchField("segment_sources", "all", torch.int64, on_host=True),
    BatchField("num_images", "all", torch.int64, on_host=True),
    BatchField("num_views", "all", torch.int64, on_host=True),
    BatchField("image_grid", "all", torch.int64, on_host=True),
    BatchField("two_way_spans", "all", torch.int64, on_host=True),
    BatchField("tokens", "all", torch.int64, per_position=True, whole=True),
    BatchField("position_ids", "all", torch.int64, per_position=True),
    BatchField("labels", "last", torch.int64, per_position=True),
    BatchField("loss_weights", "last", torch.float32, per_position=True),
    BatchField("images", "first", torch.uint8),
    BatchField("image_index", "first", torch.int64),
    BatchField("image_weight", "first", torch.float32),
)
"""Fields of a batch; those of one route and number type travel together."""

Grid = Sequence[int] | None
"""Frames, rows and columns of a picture's patches; None where all pictures are alike."""


class Spread(Protocol):
    """Says who encodes each picture of a step. All ranks ask it, and must hear the same."""

    def encoders(self) -> Encoders:
        """Return the ranks that pictures are spread over."""
        ...

    def __call__(self, grids: Sequence[Sequence[Sequence[Grid]]]) -> Sequence[Sequence[Sequence[int]]]:
        """Return [D][M][V] the place (:class:`Encoders`) of each picture, from the [D][M][V] grids of all replicas."""
        ...


@dataclass(frozen=True)
class SharedPictures:
    """The pictures of a micro-batch, where all ranks encode: whose they are, and who encodes them.

    Of each replica that shares its pictures out with this one: the micro-batch with the same number of each.
    """

    places: Sequence[Sequence[int]]
    """[D][V] who encodes each: a place of :class:`Encoders`."""
    grids: Sequence[Sequence[Grid]]
    """[D][V]."""
    moved: int = 0
    """Views of this replica that another one encodes; each frame of a film is one."""


_MOST_DIMENSIONS = 5
_ABSENT, _FAILED = -1, -2
_CUT = frozenset(one.name for one in FIELDS if one.per_position and not one.whole)


@dataclass
class Batch:
    """One pack on the device of one rank."""

    tokens: Tensor
    """[1, S] int64. All of the pack, also where context-parallel ranks share it: features are put in place first."""
    position_ids: Tensor
    """[1, S] int64, from 0 in each segment; or [1, 3, S], see :class:`megavlm.data.batch.Pack`. Of a pack that is
    shared, this and what follows are of this rank's positions (:mod:`megavlm.parallel.context`)."""
    packed_seq_params: PackedSeqParams
    """Segment borders for Megatron-Core."""
    segment_sources: Tensor
    """[G] int64: index of each segment's data set; -1 for padding."""
    num_images: int
    """N, on every stage."""
    labels: Tensor | None
    """[1, S] int64, already shifted; IGNORE_INDEX where there is nothing to predict. From the feed only the last stage
    has them."""
    images: Tensor | None
    """[V, 3, H, W] uint8 views on the first stage, or with ``image_grid`` [P, F] uint8: F numbers of each of their P
    patches. None on the others. With ``shared`` those that this rank encodes, in the order of ``shared``, and on all
    stages."""
    num_views: int
    """V, on every stage: one for each image but where the image plan makes several of it."""
    image_grid: Tensor | None = None
    """[V, 3] int64 on the host, on every stage: frames, rows and columns of patches of each picture, where pictures
    keep sizes of their own. None where they do not, or there are none."""
    image_index: Tensor | None = None
    """[T, K] int64, with ``images``: the features that stand in each of the T image slots; -1 is the learned newline
    vector. None where they stay in the order of the views."""
    image_weight: Tensor | None = None
    """[T, K] float32 weights of these; None where K is 1."""
    loss_weights: Tensor | None = None
    """[1, S] float32, with ``labels``: what the losses are multiplied by; None where all count 1."""
    shared: SharedPictures | None = None
    """Who encodes which picture; None where the first stage encodes all."""
    view_features: Tensor | None = None
    """[Q, N, E] on the first stage: what these ranks have made of the pictures. None where nobody has yet, and where
    there are none."""

    @property
    def token_sources(self) -> Tensor:
        """[S] index of the data set that each position of this rank comes from."""
        lengths, split = self.packed_seq_params.cu_seqlens_q.diff().long(), context_split(self.packed_seq_params)
        if split is not None:  # of each segment every rank has as much
            lengths = lengths // split.size
        return torch.repeat_interleave(self.segment_sources, lengths, output_size=self.length)

    @property
    def length(self) -> int:
        """Positions of this rank."""
        return self.position_ids.size(-1)

    def inputs(self, *, with_labels: bool = False) -> dict[str, Any]:
        """Return what the model's ``forward`` takes of it.

        Args:
            with_labels: the last stage returns losses, not logits. Positions that do not count get some valid token;
                whoever sums the losses leaves them out.
        """
        labels = self.labels.clamp(min=0) if with_labels and self.labels is not None else None
        return {
            "tokens": self.tokens,
            "position_ids": self.position_ids,
            "packed_seq_params": self.packed_seq_params,
            "segment_sources": self.segment_sources,
            "labels": labels,
            "images": self.images if self.shared is None else None,
            "view_features": self.view_features,
            "image_grid": self.image_grid,
            "image_index": self.image_index,
            "image_weight": self.image_weight,
        }


def make_batch(
    pack: Pack, images: Tensor | None, device: torch.device, arrangement: Arrangement | None = None,
    length: int | None = None,
) -> Batch:  # fmt: skip
    """Put one pack on a device.

    Args:
        pack: the pack.
        images: [V, 3, H, W] views or [P, F] patches, uint8 or normalised floats; None where they are not for this rank.
        device: where to.
        arrangement: where the views' features go; None where they stay in their order.
        length: what :func:`context_length` says, for this rank's part of the pack; None for all of it.
    """
    return _batch(_fields(pack, images, arrangement), device, length)


def context_length(cu_seqlens: Iterable[NDArray[Any]]) -> int | None:
    """Return how long packs are that context-parallel ranks share, filled up; None where there is one such rank.

    They are equally long, as activations that go from stage to stage must be; a collective (:func:`common_length`).

    Args:
        cu_seqlens: of each pack of a step.
    """
    size, tensor = mpu.get_context_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()
    return None if size == 1 else common_length(max(filled_length(one, size, tensor) for one in cu_seqlens))


def arrangement_on(arrangement: Arrangement | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return index and weight of an arrangement on a device, as far as there are."""
    fields = _arranged(arrangement)
    index, weight = (
        to_device(fields[name], device) if name in fields else None for name in ("image_index", "image_weight")
    )
    return index, weight


def share_packs(packs: Sequence[ReadPack] | None, num_packs: int, spread: Spread | None = None) -> list[Batch]:
    """Hand packs from the reader rank to the ranks of its replica, each field to the stages that need it.

    Args:
        packs: on the reader rank, ``num_packs`` of them; None there means that reading failed.
        num_packs: how many.
        spread: who gets which pictures' pixels; None for all to the first stage.

    Raises:
        RuntimeError: reading failed on the reader rank.
    """
    device = local_device()
    read = None if packs is None else [_fields(item.pack, item.pixels, item.arrangement) for item in packs]
    shapes = _share_shapes(read, num_packs, device)
    found: list[dict[str, Tensor]] = [{} for _ in range(num_packs)]
    fields = FIELDS if spread is None else [one for one in FIELDS if one.name != "images"]
    for first_only, dtype in dict.fromkeys((one.stages == "first", one.dtype) for one in fields):
        if not first_only or is_first_stage():
            route = [one for one in fields if (one.stages == "first", one.dtype) == (first_only, dtype)]
            _share_route(route, read, shapes, found, device)
    if spread is None:
        length = context_length(one["cu_seqlens"].numpy() for one in found)
        return [_batch(one, device, length) for one in found]
    shared = _scatter_pictures(spread, read, shapes, found, device)
    return [replace(_batch(one, device), shared=own) for one, own in zip(found, shared, strict=True)]


def _scatter_pictures(
    spread: Spread,
    read: Sequence[Mapping[str, Tensor]] | None,
    shapes: Sequence[Mapping[str, Sequence[int]]],
    found: Sequence[dict[str, Tensor]],
    device: torch.device,
) -> list[SharedPictures]:
    """Hand each picture's pixels to the ranks that encode it, as ``images`` of ``found``; return who that is.

    Args:
        spread: says who.
        read: on the reader rank, its packs.
        shapes: of each pack and field.
        found: the fields of each pack on this rank, among them ``num_views`` and ``image_grid``.
        device: where to.
    """
    encoders = spread.encoders()
    own: list[list[Grid]] = [
        one["image_grid"].tolist() if "image_grid" in one else [None] * int(one["num_views"]) for one in found
    ]
    grids = [own] if len(encoders.replicas) == 1 else _of_all_replicas(own, device)
    places = spread(grids)
    # Rows of the pixels that each rank gets of each replica.
    counts = [[0] * encoders.size for _ in grids]
    for of_replica, packs, spots in zip(counts, grids, places, strict=True):
        for place, grid in ((p, g) for pack in zip(spots, packs, strict=True) for p, g in zip(*pack, strict=True)):
            for rank in encoders.holders(place):
                of_replica[rank] += _pixel_rows(grid)
    tail = next((list(one["images"][1:]) for one in shapes if one.get("images")), [0])
    body = torch.empty(0, *tail, dtype=torch.uint8, device=device)
    if read is not None:
        pieces: list[list[Tensor]] = [[] for _ in range(encoders.size)]
        for pack, shown, where in zip(read, own, places[encoders.own], strict=True):
            rows = [_pixel_rows(grid) for grid in shown]
            for piece, place in zip(pack["images"].split(rows) if rows else (), where, strict=True):
                for rank in encoders.holders(place):
                    pieces[rank].append(piece)
        body = to_device(torch.cat([piece for one in pieces for piece in one] or [body.cpu()]), device)
    received = [0] * encoders.size
    for of_replica, ranks in zip(counts, encoders.replicas, strict=True):
        received[ranks[0]] = of_replica[encoders.rank]  # its reader
    if any(map(sum, counts)):
        sent = counts[encoders.own] if read is not None else [0] * encoders.size
        body = exchange(body, sent, received, encoders.group)
    at = [0, *accumulate(received[ranks[0]] for ranks in encoders.replicas)]  # readers lie in the order of replicas
    shared = []
    for number, one in enumerate(found):
        mine = []
        for replica, (packs, spots) in enumerate(zip(grids, places, strict=True)):
            pairs = zip(spots[number], packs[number], strict=True)
            count = sum(_pixel_rows(grid) for place, grid in pairs if place == encoders.place)
            mine.append(body[at[replica] : at[replica] + count])
            at[replica] += count
        one["images"] = mine[0] if len(mine) == 1 else torch.cat(mine)
        home = zip(places[encoders.own][number], own[number], strict=True)
        moved = sum(grid[0] if grid else 1 for place, grid in home if place // encoders.places != encoders.own)
        shared.append(SharedPictures([one[number] for one in places], [one[number] for one in grids], moved))
    return shared


def _pixel_rows(grid: Grid) -> int:
    """Return the rows that a picture has among the pixels: its patches, or 1."""
    return 1 if grid is None else prod(grid)


def _of_all_replicas(own: Sequence[Sequence[Grid]], device: torch.device) -> list[list[list[Grid]]]:
    """Return the grids of the pictures of each replica's packs; a collective over the replicas.

    Args:
        own: [M][V] of this one.
        device: where messages go.
    """
    group = mpu.get_data_parallel_group()
    rows = [[pack, *(grid or (0, 0, 0))] for pack, grids in enumerate(own) for grid in grids]
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=device), group=group)
    counts = torch.cat(sizes).tolist()
    if not any(counts):
        return [[[] for _ in own] for _ in counts]
    table = torch.zeros(max(counts), 4, dtype=torch.int64)
    table[: len(rows)] = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
    table = to_device(table, device)
    tables = [torch.empty_like(table) for _ in counts]
    dist.all_gather(tables, table, group=group)
    found: list[list[list[Grid]]] = [[[] for _ in own] for _ in counts]
    for packs, count, of_replica in zip(found, counts, tables, strict=True):
        for pack, *grid in of_replica[:count].tolist():
            packs[pack].append(grid if any(grid) else None)
    return found


def _arranged(arrangement: Arrangement | None) -> dict[str, Tensor]:
    """Return what there is of ``image_index``, ``image_weight`` and ``image_grid``."""
    if arrangement is None:
        return {}
    arrays = {"image_index": arrangement.index, "image_weight": arrangement.weight, "image_grid": arrangement.grid}
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}


def _fields(pack: Pack, images: Tensor | None, arrangement: Arrangement | None = None) -> dict[str, Tensor]:
    """Return what there is of each of :data:`FIELDS`, as a rank that has all of the pack knows it."""
    views = len(pack.images) if images is None else images.size(0)
    if arrangement is not None and arrangement.grid is not None:
        views = len(arrangement.grid)
    arrays = {
        "cu_seqlens": pack.cu_seqlens,
        "segment_sources": pack.segment_sources,
        "num_images": np.array([len(pack.images) or views]),
        "num_views": np.array([views]),
        "tokens": pack.tokens,
        "position_ids": pack.position_ids,
        "labels": pack.labels,
    }
    found = {name: torch.from_numpy(np.ascontiguousarray(array, np.int64)) for name, array in arrays.items()}
    if pack.loss_weights is not None:
        found["loss_weights"] = torch.from_numpy(pack.loss_weights)
    if pack.two_way_spans is not None:
        found["two_way_spans"] = torch.from_numpy(pack.two_way_spans)
    arranged = _arranged(arrangement)
    if images is None:  # on a later stage, whose layers may attend to pictures
        return {**found, **{name: one for name, one in arranged.items() if name == "image_grid"}}
    return {**found, "images": images, **arranged}


def _batch(fields: Mapping[str, Tensor], device: torch.device, length: int | None = None) -> Batch:
    """Make a batch of its fields, wherever they are: the only place that does.

    Args:
        fields: of the whole pack.
        device: where to.
        length: of the pack filled up, of which this rank takes its part; None for all of it as it is.

    Raises:
        AssertionError: fields that have a value per position are not equally long.
    """
    lengths = {one.name: fields[one.name].size(-1) for one in FIELDS if one.per_position and one.name in fields}
    assert len(set(lengths.values())) == 1, f"fields of different lengths: {lengths}"

    cu_seqlens, split = fields["cu_seqlens"].numpy().astype(np.int32), None
    if length is not None:
        split = split_context(
            cu_seqlens, mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank(), length
        )

    def placed(name: str) -> Tensor:
        whole = to_device(fields[name], device)
        return whole if split is None or name not in _CUT else whole.index_select(-1, split.own_rows(device))

    labels = placed("labels") if "labels" in fields else None
    if labels is not None and split is not None:
        labels = labels.where(split.own_real(device), IGNORE_INDEX)
    position_ids, spans = placed("position_ids"), fields.get("two_way_spans")
    return Batch(
        tokens=placed("tokens")[None],
        position_ids=position_ids[None],
        packed_seq_params=packed_segments(
            cu_seqlens,
            device,
            position_ids,
            None if spans is None else spans.tolist(),
            split,
        ),
        segment_sources=placed("segment_sources"),
        num_images=int(fields["num_images"]),
        labels=None if labels is None else labels[None],
        images=fields["images"].to(device) if "images" in fields else None,
        num_views=int(fields["num_views"]),
        image_grid=fields.get("image_grid"),
        image_index=placed("image_index") if "image_index" in fields else None,
        image_weight=placed("image_weight") if "image_weight" in fields else None,
        loss_weights=placed("loss_weights")[None] if "loss_weights" in fields else None,
    )


def _share_shapes(
    read: Sequence[Mapping[str, Tensor]] | None, num_packs: int, device: torch.device
) -> list[dict[str, list[int]]]:
    """Tell all ranks of the replica the shape of each field of each pack; what is absent has none.

    Raises:
        RuntimeError: reading failed on the reader rank.
    """
    # A row: the number of dimensions, or _ABSENT, or _FAILED; then the dimensions.
    table = torch.full((num_packs, len(FIELDS), 1 + _MOST_DIMENSIONS), _FAILED, dtype=torch.int64)
    for pack, fields in enumerate(read or []):
        for place, field in enumerate(FIELDS):
            shape = list(fields[field.name].shape) if field.name in fields else None
            table[pack, place, 0] = _ABSENT if shape is None else len(shape)
            table[pack, place, 1 : 1 + len(shape or [])] = torch.tensor(shape or [], dtype=torch.int64)
    table = to_device(table, device)
    group = replica_group()
    dist.broadcast(table, dist.get_process_group_ranks(group)[0], group=group)
    rows = table.tolist()
    if rows[0][0][0] == _FAILED:
        raise RuntimeError("the reader of this data-parallel replica failed; its log says why")
    return [
        {field.name: row[1 : 1 + row[0]] for field, row in zip(FIELDS, pack, strict=True) if row[0] != _ABSENT}
        for pack in rows
    ]


def _share_route(
    fields: Sequence[BatchField],
    read: Sequence[Mapping[str, Tensor]] | None,
    shapes: Sequence[Mapping[str, Sequence[int]]],
    found: Sequence[dict[str, Tensor]],
    device: torch.device,
) -> None:
    """Hand some fields of all packs over in one message, and put what is for this rank into ``found``.

    Only what the host reads goes there; the rest stays on the device.

    Args:
        fields: of one number type, and either all for the first stage alone or all not.
        read: on the reader rank, its packs.
        shapes: of each pack and field.
        found: the fields of each pack on this rank.
        device: where to.
    """
    hosted = sorted(fields, key=lambda one: not one.on_host)
    parts = [(pack, field) for field in hosted for pack in range(len(shapes)) if field.name in shapes[pack]]
    if not parts:
        return
    body = _share_body(parts, read, shapes, device)
    sizes = [prod(shapes[pack][field.name]) for pack, field in parts]
    for_host = sum(size for (_, field), size in zip(parts, sizes, strict=True) if field.on_host)
    host = body[:for_host].cpu() if for_host else None
    at = 0
    for (pack, field), size in zip(parts, sizes, strict=True):
        if field.stages != "last" or is_last_stage():
            piece = (host if host is not None and field.on_host else body)[at : at + size]
            found[pack][field.name] = piece.view(*shapes[pack][field.name])
        at += size


def _share_body(
    parts: Sequence[tuple[int, BatchField]],
    read: Sequence[Mapping[str, Tensor]] | None,
    shapes: Sequence[Mapping[str, Sequence[int]]],
    device: torch.device,
) -> Tensor:
    """Return the values of ``parts`` (pack and field), one after the other, on the device of each rank they are for."""
    _, like = parts[0]
    if read is not None:
        values = [read[pack][field.name] for pack, field in parts]
        assert all(value.dtype == like.dtype for value in values), f"{like.name} and others are not {like.dtype}"
        body = to_device(torch.cat([value.flatten() for value in values]), device)
    else:
        total = sum(prod(shapes[pack][field.name]) for pack, field in parts)
        body = torch.empty(total, dtype=like.dtype, device=device)
    group = stage_group() if like.stages == "first" else replica_group()
    if len(body) and dist.get_world_size(group) > 1:
        dist.broadcast(body, dist.get_process_group_ranks(group)[0], group=group)  # the reader
    return body
