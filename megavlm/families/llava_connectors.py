"""Systems of LLaVA's original layout with a connector of their own: MobileVLM and DenseConnector.

Facts are from the public repositories: Meituan-AutoML/MobileVLM @ 7f5c81f1 (``mobilevlm/model``; arXiv 2312.16886,
2402.03766) and HJYao00/DenseConnector @ d7c8222f (``dc/model``; arXiv 2405.13800).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from megavlm.architectures.connectors.dense_connector.tables import DENSE_PROJECTOR
from megavlm.architectures.connectors.ldp.tables import LDP, LDP_V2
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.common import expect
from megavlm.families.family import Tree, config_file
from megavlm.families.llava_original import LlavaOriginalFamily, SystemLanguage
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_PROJECTOR = "model.mm_projector."
_GRID = 12
"""Rows and columns of LDPv2's tokens in MobileVLM's code."""
_LDP = {"ldpnet": (LDP, "model.mlp.1.weight"), "ldpnetv2": (LDP_V2, "mlp.mlp.0.weight")}
"""By ``mm_projector_type``: the table, and the first matrix under ``mm_projector``."""
_SPARSE = (7, 15)
"""Layers that DenseConnector's sti and sci take beside the features."""


class MobileVLMFamily(LlavaOriginalFamily):
    """MobileVLM v1 (LDP) and v2 (LDPv2) on MobileLLaMA, and on Vicuna."""

    name = "mobilevlm"
    title = "MobileVLM, v1 and v2, in its authors' layout"
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("ldp",), "language": ("decoder",),
    }  # fmt: skip
    languages: ClassVar = (SystemLanguage("llama", ("mobilevlm",), "MobileLlamaForCausalLM", ("vicuna_v1",)),)
    others = "-"
    may_lack_tower = False
    tower_keys: ClassVar = {}  # a v2 takes the checkpoint's tower; for a v1 there is no key that makes its code do so
    read_as = None
    flags: ClassVar = {**LlavaOriginalFamily.flags, "vision_tower_type": "clip"}

    def check_pictures(self, config: Mapping[str, Any], where: str) -> None:
        """Its only towers are CLIP's."""
        super().check_pictures(config, where)
        expect(config, where, vision_tower_type="clip")

    def connector_of(self, source: Source) -> Tree:
        """Return ``model.connector``.

        Raises:
            UserError: the projector that is named has other weights, or is not known.
        """
        where, named = config_file(source), str(source.config.get("mm_projector_type", "linear"))
        there = [kind for kind, (_, first) in _LDP.items() if _PROJECTOR + first in source]
        if named not in _LDP or named not in there:
            own = (one for one in source.tensors if one.startswith(_PROJECTOR))
            found = there[0] if there else next(own, "not there")
            raise UserError(
                f"{where}: mm_projector_type is {named!r}, but the weights under {_PROJECTOR} are {found}; MobileVLM "
                f"has {' and '.join(_LDP)} here"
            )
        return {"preset": named, **({"output_grid": _GRID} if named == "ldpnetv2" else {})}

    def connector_table(self, model: ModelConfig) -> Table:
        """Return the table of the version."""
        return _LDP[_ldp(model)][0]

    def mm_config(self, model: ModelConfig) -> Tree:
        """Name the version."""
        return {**super().mm_config(model), "mm_projector_type": _ldp(model)}

    def no_connector(self, model: ModelConfig) -> str | None:
        """Its code has a fixed number of tokens for v2."""
        if model.connector.version == 2 and model.connector.output_grid != _GRID:
            side = model.connector.output_grid
            return f"the connector makes {side} x {side} tokens, MobileVLM's code {_GRID} x {_GRID}"
        return None

    def no_tower(self, vision: VisionConfig) -> str | None:
        """CLIP's, features of one layer."""
        if not vision.class_token:
            return "the vision tower is not CLIP's, MobileVLM's is"
        if vision.feature_layers is not None:
            return "features of several layers are taken (model.vision.feature_layers), MobileVLM takes one layer's"
        return super().no_tower(vision)

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return none: Transformers has no class for it."""
        return {}

    def _check_width(self, source: Source, vision: Mapping[str, Any]) -> None:
        """Hold the projector's first matrix against the tower too.

        Raises:
            UserError: they are of two widths.
        """
        super()._check_width(source, vision)
        named = str(source.config.get("mm_projector_type"))
        if named in _LDP and _PROJECTOR + _LDP[named][1] in source:  # else connector_of says what is there
            _check_first(source, _LDP[named][1], vision["hidden_size"])


class DenseConnectorFamily(LlavaOriginalFamily):
    """LLaVA-1.5 with features of several layers (sti, sci, dci)."""

    name = "dense_connector"
    title = "DenseConnector in its authors' layout"
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("dense_connector",), "language": ("decoder",),
    }  # fmt: skip
    languages: ClassVar = (
        SystemLanguage(
            "llama", ("llava_llama", "llava"), "LlavaLlamaForCausalLM", ("llama_3", "vicuna_v1", "chatml_direct")
        ),
    )
    others = "-"
    may_lack_tower = False
    read_as = None

    def describes(self, config: Mapping[str, Any]) -> bool:
        """By the integration, which LLaVA has not."""
        return config.get("mm_dense_connector_type") in ("sti", "sci", "dci")

    def tower_branch(self, source: Source) -> Tree:
        """Return ``model.vision`` with all layers that the integration takes.

        Raises:
            UserError: the tower has too few, or config.json takes several itself.
        """
        vision, kind, where = super().tower_branch(source), _kind(source), config_file(source)
        if vision["feature_layers"] is not None:
            layer = source.config["mm_vision_select_layer"]
            raise UserError(
                f"{where}: mm_vision_select_layer is {layer!r}; DenseConnector takes one, and others by itself"
            )
        layers = _layers(kind, vision["num_layers"])
        if max(layers) > vision["num_layers"]:
            raise UserError(
                f"{where}: mm_dense_connector_type {kind!r} takes layers {_SPARSE[0]} and {_SPARSE[1]}, but of "
                f"mm_vision_tower {source.config['mm_vision_tower']!r} {vision['num_layers']} run"
            )
        return vision | {"feature_layers": layers}

    def connector_of(self, source: Source) -> Tree:
        """Return ``model.connector``: LLaVA's projector behind the integration."""
        connector = super().connector_of(source)
        if not connector["preset"].startswith("mlp"):
            raise UserError(
                f"{config_file(source)}: mm_projector_type is {connector['preset']!r} with mm_dense_connector_type "
                f"{_kind(source)!r}; only mlpNx_gelu is supported"
            )
        depth = int(connector["preset"].removeprefix("mlp").removesuffix("x_gelu"))
        return {"preset": f"dense_{_kind(source)}", "depth": depth}

    def connector_table(self, model: ModelConfig) -> Table:
        """Return the table of the linear layers."""
        return DENSE_PROJECTOR

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration that names one layer: the others follow from the integration."""
        return super().config(_plain(model), tokens)

    def mm_config(self, model: ModelConfig) -> Tree:
        """Return the keys on the projector."""
        return {
            "mm_dense_connector_type": model.connector.integration,
            "mm_hidden_size": model.vision.hidden_size * _wide(model.connector.integration),
            "mm_projector_type": f"mlp{model.connector.depth}x_gelu",
            "mm_vision_select_feature": "patch",
        }

    def no_connector(self, model: ModelConfig) -> str | None:
        """Its code has two streams, and means of eight patches."""
        connector, vision = model.connector, model.vision
        if connector.streams != 2 or (connector.integration == "sti" and connector.pool != 8):
            return "the connector has other numbers of streams, or of patches in a mean, than DenseConnector's 2 and 8"
        wanted = _layers(connector.integration, vision.num_layers)
        if list(vision.feature_layers or ()) != wanted:
            return f"features are those of other layers than DenseConnector's {wanted} (model.vision.feature_layers)"
        return None

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return none: Transformers has no class for it."""
        return {}

    def _check_width(self, source: Source, vision: Mapping[str, Any]) -> None:
        """Hold the projector against what the integration makes of the tower's features.

        Raises:
            UserError: they are of two widths.
        """
        width = vision["hidden_size"] * _wide(_kind(source))
        told = source.config.get("mm_hidden_size", width)
        if told != width:
            raise UserError(
                f"{config_file(source)}: mm_hidden_size is {told!r}, but {_kind(source)} of the features of "
                f"mm_vision_tower {source.config['mm_vision_tower']!r} is {width} wide; correct one"
            )
        _check_first(source, "0.weight", width)


def _ldp(model: ModelConfig) -> str:
    return "ldpnetv2" if model.connector.version == 2 else "ldpnet"


def _kind(source: Source) -> str:
    return str(source.config["mm_dense_connector_type"])


def _layers(kind: str, last: int) -> list[int]:
    """Return the layers in the order of the connector's rules."""
    return list(range(last + 1)) if kind == "dci" else [last, *_SPARSE]


def _wide(kind: str) -> int:
    return 1 if kind == "sti" else 3


def _plain(model: ModelConfig) -> ModelConfig:
    vision: Any = model.vision
    return dataclasses.replace(model, vision=dataclasses.replace(vision, feature_layers=None))


def _check_first(source: Source, name: str, width: int) -> None:
    """Check the width that the projector's first matrix takes.

    Raises:
        UserError: it is another.
    """
    there = source.shape(_PROJECTOR + name)[-1]
    if there != width:
        raise UserError(
            f"{source.path}: {_PROJECTOR}{name} is for features {there} wide, but those of mm_vision_tower "
            f"{source.config['mm_vision_tower']!r} are {width} wide; name the tower that the projector was trained with"
        )
