"""Vary-toy (arXiv 2401.12503), and Vary (2312.06109), in their authors' layout: no class in Transformers.

Facts are those of Ucas-HaoranWei/Vary-toy @ c6e40597 (``vary/model/vary_toy_qwen1_8.py``, ``vary_qwen_vary.py``,
``vision_encoder/sam.py``, ``data/base_dataset.py``). Its code builds both towers by itself: CLIP-L/14 at 224 and SAM-B
at 1024, so that ``config.json`` says nothing of them but ``vision_select_layer``. Their shapes are those of their
tensors here, with heads of 64, which both have. Vary-tiny, its vocabulary stage on OPT-125M, is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.hybrid_split.tables import VARY_PROJECTORS
from megavlm.architectures.decoders.decoder.tables import QWEN_LANGUAGE
from megavlm.architectures.pair_tables import LOW_TRANSFORMERS_VISION
from megavlm.architectures.towers.sam.tables import original_sam_table
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.common import expect, need
from megavlm.families.decoders import qwen_config, qwen_language
from megavlm.families.family import Constants, Tree, config_file
from megavlm.families.qwen import QwenFamily
from megavlm.families.towers import CLIP_MEAN, CLIP_STD, transformers_vision
from megavlm.families.vit import no_transformers_tower
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_LOW, _HIGH = "transformer.vision_tower.vision_model.", "transformer.vision_tower_high."
_CLASS = "varyQwenForCausalLM"
_HEAD = 64
"""Width of a head of either tower."""
_EPSILON = {"layernorm_epsilon": 1e-5, "high_layernorm_epsilon": 1e-6}
_MARKS = {"im_start_token": 151857, "im_end_token": 151858, "im_patch_token": 151859}
"""Ids that its code has fixed: ``<img>``, ``</img>``, ``<imgpad>``."""


class VaryFamily(QwenFamily):
    """Vary-toy on Qwen-1.8B, Vary on Qwen-7B."""

    name = "vary"
    title = "Vary-toy and Vary (varyQwenForCausalLM)"
    finds = None  # "Detect an object: ..", Table 1 of the paper; how its answers write a box was read nowhere
    template = "vary"
    kept_keys = ("vision_select_layer",)
    image_plan = "crop_squash"
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit_sam",), "connector": ("hybrid_split",), "language": ("decoder",),
    }  # fmt: skip

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == "vary"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures.

        Raises:
            UserError: it is Vary-tiny, or a tower is missing or not whole, or the towers do not go together.
        """
        config, where = source.config, config_file(source)
        for name in config.get("architectures") or ():
            if name != _CLASS:
                raise UserError(
                    f"{where}: architectures names {str(name)[:60]!r}; of Vary {_CLASS} is supported (Vary-tiny, on "
                    "OPT, is not)"
                )
        expect(config, where, use_im_start_end=True)
        low, high = _clip(source, where), _sam(source)
        side = low["image_size"] // low["patch_size"]
        if high["output_grid"] != side:
            raise UserError(
                f"{source.path}: the tower under {_HIGH} makes {high['output_grid']} x {high['output_grid']} features "
                f"of a picture and the one under {_LOW} {side} x {side}; one of the two is of another size of pictures"
            )
        if config.get("image_token_len", side**2) != side**2:
            raise UserError(
                f"{where}: image_token_len is {str(config['image_token_len'])[:40]!r}, but either tower makes {side**2}"
                " features of a picture; correct it"
            )
        return {
            "vision": {**low, "preset": "clip_sam", **{f"high_{key}": value for key, value in high.items()}},
            "connector": {"preset": "two_linears"},
            "language": qwen_language(config, where),
            "image": {"kind": self.image_plan, "resample": "bicubic"},
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables of both towers, the connector and the language model."""
        return [
            dataclasses.replace(LOW_TRANSFORMERS_VISION, prefix=_LOW),
            original_sam_table(model.vision.high, ours="high.", tower=_HIGH),
            VARY_PROJECTORS,
            QWEN_LANGUAGE,
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration, with the keys that its trainer writes."""
        tree = {key: value for key, value in qwen_config(model.language).items() if key != "auto_map"}
        start = tokens.get("image_start", _MARKS["im_start_token"])
        return {
            **tree,
            "architectures": [_CLASS],
            "im_end_token": start + 1,
            "im_patch_token": tokens.get("image", start + 2),
            "im_start_token": start,
            "image_token_len": model.tokens_per_view,
            "model_type": "vary",
            "use_im_start_end": True,
            "vision_select_layer": -2,
        }

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return CLIP's last layer and norm, behind the features: its code loads the tower whole."""
        low = model.vision.low
        width, inner = low.hidden_size, low.ffn_hidden_size
        at = f"{_LOW}encoder.layers.{low.num_layers}."
        shapes = {f"self_attn.{one}_proj": (width, width) for one in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        found: Constants = {f"{at}{one}.weight": (shape, 0.0) for one, shape in shapes.items()}
        found |= {f"{at}{one}.bias": (shape[:1], 0.0) for one, shape in shapes.items()}
        for one in (f"{_LOW}post_layernorm.", f"{at}layer_norm1.", f"{at}layer_norm2."):
            found |= {f"{one}weight": ((width,), 1.0), f"{one}bias": ((width,), 0.0)}
        return found

    def refuses(self, model: ModelConfig) -> str | None:
        """Towers, connector, language model and image plan must be Vary's kinds."""
        return _no_pictures(model) or _no_towers(model.vision) or _no_halves(model) or super().refuses(model)

    def tokens(self, source: Source) -> dict[str, int]:
        """``<img>`` and ``<imgpad>``."""
        marks, where = {key: source.config.get(key, value) for key, value in _MARKS.items()}, config_file(source)
        for key, value in marks.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"{where}: {key} is {str(value)[:40]!r}; it must be the id of a token")
        start, end, patch = marks.values()
        if (end, patch) != (start + 1, start + 2):
            raise UserError(
                f"{where}: im_start_token, im_end_token and im_patch_token are {start}, {end} and {patch}, which do not"
                " follow each other as <img>, </img> and <imgpad> do; correct them"
            )
        return {"image_start": start, "image": patch}


def _no_pictures(model: ModelConfig) -> str | None:
    if (model.image.kind, model.image.resample) != (VaryFamily.image_plan, "bicubic"):
        return f"pictures are made by {model.image.kind} ({model.image.resample}), Vary's by crop_squash (bicubic)"
    for prefix in ("", "high_"):
        for key, value in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
            if list(getattr(model.vision, prefix + key)) != value:
                return f"pixels are normalised by another {key} than CLIP's (model.vision.{prefix}{key})"
    return None


def _no_towers(vision: Any) -> str | None:
    """Return why a pair of towers is not Vary's, or None."""
    if vision.low_from != "plan":
        return "the first tower has no rendering of its own (model.vision.low_from), Vary's has"
    if vision.ratio != 1:
        return "the second tower makes several features of a place, Vary's one (model.vision)"
    if vision.high_second_neck_layer is not None:
        return "the second tower has a second neck (model.vision.high_second_neck_layer), Vary's has none"
    if 4 * vision.high_output_grid != vision.high.side:
        return "the second tower's map is stretched (model.vision.high_output_grid), Vary's is not"
    for prefix in ("", "high_"):
        width, heads = getattr(vision, f"{prefix}hidden_size"), getattr(vision, f"{prefix}num_attention_heads")
        if width != _HEAD * heads:
            return f"heads are not {_HEAD} wide (model.vision.{prefix}num_attention_heads), those of Vary's towers are"
    for key, value in _EPSILON.items():
        if getattr(vision, key) != value:
            return f"norms have the epsilon {getattr(vision, key)} (model.vision.{key}), Vary's {value}"
    if vision.activation != "quick_gelu":
        return f"the first tower has {vision.activation} (model.vision.activation), Vary's CLIP quick_gelu"
    if vision.feature_layers is not None:
        return "features of several layers are taken (model.vision.feature_layers), Vary takes one layer's"
    return no_transformers_tower(vision.low, clip=True)


def _no_halves(model: ModelConfig) -> str | None:
    if model.connector.first != "low" or model.connector.output_layer:
        return "the connector is not two linear layers side by side, the first tower's first (model.connector)"
    return None


def _layers(source: Source, prefix: str, first: str, what: str) -> int:
    """Return the number of layers under ``prefix``.

    Raises:
        UserError: there are none, or some are missing.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d+)\..*")
    found = sorted({int(match[1]) for name in source.tensors if (match := pattern.fullmatch(name))})
    if first not in source or not found or found != list(range(len(found))):
        have = "none of its layers" if not found else f"layers {str(found)[:80]}"
        have += "" if first in source else f", and no {first}"
        raise UserError(
            f"{source.path}: has no whole {what} ({have}), and each picture is rendered for two towers; put its weights"
            " beside the others"
        )
    return len(found)


def _clip(source: Source, where: str) -> Tree:
    """Return the keys of the first tower, by the shapes of its tensors.

    Raises:
        UserError: it is missing, or of a shape that CLIP's has not.
    """
    table, patches = f"{_LOW}embeddings.position_embedding.weight", f"{_LOW}embeddings.patch_embedding.weight"
    layers = _layers(source, f"{_LOW}encoder.layers.", patches, f"CLIP under {_LOW}")
    width, _, _, patch = _four(source, patches)
    rows = source.shape(table)[0] if table in source else 0
    grid = math.isqrt(max(0, rows - 1))
    if grid**2 != rows - 1 or grid == 0:
        raise UserError(f"{source.path}: {table} has {rows} rows, which are no class token and a square of patches")
    tree = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": source.shape(f"{_LOW}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(source, width, patches),
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
    }
    layer = need(source.config, "vision_select_layer", where)
    if type(layer) is not int:
        raise UserError(f"{where}: vision_select_layer is {str(layer)[:40]!r}; it must be a number of a layer, as -2")
    return transformers_vision(tree, layer, f"{where}: vision_select_layer for {_LOW}")


def _sam(source: Source) -> Tree:
    """Return the keys of the second tower, as a tower has them, by the shapes of its tensors.

    Raises:
        UserError: it is missing, or not whole.
    """
    table = f"{_HIGH}pos_embed"
    layers = _layers(source, f"{_HIGH}blocks.", table, f"SAM under {_HIGH}")
    _, side, columns, width = _four(source, table)
    if side != columns or side % 4:
        raise UserError(
            f"{source.path}: {table} is of {side} x {columns} patches, which two convolutions make no"
            " quarter of on each side"
        )
    patch = _four(source, f"{_HIGH}patch_embed.proj.weight")[-1]
    spans = [(source.shape(f"{_HIGH}blocks.{number}.attn.rel_pos_h")[0] + 1) // 2 for number in range(layers)]
    windows = sorted({span for span in spans if span != side})
    if len(windows) > 1:
        raise UserError(
            f"{source.path}: the tables of positions under {_HIGH}blocks are of windows of {windows} patches; one size "
            "is supported"
        )
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": layers,
        "num_attention_heads": _heads(source, width, table),
        "ffn_hidden_size": source.shape(f"{_HIGH}blocks.0.mlp.lin1.weight")[0],
        "window_size": windows[0] if windows else side,
        "global_layers": tuple(number for number, span in enumerate(spans) if span == side),
        "neck_size": source.shape(f"{_HIGH}neck.0.weight")[0],
        "output_grid": side // 4,
        "layernorm_epsilon": _EPSILON["high_layernorm_epsilon"],
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


def _four(source: Source, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor of four axes.

    Raises:
        UserError: it has others.
    """
    shape = source.shape(name)
    if len(shape) != 4:
        raise UserError(f"{source.path}: {name} has the shape {list(shape)}; it must have four axes")
    return shape


def _heads(source: Source, width: int, name: str) -> int:
    if width % _HEAD:
        raise UserError(f"{source.path}: {name} is {width} wide, which is no multiple of {_HEAD}, the width of a head")
    return width // _HEAD
