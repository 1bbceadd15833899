"""A layer whose attention and MLP stand side by side (GPT-J, GPT-NeoX, Phi): Megatron-Core has no such layer."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelTransformerLayer(TransformerLayer):
    """``x + attention(norm(x)) + mlp(norm(x))``, with one norm.

    What Megatron-Core saves, marks and shards of a layer is by its modules, which are the same; the one in front of the
    MLP has no parameters. With sequence parallelism attention and MLP gather the norm's output each, as in a layer of
    Megatron-Core they gather that of theirs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.pre_mlp_layernorm, IdentityOp), "attention and MLP share the norm in front"
        assert not (self.recompute_input_layernorm or self.recompute_mlp), "is not recomputed in parts"

    def forward(
        self,
        hidden_states: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the stream [S, B, E] and ``context``; arguments as of Megatron-Core's layer."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(
            normed,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            rotary_pos_cos=rotary_pos_cos,
            rotary_pos_sin=rotary_pos_sin,
            packed_seq_params=packed_seq_params,
        )
        mixed = self.mlp(normed, padding_mask=padding_mask) if self.is_moe_layer else self.mlp(normed)
        fused = self.config.bias_dropout_fusion
        with self.bias_dropout_add_exec_handler():
            hidden_states = self.self_attn_bda(self.training, fused)(attended, hidden_states, self.hidden_dropout)
            hidden_states = self.mlp_bda(self.training, fused)(mixed, hidden_states, self.hidden_dropout)
        return hidden_states, context
