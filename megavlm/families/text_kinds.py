"""Kinds of language models: what ``config.json`` calls each, what it fixes of ours, and the names of its weights.

A kind is read and written alike where it stands alone and where it is the language half of a family (``text_config``):
:mod:`megavlm.families.text` has all of them by ``model_type``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.common import expect, flag, need, number
from megavlm.families.decoders import rope_branch
from megavlm.families.family import Family, Tree, config_file
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

ANY: Any = object()
"""In ``TextKind.fixed``: the kind's configuration says it."""

PLAIN: dict[str, Any] = {
    "add_qkv_bias": False, "qk_layernorm": False, "normalization": "RMSNorm", "layernorm_zero_centered_gamma": False,
    "add_bias_linear": False, "lm_head_bias": False, "gated_linear_unit": True, "activation": "silu",
    "use_parallel_residual": False, "rotary_percent": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "logits_scaling": 1.0, "sliding_window": None, "sliding_window_pattern": None,
    "rope_local_base_freq": None, "post_layernorms": False, "query_pre_attn_scalar": None,
    "rotary_interleaved": False, "rotary_sections": (), "num_moe_experts": None,
    "visual_expert": False, "image_positions": "counted", "pre_layernorms": True, "head_layernorm": False,
    "image_tokens": (), "attention_branch_norm": False, "kv_lora_rank": None,
}  # fmt: skip
"""What Llama has, of the keys by which language models differ other than in size."""


@dataclass(frozen=True)
class TextKind:
    """A kind of language models.

    Attributes:
        model_type: in ``config.json``; the preset of the same name is what ``read`` names.
        title: for people.
        table: names of its weights.
        read: ``config.json`` and its path to the recipe's ``model.language``; raises UserError for what is not known.
        write: back.
        fixed: of :data:`PLAIN`, what is another value here: that value, a function of the branch, or :data:`ANY`.
        narrow: says why a model whose keys fit is none all the same, or None.
        defaults: keys that a ``text_config`` may leave out, as Transformers' class has them.
        templates: how its conversations are written, where no checkpoint says it.
        layer_names: ``model.language.layer_names`` of those that come in.
        in_transformers: whether Transformers has a class for it, and so for a composed model with it.
    """

    model_type: str
    title: str
    table: Table
    read: Callable[[Mapping[str, Any], str], Tree]
    write: Callable[[LanguageConfig], Tree]
    fixed: Mapping[str, Any]
    narrow: Callable[[LanguageConfig], str | None] = lambda _: None
    defaults: Tree = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    layer_names: str = "llama"
    in_transformers: bool = True

    def branch(self, config: Mapping[str, Any], where: str) -> Tree:
        """Return the recipe's ``model.language``: what the configuration says, and what the kind fixes.

        Raises:
            UserError: a key is missing, or has a value that the model here does not know.
        """
        own = {key: value for key, value in self.fixed.items() if value is not ANY and not callable(value)}
        names = {} if self.layer_names == "llama" else {"layer_names": self.layer_names}
        return {"add_qkv_bias": False, **own, **names, **self.read(config, where)}

    def refuses(self, language: LanguageConfig) -> str | None:
        """Return why a model is not of this kind, or None."""
        for key, wanted in {**PLAIN, **self.fixed}.items():
            if wanted is ANY:
                continue
            if callable(wanted):
                wanted = wanted(language)
            there = getattr(language, key, PLAIN.get(key))
            if there != wanted:
                return f"the language model's {key} is {there!r}, that of {self.title} is {wanted!r}"
        return self.narrow(language)

    def fits(self, language: LanguageConfig) -> bool:
        """Whether a model is of this kind."""
        return self.refuses(language) is None


def shape(config: Mapping[str, Any], where: str, kind: str, *, epsilon: str = "rms_norm_eps") -> Tree:
    """Return the keys that all kinds have, under the names that most give them.

    Args:
        config: of the language model.
        where: its file, for messages.
        kind: name of the preset.
        epsilon: name of the norms' epsilon.
    """
    expect(config, where, quantization_config=None, attention_dropout=0.0)
    heads, hidden = need(config, "num_attention_heads", where), need(config, "hidden_size", where)
    rope = {key: value for key, value in rope_branch(config, where).items() if key != "rotary_percent"}
    return {
        "preset": kind,
        "num_layers": need(config, "num_hidden_layers", where),
        "hidden_size": hidden,
        "ffn_hidden_size": need(config, "intermediate_size", where),
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or hidden // heads,
        "vocab_size": need(config, "vocab_size", where),
        "max_position_embeddings": need(config, "max_position_embeddings", where),
        **rope,
        "norm_epsilon": number(config, epsilon, where),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", where, default=False),
        "init_method_std": number(config, "initializer_range", where, 0.02),
    }


def rotary_percent(config: Mapping[str, Any], where: str, default: float) -> float:
    """Return the part of a head that is turned, from where Transformers 4 or 5 has it."""
    rope = config.get("rope_parameters") or {}
    return number(rope, "partial_rotary_factor", where, number(config, "partial_rotary_factor", where, default))


def shape_config(
    language: LanguageConfig, kind: str, architecture: str, *, epsilon: str = "rms_norm_eps", partial: bool = False
) -> Tree:
    """Return :func:`shape`'s keys of a ``config.json``, with those of Transformers 4 and 5.

    Args:
        language: the branch.
        kind: ``model_type``.
        architecture: name of the class.
        epsilon: name of the norms' epsilon.
        partial: the kind turns a part of a head.
    """
    part = {"partial_rotary_factor": language.rotary_percent} if partial else {}
    rope, old = rope_keys(language)
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "hidden_size": language.hidden_size,
        "initializer_range": language.init_method_std,
        "intermediate_size": language.ffn_hidden_size,
        "max_position_embeddings": language.max_position_embeddings,
        "model_type": kind,
        "num_attention_heads": language.num_attention_heads,
        "num_hidden_layers": language.num_layers,
        "num_key_value_heads": language.num_query_groups,
        epsilon: language.norm_epsilon,
        "rope_parameters": {**rope, **part},
        "rope_scaling": old,
        "rope_theta": float(language.rotary_base),
        "tie_word_embeddings": language.tie_word_embeddings,
        "vocab_size": language.vocab_size,
        **part,
    }


def rope_keys(language: LanguageConfig) -> tuple[Tree, Tree | None]:
    """Return ``rope_parameters`` of Transformers 5, and ``rope_scaling`` of older versions."""
    rope: Tree = {"rope_theta": float(language.rotary_base), "rope_type": language.rope_scaling or "default"}
    if language.rope_scaling is None:
        return rope, None
    rope["factor"] = language.rope_scaling_factor
    if language.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return rope, {"type": language.rope_scaling, **{key: value for key, value in rope.items() if key != "rope_theta"}}


def odd_heads(language: LanguageConfig) -> str | None:
    """Return why a kind without a key for the width of a head cannot hold a model, or None."""
    if language.num_attention_heads * language.kv_channels != language.hidden_size:
        return (
            f"its {language.num_attention_heads} heads are {language.kv_channels} wide, which is not hidden_size"
            f" ({language.hidden_size}) together, and the kind has no key for their width"
        )
    return None


def own_code(language: LanguageConfig) -> str | None:
    """Return why a kind whose code lies beside its weights cannot hold a model, or None: that code is older."""
    if language.rope_scaling not in (None, "linear"):
        return f"its positions are stretched as {language.rope_scaling}, which the kind's own code does not know"
    return odd_heads(language)


def own_scaling(language: LanguageConfig) -> Tree | None:
    """Return ``rope_scaling`` of such a kind, whose code takes these two keys and no others."""
    if language.rope_scaling is None:
        return None
    return {"type": language.rope_scaling, "factor": language.rope_scaling_factor}


class TextFamily(Family):
    """Language models of one kind, alone."""

    parts = ("language",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"language": ("decoder",)}
    own_rotary = own_norms = True
    kind: ClassVar[TextKind]

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == self.kind.model_type

    def branches(self, source: Source) -> Tree:
        """Return the language branch."""
        return {"language": self.kind.branch(source.config, config_file(source))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [self.kind.table]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        return self.kind.write(model.language)

    def refuses(self, model: ModelConfig) -> str | None:
        """A model must have what the kind fixes."""
        return self.kind.refuses(model.language)


def chosen(kinds: Sequence[TextKind], language: LanguageConfig) -> TextKind | None:
    """Return the kind to write a model as: that of its preset, else one with its names, else any that it is of."""
    fitting = [kind for kind in kinds if kind.fits(language)]
    names = getattr(language, "layer_names", None)
    fitting.sort(key=lambda kind: (kind.model_type != language.preset, kind.layer_names != names))
    return fitting[0] if fitting else None


def refused(kinds: Sequence[TextKind], language: LanguageConfig) -> str | None:
    """Return why a model is of none of these kinds, or None: why it is not of the one that it is nearest to."""
    if chosen(kinds, language) is not None:
        return None
    names = getattr(language, "layer_names", None)
    nearest = min(kinds, key=lambda kind: (kind.model_type != language.preset, kind.layer_names != names))
    return nearest.refuses(language)
