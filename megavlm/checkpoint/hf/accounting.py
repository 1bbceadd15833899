"""Every tensor of a source accounted for: used by a rule, or set aside by a named one; anything else is an error."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megavlm.checkpoint.hf.shapes import Rule, find_aside, same_bits
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.family import Family
from megavlm.weights.rules import Aside
from megavlm.weights.source import Source

_SHOWN = 5


@dataclass
class Account:
    """What became of a source's tensors."""

    used: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Names by the rule that ignores them."""


def check_source(source: Source, family: Family, style: str, model: ModelConfig, rules: Sequence[Rule]) -> Account:
    """Hold a source against the rules of its family.

    Raises:
        UserError: a line for each tensor that is unknown, missing, or of the wrong shape or type (the first few).
    """
    account, problems = Account(), []
    types: dict[str, tuple[str, torch.dtype]] = {}
    for rule in rules:
        for name, shape in zip(rule.row.theirs, rule.shapes, strict=True):
            account.used.append(name)
            problem = _problem(source, name, shape)
            if problem is None:
                problem = _type_problem(source, name, rule, types)
            if problem is not None:
                problems.append(problem)
    asides = family.asides(model, style)
    known = set(account.used)
    for name in source.tensors:
        if name in known:
            continue
        aside = find_aside(asides, name)
        if aside is None:
            near = difflib.get_close_matches(name, [n for n in known if n not in source], n=1)
            hint = f"; is it {near[0]}?" if near else ""
            problems.append(f"{name}: unknown to the family {family.name}{hint}")
        elif aside.carried:
            account.carried.append(name)
        else:
            problems += _not_the_same(source, name, aside)
            account.ignored.setdefault(aside.why, []).append(name)
    if problems:
        more = len(problems) - _SHOWN
        shown = [f"{source.path}: {problem}" for problem in problems[:_SHOWN]]
        raise UserError("\n".join([*shown, *([f"{source.path}: and {more} more"] if more > 0 else [])]))
    return account


def _problem(source: Source, name: str, shape: tuple[int, ...]) -> str | None:
    info = source.tensors.get(name)
    if info is None:
        return f"{name}: missing; the configuration asks for it with the shape {list(shape)}"
    if info.shape != shape:
        return f"{name}: has the shape {list(info.shape)}, the configuration asks for {list(shape)}"
    if not isinstance(info.dtype, torch.dtype):
        return f"{name}: is of type {info.dtype}; only floating point is converted, so quantised weights are not"
    return None


def _type_problem(source: Source, name: str, rule: Rule, types: dict[str, tuple[str, torch.dtype]]) -> str | None:
    """Check the type against the other tensors that are stacked with this one."""
    dtype = source.tensors[name].dtype
    assert isinstance(dtype, torch.dtype)
    for slot in rule.slots:
        other, expected = types.setdefault(slot.key, (name, dtype))
        if dtype is not expected:
            return f"{name}: is {dtype}, but {other}, which is kept in one tensor with it, is {expected}"
    return None


def _not_the_same(source: Source, name: str, aside: Aside) -> list[str]:
    if aside.same_as is None:
        return []
    other = next((n for n in source.tensors if find_aside([Aside(aside.same_as, "")], n)), None)
    if other is not None and same_bits(source.get(name), source.get(other)):
        return []
    return [f"{name}: differs from {other}, though config.json ties the two (tie_word_embeddings)"]
