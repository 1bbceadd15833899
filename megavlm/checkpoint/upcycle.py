"""A dense checkpoint made into one with experts, each of which begins as the MLP that stood there (arXiv 2212.05055).

Where the scores of a token's experts sum to 1, as they do after a softmax over those that were chosen, the new model
computes what the old one did. MoE-LLaVA (arXiv 2401.15947) begins its third stage so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.base import holds_adapters
from megavlm.checkpoint.derived import write_derived
from megavlm.checkpoint.merged import recipe_branches
from megavlm.checkpoint.slots import Slot, find_slots
from megavlm.checkpoint.stream import CheckpointReader, ParameterToWrite
from megavlm.config.architecture import BRANCHES
from megavlm.config.checks import check_recipe
from megavlm.config.errors import UserError
from megavlm.config.fields import meaning_of
from megavlm.config.help import to_tree
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.families.presets import expand_presets

_EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.\d+\.")
_ROUTER = ".mlp.router."


def upcycle(checkpoint: Path, out: Path, overrides: Sequence[str], seed: int) -> int:
    """Write a dense checkpoint's weights as those of a model with experts, for any layout.

    Process groups of one process must be up.

    Args:
        checkpoint: a published checkpoint of whole weights.
        out: directory to write; it must not exist, or be empty.
        overrides: ``key=value`` over the checkpoint's recipe, the keys of experts among them.
        seed: of the routers' first weights.

    Returns:
        The bytes that were written.

    Raises:
        UserError: the checkpoint has adapters or experts, or an expert would not be the MLP that is there.
    """
    if holds_adapters(checkpoint):
        raise UserError(f"{checkpoint}: holds adapters; merge them first (megavlm convert merge)")
    recipe = load_recipe(checkpoint / "recipe.yaml", overrides, expand_presets)
    dense, _ = recipe_branches(checkpoint)
    _check(checkpoint, to_tree(dense), recipe)
    check_recipe(recipe)
    reader, old = CheckpointReader(checkpoint), find_slots(dense)
    pieces, language = [], recipe.model.language
    usual = reader.dtype(old["language.embedding.word_embeddings.weight"])
    for name, slot in find_slots(recipe.model).items():
        if _ROUTER in name:
            dtype = usual if name.endswith(".weight") else torch.float32
            pieces.append(ParameterToWrite(slot, dtype, _fresh(name, slot, dtype, language.init_method_std, seed)))
            continue
        source = old.get(_EXPERT.sub(".mlp.", name))
        if source is None:  # a newline vector, which image plans ask for
            raise UserError(f"{checkpoint}: has no {name}; give keys of experts alone")
        pieces.append(
            ParameterToWrite(slot, reader.dtype(source), lambda source=source: reader.read(source))  # type: ignore[misc]
        )
    return write_derived(checkpoint, out, pieces, to_tree(recipe))


def _check(checkpoint: Path, dense: dict[str, Any], recipe: Recipe) -> None:
    """Check that nothing but experts is new.

    Raises:
        UserError: something is, or there are experts already.
    """
    language, key = recipe.model.language, "model.language"
    if dense["language"].get("num_moe_experts") is not None:
        raise UserError(f"{checkpoint}: has experts already")
    if not any(language.expert_layers):
        raise UserError(f"{key}.num_moe_experts: missing; give the number of experts, as {key}.num_moe_experts=4")
    if language.moe_ffn_hidden_size not in (None, language.ffn_hidden_size):
        raise UserError(
            f"{key}.moe_ffn_hidden_size: {language.moe_ffn_hidden_size}, but an expert begins as an MLP of "
            f"{language.ffn_hidden_size} ({key}.ffn_hidden_size); leave it out"
        )
    if language.moe_shared_expert_intermediate_size is not None:
        raise UserError(f"{key}.moe_shared_expert_intermediate_size: there are no weights for it; leave it out")
    tree = to_tree(recipe.model)
    for branch in BRANCHES:
        own, known = getattr(recipe.model, branch), dense[branch]
        for name, value in tree[branch].items():
            new = own is language and name.startswith(("moe_", "num_moe_"))
            if not new and meaning_of(own, name).fixed and known.get(name, value) != value:
                raise UserError(
                    f"model.{branch}.{name}: {value!r}, but {checkpoint} has {known[name]!r}; leave it as it is"
                )


def _fresh(name: str, slot: Slot, dtype: torch.dtype, std: float, seed: int) -> Callable[[], Tensor]:
    """Return what makes a router's first weights, or the zeros of its experts' biases."""

    def make() -> Tensor:
        if not name.endswith(".weight"):
            return torch.zeros(slot.shape, dtype=dtype)
        number = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(number)
        return (torch.randn(slot.shape, generator=generator) * std).to(dtype)

    return make
