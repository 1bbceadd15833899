"""What classes of keys are declared with: the decorator, and what a key's value changes."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as _pydantic_dataclass
from typing_extensions import dataclass_transform

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field, dataclasses.field))
def config_class(cls: type) -> Any:
    """Make ``cls`` a frozen, keyword-only dataclass that refuses unknown keys and keeps field docstrings."""
    rules = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return _pydantic_dataclass(cls, frozen=True, kw_only=True, config=rules)


class Meaning(enum.Enum):
    """What another value of a key of ``model`` would change; a key without one is of WEIGHTS.

    Written beside the type: ``init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)``.
    """

    WEIGHTS = "the shape of weights, or what is computed with them: a checkpoint's value stays"
    USE = "how the same weights are used: a run may have another one than its checkpoint; config.json says it"
    PIXELS = "the same, of pictures: a processor's file says it, and config.json does not"
    RUN = "nothing but the run: config.json does not say it"
    NAMES = "what people call layers by: nothing is computed from it, and a preset's value is the known one"

    @property
    def fixed(self) -> bool:
        """Whether a run must have the value of the checkpoint that it starts from."""
        return self is Meaning.WEIGHTS

    @property
    def published(self) -> bool:
        """Whether a published configuration says the value."""
        return self in (Meaning.WEIGHTS, Meaning.USE)


def from_tree(kind: type[T], tree: Any) -> T:
    """Return an instance of a class of keys, of a plain tree as YAML and JSON have it; ``to_tree`` is the way back.

    A value must have its key's type: no text is taken for a number. Lists make tuples.

    Raises:
        ValidationError: a key is missing, unknown or wrong.
    """
    return TypeAdapter(kind).validate_json(json.dumps(tree), strict=True)


def meaning_of(config: Any, name: str) -> Meaning:
    """Return what the key ``name`` of a class of keys, or of one of its instances, changes."""
    info = config.__pydantic_fields__.get(name)
    found = [] if info is None else [item for item in info.metadata if isinstance(item, Meaning)]
    return found[0] if found else Meaning.WEIGHTS
