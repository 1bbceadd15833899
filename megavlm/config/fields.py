"""What classes of keys are declared with: the decorator, and what a key's value changes."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as _pydantic_dataclass
from typing_extensions import dataclass_transform


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


def meaning_of(config: Any, name: str) -> Meaning:
    """Return what the key ``name`` of a class of keys, or of one of its instances, changes."""
    info = config.__pydantic_fields__.get(name)
    found = [] if info is None else [item for item in info.metadata if isinstance(item, Meaning)]
    return found[0] if found else Meaning.WEIGHTS
