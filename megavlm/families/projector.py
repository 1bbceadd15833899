"""Connectors as LLaVA's and CodeFuse-VLM's trainers name them: ``mm_projector``, in a checkpoint or alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from megavlm.architectures.connectors.mlp.tables import LINEAR_PROJECTOR, SEQUENTIAL_PROJECTOR
from megavlm.architectures.connectors.resampler.tables import RESAMPLER
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.family import Family, Tree
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

PROJECTOR = "mm_projector."
HEAD_DIM = 128  # the original code's resampler has hidden_size / 128 heads


def resampler_branch(source: Source, prefix: str, queries: int | None) -> Tree:
    """Return the connector branch of a resampler.

    Raises:
        UserError: the number of queries is not what the configuration says.
    """
    rows, width = source.shape(prefix + "attn_pool.query")
    if queries is not None and rows != queries:
        raise UserError(f"{source.path}: {prefix}attn_pool.query has {rows} rows, config.json says n_queries {queries}")
    return {"preset": "resampler", "num_queries": rows, "head_dim": min(HEAD_DIM, width)}


def projector_branch(source: Source, prefix: str) -> Tree:
    """Return the connector branch of an ``mm_projector``, from its names and shapes.

    Raises:
        UserError: its names are those of no connector here.
    """
    if prefix + "attn_pool.query" in source:
        return resampler_branch(source, prefix, None)
    if prefix + "weight" in source:
        return {"preset": "linear"}
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.weight")
    numbers = sorted(int(match[1]) for name in source.tensors if (match := pattern.fullmatch(name)))
    if not numbers or numbers != list(range(0, 2 * len(numbers), 2)):
        raise UserError(f"{source.path}: the names under {prefix} are neither a resampler, nor linear, nor mlpNx_gelu")
    return {"preset": f"mlp{len(numbers)}x_gelu"}


def projector_table(model: ModelConfig, prefix: str) -> Table:
    """Return the table of an ``mm_projector``."""
    if model.connector.preset == "resampler":
        return dataclasses.replace(RESAMPLER, prefix=prefix)
    if model.connector.preset in ("linear", "mlp1x_gelu"):
        sequential = model.connector.preset != "linear"
        return dataclasses.replace(LINEAR_PROJECTOR, names={"linear": prefix + "0" if sequential else prefix[:-1]})
    return dataclasses.replace(SEQUENTIAL_PROJECTOR, prefix=prefix)


class ProjectorFamily(Family):
    """``mm_projector.bin``: a connector alone, as LLaVA's and CodeFuse-VLM's trainers write it."""

    name = "mm_projector"
    title = "a connector alone: mm_projector.bin"
    parts = ("connector",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"connector": ("mlp", "resampler")}
    styles: ClassVar = {f"model.{PROJECTOR}": {}, f"transformer.{PROJECTOR}": {}, PROJECTOR: {}}
    pickle = "mm_projector.bin"

    def detect(self, source: Source) -> bool:
        """By its names."""
        return all(PROJECTOR in name for name in source.tensors)  # beside it a trainer leaves the model's config.json

    def style_for(self, model: ModelConfig) -> str:
        """Return what CodeFuse-VLM's code calls it, on a Qwen v1, and what LLaVA's does."""
        codefuse = model.connector.preset == "resampler" or model.language.layer_names == "qwen"
        return f"transformer.{PROJECTOR}" if codefuse else f"model.{PROJECTOR}"

    def style_of(self, source: Source) -> str:
        """Return what stands in front of the connector's own names."""
        name = next(iter(source.tensors))
        return name[: name.index(PROJECTOR) + len(PROJECTOR)]

    def branches(self, source: Source) -> Tree:
        """Return the connector branch."""
        return {"connector": projector_branch(source, self.style_of(source))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [projector_table(model, style)]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """There is none."""
        return {}
