"""Adapters in a file of ``torch.save`` that MiniGPT-v2's trainer wrote, beside what else was trained.

github.com/Vision-CAIR/MiniGPT-4 @ d94738a7: ``runners/runner_base.py`` (``_save_checkpoint``) keeps what was trained,
under its code's names; ``models/base_model.py`` (``init_llm``) puts adapters on the language model. Alpha and dropout
stand in its settings alone; those of ``minigpt_v2.yaml`` and ``minigpt_v2.py`` are taken where the file has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.hf.peft_config import Settings
from megavlm.checkpoint.hf.shapes import find_aside, make_rules
from megavlm.checkpoint.slots import find_slots
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.family import Family
from megavlm.models.build import MODULES
from megavlm.weights.kinds import EVA_TOWER, LANGUAGE, PROJECTION, Q_FORMER
from megavlm.weights.pickles import load_weights

_ALPHA, _DROPOUT = 16, 0.05
_NAME = re.compile(r"llama_model\.(base_model\.model\..*\.lora_[AB])\.(?:default\.)?weight")


def read_minigpt(file: Path) -> tuple[Settings, dict[str, Any], dict[str, Any]]:
    """Return what adapters compute, their tensors by PEFT's names, and by the file's all that it holds beside them.

    Raises:
        UserError: there are none, or they are of several ranks.
    """
    whole = load_weights(file)
    state = whole.get("model") if isinstance(whole, dict) else None
    named = {name: _NAME.fullmatch(str(name)) for name in state} if isinstance(state, Mapping) else {}
    found = {f"{match[1]}.weight": state[name] for name, match in named.items() if match}  # type: ignore[index]
    ranks = {value.shape[0] for name, value in found.items() if ".lora_A." in name and isinstance(value, Tensor)}
    if len(ranks) != 1:
        what = f"adapters of the ranks {sorted(ranks)}" if ranks else "no adapters of MiniGPT-v2 (llama_model.*.lora_A)"
        raise UserError(f"{file}: holds {what}; give such a file, or a directory that PEFT saved")
    config = whole.get("config")
    told = config.get("model") if isinstance(config, Mapping) else None
    told = told if isinstance(told, Mapping) else {}
    alpha, dropout = told.get("lora_alpha", _ALPHA), told.get("lora_dropout", _DROPOUT)
    if not _number(alpha) or alpha <= 0 or not _number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"{file}: its config has lora_alpha {str(alpha)[:40]!r} and lora_dropout {str(dropout)[:40]!r}")
    beside = {str(name): state[name] for name, match in named.items() if not match}  # type: ignore[index]
    return Settings(ranks.pop(), float(alpha), float(dropout)), found, beside


def lost_beside(
    where: Path, beside: Mapping[str, Any], base: Path, model: ModelConfig, family: Family
) -> Iterator[str]:
    """Yield a line for each tensor that a file holds beside its adapters and that is not what the base has.

    The trainer keeps what learnt (and buffers), so a Q-Former, a norm or a tower may be in it as well as projections.
    Published files hold some that are the base's own. A process group must be up.

    Args:
        where: the file.
        beside: its other tensors, by its own names.
        base: the checkpoint that the adapters are for.
        model: the base's.
        family: the base's.
    """
    slots = find_slots(model, [part for part in MODULES if part in family.parts]) if beside else {}
    # Of other families a naming may be that of another tower.
    styles = [*family.styles] if PROJECTION in family.pickles else [family.style_for(model)]
    rules = [rule for style in styles if slots for rule in make_rules(family, model, style, slots)]
    named = {name: (rule, i) for rule in rules for i, name in enumerate(rule.row.theirs)}
    asides = [aside for style in styles for aside in family.asides(model, style) if not aside.carried]
    reader = CheckpointReader(base)
    for name, value in beside.items():
        known = [one for one in _published(name) if one in named]
        if not known:
            if ".lora_" in name or not any(find_aside(asides, one) for one in _published(name)):
                yield (
                    f"{where}: holds {name}, and no part of {base} is called so; adapters cannot hold it, so it would"
                    " be lost: take it out of the file if it is of no use"
                )
            continue
        rule, index = named[known[0]]
        own = rule.to_theirs([reader.read(slot) for slot in rule.slots])[index]
        if not isinstance(value, Tensor) or own.shape != value.shape or not torch.equal(own.float(), value.float()):
            yield (
                f"{where}: what it holds of {_what(rule.row.ours[0])} ({name}) is not what {base} has, and adapters"
                f" cannot hold it; {_remedy(known[0], family)}, and name that as --base"
            )


def _published(name: str) -> list[str]:
    """Return what the pieces of a model may call a tensor of the file of what was trained."""
    text = re.sub(r"^llama_model\.(base_model\.model\.)?", f"{LANGUAGE}/", name).replace(".base_layer.", ".")
    tower = re.sub(r"^visual_encoder\.", f"{EVA_TOWER}/", name)
    return [f"{PROJECTION}/{name}", f"{Q_FORMER}/{name}", *(one for one in (text, tower) if one != name)]


def _what(ours: str) -> str:
    """Return what a part of the model is called in messages."""
    if ours.startswith("connector.layers."):
        return "the projection"
    if ours.startswith("language."):
        return f"the {'norm' if 'norm' in ours.rpartition('.')[0] else 'language model'} {ours}"
    return "the Q-Former" if ours.startswith("connector.") else "the tower"


def _remedy(published: str, family: Family) -> str:
    """Return how a tensor gets into the base."""
    piece = published.partition("/")[0]
    if piece == PROJECTION:
        return "convert the directory of the model with this file in it"
    file = family.pickles[piece][0] if piece in family.pickles else f"{piece}/"
    return f"put it into {file} of the model's directory, as {published.partition('/')[2]}, convert that"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
