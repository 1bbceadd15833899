"""Keys of layers whose MLP is a mixture of experts, by Megatron-Core's names, and the rules between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.schema import LanguageConfig


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
    """In training, an expert takes at most this times its equal share of a pack's tokens, those that score highest; null
    to take all (dropless). Nothing is left out in validation and generation."""

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
            return tuple(number % self.moe_layer_freq == 0 for number in layers)
        return tuple(bool(here) for here in self.moe_layer_freq)
