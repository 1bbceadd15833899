"""CogVLM (arXiv 2311.03079) as its authors publish it: code and weights, no class in Transformers.

Facts are those of ``modeling_cogvlm.py``, ``visual.py``, ``configuration_cogvlm.py`` and ``config.json`` of
THUDM/cogvlm-chat-hf, cogvlm-base-{224,490}-hf and cogvlm-grounding-generalist-hf. Its ``config.json`` has no
``model_type``; its tower ends where its features are taken, with the last but one layer of EVA02-CLIP-E. CogVLM2, whose
image tokens have a bias on QKV and whose connector begins with a convolution, is told by its keys and refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.glu.tables import COGVLM_GLU
from megavlm.architectures.decoders.decoder.tables import COGVLM_LANGUAGE
from megavlm.architectures.towers.vit.tables import COGVLM_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.data.box_words import COGVLM_BOXES
from megavlm.families.common import expect, need, number
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.text_kinds import TextKind, odd_heads, shape
from megavlm.families.towers import CLIP_MEAN, CLIP_STD
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_CLASS = "CogVLMForCausalLM"
_TEMPLATES = {"chat": "cogvlm", "vqa": "cogvlm_vqa", "base": "cogvlm_base"}
"""``template_version``, and what it is here."""
_BASE, _EPSILON = 10000, 1e-5
"""Of rotary angles, and of the connector's norm: its code has them fixed."""
_TOWER: Tree = {
    "class_token": True, "class_feature": False, "conv_bias": True, "pre_layernorm": False, "post_layernorm": False,
    "branch_norms": "behind", "normalization": "LayerNorm", "activation": "gelu", "gated_mlp": False, "mlp_norm": False,
    "attention_norm": False, "register_tokens": 0, "add_qkv_bias": True, "key_bias": True, "qk_norm": None,
    "layer_scale": False, "rotary_base": None, "rotary_grid": None, "feature_layers": None, "s2_scales": None,
    "deepstack_layers": (), "positional_antialias": False, "image_mean": tuple(CLIP_MEAN), "image_std": tuple(CLIP_STD),
}  # fmt: skip
"""What the tower has one value for."""


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, hidden_act="silu", rope_theta=_BASE, rope_scaling=None, num_key_value_heads=None)
    expect(config, where, num_multi_query_heads=None, head_dim=None)
    return shape(config, where, "llama")


def _write(language: LanguageConfig) -> Tree:
    return {
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "initializer_range": language.init_method_std,
        "intermediate_size": language.ffn_hidden_size,
        "max_position_embeddings": language.max_position_embeddings,
        "num_attention_heads": language.num_attention_heads,
        "num_hidden_layers": language.num_layers,
        "rms_norm_eps": language.norm_epsilon,
        "tie_word_embeddings": language.tie_word_embeddings,
        "vocab_size": language.vocab_size,
    }


def _narrow(language: LanguageConfig) -> str | None:
    if language.num_query_groups != language.num_attention_heads:
        return "its heads share keys and values (model.language.num_query_groups), for which CogVLM has no key"
    if language.rotary_base != _BASE or language.rope_scaling is not None:
        return f"its rotary positions have another base than {_BASE}, or are stretched, for which CogVLM has no key"
    return odd_heads(language)


COGVLM_TEXT = TextKind(
    model_type="cogvlm", title="CogVLM", table=COGVLM_LANGUAGE, read=_read, write=_write,
    fixed={"visual_expert": True, "image_positions": "shared"}, narrow=_narrow, templates=("cogvlm",),
    in_transformers=False,
)  # fmt: skip


class CogVLMFamily(Family):
    """``CogVLMForCausalLM``, the first generation."""

    name = "cogvlm"
    title = "CogVLM (CogVLMForCausalLM)"
    finds = COGVLM_BOXES.asks
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("glu",), "language": ("decoder",),
    }  # fmt: skip
    template = "cogvlm"
    image_plan = "squash"
    norms_behind = visual_expert = own_rotary = True  # positions that slots share are of no fused kernel
    text: ClassVar[TextKind] = COGVLM_TEXT
    class_name: ClassVar[str] = _CLASS
    files: ClassVar[str] = "cogvlm"
    """What its Python files end with."""
    versions: ClassVar[Mapping[str, str]] = _TEMPLATES

    def detect(self, source: Source) -> bool:
        """By the class that ``config.json`` names."""
        return self.class_name in (source.config.get("architectures") or ())

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        _first_generation(config, where)
        both_weights(source)
        language = COGVLM_TEXT.branch(config, where)
        return {
            "vision": first_tower(need(config, "vision_config", where), where),
            "connector": self.connector(language),
            "language": language,
            "image": {"kind": self.image_plan, "resample": "bicubic"},
            "template": self.version(config, where),
        }

    @staticmethod
    def connector(language: Tree) -> Tree:
        """Return ``model.connector`` beside a language model."""
        return {"preset": "glu", "ffn_hidden_size": language["ffn_hidden_size"], "layernorm_epsilon": _EPSILON}

    def version(self, config: Mapping[str, Any], where: str) -> str:
        """Return the template that ``template_version`` names.

        Raises:
            UserError: there is none of that name.
        """
        version = config.get("template_version") or "chat"
        expect({"template_version": version}, where, template_version=tuple(self.versions))
        return self.versions[version]

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        return [COGVLM_VISION, COGVLM_GLU, COGVLM_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration in the form of the published ones."""
        vision = model.vision
        return {
            "architectures": [self.class_name],
            "auto_map": {
                "AutoConfig": f"configuration_{self.files}.{self.class_name.removesuffix('ForCausalLM')}Config",
                "AutoModelForCausalLM": f"modeling_{self.files}.{self.class_name}",
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **self.pictures_of(model),
            **self.text.write(model.language),
            "vision_config": {
                "dropout_prob": 0.0,
                "hidden_act": "gelu",
                "hidden_size": vision.hidden_size,
                "image_size": vision.image_size,
                "in_channels": 3,
                "intermediate_size": vision.ffn_hidden_size,
                "layer_norm_eps": vision.layernorm_epsilon,
                "num_heads": vision.num_attention_heads,
                "num_hidden_layers": vision.num_layers,
                "num_positions": vision.positional_grid**2 + 1,
                "patch_size": vision.patch_size,
            },
        }

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Return the key by which its code writes conversations, which stand behind a picture."""
        versions = {template: version for version, template in self.versions.items()}
        return {"template_version": versions.get(model.template, "chat")}

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """Its code has its templates in a Python file, and takes the one that ``config.json`` names."""
        if template in self.versions.values():
            return []
        known = ", ".join(self.versions.values())
        title = self.text.title
        return [f"model.template: {template} was trained, but {title}'s own code speaks {known} (template_version)"]

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be CogVLM's kinds."""
        vision, connector, image, title = model.vision, model.connector, model.image, self.text.title
        if (why := self.tower_refused(model)) is not None:
            return why
        if vision.positional_grid != vision.image_size // vision.patch_size:
            return f"the tower's positional table is {vision.positional_grid} wide, for pictures of another size"
        if connector.ffn_hidden_size != model.language.ffn_hidden_size:
            return (
                f"the connector's MLP is {connector.ffn_hidden_size} wide (model.connector.ffn_hidden_size), {title}"
                f" has one key for it and the language model's ({model.language.ffn_hidden_size})"
            )
        if connector.layernorm_epsilon != _EPSILON:
            return f"the connector's norm has the epsilon {connector.layernorm_epsilon}, {title}'s code {_EPSILON}"
        if (image.kind, image.resample) != (self.image_plan, "bicubic"):
            own = f"{self.image_plan} (bicubic)"
            return f"pictures are made by {image.kind} ({image.resample}), those of {title} by {own}"
        return self.text.refuses(model.language)

    def tower_refused(self, model: ModelConfig) -> str | None:
        """Return why the tower is not of the family's kind, or None."""
        for key, value in first_tower_keys().items():
            there = getattr(model.vision, key)
            if (tuple(there) if isinstance(there, list) else there) != value:
                return f"the tower has {key} {there!r}, CogVLM has {value!r}"
        return None

    def templates(self, source: Source) -> tuple[str, ...]:
        """The one that ``template_version`` names."""
        return (self.versions.get(source.config.get("template_version") or "chat", self.template),)


def _first_generation(config: Mapping[str, Any], where: str) -> None:
    """Check that it is not CogVLM2.

    Raises:
        UserError: it is; the message says what it has that is not built here.
    """
    for key in ("num_multi_query_heads", "ffn_hidden_size"):
        if config.get(key) is not None:
            raise UserError(
                f"{where}: {key} is a key of CogVLM2, whose bias on QKV of image tokens and whose convolution in front"
                " of the connector are not built here; CogVLM is, without this key"
            )


def both_weights(source: Source) -> None:
    """Check that no layer has weights for image tokens and lacks those for text, nor the other way round.

    Raises:
        UserError: one does; both are named.
    """
    pairs = (("vision_expert", "language_expert"), ("vision_mlp", "language_mlp"))
    for name in sorted(source.tensors):
        for vision, language in (*pairs, *((other, one) for one, other in pairs)):
            other = name.replace(f".{vision}", f".{language}", 1)
            if other != name and other not in source:
                what = ("image tokens", "text") if "vision" in vision else ("text", "image tokens")
                raise UserError(
                    f"{source.path}: {name}, a weight for {what[0]}, is there, but {other}, that for {what[1]}, is not;"
                    " a layer needs both: add the language model's weights (Vicuna-7B v1.5 in the published models), or"
                    " download the checkpoint whole"
                )


def first_tower_keys() -> Tree:
    """Return what EVA02-CLIP-E has one value for."""
    return dict(_TOWER)


def first_tower(visual: Mapping[str, Any], where: str) -> Tree:
    """Return ``model.vision`` of ``vision_config``.

    Raises:
        UserError: a key is missing, or has a value that the model here does not know.
    """
    expect(visual, where, hidden_act="gelu", in_channels=3)
    side, patch = need(visual, "image_size", where), need(visual, "patch_size", where)
    positions = need(visual, "num_positions", where)
    for key, value in (("image_size", side), ("patch_size", patch), ("num_positions", positions)):
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {key} is {str(value)[:40]!r}; it must be a whole number above 0")
    grid = math.isqrt(positions - 1)
    if grid**2 != positions - 1 or grid != side // patch:
        raise UserError(
            f"{where}: num_positions is {positions}, but pictures of {side} pixels have {side // patch} x"
            f" {side // patch} patches of {patch}, and a class token; correct one"
        )
    return {
        "preset": "eva02_e_vit",
        "image_size": side,
        "patch_size": patch,
        "hidden_size": need(visual, "hidden_size", where),
        "num_layers": need(visual, "num_hidden_layers", where),
        "num_attention_heads": need(visual, "num_heads", where),
        "ffn_hidden_size": need(visual, "intermediate_size", where),
        "positional_grid": grid,
        "layernorm_epsilon": number(visual, "layer_norm_eps", where),
    }
