"""Checkpoints in pieces: xtuner's LLaVA (LLaVA-Phi-3-mini and its like), and HPT 1.5 Air and Edge.

github.com/InternLM/xtuner, ``xtuner/model/llava.py`` and ``modules/projector`` @ b934f462: ``visual_encoder/`` and
``projector/`` lie in the directory of the language model. github.com/HyperGAI/HPT, ``vlmeval/vlm/hpt1_5.py`` @
144edb7f: the language model is in ``llm/``, and SigLIP's table of 27 x 27 is stretched to 448 pixels.

Both take the features of the last layer but one, which stands in no file. xtuner drops the first of them, the class
token's behind a CLIP and a patch's behind a SigLIP; HPT keeps all, and its first code, of 1.5 Air, did as xtuner.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.common import expect, need
from megavlm.families.family import Constants, Family, Tree, config_file
from megavlm.families.preprocessor import normalisation, processor_files, resampling
from megavlm.families.projector import projector_branch, projector_table
from megavlm.families.text import no_half, text_branch, text_config, text_kind, text_table
from megavlm.families.towers import transformers_vision, transformers_vision_config
from megavlm.families.vit import no_llava_tower
from megavlm.weights.rules import Table
from megavlm.weights.source import CONFIG, Source

_TOWER, _PROJECTOR = "visual_encoder", "projector"
_ADAPTERS = {"llm_adapter": "the language model", "visual_encoder_adapter": "the tower"}
"""Folders of LoRAs, which xtuner's code puts on the parts beside them."""
_LAYER = -2
_SIZE = 448
"""HPT's ``vis_scale``, in pixels."""


class XtunerFamily(Family):
    """LLaVA as xtuner saves it, on a language model of any kind that Transformers has."""

    name = "xtuner"
    title = "LLaVA in xtuner's layout (visual_encoder/ and projector/ beside the language model)"
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("mlp",), "language": ("decoder",),
    }  # fmt: skip
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "published": {"vision": f"{_TOWER}/vision_model."},
        "transformers5": {"vision": f"{_TOWER}/"},
    }
    slotless = True
    own_rotary = True
    drops_first = True
    tower_folder = _TOWER

    def detect(self, source: Source) -> bool:
        """By its folders."""
        return _TOWER in source.pieces and not self._in_folder(source)

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["vision"] + "embeddings.patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures.

        Raises:
            UserError: a LoRA lies beside the parts, or these do not go together.
        """
        for folder, part in _ADAPTERS.items():
            if (source.directory / folder).is_dir():
                raise UserError(
                    f"{source.directory / folder}: a LoRA of {part} beside its weights; merge it into these with PEFT "
                    "if it is not yet, and move it elsewhere"
                )
        text_source = source.pieces.get(self.text_folder, source)
        where = config_file(text_source)
        kind = text_kind(text_source.config)
        if kind is None:
            known = f"{self.title} has those of Transformers that there are here"
            raise UserError(f"{where}: model_type is {text_source.config.get('model_type')!r}; {known}")
        language = text_branch(source, text_source.config, self._language("lm_head."), where)
        vision = self._vision(source.pieces[_TOWER])
        connector = self._connector(source, vision, language)
        # The tower has no features of a class token here.
        connector["drop_first_feature"] = self.drops_first and not vision["class_token"]
        return {"vision": vision, "connector": connector, "language": language, "image": self._pictures(source)}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        return [
            dataclasses.replace(TRANSFORMERS_VISION, prefix=self.styles[style]["vision"]),
            projector_table(model, f"{_PROJECTOR}/model."),
            text_table(model.language, model=self._language("model."), head=self._language("lm_head.")),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the language model's configuration, and those of tower and projector in their folders."""
        vision, clip = model.vision, model.vision.class_token
        tower = transformers_vision_config(vision)
        return {
            **text_config(model.language),
            f"{_TOWER}/{CONFIG}": {
                **tower,
                "architectures": ["CLIPVisionModel" if clip else "SiglipVisionModel"],
                "image_size": self._table_size(vision),
                # Its code takes the last layer but one: see constants.
                "num_hidden_layers": vision.num_layers + 1,
            },
            f"{_PROJECTOR}/{CONFIG}": {
                "architectures": ["ProjectorModel"],
                "auto_map": {
                    "AutoConfig": "configuration_projector.ProjectorConfig",
                    "AutoModel": "modeling_projector.ProjectorModel",
                },
                "bias": True,
                "depth": model.connector.depth,
                "hidden_act": "gelu",
                "llm_hidden_size": model.language.hidden_size,
                "model_type": "projector",
                "visual_hidden_size": vision.hidden_size,
            },
        }

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return a layer behind the features, and the norm behind that: what the tower's class has and nothing uses."""
        prefix, width, wide = self.styles[style]["vision"], model.vision.hidden_size, model.vision.ffn_hidden_size
        layer = f"{prefix}encoder.layers.{model.vision.num_layers}."
        found: Constants = {}
        for norm in (f"{layer}layer_norm1.", f"{layer}layer_norm2.", f"{prefix}post_layernorm."):
            found |= {f"{norm}weight": ((width,), 1.0), f"{norm}bias": ((width,), 0.0)}
        sizes = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for name, (out, into) in (sizes | {"mlp.fc1": (wide, width), "mlp.fc2": (width, wide)}).items():
            found |= {f"{layer}{name}.weight": ((out, into), 0.0), f"{layer}{name}.bias": ((out,), 0.0)}
        return found

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree:
        """Return the keys of a square; padding is xtuner's own, in front of them."""
        side = model.vision.image_size
        square = {"height": side, "width": side}
        if model.image.kind == "squash":
            return {"crop_size": square, "do_center_crop": False, "size": square}
        return {"crop_size": square, "do_center_crop": True, "size": {"shortest_edge": side}}

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be xtuner's kinds."""
        clip, first = model.vision.class_token, model.connector.drop_first_feature
        if not re.fullmatch("mlp[0-9]+x_gelu", model.connector.preset):
            return f"the connector is {model.connector.preset}, xtuner's projector is mlpNx_gelu"
        if model.vision.feature_layers is not None:
            return "features of several layers are taken (model.vision.feature_layers), here those of one"
        if model.image.kind not in ("pad", "squash", "crop"):
            return f"the image plan is {model.image.kind}; here one view of a picture is taken"
        if first != (self.drops_first and not clip):
            does = "drops" if self.drops_first and not clip else "keeps"
            return f"model.connector.drop_first_feature is {first}, and its code {does} the first patch"
        language = model.language
        if getattr(language, "add_bias_linear", False) and not language.lm_head_bias:
            return "the output layer has no bias (model.language.lm_head_bias), which Phi's class has"
        return self._no_tower(model.vision) or no_half(language, head_bias=True)

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """What becomes of pictures is its code's own."""
        own = self.plan
        if model.image.kind == own:
            return []
        return [f"model.image.kind: {model.image.kind} was trained, and its code has {own}"]

    def templates(self, source: Source) -> tuple[str, ...]:
        """By the language model."""
        kind = text_kind(source.config)
        return kind.templates if kind is not None else ()

    plan: ClassVar[str] = "pad"
    """What its code makes of pictures: xtuner's ``chat`` pads them with the mean colour."""

    def _in_folder(self, source: Source) -> bool:
        return "llm" in source.pieces

    def _language(self, name: str) -> str:
        return f"{self.text_folder}/{name}" if self.text_folder else name

    def _vision(self, tower: Source) -> Tree:
        """Return ``model.vision``."""
        half = tower.config.get("vision_config", tower.config)
        vision = transformers_vision(half, _LAYER, config_file(tower))
        return vision | normalisation(tower, vision["image_size"])

    def _table_size(self, vision: VisionConfig) -> int:
        """Return the pictures that the tower's table is for."""
        return int(vision.image_size)

    def _no_tower(self, vision: VisionConfig) -> str | None:
        return no_llava_tower(vision)

    def _pictures(self, source: Source) -> Tree:
        """Return ``model.image``."""
        tower = source.pieces[_TOWER]
        found = [(path, tree) for path, tree in processor_files(tower, areas=True) if tree]
        branch = {"kind": self.plan} | ({"fill": "mean"} if self.plan == "pad" else {})
        return {"resample": resampling(found[0][1], str(found[0][0])), **branch} if found else branch

    def _connector(self, source: Source, vision: Mapping[str, Any], language: Mapping[str, Any]) -> Tree:
        """Return ``model.connector``.

        Raises:
            UserError: the projector is for other parts, or of another depth than it says.
        """
        piece = source.pieces[_PROJECTOR]
        config, where = piece.config, config_file(piece)
        expect(config, where, hidden_act="gelu", bias=True, model_type="projector")
        connector = projector_branch(source, f"{_PROJECTOR}/model.")
        depth = need(config, "depth", where)
        if connector["preset"] != f"mlp{depth}x_gelu":
            raise UserError(
                f"{where}: depth is {depth!r}, but the weights beside it are {connector['preset']}; correct one"
            )
        tower, text = source.pieces[_TOWER], source.pieces.get(self.text_folder, source)
        last = f"{_PROJECTOR}/model.{2 * (depth - 1)}.weight"
        for key, width, name, axis, other in (
            ("visual_hidden_size", vision["hidden_size"], f"{_PROJECTOR}/model.0.weight", 1, tower),
            ("llm_hidden_size", language["hidden_size"], last, 0, text),
        ):
            told, there = need(config, key, where), source.shape(name)[axis]
            if told != width or there != width:
                raise UserError(
                    f"{where}: {key} is {told!r} and {name} has {there}, but {config_file(other)} says {width}; give "
                    "the parts that were trained together"
                )
        return connector


class HPTFamily(XtunerFamily):
    """HPT 1.5 Air (Llama 3) and Edge (Phi-3), on SigLIP at 448 pixels."""

    name = "hpt"
    title = "HPT 1.5 (llm/, visual_encoder/, projector/)"
    text_folder = "llm"
    drops_first = False
    plan = "squash"
    languages: ClassVar[Mapping[str, tuple[str, ...]]] = {"llama": ("hpt_llama_3",), "phi3": ("phi_3",)}
    """Its templates (``vlmeval/utils/xtuner_util.py``) by ``model_type``."""

    def detect(self, source: Source) -> bool:
        """By its folders."""
        return _TOWER in source.pieces and self._in_folder(source)

    def templates(self, source: Source) -> tuple[str, ...]:
        """By the language model."""
        kind = text_kind(source.pieces[self.text_folder].config)
        return self.languages.get(kind.model_type, ()) if kind is not None else ()

    def refuses(self, model: ModelConfig) -> str | None:
        """Language models are Llama's and Phi-3's."""
        reason = super().refuses(model)
        if reason is not None:
            return reason
        kind = text_config(model.language)["model_type"]
        return (
            None if kind in self.languages else f"the language model is a {kind}; HPT's are {', '.join(self.languages)}"
        )

    def _vision(self, tower: Source) -> Tree:
        half = tower.config.get("vision_config", tower.config)
        expect(half, config_file(tower), model_type="siglip_vision_model")
        vision = transformers_vision({**half, "model_type": "siglip_vision_model"}, _LAYER, config_file(tower))
        return vision | normalisation(tower, None) | {"image_size": _SIZE}

    def _table_size(self, vision: VisionConfig) -> int:
        return int(vision.positional_grid * vision.patch_size)

    def _no_tower(self, vision: VisionConfig) -> str | None:
        if vision.image_size != _SIZE:
            return (
                f"pictures are of {vision.image_size} pixels (model.vision.image_size), HPT's code makes them {_SIZE}"
            )
        if vision.class_token:
            return "the vision tower is not SigLIP's, HPT's is"
        tower: Any = vision
        return no_llava_tower(dataclasses.replace(tower, image_size=self._table_size(vision)))
