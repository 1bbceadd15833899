"""How features come from the ranks that encode to the first stage of whose pictures they are, and gradients back.

Shape legend: D replicas that share out their pictures, M micro-batches of a step, V pictures of one; K rows of features
(picture after picture), E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megavlm.data.device_batch import Grid, SharedPictures
from megavlm.parallel.encoders import Encoders
from megavlm.parallel.exchange import exchange


class Handover:
    """The ways of a step's features.

    Args:
        encoders: the ranks that encode together.
        pictures: [M] of each micro-batch, who encodes which.
        rows_of: the rows of features of a picture.
        none: [0, E] of the features' number type and device.
    """

    def __init__(
        self, encoders: Encoders, pictures: Sequence[SharedPictures], rows_of: Callable[[Grid], int], none: Tensor
    ) -> None:
        self._encoders, self._pictures, self._none = encoders, pictures, none
        self._rows = [[[rows_of(grid) for grid in grids] for grids in pack.grids] for pack in pictures]
        self._counts = [[0] * encoders.size for _ in encoders.replicas]
        for _, replica, place, rows in self._all():
            for rank in encoders.holders(place):
                self._counts[replica][rank] += rows
        own = encoders.place
        self.mine = [(pack, replica, rows) for pack, replica, place, rows in self._all() if place == own]
        """Micro-batch, replica and rows of features of each picture that this rank encodes, in its order."""

    @property
    def mean_rows(self) -> float:
        """Rows of features of a micro-batch, on average."""
        return sum(rows for *_, rows in self._all()) / (len(self._pictures) * len(self._encoders.replicas))

    @property
    def empty(self) -> bool:
        """Whether nobody has a picture."""
        return not any(map(sum, self._counts))

    def _all(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield micro-batch, replica, place and rows of each picture."""
        for number, (pack, sizes) in enumerate(zip(self._pictures, self._rows, strict=True)):
            for replica, (places, rows) in enumerate(zip(pack.places, sizes, strict=True)):
                for place, count in zip(places, rows, strict=True):
                    yield number, replica, place, count

    def _of_own_replica(self, number: int) -> list[tuple[int, int]]:
        """Return place and rows of each picture of a micro-batch of this rank's replica."""
        own = self._encoders.own
        return list(zip(self._pictures[number].places[own], self._rows[number][own], strict=True))

    def out(self, own_KE: Tensor) -> list[list[Tensor] | None]:
        """Hand features to the first stages; a collective.

        Args:
            own_KE: of the pictures that this rank encodes (:attr:`mine`).

        Returns:
            [M] on a first stage the features of each picture; None elsewhere, and where there is no picture.
        """
        encoders, rank = self._encoders, self._encoders.rank
        by_replica = self._apart(own_KE)
        given = {taker: n for n in range(len(encoders.replicas)) for taker in encoders.takers(n)}
        sent = [self._counts[given[one]][rank] if one in given else 0 for one in range(encoders.size)]
        pieces = [by_replica[given[one]] for one in range(encoders.size) if one in given]
        body = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        received = [0] * encoders.size
        if encoders.first:
            for place in range(len(encoders.replicas) * encoders.places):
                giver = encoders.serving(place)
                received[giver] = self._counts[encoders.own][giver]
        got_KE = exchange(body, sent, received, encoders.group)
        if not encoders.first:
            return [None] * len(self._pictures)
        at = [0, *accumulate(received)][:-1]
        found: list[list[Tensor] | None] = []
        for number in range(len(self._pictures)):
            features = []
            for place, rows in self._of_own_replica(number):
                giver = encoders.serving(place)
                features.append(got_KE[at[giver] : at[giver] + rows])
                at[giver] += rows
            found.append(features or None)
        return found

    def home(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Hand gradients to who made the features; return those of this rank's, [K, E]; a collective.

        The tensor-parallel ranks of a first stage have the same gradients, whole; each serves those of its index.

        Args:
            grads: [M] on a first stage [K, E] of each micro-batch with pictures.
        """
        encoders, rank = self._encoders, self._encoders.rank
        pieces: list[list[Tensor]] = [[] for _ in range(encoders.size)]
        for number, grad_KE in enumerate(grads):
            if grad_KE is None:
                continue
            pictures = self._of_own_replica(number)
            for piece, (place, _) in zip(grad_KE.split([rows for _, rows in pictures]), pictures, strict=True):
                for owner in encoders.holders(place):
                    if encoders.column_of(owner) == encoders.column:
                        pieces[owner].append(piece)
        sent = [sum(piece.size(0) for piece in of_rank) for of_rank in pieces]
        given = [piece for of_rank in pieces for piece in of_rank]
        received = [0] * encoders.size
        for replica, ranks in enumerate(encoders.replicas):
            received[ranks[encoders.column]] = self._counts[replica][rank]
        got_KE = exchange(torch.cat(given) if given else self._none, sent, received, encoders.group)
        if len(encoders.replicas) == 1:
            return got_KE
        by_replica = got_KE.split([self._counts[replica][rank] for replica in range(len(encoders.replicas))])
        at, found = [0] * len(by_replica), [self._none]
        for _, replica, rows in self.mine:
            found.append(by_replica[replica][at[replica] : at[replica] + rows])
            at[replica] += rows
        return torch.cat(found)

    def _apart(self, own_KE: Tensor) -> list[Tensor]:
        """Return [D] of this rank's rows those of each replica."""
        assert own_KE.size(0) == sum(rows for *_, rows in self.mine), (own_KE.shape, self.mine)
        if len(self._encoders.replicas) == 1:
            return [own_KE]
        found: list[list[Tensor]] = [[self._none] for _ in self._encoders.replicas]
        pieces = own_KE.split([rows for *_, rows in self.mine]) if self.mine else ()
        for piece, (_, replica, _) in zip(pieces, self.mine, strict=True):
            found[replica].append(piece)
        return [torch.cat(one) for one in found]
