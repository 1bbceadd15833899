"""MiniCPM-V 1.0, 2.0 and MiniCPM-Llama3-V 2.5 (arXiv 2408.01800), as their authors publish them: code and weights.

Facts are those of ``modeling_minicpmv.py``, ``resampler.py`` and ``configuration_minicpm.py`` beside the weights on the
hub (copies with their history: github.com/HwwwwwwwH/MiniCPM-V-2 and github.com/theonlyengine/VQA_Model, of 2.5), of
vLLM's ``minicpmv.py``, and of timm 0.9.10, which 2.0 takes its tower from. Transformers has classes from 4.6 on.

The code of 2.5 tells its tower (Transformers' ``Idefics2VisionTransformer``) of patches in one row, not of a slice's
rows and columns: positions are those of a line (``bucketed_line``). With ``batch_vision_input`` it fills smaller slices
up to the largest one of the batch, masks nothing of that, and counts it in the line; here each slice is by itself,
which is what it does without that key, and with it where all slices have as many patches.

The code of 1.0 was not at hand. That it squashes pictures, and that its keys see the queries' table resized (Qwen-VL's
resampler), is read off what 2.0 kept of it: ``get_abs_pos`` and the paths without ``adaptive`` and ``slice_mode``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.resampler_2d.tables import MINICPM_RESAMPLER
from megavlm.architectures.towers.packed_vit.tables import SIGLIP_VISION, TIMM_VISION
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.schema import ImageConfig, ModelConfig, VisionConfig
from megavlm.data.media import plan_of
from megavlm.families.common import expect, flag, need, number
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.llama import LLAMA
from megavlm.families.minicpm import MINICPM
from megavlm.families.preprocessor import PREPROCESSOR
from megavlm.families.text_kinds import TextKind, own_code
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_HEAD = 128
"""Width of a head of the resampler, which the authors' code has fixed."""
_TIMM = "vit_so400m_patch14_siglip_384.webli"
_TIMM_HEADS, _TIMM_LAYERS = 16, 27
"""Of timm's model, for which config.json has no keys."""
_CLASS = "MiniCPMV"
_SIGLIP: Tree = {
    "conv_bias": True, "add_bias_linear": True, "add_qkv_bias": True, "class_token": False, "pre_layernorm": False,
    "post_layernorm": True, "normalization": "LayerNorm", "gated_mlp": False, "layernorm_epsilon": 1e-6,
    "rotary_base": None, "window_size": None, "deepstack_layers": (), "spatial_merge_size": 1,
    "temporal_patch_size": 1, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
}  # fmt: skip
"""What the towers of both have one value for."""


_OF_BOTH = frozenset(
    {
        "conv_bias", "add_qkv_bias", "class_token", "pre_layernorm", "post_layernorm", "normalization", "gated_mlp",
        "layernorm_epsilon", "rotary_base", "deepstack_layers", "image_mean", "image_std",
    }
)  # fmt: skip
"""Of these, the keys that a tower on squares has too."""


class MiniCPMVFamily(Family):
    """What the versions share: ``llm``, ``vpm``, ``resampler``; slices."""

    # Their tokenizers have tokens for boxes; no question that is published was found.
    finds = None
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("packed_vit",), "connector": ("resampler_2d",), "language": ("decoder",),
    }  # fmt: skip
    image_plan: ClassVar[str | None] = "slices"
    kind: ClassVar[TextKind]
    tower: ClassVar[Table]
    fixed: ClassVar[Tree]
    """What the tower has one value for."""
    resampler: ClassVar[str]
    """Preset of the connector."""

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        expect(config, where, mm_use_im_start_end=True)
        language = self.kind.branch({**self.kind.defaults, **config, "model_type": self.kind.model_type}, where)
        # A head that is written out is one of its own, unless config.json ties it.
        head = "llm.lm_head.weight" in source
        language["tie_word_embeddings"] = not head or flag(config, "tie_word_embeddings", where, default=False)
        image, side = self._pictures(source, where)
        vision = {"image_size": side, **self._tower(source, where)}
        connector = self._connector(source, where)
        _check_file(source, vision, image, config)
        return {"vision": vision, "connector": connector, "language": language, "image": image}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = {"model": "llm.model.", "head": "llm.lm_head."}
        return [self.tower, MINICPM_RESAMPLER, dataclasses.replace(self.kind.table, names=names)]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration in the form of the published ones."""
        language, vision = model.language, model.vision
        code = f"modeling_minicpmv.{_CLASS}"
        return {
            **self.kind.write(language),
            "architectures": [_CLASS],
            "auto_map": {
                "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
                "AutoModel": code,
                "AutoModelForCausalLM": code,
            },
            "image_size": vision.image_size,
            "mm_use_im_start_end": True,
            "model_type": "minicpmv",
            "patch_size": vision.patch_size,
            "query_num": model.connector.num_queries,
            **self._tower_config(vision),
            **self._sliced(model),
        }

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Return how pictures are cut, of config.json and of the processor's file."""
        file = {"max_slice_nums": _most(model), "scale_resolution": model.vision.image_size}
        return {**self._sliced(model), PREPROCESSOR: file}

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be of its kinds."""
        for key, value in self.fixed.items():
            if getattr(model.vision, key) != value:
                return f"the tower has {key} {getattr(model.vision, key)!r}, {self.title} has {value!r}"
        connector = model.connector
        if connector.preset != self.resampler:
            return f"the connector is {connector.preset}, that of {self.title} is {self.resampler}"
        if connector.head_dim != _HEAD:
            return f"the resampler's heads are {connector.head_dim} wide; the authors' code makes them {_HEAD} wide"
        image = model.image
        made, wanted = _made(image), _made(ImageConfig(kind=self.image_plan or ""))
        if made != wanted:
            return f"pictures are made by {made}, those of {self.title} by {wanted}"
        try:
            plan_of(model)
        except UserError as error:
            return str(error)
        return self.kind.refuses(model.language) or own_code(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """The one that its code writes; a chat_template of its own says nothing of pictures."""
        assert self.template is not None
        return (self.template,)

    def _pictures(self, source: Source, where: str) -> tuple[Tree, int]:
        """Return ``model.image``, and the side of the square of whose area slices are."""
        raise NotImplementedError

    def _tower(self, source: Source, where: str) -> Tree:
        """Return ``model.vision`` without the size of pictures."""
        raise NotImplementedError

    def _tower_config(self, vision: VisionConfig) -> Tree:
        """Return the keys of the tower."""
        raise NotImplementedError

    def _sliced(self, model: ModelConfig) -> Tree:
        """Return the keys of config.json that say how pictures are cut."""
        raise NotImplementedError

    def _connector(self, source: Source, where: str) -> Tree:
        queries = need(source.config, "query_num", where)
        rows, width = source.shape("resampler.query")
        if rows != queries:
            raise UserError(f"{where}: query_num is {queries}, but resampler.query has {rows} rows; correct one")
        if width % _HEAD:
            raise UserError(
                f"{where}: hidden_size {width} is no multiple of {_HEAD}, the width of the resampler's heads"
            )
        return {"preset": self.resampler, "num_queries": rows, "head_dim": _HEAD}


class MiniCPMV1Family(MiniCPMVFamily):
    """``MiniCPMV`` 1.0: one squashed picture, timm's SigLIP, Qwen-VL's resampler, MiniCPM-2B."""

    name = "minicpm_v"
    title = "MiniCPM-V 1.0 (MiniCPMV)"
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("resampler",), "language": ("decoder",),
    }  # fmt: skip
    image_plan = "squash"
    template = "minicpm"
    kind = MINICPM
    tower = TIMM_VISION
    resampler = "resampler"
    fixed: ClassVar[Tree] = {
        **{key: value for key, value in _SIGLIP.items() if key in _OF_BOTH}, "activation": "gelu",
        "positional_antialias": True, "num_attention_heads": _TIMM_HEADS, "feature_layers": None, "s2_scales": None,
        "qk_norm": None, "layer_scale": False, "register_tokens": 0, "key_bias": True, "mlp_norm": False,
        "attention_norm": False,
    }  # fmt: skip

    def detect(self, source: Source) -> bool:
        """By ``model_type``, the name of the tower, and that pictures are not sliced."""
        return is_timm(source) and not source.config.get("slice_mode")

    def _pictures(self, source: Source, where: str) -> tuple[Tree, int]:
        return {"kind": "squash", "resample": "bicubic"}, int(number(source.config, "image_size", where, 448))

    def _tower(self, source: Source, where: str) -> Tree:
        fixed = {key: value for key, value in self.fixed.items() if key != "deepstack_layers"}
        return {"preset": "siglip_vit", **fixed, **timm_tower(source, where)}

    def _tower_config(self, vision: VisionConfig) -> Tree:
        return {"drop_vision_last_layer": vision.num_layers < _TIMM_LAYERS, "vision_encoder": _TIMM}

    def _sliced(self, model: ModelConfig) -> Tree:
        return {"image_size": model.vision.image_size, "slice_mode": False}

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Nothing but the size, which the tower's has."""
        return {}


class MiniCPMV2Family(MiniCPMVFamily):
    """``MiniCPMV`` 2.0: SigLIP by timm, whose table is resized to each slice; MiniCPM-2B."""

    name = "minicpm_v_2"
    title = "MiniCPM-V 2.0 (MiniCPMV)"
    template = "minicpm"
    kind = MINICPM
    tower = TIMM_VISION
    resampler = "minicpm_v_2_resampler"
    fixed: ClassVar[Tree] = {
        **_SIGLIP, "activation": "gelu", "positional_interpolation": "bicubic_antialias",
        "num_attention_heads": _TIMM_HEADS,
    }  # fmt: skip

    def detect(self, source: Source) -> bool:
        """By ``model_type``, the name of the tower, and that pictures are sliced."""
        return is_timm(source) and bool(source.config.get("slice_mode"))

    def _pictures(self, source: Source, where: str) -> tuple[Tree, int]:
        config = source.config
        return sliced(config, where), int(number(config, "scale_resolution", where, 448))

    def _tower(self, source: Source, where: str) -> Tree:
        return {"preset": "minicpm_v_2_vit", **timm_tower(source, where)}

    def _tower_config(self, vision: VisionConfig) -> Tree:
        return {"drop_vision_last_layer": vision.num_layers < _TIMM_LAYERS, "vision_encoder": _TIMM}

    def _sliced(self, model: ModelConfig) -> Tree:
        return {
            "max_slice_nums": _most(model),
            "scale_resolution": model.vision.image_size,
            "slice_mode": True,
        }


class MiniCPMLlama3V25Family(MiniCPMVFamily):
    """``MiniCPMV`` 2.5: SigLIP by Transformers' Idefics2, with positions in a line; Llama 3."""

    name = "minicpm_llama3_v_2_5"
    title = "MiniCPM-Llama3-V 2.5 (MiniCPMV)"
    template = "minicpm_llama_3"
    kind = LLAMA
    tower = SIGLIP_VISION
    resampler = "resampler_2d"
    fixed: ClassVar[Tree] = {**_SIGLIP, "activation": "gelu_tanh", "positional_interpolation": "bucketed_line"}

    def detect(self, source: Source) -> bool:
        """By ``model_type``, and that the tower's settings stand in ``vision_config``."""
        return source.config.get("model_type") == "minicpmv" and "vision_encoder" not in source.config

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        version = source.config.get("version")
        if version is not None and str(version) != "2.5":
            raise UserError(
                f"{config_file(source)}: version is {version}; of MiniCPM-V 1.0, 2.0 and Llama3-V 2.5 are supported, "
                "later ones are not"
            )
        expect(source.config, config_file(source), slice_mode=True)
        return super().branches(source)

    def _pictures(self, source: Source, where: str) -> tuple[Tree, int]:
        own = source.config.get("slice_config") or {"max_slice_nums": 1}
        return sliced(own, where), int(number(own, "scale_resolution", where, 448))

    def _tower(self, source: Source, where: str) -> Tree:
        visual = source.config.get("vision_config") or {}
        expect(visual, where, model_type=("idefics2", "idefics2_vision"), num_channels=3)
        expect(visual, where, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
        patch, side = visual.get("patch_size", 14), visual.get("image_size", 980)
        expect(source.config, where, patch_size=patch)
        expect(source.config.get("slice_config") or {}, f"{where}: slice_config", patch_size=patch)
        dropped = flag(source.config, "drop_vision_last_layer", where, default=True)
        return {
            "preset": "minicpm_v_2_5_vit",
            "patch_size": patch,
            "positional_grid": side // patch,
            "hidden_size": visual.get("hidden_size", 1152),
            "ffn_hidden_size": visual.get("intermediate_size", 4304),
            "num_layers": visual.get("num_hidden_layers", 27) - int(dropped),
            "num_attention_heads": visual.get("num_attention_heads", 16),
        }

    def _tower_config(self, vision: VisionConfig) -> Tree:
        return {
            "batch_vision_input": False,
            "drop_vision_last_layer": False,
            "version": "2.5",
            "vision_config": {
                "hidden_size": vision.hidden_size,
                "image_size": (vision.positional_grid or 0) * vision.patch_size,
                "intermediate_size": vision.ffn_hidden_size,
                "model_type": "idefics2",
                "num_attention_heads": vision.num_attention_heads,
                "num_hidden_layers": vision.num_layers,
                "patch_size": vision.patch_size,
            },
        }

    def _sliced(self, model: ModelConfig) -> Tree:
        own = {"max_slice_nums": _most(model), "model_type": "minicpmv", "patch_size": model.vision.patch_size}
        return {"slice_config": {**own, "scale_resolution": model.vision.image_size}, "slice_mode": True}


def is_timm(source: Source) -> bool:
    """Whether a checkpoint is one of the versions whose tower is timm's."""
    return source.config.get("model_type") == "minicpmv" and "vision_encoder" in source.config


def sliced(config: Mapping[str, Any], where: str) -> Tree:
    """Return ``model.image`` of the keys that say how many slices a picture has at most."""
    return {"kind": "slices", "max_tiles": int(number(config, "max_slice_nums", where, 9)), "resample": "bicubic"}


def timm_tower(source: Source, where: str) -> Tree:
    """Return the sizes of timm's SigLIP, which its tensors say.

    Raises:
        UserError: it is another tower, or its tensors do not go with ``patch_size`` or ``drop_vision_last_layer``.
    """
    config = source.config
    expect(config, where, vision_encoder=_TIMM)
    width, _, patch, _ = source.shape("vpm.patch_embed.proj.weight")
    if need(config, "patch_size", where) != patch:
        raise UserError(
            f"{where}: patch_size is {config['patch_size']}, but the patches of vpm.patch_embed are {patch} wide; "
            "correct it"
        )
    numbers = [int(found[1]) for name in source.tensors if (found := re.match(r"vpm\.blocks\.(\d+)\.", name))]
    layers = max(numbers, default=-1) + 1
    dropped = flag(config, "drop_vision_last_layer", where, default=layers < _TIMM_LAYERS)
    if dropped != (layers < _TIMM_LAYERS):  # the code would leave one out that is there, or run one that is not
        raise UserError(
            f"{where}: drop_vision_last_layer is {dropped}, but vpm.blocks has {layers} of the tower's {_TIMM_LAYERS} "
            "layers; correct one"
        )
    rows = source.shape("vpm.pos_embed")[1]
    return {
        "patch_size": patch,
        "positional_grid": round(rows**0.5),
        "hidden_size": width,
        "ffn_hidden_size": source.shape("vpm.blocks.0.mlp.fc1.weight")[0],
        "num_layers": layers,
        "num_attention_heads": _TIMM_HEADS,
    }


def _made(image: ImageConfig) -> str:
    return f"{image.kind} ({image.slice_markup}, {image.resample})"


def _most(model: ModelConfig) -> int:
    return model.image.max_tiles or 9


def _check_file(source: Source, vision: Tree, image: Tree, config: Mapping[str, Any]) -> None:
    """Check that the image processor's file, where there is one, makes what config.json says.

    Raises:
        UserError: it does not.
    """
    path = source.directory / PREPROCESSOR
    tree = read_json(path) if path.is_file() else {}
    said = {
        "max_slice_nums": image.get("max_tiles"), "scale_resolution": vision["image_size"],
        "patch_size": vision["patch_size"], "image_feature_size": config.get("query_num"),
    }  # fmt: skip
    for key, value in said.items():
        if value is not None and tree.get(key, value) != value:
            raise UserError(f"{path}: {key} is {tree[key]!r}, but config.json says {value}; correct one")
    expect(tree, str(path), norm_mean=[0.5] * 3, norm_std=[0.5] * 3)
