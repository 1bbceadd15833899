"""What a model's branches are made of: architectures, and the names that a recipe may use for them.

An :class:`Architecture` is one kind of tower, connector or language model: its own keys, its rules, and where it is
built. A preset is data: an architecture, and default values for its keys. Neither imports torch or Megatron-Core, so
that a recipe is checked, and ``--help`` printed, in an instant. Who fills the registries stands above this room
(:mod:`megavlm.architectures`, :mod:`megavlm.families`, and packages with the entry point ``megavlm.presets``).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, core_schema

from megavlm.config.errors import UserError
from megavlm.config.fields import from_tree

_ROOMS = "megavlm.families.presets"
"""What registers all that there is, when it is imported and asked to; by name, as an entry point is."""


def no_rules(_own: Any, _layout: Any) -> Iterator[str]:
    """Yield nothing: an architecture whose types say all."""
    yield from ()


@dataclass(frozen=True)
class Architecture:
    """One kind of tower, connector or language model.

    What its functions get as ``own`` is what its builder gets: the tower's or the language model's branch, and for a
    connector, which lies between the two, the whole ``model`` branch.

    Attributes:
        name: of its folder, unique in its branch.
        config: the class of its keys: a subclass of ``VisionConfig``, ``ConnectorConfig`` or ``LanguageConfig``.
        build: "module:function", imported when a model is built: ``tower(own, context)``, ``connector(own, context)``,
            ``decoder(own, context, pre_process=, post_process=, vp_stage=)``.
        rules: of ``own`` and the recipe's ``parallel`` branch; yields a line (key, rule, remedy) for each
            that is broken.
        products: the keys and numbers that its matrix products have as sizes: (key, value, ranks that share it), which
            FP8 asks to be whole blocks; None where that is not known, and FP8 is refused.
        cost: what the planner, MFU and the order of packs ask (:mod:`megavlm.architectures.cost`): a module, or an
            object with the same functions; None where it is not known, and these are refused.
        targets: of a language model, by its branch: what ``lora.targets`` may name (``megavlm.config.lora.Target``);
            None where it takes no adapters.
    """

    name: str
    config: Any
    build: str
    rules: Callable[[Any, Any], Iterator[str]] = no_rules
    products: Callable[[Any, int], tuple[tuple[str, int, int], ...]] | None = None
    cost: Any = None
    targets: Callable[[Any], tuple[Any, ...]] | None = None

    def make(self, *args: Any, **kwargs: Any) -> Any:
        """Call the builder, whose module is imported now."""
        module, _, function = self.build.partition(":")
        return getattr(importlib.import_module(module), function)(*args, **kwargs)


@dataclass(frozen=True)
class Preset:
    """An architecture and default values for one branch of the recipe.

    For a whole model there is no architecture, and the values are its branches.
    """

    name: str
    architecture: Architecture | None
    values: dict[str, Any] = field(hash=False)

    @property
    def pattern(self) -> bool:
        """Whether the name has a number in it, which says what keys of other presets do."""
        return "<N>" in self.name

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Build a part of a model."""
        assert self.architecture is not None, self.name
        return self.architecture.make(*args, **kwargs)


class Registry:
    """Presets of one kind, by name. A name may be a pattern such as ``mlp<N>x_gelu``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._presets: dict[str, Preset] = {}

    def register(self, name: str, architecture: Architecture | None = None, **values: Any) -> None:
        """Add a preset. ``<N>`` in ``name`` stands for a positive number.

        Args:
            name: of the preset.
            architecture: what it is a size of; None for a whole model.
            values: defaults of the branch's keys.

        Raises:
            UserError: the name is taken, or two architectures have one name.
        """
        if name in self._presets:
            raise UserError(f"{self.kind} preset {name!r} is registered twice")
        if architecture is not None and not isinstance(architecture, Architecture):
            raise UserError(
                f"{self.kind} preset {name!r}: is registered with {architecture!r}; give an "
                "Architecture, which says what is built (docs/architecture.md)"
            )
        for other in self.architectures() if architecture is not None else ():
            if architecture is not None and other.name == architecture.name and other is not architecture:
                raise UserError(f"{self.kind} architecture {other.name!r} is registered twice; rename one of the two")
        self._presets[name] = Preset(name, architecture, values)

    def __len__(self) -> int:
        return len(self._presets)

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._presets)

    def find(self, name: str) -> Preset:
        """Return the preset called ``name``.

        Raises:
            UserError: there is none; the message lists those that exist.
        """
        if name in self._presets and not self._presets[name].pattern:
            return self._presets[name]
        for pattern, preset in self._presets.items():
            if re.fullmatch(re.escape(pattern).replace("<N>", "[1-9][0-9]*"), name):
                return preset
        raise UserError(f"no {self.kind} preset {name!r}; there are {', '.join(self.names())}")

    def architectures(self) -> list[Architecture]:
        """Return the architectures, in the order of their first presets."""
        found = {p.architecture.name: p.architecture for p in self._presets.values() if p.architecture is not None}
        return list(found.values())


VISION = Registry("vision")
CONNECTORS = Registry("connector")
LANGUAGE = Registry("language")
MODELS = Registry("model")
BRANCHES: dict[str, Registry] = {"vision": VISION, "connector": CONNECTORS, "language": LANGUAGE}
"""By the branch of ``model`` that a registry is of."""


def load() -> None:
    """Fill the registries, once."""
    if not len(MODELS):  # a name is looked up often
        importlib.import_module(_ROOMS).load_presets()


def architecture_named(branch: str, preset: str) -> Architecture:
    """Return the architecture of a preset of a branch (vision, connector or language)."""
    load()
    architecture = BRANCHES[branch].find(preset).architecture
    assert architecture is not None
    return architecture


def architecture_of(model: Any, branch: str) -> Architecture:
    """Return the architecture of a branch of a ``ModelConfig``."""
    return architecture_named(branch, getattr(model, branch).preset)


def own_of(model: Any, branch: str) -> Any:
    """Return what the functions of a branch's architecture get: the branch, or the model for a connector."""
    return model if branch == "connector" else getattr(model, branch)


def branch_keys(branch: str) -> dict[str, list[Architecture]]:
    """Return the keys of a branch of ``model``, each with the architectures that have it."""
    load()
    found: dict[str, list[Architecture]] = {}
    for architecture in BRANCHES[branch].architectures():
        for name in architecture.config.__pydantic_fields__:
            found.setdefault(name, []).append(architecture)
    return found


@dataclass(frozen=True)
class Branch:
    """Beside the type of a field of ``model``: the class of its value is the one of its preset's architecture."""

    name: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate with the class that the value's preset asks for."""
        return core_schema.with_info_plain_validator_function(lambda value, info: self._validate(source, value, info))

    def _validate(self, base: Any, value: Any, info: core_schema.ValidationInfo) -> Any:
        if isinstance(value, base):
            return value
        if not isinstance(value, Mapping):
            detail: InitErrorDetails = {
                "type": "dataclass_type",
                "loc": (),
                "input": value,
                "ctx": {"class_name": base.__name__},
            }
            raise ValidationError.from_exception_data(base.__name__, [detail])
        if "preset" not in value:
            missing: InitErrorDetails = {"type": "missing", "loc": ("preset",), "input": value}
            raise ValidationError.from_exception_data(base.__name__, [missing])
        if not isinstance(value["preset"], str):
            wrong: InitErrorDetails = {"type": "string_type", "loc": ("preset",), "input": value["preset"]}
            raise ValidationError.from_exception_data(base.__name__, [wrong])
        load()
        architecture = BRANCHES[self.name].find(value["preset"]).architecture
        assert architecture is not None
        own, others = architecture.config.__pydantic_fields__, branch_keys(self.name)
        # A key of another architecture that is null says nothing; every save wrote those of all, once.
        kept = {key: item for key, item in value.items() if key in own or item is not None or key not in others}
        if info.mode == "json":
            return from_tree(architecture.config, kept)
        return TypeAdapter(architecture.config).validate_python(kept)
