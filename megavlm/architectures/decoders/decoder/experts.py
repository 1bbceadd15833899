"""Keys of layers whose MLP is a mixture of experts, by Megatron-Core's names, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import LanguageConfig, ParallelConfig

_OWN = "model.language"
_EP, _ETP = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"


@config_class
class ExpertsConfig(LanguageConfig):
    """Which layers of a language model have experts, and how tokens are sent to them."""

    num_moe_experts: int | None = Field(default=None, gt=1, le=100_000)
    """Experts of a layer, each an MLP (Hugging Face: num_experts, n_routed_experts); null for none in any layer."""
    moe_ffn_hidden_size: int | None = Field(default=None, gt=0, le=10_000_000)
    """Width of an expert (Hugging Face: moe_intermediate_size); null for ffn_hidden_size."""
    moe_layer_freq: int | tuple[int, ...] = 1
    """Which layers have experts: every so manieth, the first one among them; or a 1 (experts) or 0 (an MLP) for each of
    the layers, as `[0, 1, 1, 1]` for an MLP in the first."""
    moe_router_topk: int = Field(default=2, gt=0, le=100_000)
    """Experts that a token is sent to (Hugging Face: num_experts_per_tok)."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """What makes a token's scores of the router's numbers."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts, of which the best are taken as they are, instead of over those that were chosen (as in
    Mixtral, and with Hugging Face's norm_topk_prob: the same numbers)."""
    moe_router_num_groups: int | None = Field(default=None, gt=0, le=100_000)
    """Groups that the experts lie in (DeepSeek-V3; Hugging Face: n_group); null for none."""
    moe_router_group_topk: int | None = Field(default=None, gt=0, le=100_000)
    """Groups that a token's experts are chosen from (Hugging Face: topk_group)."""
    moe_router_topk_scaling_factor: float | None = Field(default=None, gt=0)
    """Scores of the chosen experts are multiplied by it (Hugging Face: routed_scaling_factor); null for 1."""
    moe_router_enable_expert_bias: bool = False
    """Experts are chosen by score + a bias of their own, which is no part of the score, learns no gradient and moves
    towards equal loads (DeepSeek-V3: e_score_correction_bias); with sigmoid."""
    moe_router_bias_update_rate: Annotated[float, Meaning.RUN] = Field(default=1e-3, ge=0)
    """By how much a step moves that bias."""
    moe_router_load_balancing_type: Annotated[Literal["aux_loss", "none"], Meaning.RUN] = "aux_loss"
    """Whether a loss keeps the experts' loads alike: aux_loss (Switch Transformer's, over a pack's tokens) or none."""
    moe_aux_loss_coeff: Annotated[float, Meaning.RUN] = Field(default=0.0, ge=0)
    """Weight of the balance loss of each layer (Hugging Face: router_aux_loss_coef)."""
    moe_z_loss_coeff: Annotated[float | None, Meaning.RUN] = Field(default=None, ge=0)
    """Weight of the z loss of each layer, which keeps the router's numbers small (ST-MoE: 1e-3); null for none."""
    moe_shared_expert_intermediate_size: int | None = Field(default=None, gt=0, le=10_000_000)
    """Width of the shared experts together, which get every token; null for none."""
    moe_shared_expert_gate: bool = False
    """What the shared experts give is multiplied by a number of the token's own, from 0 to 1 (Qwen2-MoE)."""
    moe_expert_capacity_factor: Annotated[float | None, Meaning.RUN] = Field(default=None, gt=0)
    """In training, an expert takes at most this times its equal share of a pack's tokens, those with the best scores;
    null to take all (dropless). Nothing is left out in validation and generation."""

    @property
    def expert_width(self) -> int:
        """Width of one expert."""
        assert self.num_moe_experts is not None
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each of the model's layers has experts."""
        layers = range(self.num_layers)
        if self.num_moe_experts is None:
            return (False,) * len(layers)
        if isinstance(self.moe_layer_freq, int):
            return tuple(number % max(self.moe_layer_freq, 1) == 0 for number in layers)
        return tuple(bool(here) for here in self.moe_layer_freq)


def expert_rules(language: Any, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule about experts: key, rule, remedy.

    Args:
        language: a :class:`ExpertsConfig` with the keys of a decoder.
        layout: the recipe's.
    """
    experts = language.num_moe_experts
    if experts is None:
        for name, info in ExpertsConfig.__pydantic_fields__.items():  # type: ignore[attr-defined]
            if name.startswith("moe_") and getattr(language, name) != info.default:
                yield f"{_OWN}.{name}: has no effect without {_OWN}.num_moe_experts; set that, or leave this out"
        return
    yield from _layers(language)
    yield from _router(language, experts)
    yield from _shared(language, layout)
    yield from _expert_shards(language, layout, experts)
    if language.moe_router_load_balancing_type == "none" and language.moe_aux_loss_coeff:
        yield (
            f"{_OWN}.moe_aux_loss_coeff: has no effect with {_OWN}.moe_router_load_balancing_type none; set that to"
            " aux_loss, or this to 0"
        )


def _layers(language: Any) -> Iterator[str]:
    """Check which layers have experts."""
    key, freq = f"{_OWN}.moe_layer_freq", language.moe_layer_freq
    if isinstance(freq, int):
        if freq < 1:
            yield f"{key}: every {freq} layers cannot be; set it to 1 or more, or to a list"
    elif len(freq) != language.num_layers or set(freq) - {0, 1}:
        yield f"{key}: is no list of 0 and 1 for {language.num_layers} layers ({_OWN}.num_layers); give one for each"
    elif not any(freq):
        yield f"{key}: gives no layer experts; give some a 1, or set {_OWN}.num_moe_experts to null"


def _router(language: Any, experts: int) -> Iterator[str]:
    """Check how experts are chosen."""
    top, groups, chosen = language.moe_router_topk, language.moe_router_num_groups, language.moe_router_group_topk
    key = f"{_OWN}.moe_router_topk"
    sigmoid = language.moe_router_score_function == "sigmoid"
    if top > experts:
        yield f"{key}: {top} is more than the experts ({_OWN}.num_moe_experts, {experts}); lower it"
        return
    if top == 1 and not sigmoid and not language.moe_router_pre_softmax:
        yield (
            f"{key}: of one chosen expert softmax is 1, and the router would not learn; set"
            f" {_OWN}.moe_router_pre_softmax to true"
        )
    if language.moe_router_pre_softmax and sigmoid:
        yield f"{_OWN}.moe_router_pre_softmax: has no effect with sigmoid; set it to false"
    if language.moe_router_enable_expert_bias and not sigmoid:
        yield (
            f"{_OWN}.moe_router_enable_expert_bias: goes with {_OWN}.moe_router_score_function sigmoid; set that, or"
            " this to false"
        )
    plain = ExpertsConfig.__pydantic_fields__["moe_router_bias_update_rate"].default  # type: ignore[attr-defined]
    if language.moe_router_bias_update_rate != plain and not language.moe_router_enable_expert_bias:
        yield (
            f"{_OWN}.moe_router_bias_update_rate: has no effect without {_OWN}.moe_router_enable_expert_bias; set that,"
            " or leave this out"
        )
    if (groups is None) != (chosen is None):
        missing, there = ("num_groups", "group_topk") if groups is None else ("group_topk", "num_groups")
        yield f"{_OWN}.moe_router_{there}: needs {_OWN}.moe_router_{missing}; set both, or both to null"
    elif groups is not None and chosen is not None:
        if experts % groups:
            yield f"{_OWN}.moe_router_num_groups: {groups} does not divide {experts} experts; take a divisor"
        elif chosen > groups:
            yield f"{_OWN}.moe_router_group_topk: {chosen} is more than the {groups} groups; lower it"
        elif top % chosen or top // chosen > experts // groups:
            yield (
                f"{key}: {top} experts of {chosen} groups of {experts // groups} are not equally many of each group;"
                f" change it, or {_OWN}.moe_router_group_topk"
            )


def _shared(language: Any, layout: ParallelConfig) -> Iterator[str]:
    """Check the shared experts."""
    width = language.moe_shared_expert_intermediate_size
    if width is None:
        if language.moe_shared_expert_gate:
            yield (
                f"{_OWN}.moe_shared_expert_gate: has no effect without {_OWN}.moe_shared_expert_intermediate_size;"
                " set that, or this to false"
            )
        return
    if language.add_bias_linear:
        yield (
            f"{_OWN}.moe_shared_expert_intermediate_size: shared experts have no biases, which"
            f" {_OWN}.add_bias_linear gives all linear layers; set that to false, or this to null"
        )
    yield from divides(f"{_OWN}.moe_shared_expert_intermediate_size", width, layout.tensor_model_parallel_size, TP)


def _expert_shards(language: Any, layout: ParallelConfig, experts: int) -> Iterator[str]:
    """Check how experts lie on ranks."""
    tp, ep, shards = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tensor_ranks
    yield from divides(f"{_OWN}.num_moe_experts", experts, ep, _EP)
    key = "moe_ffn_hidden_size" if language.moe_ffn_hidden_size is not None else "ffn_hidden_size"
    yield from divides(f"{_OWN}.{key}", language.expert_width, shards, f"{_ETP}, or TP without {_EP}")
    if tp > 1 and not layout.sequence_parallel:
        yield (
            f"parallel.sequence_parallel: with experts, {TP} ({tp}) needs it: each rank routes its own part of the"
            " sequence; set it to true"
        )
    if ep == 1 and shards != tp:
        # Megatron-Core takes experts for layers like others then, and would not add up what TP ranks make of theirs.
        yield f"{_ETP}: {shards} without {_EP} must be {TP} ({tp}); set that above 1, or this to null"
    if language.add_bias_linear and shards > 1:
        yield (
            f"{_ETP}: experts with biases ({_OWN}.add_bias_linear) are not shared by {shards} ranks; set this to 1 and"
            f" {_EP} above 1"
        )
