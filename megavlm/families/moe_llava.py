"""MoE-LLaVA (arXiv 2401.15947) as its authors' code and DeepSpeed write it (PKU-YuanGroup/MoE-LLaVA @ 24bcef9d).

LLaVA's original layout with other names of tower and projector, and a language model whose MLPs are mixtures of
experts in every second layer. What DeepSpeed's gate of two experts computes (``top2gating``,
deepspeed/moe/sharded_moe.py @ 0c691a52): a softmax over all experts, of which the two chosen are divided by their sum,
which is a softmax over the two. It chooses the second with Gumbel noise, in answers too, and takes tokens in their
order up to a capacity; what is left out gives its share to the other expert. Here both are the best two, and capacity
is of training alone (docs/experts.md).

Of SigLIP its code (``siglip_encoder.py`` @ 33afc0d) drops the first patch, as if it were CLIP's class token.

On Qwen v1 (``language_model/llava_qwen_moe.py``) all of it lies under ``transformer``, as Qwen v1's own weights do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.decoders.decoder.tables import (
    MOE_LLAVA_LANGUAGE,
    MOE_LLAVA_PHI_LANGUAGE,
    MOE_LLAVA_QWEN_LANGUAGE,
    QWEN_LANGUAGE,
)
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.common import expect, need
from megavlm.families.decoders import qwen_config, qwen_language
from megavlm.families.experts import other_experts
from megavlm.families.family import Tree, config_file
from megavlm.families.llava_like import EPOCH, LikeFamily
from megavlm.families.llava_original import SystemLanguage
from megavlm.families.text_kinds import TextKind
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_MM = {
    "mm_vision_tower": "mm_image_tower", "mm_projector_type": "image_projector_type",
}  # fmt: skip
"""What LLaVA calls a key, and MoE-LLaVA."""
_TABLES = {"stablelm": MOE_LLAVA_LANGUAGE, "phi": MOE_LLAVA_PHI_LANGUAGE, "qwen": MOE_LLAVA_QWEN_LANGUAGE}
_TOPS = {"qwen": "transformer."}
"""What all names but the output layer's begin with, where that is not ``model.``."""
_TOP = 2
_MODES = ("sparse", "dense", "first_half", "second_half", "custom")


def _grouped(language: LanguageConfig) -> str | None:
    grouped = language.num_query_groups != language.num_attention_heads
    if language.rope_scaling is not None or grouped:
        return "the language model has grouped queries or stretched positions, which Qwen v1 has not"
    return None


_QWEN = TextKind(
    model_type="qwen",
    title="Qwen v1",
    table=QWEN_LANGUAGE,
    read=qwen_language,
    write=qwen_config,
    fixed={"add_qkv_bias": True},
    narrow=_grouped,
    layer_names="qwen",
    in_transformers=False,
)


class _Qwen(SystemLanguage):
    """Qwen v1, which no other system of LLaVA's layout has."""

    @property
    def text_kind(self) -> TextKind:
        """How it is read and written, and its table."""
        return _QWEN


class MoeLlavaFamily(LikeFamily):
    """On StableLM-2, Phi-2 and Qwen-1.8B."""

    name = "moe_llava"
    title = "MoE-LLaVA in its authors' layout (on StableLM-2, Phi-2 and Qwen-1.8B)"
    others = "moe_llava_.*"
    read_as = None
    projector_key = "image_projector_type"
    drops_first = True
    projector: ClassVar[str] = "model.mm_projector.image_spatial_proj."
    text_names = (*LikeFamily.text_names, "transformer.h.", "transformer.wte.")
    styles: ClassVar = {
        "published": {"tower": "model.image_tower.image_tower.vision_model."},
        "transformers5": {"tower": "model.image_tower.image_tower."},
    }
    languages: ClassVar[tuple[SystemLanguage, ...]] = (
        SystemLanguage(
            "stablelm", ("moe_llava_stablelm",), "MoELLaVAStablelmForCausalLM", ("vicuna_v1_endoftext",), EPOCH
        ),
        SystemLanguage("phi", ("moe_llava_phi",), "MoELLaVAPhiForCausalLM", ("vicuna_v1_endoftext",)),
        # conversation.py: "qwen" is "phi".
        _Qwen("qwen", ("moe_llava_qwen",), "MoELLaVAQWenForCausalLM", ("vicuna_v1_endoftext",)),
    )
    flags: ClassVar = {
        "freeze_mm_mlp_adapter": False, "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "mm_video_tower": None, "tune_mm_mlp_adapter": False, "use_mm_proj": True,
    }  # fmt: skip

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return none: Transformers has no class for it."""
        return {}

    def describes(self, config: Mapping[str, Any]) -> bool:
        """By the tower's key."""
        return "mm_image_tower" in config

    def mm(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return LLaVA's keys."""
        return {**config, **{ours: config[theirs] for ours, theirs in _MM.items() if theirs in config}}

    def with_mm(self, config: Tree, mm: Tree) -> Tree:
        """Write the projector's."""
        return {**config, **{_MM.get(key, key): value for key, value in mm.items()}}

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Write the tower's."""
        found = super().with_tower(config, vision_config, layer)
        return {_MM.get(key, key): value for key, value in found.items()}

    def check_pictures(self, config: Mapping[str, Any], where: str) -> None:
        """Check what is asked of pictures; of films, which Video-LLaVA's code has beside them, nothing is known here.

        Raises:
            UserError: it is not done here.
        """
        super().check_pictures(config, where)
        expect(config, where, mm_video_tower=None)

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        kind = self._written(model.language).kind
        first = super().tables(dense_model(model), style)[:2]
        moved = [dataclasses.replace(one, prefix=_under(kind, one.prefix)) for one in first]
        return [*moved, _TABLES[kind]]

    def projector_in(self, source: Source) -> str:
        """By the language model."""
        return _under(self._language_of(source.config).kind, self.projector)

    def style_of(self, source: Source) -> str:
        """By the tower's names."""
        kind = self._language_of(source.config).kind
        return next((s for s in self.styles if _under(kind, self.probe(s)) in source), next(iter(self.styles)))

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a flat configuration, with what DeepSpeed's layer is made of."""
        language = model.language
        layers = [layer for layer, here in enumerate(language.expert_layers) if here]
        moe = {
            "capacity_factor": 1.5, "ep_size": 1, "eval_capacity_factor": 2.0, "min_capacity": 0, "moe_enable": True,
            "moe_layers_idx": layers, "moe_mode": "custom", "num_experts": [language.num_moe_experts] * len(layers),
            "router_aux_loss_coef": 0.01, "top_k_experts": language.moe_router_topk, "train_modules": [],
            "use_residual": False,
        }  # fmt: skip
        return {**super().config(dense_model(model), tokens), "moe": moe}

    def branches(self, source: Source) -> Tree:
        """Return the branches; of SigLIP one feature less."""
        found = super().branches(source)
        if "connector" in found and "vision" in found:
            found["connector"]["drop_first_feature"] = not found["vision"]["class_token"]
        return found

    def refuses(self, model: ModelConfig) -> str | None:
        """Experts must be DeepSpeed's kind, all else the system's."""
        language = model.language
        if getattr(model.connector, "drop_first_feature", False) == bool(model.vision.class_token):
            return "its code drops SigLIP's first patch, and of CLIP none (model.connector.drop_first_feature)"
        if reason := other_experts(language):
            return reason
        if language.expert_width != language.ffn_hidden_size:
            return "the language model's moe_ffn_hidden_size is not its ffn_hidden_size; MoE-LLaVA has one width"
        if language.moe_router_topk != _TOP or language.moe_router_pre_softmax:
            return "a token's scores are not a softmax over two experts (moe_router_topk, moe_router_pre_softmax)"
        return super().refuses(dense_model(model))

    def _holds_tower(self, source: Source) -> bool:
        kind = self._language_of(source.config).kind
        return any(_under(kind, self.probe(style)) in source for style in self.styles)

    def _written(self, language: LanguageConfig) -> SystemLanguage:
        return super()._written(dense(language))

    def _rest(self, source: Source) -> Tree:
        found, where = super()._rest(source), config_file(source)
        found["language"] |= _experts(source.config, found["language"]["num_layers"], where)
        return found


def _under(kind: str, name: str) -> str:
    """Return what a name, or a beginning of one, is where this language model is."""
    return _TOPS.get(kind, "model.") + name.removeprefix("model.")


def _experts(config: Mapping[str, Any], layers: int, where: str) -> Tree:
    """Return the keys of experts.

    Raises:
        UserError: a key is missing or wrong, or asks for what is not there.
    """
    moe = need(config, "moe", where)
    if not isinstance(moe, Mapping):
        raise UserError(f"{where}: moe is {str(moe)[:40]!r}; it holds the keys of DeepSpeed's layer")
    inside = f"{where}: moe"
    expect(moe, inside, moe_enable=True, use_residual=False, top_k_experts=_TOP, moe_mode=_MODES)
    here, counts = need(moe, "moe_layers_idx", inside), need(moe, "num_experts", inside)
    if not _rising(here, layers):
        raise UserError(f"{inside}: moe_layers_idx is {here!r}; it lists numbers of layers, 0 to {layers - 1}, rising")
    if not isinstance(counts, list | tuple) or len(counts) != len(here) or len(set(map(str, counts))) != 1:
        raise UserError(f"{inside}: num_experts is {counts!r}; one number is known, once for each of moe_layers_idx")
    if type(counts[0]) is not int or counts[0] < _TOP:
        raise UserError(f"{inside}: num_experts is {counts!r}; a mixture has at least 2")
    plan = tuple(int(layer in here) for layer in range(layers))
    every = here[1] - here[0] if len(here) > 1 else layers
    regular = plan == tuple(int(layer % every == 0) for layer in range(layers))
    return {"num_moe_experts": counts[0], "moe_router_topk": _TOP, "moe_layer_freq": every if regular else plan}


def _rising(numbers: Any, layers: int) -> bool:
    if not isinstance(numbers, list | tuple) or not numbers or any(type(one) is not int for one in numbers):
        return False
    return list(numbers) == sorted(set(numbers)) and numbers[0] >= 0 and numbers[-1] < layers


def dense(language: LanguageConfig) -> LanguageConfig:
    """Return a language model with an MLP in the place of its experts."""
    plain: Any = {"num_moe_experts": None, "moe_layer_freq": 1, "moe_router_topk": _TOP}
    return dataclasses.replace(language, **plain)


def dense_model(model: ModelConfig) -> ModelConfig:
    """Return a model whose language model has no experts."""
    return dataclasses.replace(model, language=dense(model.language))
