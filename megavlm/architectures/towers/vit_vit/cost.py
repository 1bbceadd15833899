"""The cost of two vision transformers side by side: see :class:`megavlm.architectures.cost.TowerCost`."""

from __future__ import annotations

from megavlm.architectures.pair import PairCost
from megavlm.architectures.towers.vit import cost as each

_BOTH = PairCost(each, each)
parameters, work, again, kept = _BOTH.parameters, _BOTH.work, _BOTH.again, _BOTH.kept
passing, rebuilt, passage = _BOTH.passing, _BOTH.rebuilt, _BOTH.passage
