"""What "whole" means for a family: one row each, every point of which is either tried or says why there is none.

``whole_rows.py`` has the rows, ``test_whole.py`` walks all registered families over all points. To add a family that
Transformers has a class for::

    ROWS["new_vl"] = WholeFamily(
        checkpoints=("new_vl",),                       # names in test_round_trips.CASES
        source=TransformersSource("new_vl", new_vl),   # makes the tiny model
        uneven=TransformersSource("new_vl", new_vl_of_five_heads),
        ...
    )

A field has no default: a family that lacks a point has a :class:`Lack` there, and docs/families.md says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from megavlm.config.schema import ModelConfig
from megavlm.data.media import ImageLayout

ALL = ("vision", "connector", "language")


@dataclass(frozen=True)
class Lack:
    """A point that a family does not have."""

    reason: str
    """Why there is none, or which other row or test has it."""


@dataclass(frozen=True)
class Shown:
    """A sample that the source is given."""

    ids: Tensor
    """[S] int64, with the slots of its pictures."""
    given: Mapping[str, Tensor]
    """What else the source takes: pixels, sizes."""
    views: Tensor
    """[V, 3, H, W]: the same pictures as the model here takes them."""
    sizes: Tensor
    """[N, 2] height and width of the pictures."""
    layouts: list[ImageLayout]


class Source(Protocol):
    """What a family is held against: a class of Transformers, or a plain reference, with tiny random weights."""

    @property
    def style(self) -> str:
        """The naming, of the family's ``styles``, that :meth:`gradients` has."""

    image: int
    """Id of the token of an image's slots."""

    def save(self, directory: Path) -> None:
        """Write the checkpoint, with the files that say what becomes of pictures."""

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Return a sample of photographs of these sizes (width, height), made pixels by the source's own processor."""

    def features(self, sample: Shown) -> Tensor:
        """Return [T, E] image features, as they lie in the slots."""

    def logits(self, sample: Shown) -> Tensor:
        """Return [S, V]."""

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of what was computed since the start, by the names of the checkpoint."""

    def answer(self, sample: Shown, tokens: int) -> list[int]:
        """Return the greedy answer."""


@dataclass(frozen=True)
class Published:
    """The size of a published model."""

    count: int | str
    """Parameters: all digits where ``published_totals.py`` says where they were read; else what the class has, or as
    the model's page rounds it, from memory (13.4B)."""
    refused: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Tensor-parallel sizes, of 2, 4 and 8, that the model does not go with, and words of the message."""


@dataclass(frozen=True)
class Stage:
    """What the authors' script says of a stage: file and commit stand in the recipe."""

    trains: tuple[str, ...]
    lr: float
    steps: int
    batch: int
    length: int
    tokens: int
    """Slots of a picture of 640 x 480, by the stage's image plan."""
    after: str | None = None
    """The stage before, whose weights it starts from."""
    warmup: int | None = None
    """Steps; None for 3 % of all."""
    decay: float = 0.0
    tower: float = 1.0
    """Of the learning rate: that of the tower."""
    connector: float = 1.0
    """Of the learning rate: that of the connector."""
    template: str | None = None
    """Another than the preset's."""
    least: float = 0.0
    """The learning rate at the end."""
    adam: tuple[float, float, float, float] = (0.9, 0.999, 1e-8, 1)
    """Both betas, epsilon, and the norm that gradients are clipped to."""
    lora: tuple[int, int] | None = None
    """Rank and alpha of the language model's adapters, where those are trained instead of it."""


@dataclass(frozen=True)
class WholeFamily:
    """One family and its points."""

    checkpoints: tuple[str, ...] | Lack
    """There and back bit for bit: names in ``test_round_trips.CASES``."""
    template: str | Lack
    """``model.template`` of the converted checkpoint."""
    image: Mapping[str, Any] | Lack
    """``model.image`` of the converted checkpoint: keys and values."""
    source: Source | Lack
    """Features, logits, losses, gradients of every parameter, packs, three steps and greedy answers with a cache, at
    one process and at TP 2 x PP 2 with sequence parallelism."""
    uneven: Source | Lack
    """The same where two ranks divide neither the tower's heads nor the key/value heads."""
    others: Mapping[str, Source] | Lack
    """The same for other parts that the family is published with."""
    answers: Callable[[Path], Path] | Lack
    """Makes a checkpoint with tokenizer and processor, for ``megavlm convert check`` on oblong pictures."""
    lora: tuple[str, ...] | Lack
    """``lora.targets`` whose adapters go to PEFT and back."""
    presets: Mapping[str, Published] | Lack
    built: Callable[[ModelConfig], tuple[nn.Module, list[nn.Module]]] | Lack
    """Builds the published class of a preset, and names what of it is not built here: layers behind the features."""
    recipes: Mapping[str, Stage] | Lack
    headers: str | Lack
    """How each recipe says what ``megavlm plan`` predicts of it: a regular expression with groups gpus, memory (GiB of
    the fullest), seconds (of a step), hours (of all GPUs), tensor and pipeline."""
    planner: Mapping[str, float] | Lack
    """Bytes of weights, gradients and what is kept for the backward pass, and operations, that the planner says of the
    tiny model at each layout: by which share each may be off."""

    def lacks(self) -> dict[str, Lack]:
        """Return the points that there are not."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {name: value for name, value in own.items() if isinstance(value, Lack)}


def part(checkpoints: tuple[str, ...] | Lack, reason: str, **given: Any) -> WholeFamily:
    """Return the row of a family that is no whole model: a tower, a language model, a connector."""
    return _filled(checkpoints, reason, given)


def layout_of(other: str, checkpoints: tuple[str, ...] | Lack, **given: Any) -> WholeFamily:
    """Return the row of another layout of a family's checkpoints: what is converted is one model, whose row has it."""
    return _filled(checkpoints, f"another layout of {other}: the same model once it is converted", given)


def _filled(checkpoints: tuple[str, ...] | Lack, reason: str, given: Mapping[str, Any]) -> WholeFamily:
    rest = {one.name: Lack(reason) for one in dataclasses.fields(WholeFamily) if one.name != "checkpoints"}
    return WholeFamily(checkpoints=checkpoints, **{**rest, **given})
