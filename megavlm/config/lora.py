"""Rules of the recipe's ``lora`` branch, and which parts of which layers its targets mean."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.architecture import architecture_named
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, LoraConfig, Recipe

_KEY = "lora."
ALL = "all-linear"
"""What PEFT calls every linear layer but the output layer."""


@dataclass(frozen=True)
class Target:
    """A linear layer of the Hugging Face model.

    Attributes:
        path: its name inside a layer of the language model.
        linear: the layer here that holds it, by its name inside a layer.
        part: which of that layer's parts it is (q, k, v, or gate, up).
        parts: how many there are.
        others: what other Hugging Face models of these layers call it.
    """

    path: str
    linear: str
    part: int = 0
    parts: int = 1
    others: tuple[str, ...] = ()

    def called(self, name: str) -> bool:
        """Whether ``name`` is the path or an end of it, as PEFT reads ``target_modules``."""
        return any(path == name or path.endswith(f".{name}") for path in (self.path, *self.others))


_QKV, _PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
_FC1, _FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
EXPERT_LINEARS = ("mlp.experts.linear_fc1", "mlp.experts.linear_fc2")
"""Those of each expert, whose number is left out: all experts of a layer have adapters, or none."""
SHARED_LINEARS = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
"""Those of the experts that get every token."""
_IN, _STEPS = "self_attention.in_proj", "self_attention.x_proj"
"""Mamba's. Its ``out_proj`` takes no adapter: PEFT refuses one there, as Mamba's kernels read the weight themselves."""
CROSS_LINEARS = ("cross_attention.linear_q", "cross_attention.linear_kv", "cross_attention.linear_proj")
"""Those of attention to pictures, in the layers that have it instead of attention to text."""
LATENT_LINEARS = tuple(f"self_attention.linear_{name}_proj" for name in ("q", "q_up", "kv_up"))
"""Those of latent attention beside ``linear_proj``: to queries, of the stream or of their latent; to keys and values.
What leads down to a latent, which each tensor-parallel rank has whole, takes no adapter."""
OF_IMAGES = ".vision"
"""How the name of a linear layer goes on where its second weight, that of image tokens, is meant."""
IMAGE_LINEARS = tuple(f"{linear}{OF_IMAGES}" for linear in (_QKV, _PROJ, _FC1, _FC2))
"""Those for image tokens, in layers with weights of their own for them."""
LINEARS = (
    *(_QKV, _PROJ, _FC1, _FC2, *EXPERT_LINEARS, *SHARED_LINEARS, *CROSS_LINEARS, *LATENT_LINEARS, _IN, _STEPS),
    *IMAGE_LINEARS,
)
"""The linear layers of the layers of a language model, of all kinds."""

_NUMBER = re.compile(r"\.experts\.(?:local_experts\.(?:\d+|\{\})|experts)\.")
"""How names say that a parameter is an expert's: in the model, in a table of weights, in a checkpoint."""


def linear_of(weight: str) -> str | None:
    """Return which of ``LINEARS`` a parameter is the weight of, by its name, or None."""
    name = _NUMBER.sub(".experts.", f".{weight}")
    return next((linear for linear in LINEARS if name.endswith(f".{linear}.weight")), None)


def known_targets(language: LanguageConfig) -> tuple[Target, ...]:
    """Return what ``lora.targets`` may name; nothing, where the language model's architecture takes no adapters."""
    architecture = architecture_named("language", language.preset)
    return () if architecture.targets is None else tuple(architecture.targets(language))


def targets_of(lora: LoraConfig, language: LanguageConfig) -> tuple[Target, ...]:
    """Return the layers that get adapters."""
    return tuple(t for t in known_targets(language) if any(name == ALL or t.called(name) for name in lora.targets))


def lora_rules(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    lora = recipe.lora
    if lora.rank is None:
        plain = LoraConfig()
        for name in ("alpha", "dropout", "targets", "train_embeddings", "train_head", "train_norms", "quantize"):
            if getattr(lora, name) != getattr(plain, name):
                yield (
                    f"{_KEY}{name}: has no effect without {_KEY}rank; set that, or leave this out (lora={{}} empties "
                    "the branch)"
                )
        return
    targets = known_targets(recipe.model.language)
    if not targets:
        yield (
            f"{_KEY}rank: model.language.preset {recipe.model.language.preset!r} is of an architecture that names no "
            "layers for adapters; set this to null"
        )
        return
    known = ", ".join(target.path for target in targets)
    if not lora.targets:
        yield f"{_KEY}targets: names no layer; name some of {known}"
    for name in lora.targets:
        if name != ALL and not any(target.called(name) for target in targets):
            yield f"{_KEY}targets: {name!r} is none of the language model's layers; there are {known} (or their ends)"
    if recipe.modules.language.freeze:
        yield (
            f"modules.language.freeze: true, but with {_KEY}rank the language model learns through adapters (its own "
            "weights are frozen anyway); set this to false, or that to null"
        )
    if recipe.model.language.tie_word_embeddings and lora.train_embeddings != lora.train_head:
        yield (
            f"{_KEY}train_head: the model's embedding and output layer are one weight; set it and "
            f"{_KEY}train_embeddings alike"
        )
    cost = architecture_named("language", recipe.model.language.preset).cost
    attends = recipe.model.language.cross_layers or recipe.model.language.feature_width
    if lora.train_norms and (attends or not hasattr(cost, "norm_weights")):
        yield (f"{_KEY}train_norms: which norms learn is known of layers that attend to text alone; set it to false")
    if recipe.checkpoint.load is None:
        yield f"checkpoint.load: {_KEY}rank needs the weights that the adapters are for; name their checkpoint"
    if recipe.engine.fp8 is not None:
        yield f"engine.fp8: layers with adapters compute in training.precision; set it to null, or {_KEY}rank"
    if recipe.engine.cuda_graph_impl != "none":
        yield f"engine.cuda_graph_impl: not with adapters; set it to none, or {_KEY}rank to null"
    if recipe.engine.tp_comm_overlap:
        yield f"engine.tp_comm_overlap: not with adapters; set it to false, or {_KEY}rank to null"
    if lora.quantize is not None:
        yield from _quantised_shards(recipe)


_TP, _ETP = "parallel.tensor_model_parallel_size", "parallel.expert_tensor_parallel_size"
_WIDTH, _SHARED_WIDTH = "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"
NF4_BLOCK, NF4_GROUP = 64, 256
"""Weights that share a scale, and scales that share one of their own (QLoRA, arXiv 2305.14314)."""


def _quantised_shards(recipe: Recipe) -> Iterator[str]:
    """Check that tensor-parallel shards are whole groups, so that all layouts have the same quantised weights."""
    tp, language = recipe.parallel.tensor_model_parallel_size, recipe.model.language
    if language.recurrent:
        yield f"{_KEY}quantize: Mamba's weights are not kept in 4 bits; set it to null"
        return
    if language.latent_attention:
        yield f"{_KEY}quantize: weights of latent attention are not kept in 4 bits; set it to null"
        return
    unit, hidden, experts = NF4_BLOCK * NF4_GROUP, language.hidden_size, any(language.expert_layers)
    group = language.kv_channels * (language.num_attention_heads // language.num_query_groups + 2)
    heads = language.num_attention_heads * language.kv_channels
    pictures = (2 * language.num_query_groups * language.kv_channels * hidden,) * bool(language.cross_layers)
    sizes: list[tuple[str, str, int, tuple[int, ...]]] = [
        ("hidden_size", _TP, tp, (language.num_query_groups * group * hidden, heads * hidden, *pictures))
    ]
    if not (experts and all(language.expert_layers)):
        sizes.append(("ffn_hidden_size", _TP, tp, (language.ffn_hidden_size * hidden,)))
    if experts:
        own, shared = (getattr(language, name) for name in (_WIDTH, _SHARED_WIDTH))
        name, ranks = "ffn_hidden_size" if own is None else _WIDTH, recipe.parallel.expert_tensor_ranks
        sizes.append((name, f"{_TP} or {_ETP}", ranks, ((own or language.ffn_hidden_size) * hidden,)))
        sizes += [] if shared is None else [(_SHARED_WIDTH, _TP, tp, (shared * hidden,))]
    for name, key, ranks, values in sizes:
        if ranks > 1 and any(value % (unit * ranks) for value in values):
            yield (
                f"{_KEY}quantize: a shard of the weights that model.language.{name} makes is no multiple of "
                f"{NF4_BLOCK} x {NF4_GROUP} values at {key} {ranks}; lower that, or set this to null"
            )


def check_quantiser(quantize: str | None) -> None:
    """Check that what ``lora.quantize`` needs is installed.

    Raises:
        UserError: it is not.
    """
    if quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("lora.quantize: bitsandbytes is not installed; pip install 'megavlm[qlora]', or set it to null")
