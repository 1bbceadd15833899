"""What a family's table is made of: rows from Hugging Face names to canonical names, with few named reshapes.

A row works in both directions. Which rows apply follows from the model: a row whose canonical parameter the model
does not have (a bias, an untied output layer) is left out. Nothing here imports torch before a tensor is reshaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from megavlm.config.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "Sequence[Tensor]"


@dataclass(frozen=True)
class Heads:
    """Attention heads that a fused QKV projection is made for."""

    heads: int
    groups: int
    """Key/value heads."""
    dim: int
    """Width of one head."""

    @staticmethod
    def of(part: str, model: ModelConfig, name: str = "") -> Heads:
        """Return the heads of a part of the model; zeros for one that has no such projection.

        Of a pair of towers ``name``, a parameter's, tells which.
        """
        own = getattr(model, part)
        if name.startswith(f"{part}.high.transformer."):
            own = own.high
        count = getattr(own, "num_attention_heads", None)
        if count is None:
            return Heads(0, 0, 0)
        groups = getattr(own, "num_query_groups", count)
        width = getattr(own, "kv_channels", None)
        return Heads(count, groups, own.hidden_size // count if width is None else width)


@dataclass(frozen=True)
class Reshape:
    """A change of layout and its inverse; both work on the meta device too.

    Attributes:
        name: how messages call it.
        to_ours: Hugging Face's tensors to the canonical ones.
        to_theirs: back.
    """

    name: str
    to_ours: Callable[[Tensors, Heads], Tensors]
    to_theirs: Callable[[Tensors, Heads], Tensors]


def _joined(parts: Tensors, dim: int = 0) -> Tensor:
    import torch  # noqa: PLC0415 - tables are read without it

    return torch.cat(list(parts), dim=dim)


def _stacked(parts: Tensors) -> Tensor:
    import torch  # noqa: PLC0415 - tables are read without it

    return torch.stack(list(parts))


def _group(qkv: Tensors, heads: Heads) -> Tensors:
    """Q [heads * dim, ...], k and v [groups * dim, ...] to Megatron's [q.., k, v] of one group after the other."""
    parts = [part.unflatten(0, (heads.groups, -1)) for part in qkv]
    return [_joined(parts, dim=1).flatten(0, 1)]


def _ungroup(fused: Tensors, heads: Heads) -> Tensors:
    """Return q, k and v of Megatron's fused projection."""
    sizes = [heads.heads // heads.groups * heads.dim, heads.dim, heads.dim]
    return [part.flatten(0, 1) for part in fused[0].unflatten(0, (heads.groups, -1)).split(sizes, dim=1)]


def _pair(key_value: Tensors, heads: Heads) -> Tensors:
    """K and v [groups * dim, ...] to [k, v] of one group after the other."""
    parts = [part.unflatten(0, (heads.groups, -1)) for part in key_value]
    return [_joined(parts, dim=1).flatten(0, 1)]


def _unpair(fused: Tensors, heads: Heads) -> Tensors:
    """Return k and v of a projection that makes both."""
    return [part.flatten(0, 1) for part in fused[0].unflatten(0, (heads.groups, -1)).chunk(2, dim=1)]


def _blocks(qkv: Tensor, heads: Heads) -> Tensors:
    """Split [Q; K; V]."""
    return qkv.split([heads.heads * heads.dim, heads.groups * heads.dim, heads.groups * heads.dim])


def _side(pixels: int) -> int:
    """Return the side of a square of so many pixels."""
    return math.isqrt(pixels)


SAME = Reshape("same", lambda x, _: list(x), lambda x, _: list(x))
TRANSPOSE = Reshape("transpose", lambda x, _: [x[0].T], lambda x, _: [x[0].T])
QKV = Reshape("q, k, v to [q, k, v] per group", _group, _ungroup)
QKV_BLOCKS = Reshape(
    "[Q; K; V] to [q, k, v] per group",
    lambda x, heads: _group(_blocks(x[0], heads), heads),
    lambda x, heads: [_joined(_ungroup(x, heads))],
)
HEAD_ROWS = Reshape(
    "a row for each head to one vector",
    lambda x, _: [x[0].flatten()],
    lambda x, heads: [x[0].unflatten(0, (-1, heads.dim))],
)
KEY_VALUE = Reshape("k, v to [k, v] per group", _pair, _unpair)
KEY_VALUE_BLOCKS = Reshape(
    "[K; V] to [k, v] per head",
    lambda x, heads: _pair(x[0].chunk(2), replace(heads, groups=heads.heads)),
    lambda x, heads: [_joined(_unpair(x, replace(heads, groups=heads.heads)))],
)
ONE_AXIS = Reshape("[1, ..] to [..]", lambda x, _: [x[0].squeeze(0)], lambda x, _: [x[0].unsqueeze(0)])
POINTWISE = Reshape(
    "[out, in, 1, 1] to [out, in]", lambda x, _: [x[0][..., 0, 0]], lambda x, _: [x[0][..., None, None]]
)
PATCHES = Reshape(
    "[out, p * p * C] to [out, C, p, p]",
    lambda x, _: [x[0].unflatten(1, (_side(x[0].size(1) // 3), -1, 3)).permute(0, 3, 1, 2)],
    lambda x, _: [x[0].permute(0, 2, 3, 1).flatten(1)],
)
TWO_AXES = Reshape("[1, 1, ..] to [..]", lambda x, _: [x[0][0, 0]], lambda x, _: [x[0][None, None]])
CONCAT = Reshape("gate and up, one above the other", lambda x, _: [_joined(x)], lambda x, _: x[0].chunk(2))
SPLIT3 = Reshape("[Q; K; V] to three", lambda x, _: x[0].chunk(3), lambda x, _: [_joined(x)])
STACKED = Reshape("[experts, out, in] to one each", lambda x, _: x[0].unbind(), lambda x, _: [_stacked(x)])
STACKED_INPUTS_FIRST = Reshape(
    "[experts, in, out] to [out, in] each",
    lambda x, _: [one.T for one in x[0].unbind()],
    lambda x, _: [_stacked([one.T for one in x])],
)


@dataclass(frozen=True)
class Row:
    """One row of a table, or, with names filled in, one rule.

    A row of experts has a {} for the expert's number in all canonical names. With one in Hugging Face's names too it is
    a rule for each expert; without, Hugging Face keeps all of them in one tensor, and it is one rule.

    Attributes:
        ours: canonical names, space between several.
        theirs: Hugging Face names, likewise.
        reshape: from theirs to ours.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    reshape: Reshape = SAME

    def of_experts(self, prefix: str, slots: Mapping[str, object]) -> Iterator[Row]:
        """Yield the row for the experts that a model has in a layer; any other row as it is.

        Args:
            prefix: of the canonical names of the layer.
            slots: the model's parameters. A layer without experts, one in front of those that have some, has no row.
        """
        if not any("{}" in name for name in self.ours):
            yield self
            return
        count = 0
        while prefix + self.ours[0].replace("{}", str(count)) in slots:
            count += 1
        each = [tuple(name.replace("{}", str(i)) for name in self.ours) for i in range(count)]
        if any("{}" in name for name in self.theirs):
            for i, ours in enumerate(each):
                yield replace(self, ours=ours, theirs=tuple(name.replace("{}", str(i)) for name in self.theirs))
        elif each:
            yield replace(self, ours=tuple(name for ours in each for name in ours))


def row(ours: str, theirs: str, reshape: Reshape = SAME) -> Row:
    """Return a row; several names stand with spaces between them."""
    return Row(tuple(ours.split()), tuple(theirs.split()), reshape)


def both(ours: str, theirs: str, reshape: Reshape = SAME) -> tuple[Row, Row]:
    """Return the rows of a weight and its bias."""
    weight, bias = (
        row(" ".join(f"{n}.{kind}" for n in ours.split()), " ".join(f"{n}.{kind}" for n in theirs.split()), reshape)
        for kind in ("weight", "bias")
    )
    return weight, bias


@dataclass(frozen=True)
class Aside:
    """Tensors of a checkpoint that the model has no parameter for.

    Attributes:
        pattern: regular expression over whole names.
        why: the rule's name, for reports.
        carried: kept beside the checkpoint and given back on export; else left behind.
        same_as: pattern of the name whose tensor it must equal (a tied output layer written out).
        behind: the pattern's group is the number of a layer, and only those behind the model's last one are meant.
        first: of ``behind``: the number of the first such layer; a table fills it in.
    """

    pattern: str
    why: str
    carried: bool = False
    same_as: str | None = None
    behind: bool = False
    first: int = 0

    def takes(self, name: str) -> bool:
        """Whether it is about the tensor ``name``."""
        found = re.fullmatch(self.pattern, name)
        return found is not None and (not self.behind or int(found[1]) >= self.first)


@dataclass(frozen=True)
class Table:
    """The rows of one part of a model in one naming.

    Attributes:
        part: vision, connector or language.
        ours: prefix of the canonical names of a layer, with {} for its number.
        theirs: the same for Hugging Face's names.
        layer: rows of a layer, relative to the prefixes; those that the layer has no parameter for do not apply.
        rest: rows outside of the layers; ours relative to the part, theirs relative to ``prefix``.
        aside: tensors without a parameter, relative to ``prefix``.
        prefix: in front of all of Hugging Face's names.
        names: words in braces in those names, and what they stand for.
    """

    part: str
    ours: str = ""
    theirs: str = ""
    layer: tuple[Row, ...] = ()
    rest: tuple[Row, ...] = ()
    aside: tuple[Aside, ...] = ()
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def rules(self, slots: Mapping[str, object], num_layers: int) -> list[Row]:
        """Return the rules that apply to a model with these canonical parameters."""
        rules = [self._fill(one, f"{self.part}.", "") for one in self.rest]
        for i in range(num_layers if self.layer else 0):
            prefixes = (f"{self.part}.{self.ours.format(i)}", self.theirs.replace("{}", str(i)))
            filled = (one for row in self.layer for one in row.of_experts(prefixes[0], slots))
            rules += [self._fill(one, *prefixes) for one in filled]
        return [rule for rule in rules if all(name in slots for name in rule.ours)]

    def asides(self, num_layers: int) -> list[Aside]:
        """Return the tensors without a parameter of a model with so many layers, with whole patterns."""
        return [
            Aside(
                self._name(a.pattern, escape=True),
                a.why,
                a.carried,
                self._name(a.same_as, escape=True) if a.same_as else None,
                a.behind,
                num_layers,
            )
            for a in self.aside
        ]

    def _fill(self, one: Row, ours: str, theirs: str) -> Row:
        return Row(
            tuple(ours + name for name in one.ours),
            tuple(self._name(theirs + name) for name in one.theirs),
            one.reshape,
        )

    def _name(self, name: str, *, escape: bool = False) -> str:
        whole = ("" if name.startswith("{") else "{prefix}") + name
        for word, text in {"prefix": self.prefix, **self.names}.items():
            whole = whole.replace("{" + word + "}", re.escape(text) if escape else text)
        return whole
