"""LLaVA as its authors' code writes it (github.com/haotian-liu/LLaVA, ``llava/model``; and LLaVA-NeXT's on Qwen2).

One flat ``config.json``: the language model's keys and ``mm_*``. The tower is named there (``mm_vision_tower``) and
lies in the checkpoint, or apart. Its shape is that of a known name, of the directory that is named, or of
``vision_config.json`` beside, which an export writes for towers that have no public name.

Other systems kept the layout and took other language models: a subclass of :class:`LlavaOriginalFamily` names them
(:mod:`megavlm.families.llava_like`). What a language model is read and written as, and its table, are those of its kind
(:data:`megavlm.families.text.TEXT_KINDS`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megavlm.data.media import plan_of
from megavlm.families.common import expect, need
from megavlm.families.family import Family, Tower, Tree, config_file
from megavlm.families.preprocessor import image_branch, llava_processor, normalisation
from megavlm.families.projector import projector_branch, projector_table
from megavlm.families.public_towers import TOWERS, known_tower, public_name
from megavlm.families.text import TEXT_KINDS, language_branch, with_head
from megavlm.families.text_kinds import TextKind, chosen, refused
from megavlm.families.towers import transformers_vision, transformers_vision_config
from megavlm.families.vit import no_llava_tower
from megavlm.weights.rules import Table
from megavlm.weights.source import CONFIG, Source

__all__ = ["TOWERS", "LlavaApartFamily", "LlavaOriginalFamily", "SystemLanguage", "pictures"]

VISION_CONFIG = "vision_config.json"
_HEAD = "lm_head."


@dataclass(frozen=True)
class SystemLanguage:
    """A language model that a system of LLaVA's layout is published with.

    Attributes:
        kind: name of its kind in :data:`TEXT_KINDS`.
        model_types: what ``config.json`` calls it; the first is written.
        architecture: the class, in ``config.json``.
        templates: how its conversations are written, where no checkpoint says it.
        keys: of ``config.json``, by what the kind calls them, those that have another name here.
        multiplies_features: image features are multiplied as its embeddings are.
        windows: its kind reads sliding windows; else one that is asked for is refused.
        head_bias: the system's code builds the output layer with a bias, where the kind may have one.
    """

    kind: str
    model_types: tuple[str, ...]
    architecture: str
    templates: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    multiplies_features: bool = False
    windows: bool = True
    head_bias: bool = False

    @property
    def text_kind(self) -> TextKind:
        """How it is read and written, and its table."""
        return TEXT_KINDS[self.kind]


class LlavaOriginalFamily(Family):
    """Tower, projector and language model in one checkpoint."""

    name = "llava_original"
    title = "LLaVA in its authors' layout (mm_projector, mm_vision_tower)"
    # As its data asks (llava_v1_5_mix665k); what the numbers count: issue 606 of haotian-liu/LLaVA.
    finds: ClassVar[str | None] = (
        "Please provide the bounding box coordinate of the region this sentence describes: {thing}"
    )
    box_plane = True
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",), "language": ("decoder",)}
    styles: ClassVar = {
        "published": {"tower": "model.vision_tower.vision_tower.vision_model."},
        "transformers5": {"tower": "model.vision_tower.vision_tower."},
    }
    preprocesses = True
    slotless = True
    own_files: ClassVar[tuple[str, ...]] = (VISION_CONFIG,)
    read_as: ClassVar[str | None] = "llava"
    # Else LLaVA's own code takes the tower from where mm_vision_tower says, and not from here.
    tower_keys: ClassVar = {"unfreeze_mm_vision_tower": True}
    own_multiplier = True
    projector_key: ClassVar[str] = "mm_projector_type"
    """Of ``config.json``, that names the projector."""
    projector: ClassVar[str] = "model.mm_projector."
    """What the names of the projector's weights begin with."""
    text_names: ClassVar[tuple[str, ...]] = ("model.layers.", "model.embed_tokens.")
    """What those of its language models begin with."""
    may_lack_tower: ClassVar[bool] = True
    """Whether a checkpoint may come without its tower, which then is of :class:`LlavaApartFamily`."""

    languages: ClassVar[tuple[SystemLanguage, ...]] = (
        # Llama 3 and Yi have Llama's names, and tokens of their own.
        SystemLanguage(
            "llama",
            ("llava_llama", "llava"),
            "LlavaLlamaForCausalLM",
            ("llama_3", "phi_3", "vicuna_v1", "chatml_direct"),
        ),
        SystemLanguage("qwen2", ("llava_qwen",), "LlavaQwenForCausalLM", ("qwen2",)),
        # Mistral without its window is a Llama.
        SystemLanguage("llama", ("llava_mistral",), "LlavaMistralForCausalLM", ("mistral",), windows=False),
    )
    """Language models of the system, in the order in which they are tried for a model that is written."""
    others: ClassVar[str] = "llava_(mpt|mixtral|gemma|baichuan)"
    """What ``model_type`` the system's other language models have, which are refused by name: a regular expression."""
    flags: ClassVar[Tree] = {
        "freeze_mm_mlp_adapter": False, "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "tune_mm_mlp_adapter": False, "use_mm_proj": True,
    }  # fmt: skip
    """Keys that are always the same in what is written."""

    def detect(self, source: Source) -> bool:
        """By the projector's type, the language model's names and whether the tower is there.

        Raises:
            UserError: it is the system's, and the tower is missing.
        """
        if not self._is_system(source):
            return False
        if self._holds_tower(source) or self.may_lack_tower:
            return self._holds_tower(source)
        tower, first = self.mm(source.config).get("mm_vision_tower"), next(iter(self.styles))
        raise UserError(
            f"{source.path}: {self.title} without a vision tower ({self.probe(first)} is not there), which is only "
            f"read with it; put that of mm_vision_tower {tower!r} beside the other weights"
        )

    def templates(self, source: Source) -> tuple[str, ...]:
        """By the language model: its authors' code has the forms, and no ``chat_template``."""
        return self._language_of(source.config).templates

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "embeddings.patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches."""
        where = config_file(source)
        self.check_pictures(source.config, where)
        vision = self.vision_of(source)
        self._check_width(source, vision)
        return {"vision": vision, **self._rest(source), "image": pictures(source, source, vision)}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        tower = dataclasses.replace(TRANSFORMERS_VISION, prefix=self.styles[style]["tower"])
        return [tower, self.connector_table(model), self._written(model.language).text_kind.table]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a flat configuration whose tower ends with the layer whose features are taken."""
        own = self._written(model.language)
        text = own.text_kind.write(model.language)
        text.pop("auto_map", None)  # of the language model alone
        config = {
            **{own.keys.get(key, key): value for key, value in text.items()},
            **self.flags,
            "architectures": [own.architecture],
            "model_type": own.model_types[0],
            **self.tower_keys,
            **self.pictures_of(model),
        }
        layers = model.vision.feature_layers
        config = self.with_mm(config, self.mm_config(model))
        return self.with_tower(config, self.vision_config(model.vision), list(layers) if layers else -1)

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Return what LLaVA's code does with pictures; ``square`` leaves it to the tower's processor."""
        return {"image_aspect_ratio": "pad" if model.image.kind == "pad" else "square"}

    def mm(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return LLaVA's keys on tower and projector (``mm_*``), wherever the system has them."""
        return config

    def with_mm(self, config: Tree, mm: Tree) -> Tree:
        """Return a configuration with these keys, see :meth:`mm`."""
        return {**config, **mm}

    def mm_config(self, model: ModelConfig) -> Tree:
        """Return the keys on the projector, and which features it takes."""
        return {
            "mm_hidden_size": model.vision.feature_size,
            "mm_projector_type": model.connector.preset,
            "mm_vision_select_feature": "patch",
        }

    def vision_of(self, source: Source) -> Tree:
        """Return ``model.vision``."""
        vision = self.tower_branch(source)
        return vision | normalisation(source, vision["image_size"])

    def tower_branch(self, source: Source) -> Tree:
        """Return ``model.vision`` as the tower's own configuration says it."""
        return transformers_vision(*self.tower_of(source.config, source.directory), config_file(source))

    def vision_config(self, vision: VisionConfig) -> Tree:
        """Return the tower's own configuration."""
        return transformers_vision_config(vision)

    def connector_of(self, source: Source) -> Tree:
        """Return ``model.connector``.

        Raises:
            UserError: the projector that is named has other weights, or is not known.
        """
        where, named = config_file(source), self.mm(source.config).get("mm_projector_type", "linear")
        begins = self.projector_in(source)
        if not re.fullmatch("linear|mlp[0-9]+x_gelu|identity", str(named)):
            there = next((name for name in source.tensors if name.startswith(begins)), "there are none")
            raise UserError(
                f"{where}: {self.projector_key} is {named!r}; {self.title} has linear and mlpNx_gelu here (the weights "
                f"under {begins}: {there})"
            )
        connector = projector_branch(source, begins)
        if named != connector["preset"]:
            raise UserError(
                f"{where}: {self.projector_key} is {named!r}, but the weights' names under {begins} are those "
                f"of {connector['preset']}; correct one"
            )
        return connector

    def projector_in(self, source: Source) -> str:
        """Return what the names of the projector's weights begin with in a checkpoint."""
        return self.projector

    def connector_table(self, model: ModelConfig) -> Table:
        """Return the table of the projector."""
        return projector_table(model, self.projector)

    def no_connector(self, model: ModelConfig) -> str | None:
        """Return why the system has no such connector, or None."""
        if not re.fullmatch("linear|mlp[0-9]+x_gelu", model.connector.preset):
            return f"the connector is {model.connector.preset}, LLaVA's are linear and mlpNx_gelu"
        own = self._written(model.language)
        wanted = getattr(model.language, "embedding_multiplier", 1.0) if own.multiplies_features else 1.0
        there = getattr(model.connector, "output_multiplier", 1.0)
        if there != wanted:
            return f"image features are multiplied by {there} (model.connector.output_multiplier), here by {wanted}"
        return None

    def no_tower(self, vision: VisionConfig) -> str | None:
        """Return why the system has no such tower, or None."""
        return no_llava_tower(vision)

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower:
        """Return the tower's own configuration and the layer whose features are taken.

        Raises:
            UserError: nothing tells the shape of the tower that is named.
        """
        where, mm = str(directory / CONFIG), self.mm(config)
        name, layer = str(need(mm, "mm_vision_tower", where)), mm.get("mm_vision_select_layer", -2)
        for path in (directory / VISION_CONFIG, directory / name / CONFIG, Path(name) / CONFIG):
            if path.is_file():
                tree = read_json(path)
                return tree.get("vision_config", tree), layer
        shape = known_tower(name)
        if shape is None:
            raise UserError(
                f"{where}: mm_vision_tower is {name!r}, of whose shape nothing is known; put that tower's config.json "
                f"to {directory / VISION_CONFIG}"
            )
        return shape, layer

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Name a public tower where the shape is one's, else write its shape to a file beside."""
        name = public_name(vision_config, layer)
        if name is not None:
            return {**config, "mm_vision_tower": name[0], "mm_vision_select_layer": name[1]}
        own_file = {VISION_CONFIG: vision_config}
        return {**config, "mm_vision_tower": "vision_tower", "mm_vision_select_layer": layer, **own_file}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return what LLaVA's processor needs."""
        return llava_processor(model.vision, image_token)

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be the system's kinds."""
        reason = refused(self._kinds(), with_head(model.language))
        if reason is None and getattr(model.language, "rotary_sections", None):
            reason = "the language model has three numbers a position (model.language.rotary_sections), LLaVA's one"
        if reason is None and not plan_of(model).fixed:
            reason = f"the image plan is {model.image.kind}; of LLaVA's those with one view of a picture are written"
        return reason or self.no_connector(model) or self.no_tower(model.vision)

    def extra_files(self, source: Source) -> dict[str, Tree]:
        """Return the tower's shape, where it comes from a directory that need not be there for an export."""
        known = known_tower(str(self.mm(source.config).get("mm_vision_tower"))) is not None
        if known or (source.directory / VISION_CONFIG).is_file():
            return {}
        return {VISION_CONFIG: self.tower_of(source.config, source.directory)[0]}

    def check_pictures(self, config: Mapping[str, Any], where: str) -> None:
        """Check what is asked of pictures.

        Raises:
            UserError: it is not done here.
        """
        expect(config, where, mm_use_im_start_end=False, image_aspect_ratio=("pad", "square"), s2=False)
        mm = self.mm(config)
        tower = str(mm.get("mm_vision_tower"))
        if mm.get("mm_vision_select_feature", "patch") != "patch":
            value = mm["mm_vision_select_feature"]
            raise UserError(f"{where}: mm_vision_select_feature is {value!r}; of {tower} only 'patch' is supported")
        if config.get("mm_resampler_type") is not None:
            raise UserError(f"{where}: mm_resampler_type is {config['mm_resampler_type']!r}; only null is supported")

    def _is_system(self, source: Source) -> bool:
        config = source.config
        kind = config.get("model_type")
        if not isinstance(kind, str) or not self.describes(config):
            return False
        if any(kind in one.model_types for one in self.languages):
            # CodeFuse-VLM has llava_qwen as well, on Qwen v1.
            return any(name.startswith(self.text_names) for name in source.tensors)
        if re.fullmatch(self.others, kind):
            known = ", ".join(one.model_types[0] for one in self.languages)
            raise UserError(
                f"{config_file(source)}: model_type {kind!r}: of {self.title.partition(' in ')[0]}'s language models "
                f"{known} are known"
            )
        return False

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration says of tower and projector what the system's do."""
        return "mm_projector_type" in config or "mm_vision_tower" in config

    def _holds_tower(self, source: Source) -> bool:
        return any(self.probe(style) in source for style in self.styles)

    def _language_of(self, config: Mapping[str, Any]) -> SystemLanguage:
        return next(one for one in self.languages if config.get("model_type") in one.model_types)

    def _kinds(self) -> list[TextKind]:
        return [one.text_kind for one in self.languages]

    def _written(self, language: LanguageConfig) -> SystemLanguage:
        """Return what a model is written as; the first where it is refused, for the sake of messages."""
        kind = chosen(self._kinds(), with_head(language))
        return next((one for one in self.languages if kind is one.text_kind), self.languages[0])

    def _rest(self, source: Source) -> Tree:
        """Return connector and language model."""
        config, where = source.config, config_file(source)
        connector, own = self.connector_of(source), self._language_of(config)
        if not own.windows and config.get("sliding_window") is not None:
            raise UserError(f"{where}: sliding_window is {config['sliding_window']!r}; only null is supported")
        renamed = {theirs: kind for kind, theirs in own.keys.items()}
        text = {renamed.get(key, key): value for key, value in config.items()}
        language = language_branch(own.text_kind, source, {**text, "model_type": own.kind}, _HEAD, where)
        if own.multiplies_features:
            connector["output_multiplier"] = language["embedding_multiplier"]
        return {"connector": connector, "language": language}

    def _check_width(self, source: Source, vision: Mapping[str, Any]) -> None:
        """Check that projector and tower are of one width, by their configurations and by the projector's weights.

        Raises:
            UserError: they are not; both are named.
        """
        where, mm = config_file(source), self.mm(source.config)
        sides = len(vision["feature_layers"] or (0,)) * len(vision.get("s2_scales") or (0,))
        width, tower = vision["hidden_size"] * sides, mm["mm_vision_tower"]
        if mm.get("mm_hidden_size", width) != width:
            raise UserError(
                f"{where}: mm_hidden_size is {mm['mm_hidden_size']!r}, but the features of mm_vision_tower {tower!r} "
                f"are {width} wide; correct one"
            )
        begins = self.projector_in(source)
        for name in (f"{begins}0.weight", f"{begins}weight"):
            there = source.shape(name)[-1] if name in source else width
            if there != width:
                raise UserError(
                    f"{source.path}: {name} is for features {there} wide, but those of mm_vision_tower {tower!r} are "
                    f"{width} wide; name the tower that the projector was trained with"
                )


class LlavaApartFamily(LlavaOriginalFamily):
    """The same without the tower's weights: they are those that ``mm_vision_tower`` names."""

    name = "llava_original_apart"
    title = "LLaVA in its authors' layout, its tower apart"
    with_tower_trained = LlavaOriginalFamily.name
    parts = ("connector", "language")

    def detect(self, source: Source) -> bool:
        """As LLaVA in its authors' layout."""
        return self._is_system(source) and not self._holds_tower(source)

    def branches(self, source: Source) -> Tree:
        """Return two branches."""
        self.check_pictures(source.config, config_file(source))
        return self._rest(source)

    def style_of(self, source: Source) -> str:
        """There is no tower to tell."""
        return next(iter(self.styles))

    def extra_files(self, source: Source) -> dict[str, Tree]:
        """Return none: the tower goes home by itself."""
        return {}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return two tables."""
        return super().tables(model, style)[1:]

    def tower_apart(self, source: Source, vision: Path | None) -> tuple[Path, Any]:
        """Return what the user says, or the directory that config.json names.

        Raises:
            UserError: the user does not say, and the name in config.json is no directory.
        """
        name, layer = str(source.config.get("mm_vision_tower")), source.config.get("mm_vision_select_layer", -2)
        if vision is not None:
            return vision, layer
        for path in (source.directory / name, Path(name)):
            if path.is_dir():
                return path, layer
        raise UserError(
            f"{source.path}: has no vision tower; config.json names it (mm_vision_tower {name!r}): give its directory "
            "with --vision DIR"
        )

    def pictures(self, source: Source, tower: Source, vision: Mapping[str, Any]) -> Tree:
        """As LLaVA in its authors' layout."""
        return pictures(source, tower, vision)


def pictures(source: Source, tower: Source, vision: Mapping[str, Any]) -> Tree:
    """Return ``model.image``: padded where config.json says so, else as the tower's own processor does.

    Args:
        source: the checkpoint.
        tower: where the processor's file lies, if there is one.
        vision: ``model.vision``.
    """
    clip = bool(vision["class_token"])
    if source.config.get("image_aspect_ratio") == "pad":
        return image_branch(source, vision["image_size"], clip=clip)
    own = image_branch(tower, vision["image_size"], clip=clip)
    return own or {"kind": "crop" if clip else "squash"}
