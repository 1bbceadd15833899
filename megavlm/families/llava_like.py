"""Systems that kept LLaVA's original layout and took other language models: Bunny, Imp, Mipha, LLaVA-Phi, ALLaVA.

Facts are from the public repositories: BAAI-DCAI/Bunny @ 08273acb, MILVLG/imp @ 363a9bb6, zhuyiche/llava-phi @ 21dafbf5
(Mipha and LLaVA-Phi), FreedomIntelligence/ALLaVA @ 896b77f0. What they share is
:class:`megavlm.families.llava_original.LlavaOriginalFamily`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.common import expect, flag
from megavlm.families.eva02 import AUTHORS, eva02_table, eva02_tower, no_eva02
from megavlm.families.family import Tower, Tree, config_file
from megavlm.families.llava_original import LlavaOriginalFamily, SystemLanguage
from megavlm.families.preprocessor import normalisation
from megavlm.families.public_towers import known_tower, public_name
from megavlm.families.towers import transformers_vision_config
from megavlm.weights.rules import Table
from megavlm.weights.source import CONFIG, Source

# StableLM-2 as its first code has it (configuration_stablelm_epoch.py).
EPOCH = {"layer_norm_eps": "norm_eps", "partial_rotary_factor": "rope_pct"}


class LikeFamily(LlavaOriginalFamily):
    """What these have in common."""

    others = "-"
    may_lack_tower = False
    tower_keys: ClassVar = {}
    own_rotary = True
    clips: ClassVar[tuple[bool, ...]] = (True, False)
    """Whether its towers are CLIP's, SigLIP's."""
    own_layer: ClassVar[int | None] = None
    """The layer whose features its code takes, whatever config.json says."""

    def check_pictures(self, config: Mapping[str, Any], where: str) -> None:
        """Check the layer of a tower that its code takes by name: of one whose last layers were cut off it is another.

        Raises:
            UserError: it is not the one that the code takes.
        """
        super().check_pictures(config, where)
        mm = self.mm(config)
        if self.own_layer is not None and known_tower(str(mm.get("mm_vision_tower"))) is not None:
            expect(mm, where, mm_vision_select_layer=self.own_layer)

    def no_tower(self, vision: VisionConfig) -> str | None:
        """Return why the system has no such tower, or None."""
        reason = super().no_tower(vision)
        if reason is None and bool(vision.class_token) not in self.clips:
            reason = f"the vision tower is not CLIP's, {self.name}'s is"
        name = None if reason or self.own_layer is None else public_name(self.vision_config(vision), _layers(vision))
        if name is not None and name[1] != self.own_layer:
            reason = f"layer {name[1]} of {name[0]} is taken, and {self.name}'s code takes {self.own_layer}"
        return reason

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Say of an output layer's bias where it is not as the system's code builds it; the weights tell it here."""
        there = getattr(model.language, "lm_head_bias", False)
        other = there != self._written(model.language).head_bias
        return {**super().config(model, tokens), **({"lm_head_bias": there} if other else {})}

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """Name a bias that the system's code leaves out."""
        own = self._written(model.language)
        if own.head_bias or not getattr(model.language, "lm_head_bias", False):
            return []
        return [f"model.language.lm_head_bias: {own.architecture} builds the output layer without, and leaves it out"]


def _layers(vision: VisionConfig) -> Any:
    return list(vision.feature_layers) if vision.feature_layers else -1


_EVA, _EVA_FILE = "eva", "EVA02_CLIP_L_336_psz14_s6B.pt"
_EVA_TOP = "model.vision_tower.vision_tower.model."


class BunnyFamily(LikeFamily):
    """Bunny 1.0, on SigLIP or EVA02, and 1.1, which sees each picture at three sizes (S2)."""

    name = "bunny"
    title = "Bunny in its authors' layout"
    finds = LlavaOriginalFamily.finds  # its data holds LLaVA's (bunny_llava_1.4m)
    others = "bunny-.*"
    # Else its code takes the tower from where mm_vision_tower says.
    tower_keys: ClassVar = {"unfreeze_vision_tower": True}
    own_layer = -2
    styles: ClassVar = {**LlavaOriginalFamily.styles, _EVA: {**AUTHORS, "tower": _EVA_TOP, "top": _EVA_TOP}}
    languages: ClassVar[tuple[SystemLanguage, ...]] = (
        SystemLanguage("phi", ("bunny-phi",), "BunnyPhiForCausalLM", ("vicuna_v1_endoftext",)),
        # Its tokenizer began texts with a BOS until June 2024, as bunny/util/data_utils.py says.
        SystemLanguage(
            "phi3", ("bunny-phi3",), "BunnyPhi3ForCausalLM", ("vicuna_v1_endoftext_bos", "vicuna_v1_endoftext")
        ),
        SystemLanguage("stablelm", ("bunny-stablelm",), "BunnyStableLMForCausalLM", ("vicuna_v1_endoftext",), EPOCH),
        SystemLanguage("qwen2", ("bunny-qwen2", "bunny-qwen"), "BunnyQwen2ForCausalLM", ("vicuna_v1_endoftext",)),
        SystemLanguage("llama", ("bunny-llama",), "BunnyLlamaForCausalLM", ("vicuna_v1_end_of_text",)),
        # bunny_minicpm.py multiplies words and pictures alike.
        SystemLanguage(
            "minicpm", ("bunny-minicpm",), "BunnyMiniCPMForCausalLM", ("vicuna_v1",), multiplies_features=True
        ),
    )
    flags: ClassVar = {"freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False, "use_mm_proj": True}

    def vision_of(self, source: Source) -> Tree:
        """Return ``model.vision``; with S2 the tower's own pixels are those of a tile."""
        config, where = source.config, config_file(source)
        scales = self._scales(config, where)
        if self.style_of(source) == _EVA:
            if scales is not None:
                raise UserError(f"{where}: use_s2 goes with SigLIP; of EVA02's tower it is not known")
            return eva02_tower(source, self.styles[_EVA], self.own_layer)  # eva_vit.py has CLIP's mean and deviation
        if scales is None:
            return super().vision_of(source)
        plain = self.tower_branch(source)
        if plain["image_size"] != scales[0]:
            tower = config["mm_vision_tower"]
            raise UserError(
                f"{where}: s2_scales begins with tiles of {scales[0]}, but mm_vision_tower {tower!r} is for "
                f"{plain['image_size']} x {plain['image_size']}; correct one"
            )
        return plain | normalisation(source, None) | {"image_size": scales[-1], "s2_scales": list(scales)}

    def _scales(self, config: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
        if not flag(config, "use_s2", where, default=False):
            return None
        text = config.get("s2_scales", "384,768,1152")  # as siglip_encoder.py has it
        sides = str(text).split(",")
        if not all(side.strip().isdigit() for side in sides):
            raise UserError(f"{where}: s2_scales is {str(text)[:40]!r}; it must be pixels with commas between them")
        return tuple(sorted(int(side) for side in sides))

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return _EVA_TOP + "patch_embed.proj.weight" if style == _EVA else super().probe(style)

    def style_for(self, model: ModelConfig) -> str:
        """Return that of the tower."""
        return _EVA if _is_eva(model.vision) else super().style_for(model)

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        found = list(super().tables(model, style))
        return [eva02_table(self.styles[_EVA]), *found[1:]] if style == _EVA else found

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Its code knows one EVA02, by the name of its file."""
        if vision_config:
            return super().with_tower(config, vision_config, layer)
        return {**config, "mm_vision_tower": _EVA_FILE, "mm_vision_select_layer": self.own_layer}

    def extra_files(self, source: Source) -> dict[str, Tree]:
        """EVA02's tensors say its shape."""
        return {} if self.style_of(source) == _EVA else super().extra_files(source)

    def vision_config(self, vision: VisionConfig) -> Tree:
        """Return that of a tile; none of EVA02, for which there is no such configuration."""
        if _is_eva(vision):
            return {}
        return {**transformers_vision_config(vision), "image_size": vision.tile_size}

    def mm_config(self, model: ModelConfig) -> Tree:
        """Return its keys, S2's among them."""
        scales = model.vision.s2_scales
        own = {"s2_scales": ",".join(map(str, scales))} if scales else {}
        tree = {key: value for key, value in super().mm_config(model).items() if key != "mm_vision_select_feature"}
        return {**tree, "use_s2": scales is not None, **own}

    def no_tower(self, vision: VisionConfig) -> str | None:
        """S2 goes with SigLIP."""
        if _is_eva(vision):
            return no_eva02(vision)
        if vision.s2_scales is None:
            return super().no_tower(vision)
        if vision.class_token:
            return "the tower sees pictures at several sizes (model.vision.s2_scales), which Bunny does with SigLIP"
        tile = dataclasses.replace(vision, image_size=vision.tile_size, s2_scales=None)  # type: ignore[call-arg]
        return super().no_tower(tile)

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return none for S2, whose number of slots Transformers' processor would not find, and for EVA02."""
        other = model.vision.s2_scales or _is_eva(model.vision)
        return {} if other else super().processor(model, image_token)


def _is_eva(vision: VisionConfig) -> bool:
    """Whether a tower's layers are EVA's."""
    return not vision.key_bias


class ImpFamily(LikeFamily):
    """Imp v1 and v1.5; its code cuts the tower's last layer off."""

    name = "imp"
    title = "Imp in its authors' layout"
    finds = LlavaOriginalFamily.finds  # it is trained on LLaVA's data
    others = "imp_.*"
    languages: ClassVar[tuple[SystemLanguage, ...]] = (
        SystemLanguage("phi", ("imp",), "ImpForCausalLM", ("imp_phi2",), head_bias=True),
        SystemLanguage("phi3", ("imp_phi3",), "ImpPhi3ForCausalLM", ("imp_phi3",)),
        SystemLanguage("qwen2", ("imp_qwen2",), "ImpQwen2ForCausalLM", ("imp_qwen2",)),
    )


class AllavaFamily(LikeFamily):
    """ALLaVA and ALLaVA-Longer."""

    name = "allava"
    title = "ALLaVA in its authors' layout"
    finds = None  # its data has no boxes
    box_plane = False
    others = "llava_stablelm_.*"
    clips: ClassVar[tuple[bool, ...]] = (True,)
    languages: ClassVar[tuple[SystemLanguage, ...]] = (
        SystemLanguage("phi", ("llava_phi",), "LlavaPhiForCausalLM", ("allava",)),
        SystemLanguage("stablelm", ("llava_stablelm_1_6b",), "LlavaStableLM_1_6bForCausalLM", ("allava",), EPOCH),
    )


class LlavaPhiFamily(LikeFamily):
    """LLaVA-Phi; ``vision_config`` has tower and projector, and the tower lies one name higher."""

    name = "llava_phi"
    title = "LLaVA-Phi in its authors' layout"
    finds = LlavaOriginalFamily.finds  # its data is LLaVA's
    styles: ClassVar = {
        "published": {"tower": "model.vision_tower.vision_model."},
        "transformers5": {"tower": "model.vision_tower."},
    }
    clips: ClassVar[tuple[bool, ...]] = (True,)
    languages: ClassVar[tuple[SystemLanguage, ...]] = (
        SystemLanguage("phi", ("llava_phi",), "LlavaPhiForCausalLM", ("vicuna_v1_endoftext",)),
    )
    flags: ClassVar = {
        "freeze_vision_tower": False, "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "tune_mm_mlp_adapter": True,
    }  # fmt: skip
    own_files = ()
    kinds: ClassVar[tuple[str, str]] = ("llava_phi_clip_vision_model", "llava_phi_projector")
    """``model_type`` of tower and projector."""

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether ``vision_config`` has both."""
        both = config.get("vision_config")
        return isinstance(both, Mapping) and isinstance(both.get("vision_tower"), Mapping)

    def mm(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return LLaVA's keys of both."""
        both = config["vision_config"]
        tower, projector = both["vision_tower"], both.get("mm_projector") or {}
        named = tower.get("vision_model_name_or_path", "clip")
        taken = {key: value for key, value in tower.items() if key.startswith("mm_")}
        return {"mm_projector_type": "linear", **projector, **taken, "mm_vision_tower": named}

    def with_mm(self, config: Tree, mm: Tree) -> Tree:
        """Put them there."""
        projector = {key: mm[key] for key in ("mm_hidden_size", "mm_projector_type")}
        own = {"hidden_size": config["hidden_size"], "model_type": self.kinds[1], **projector}
        return {**config, "vision_config": {"mm_projector": own}}

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower:
        """Return what ``vision_config`` says; what it leaves out is as in the system's class, which is CLIP's."""
        where, tree = str(directory / CONFIG), config["vision_config"]["vision_tower"]
        expect(tree, where, model_type=self.kinds[0])
        expect(config["vision_config"].get("mm_projector") or {}, where, model_type=self.kinds[1])
        clip = "siglip" not in str(self.mm(config)["mm_vision_tower"])
        kind = "clip_vision_model" if clip else "siglip_vision_model"
        defaults = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32}
        return {**defaults, **tree, "model_type": kind}, tree.get("mm_vision_select_layer", -2)

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Put it into ``vision_config``."""
        clip = str(vision_config.get("model_type", "clip")).startswith("clip")
        named = public_name(vision_config, layer)
        tower = {
            **vision_config, "mm_vision_select_feature": "patch", "mm_vision_select_layer": layer,
            "model_type": self.kinds[0],
            "vision_model_name_or_path": named[0] if named else "clip" if clip else "siglip",
        }  # fmt: skip
        return {**config, "vision_config": {**config.get("vision_config", {}), "vision_tower": tower}}

    def extra_files(self, source: Source) -> dict[str, Tree]:
        """Return none: config.json has the tower's shape."""
        return {}


class MiphaFamily(LlavaPhiFamily):
    """Mipha, LLaVA-Phi's successor: SigLIP, and other language models."""

    name = "mipha"
    title = "Mipha in its authors' layout"
    clips = (True, False)
    others = "mipha_.*"
    languages: ClassVar[tuple[SystemLanguage, ...]] = (
        SystemLanguage("phi", ("mipha_phi",), "MiphaPhiForCausalLM", ("vicuna_v1_endoftext",), head_bias=True),
        # Transformers 4.38.2, which it pins, multiplies behind the place where pictures come in.
        SystemLanguage(
            "gemma", ("mipha_gemma",), "MiphaGemmaForCausalLM", ("vicuna_v1_gemma",), multiplies_features=True
        ),
    )
    kinds: ClassVar = ("mipha_vision_model", "mipha_projector")
