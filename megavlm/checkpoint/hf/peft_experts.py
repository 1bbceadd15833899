"""Adapters of experts that Transformers holds in one tensor, as PEFT's ``target_parameters`` has them.

Of a parameter [experts, out, in] PEFT 0.21 (``tuners/lora/layer.py``, ``ParamWrapper``) keeps A [experts x rank, in],
of one expert after the other, and B [out, rank x experts], whose columns go through all experts first. Its wrappers lie
in each other: where both parameters of a module have one, gate_up_proj's is ``experts.base_layer.lora_A.weight`` and
down_proj's ``experts.lora_A.weight``; a single one has the latter name.

Gate and up are one parameter there. Our two adapters of rank r become one of 2r whose B is block-diagonal, with twice
the alpha, so that alpha / rank stays (as PEFT fuses those of separate experts, in
``utils/transformers_weight_conversion.py``). Of a file of any other B, at the rank of all layers, each of gate and up
gets A, and its rows of B: the same sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megavlm.checkpoint.hf.peft_config import MERGE, Settings
from megavlm.checkpoint.hf.shapes import Rule
from megavlm.config.errors import UserError
from megavlm.weights.rules import CONCAT, SAME, Row

UPPER, LOWER = "gate_up_proj", "down_proj"
_PARTS = {UPPER: ("gate_proj", "up_proj"), LOWER: ("down_proj",)}
_ONE = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.lora_([AB])\.weight")
_WRAPPED = re.compile(r"(.+\.experts)(\.base_layer)?\.lora_[AB]\.weight")
_MIXTRAL = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\b")
_MODERN = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def apart(rule: Rule) -> Iterator[Rule]:
    """Yield a rule for each expert of one about a tensor of all; any other rule as it is.

    An expert has the names that it has where experts lie apart: ``experts.3.gate_proj.weight``.
    """
    container, _, name = rule.row.theirs[0].rpartition(".")
    if len(rule.row.ours) == 1 or len(rule.row.theirs) > 1 or name not in _PARTS:
        yield rule
        return
    experts, rows, columns = rule.shapes[0]
    parts = _PARTS[name]
    for i, (ours, slot) in enumerate(zip(rule.row.ours, rule.slots, strict=True)):
        assert experts == len(rule.slots)
        theirs = tuple(f"{container}.{i}.{part}.weight" for part in parts)
        row = Row((ours,), theirs, CONCAT if len(parts) > 1 else SAME)
        yield replace(rule, row=row, slots=(slot,), shapes=((rows // len(parts), columns),) * len(parts))


def stacks_experts(rules: Sequence[Rule]) -> bool:
    """Whether the naming has all experts of a layer in one tensor."""
    return any(len(rule.row.ours) > 1 and rule.row.theirs[0].endswith((UPPER, LOWER)) for rule in rules)


def is_wrapped(key: str) -> bool:
    """Whether a tensor is of adapters of a parameter of experts."""
    return _WRAPPED.fullmatch(key) is not None


def modern(name: str) -> str:
    """Return what Transformers 5 calls a layer of experts, which it calls alike in all models."""
    return _MIXTRAL.sub(lambda found: f".mlp.experts.{found[1]}.{_MODERN[found[2]]}", name)


def modern_rules(rules: Sequence[Rule]) -> list[Rule]:
    """Return the rules with the names that Transformers 5 has."""
    return [replace(one, row=replace(one.row, theirs=tuple(map(modern, one.row.theirs)))) for one in rules]


@dataclass(frozen=True)
class Stacked:
    """Adapters in PEFT's form.

    Attributes:
        tensors: by PEFT's names.
        parameters: ends of the names of the parameters that have some.
        fused: gate and up both have one, so that theirs has twice the rank.
    """

    tensors: dict[str, Tensor]
    parameters: tuple[str, ...]
    fused: bool


def stack(tensors: Mapping[str, Tensor]) -> Stacked:
    """Put adapters of single experts together; other tensors stay as they are.

    Args:
        tensors: A [rank, in] and B [out, rank], by PEFT's names of modules that are apart, which Transformers 5 has.
    """
    out: dict[str, Tensor] = {}
    found: dict[str, dict[str, dict[int, Tensor]]] = {}
    for key, value in tensors.items():
        one = _ONE.fullmatch(key)
        if one is None:
            out[key] = value
        else:
            kinds = found.setdefault(one[1], {})
            kinds.setdefault(f"{one[3]} {one[4]}", {})[int(one[2])] = value
    parameters: dict[str, None] = {}
    fused = False
    for container, kinds in found.items():
        own = {name: [part for part in parts if f"{part} A" in kinds] for name, parts in _PARTS.items()}
        wrapped = [name for name, parts in own.items() if parts]
        for name in wrapped:
            parameters.setdefault(".".join([*container.split(".")[-2:], name]))
            lows, ups = [], []
            for i in sorted(kinds[f"{own[name][0]} A"]):
                lows.append(torch.cat([kinds[f"{part} A"][i] for part in own[name]]))
                ups.append(_blocks([(part, kinds.get(f"{part} B", {}).get(i)) for part in _PARTS[name]]))
            prefix = f"{container}.base_layer" if name != wrapped[-1] else container
            out[f"{prefix}.lora_A.weight"] = torch.cat(lows)
            out[f"{prefix}.lora_B.weight"] = torch.stack(ups, dim=-1).flatten(1)
        fused = fused or len(own[UPPER]) > 1
    return Stacked(out, tuple(parameters), fused)


def _blocks(parts: Sequence[tuple[str, Tensor | None]]) -> Tensor:
    """Return B of one expert, [rows of all parts, rank of those that are there], zero between the parts."""
    there = [value for _, value in parts if value is not None]
    none = there[0].new_zeros(len(there[0]), 0)
    return torch.block_diag(*(none if value is None else value for _, value in parts))


def unstack(where: Path, settings: Settings, left: Mapping[str, Tensor], experts: int | None) -> dict[str, Tensor]:
    """Undo :func:`stack`, and take in what PEFT trained on the parameters itself.

    Args:
        where: the file, for messages.
        settings: what its configuration says.
        left: tensors by PEFT's names without ``base_model.model.``.
        experts: how many the model has in a layer; None for none.

    Raises:
        UserError: something is not as PEFT writes it, or is no sum of adapters of one rank for each of gate and up.
    """
    found = [_WRAPPED.fullmatch(key) for key in left]
    containers = list(dict.fromkeys(one[1] for one in found if one))
    if experts is None or not containers:
        return dict(left)
    out = {key: value for (key, value), one in zip(left.items(), found, strict=True) if one is None}
    pieces: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {}
    for container in containers:
        pieces[container] = {}
        for name, prefix in _wrappers(where, settings, left, container).items():
            rank = settings.rank * (2 if name == UPPER and settings.fused else 1)
            each = list(_each(where, left, prefix, rank, experts))
            for part, own in zip(_PARTS[name], _of_parts(where, prefix, name, each, settings), strict=True):
                pieces[container][part] = own
    silent = _silent(pieces) if not settings.fused else set()
    for container, parts in pieces.items():
        for part, own in parts.items():
            for i, (low, up) in enumerate(own if part not in silent else ()):
                out[f"{container}.{i}.{part}.lora_A.weight"] = low
                out[f"{container}.{i}.{part}.lora_B.weight"] = up
    return out


def _wrappers(where: Path, settings: Settings, left: Mapping[str, Tensor], container: str) -> dict[str, str]:
    """Return which parameters of a module of experts have adapters, and the beginning of their names in the file."""
    if any(key.startswith(f"{container}.base_layer.") for key in left):
        return {UPPER: f"{container}.base_layer", LOWER: container}
    told = [name for name in (UPPER, LOWER) if any(f".{key}".endswith(f".{name}") for key in settings.parameters)]
    if len(told) != 1:
        raise UserError(
            f"{where}: {container} has adapters of one parameter, and target_parameters of the configuration names "
            f"{' and '.join(told) or f'neither {UPPER} nor {LOWER}'}; restore the files"
        )
    return {told[0]: container}


def _each(
    where: Path, left: Mapping[str, Tensor], prefix: str, rank: int, experts: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A [rank, in] and B [out, rank] of each expert."""
    try:
        low, up = (left[f"{prefix}.lora_{kind}.weight"] for kind in "AB")
    except KeyError as error:
        raise UserError(f"{where}: has no {error.args[0]}; restore the file") from None
    for kind, value, axis in (("A", low, 0), ("B", up, 1)):
        if value.dim() != 2 or value.shape[axis] != rank * experts:
            raise UserError(
                f"{where}: {prefix}.lora_{kind}.weight has the shape {list(value.shape)}; of {experts} experts with "
                f"adapters of rank {rank} it has {rank * experts} {'columns' if axis else 'rows'}; {MERGE}"
            )
    yield from zip(low.unflatten(0, (experts, rank)), up.unflatten(1, (rank, experts)).unbind(-1), strict=True)


def _of_parts(
    where: Path, prefix: str, name: str, each: Sequence[tuple[Tensor, Tensor]], settings: Settings
) -> list[list[tuple[Tensor, Tensor]]]:
    """Return A and B of each expert, for each part of a parameter."""
    if name == LOWER:
        return [list(each)]
    if any(len(up) % 2 for _, up in each):
        raise UserError(f"{where}: {prefix}.lora_B.weight has an odd number of rows, which are not gate and up")
    if not settings.fused:
        return [[(low, up.chunk(2)[half]) for low, up in each] for half in (0, 1)]
    for low, up in each:
        gate, raised = (rows.chunk(2, dim=1) for rows in up.chunk(2))
        if gate[1].any() or raised[0].any():
            raise UserError(
                f"{where}: {prefix}.lora_B.weight has rank {low.shape[0]} (rank_pattern) and is not block-diagonal, so "
                f"that gate and up share all of it, while the other layers have rank {settings.rank}; all layers have "
                f"adapters of one rank here; {MERGE}"
            )
    return [[(low.chunk(2)[half], up.chunk(2)[half].chunk(2, dim=1)[half]) for low, up in each] for half in (0, 1)]


def _silent(pieces: Mapping[str, Mapping[str, Sequence[tuple[Tensor, Tensor]]]]) -> set[str]:
    """Return gate or up, whose B is zero in all experts of all layers while the other's is not: it has no adapter."""
    adds = {
        part: any(bool(up.any()) for parts in pieces.values() for _, up in parts.get(part, ()))
        for part in _PARTS[UPPER]
    }
    return {part for part, any_ in adds.items() if not any_} if any(adds.values()) else set()
