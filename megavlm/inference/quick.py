"""What a forward pass can leave out while answers are generated: care for gradients, and positions nobody asks for.

The modules and their weights stay Megatron-Core's; for a while, some of them have a shorter ``forward``. On a CPU, and
for one prompt on a GPU, the Python of a layer costs more than its small operations.

Shape legend: T positions of a turn, K of them whose logits are wanted, E hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megavlm.models.build import unwrap

Ends = Callable[[], Tensor]
"""Gives the [K] int64 positions whose logits are wanted of the current turn."""


@contextlib.contextmanager
def quick_layers(chunks: Sequence[Any], ends: Ends) -> Iterator[None]:
    """Shorten the forward pass of ``chunks``, without gradients and in evaluation mode, and leave them as they were.

    The last stage gives logits [1, K, V / TP] of ``ends`` only: those of a whole prompt are large and slow.

    Args:
        chunks: the model chunks of this rank, wrapped or bare.
        ends: asked in each forward pass.
    """
    shorter: list[tuple[Any, Callable[..., Any]]] = [(linear, partial(_product, linear)) for linear in _linears(chunks)]
    heads = []
    for model in (unwrap(chunk).language for chunk in chunks):
        layers = list(model.decoder.layers)
        # Of a plain last layer the MLP is for the wanted positions only; with sequence parallelism each rank has part
        # of the positions, and the head picks them instead.
        picks = model.post_process and not model.config.sequence_parallel and bool(layers) and _is_plain(layers[-1])
        for layer in filter(_is_plain, layers):
            shorter.append((layer, partial(_layer, layer, ends if picks and layer is layers[-1] else None)))
        if model.post_process and not picks:
            heads.append((model.output_layer, model.output_layer.sequence_parallel))
    hooks = []
    try:
        for module, forward in shorter:
            module.forward = forward
        for head, gathers in heads:
            hooks.append(head.register_forward_pre_hook(partial(_wanted, ends, gathers)))
            head.sequence_parallel = False
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for head, gathers in heads:
            head.sequence_parallel = gathers
        for module, _ in shorter:
            module.__dict__.pop("forward", None)  # the class has its own


def _linears(chunks: Sequence[Any]) -> list[Any]:
    """Return the linear layers that :func:`_product` can stand in for; no subclasses, which do more."""
    kinds = (ColumnParallelLinear, RowParallelLinear)
    layers = [module for chunk in chunks for module in chunk.modules() if type(module) in kinds]
    return [layer for layer in layers if layer.tp_group.size() == 1]


def _product(
    linear: Any, values: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """What a linear layer gives on the only tensor-parallel rank: nothing is gathered or reduced."""
    weight = linear.weight if weight is None else weight
    if linear.skip_bias_add:
        return F.linear(values, weight), linear.bias
    return F.linear(values, weight, linear.bias), None


def _is_plain(layer: Any) -> bool:
    """Whether a layer is attention and MLP, added one after the other as they are, and nothing else."""
    plain_sums = layer.self_attn_bda is get_bias_dropout_add and layer.mlp_bda is get_bias_dropout_add
    return type(layer) is TransformerLayer and isinstance(layer.cross_attention, IdentityOp) and plain_sums


def _layer(
    layer: Any, ends: Ends | None, hidden_states: Tensor, *, packed_seq_params: Any, rotary_pos_emb: Any,
    context: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What a layer gives without dropout: [T, 1, E], or [K, 1, E] of ``ends``, and the context for those behind it.

    The last layer needs the MLP for those only, as it has remembered the keys and values of the others by then.
    """
    attended, bias = layer.self_attention(
        layer.input_layernorm(hidden_states),
        attention_mask=None,
        packed_seq_params=packed_seq_params,
        rotary_pos_emb=rotary_pos_emb,
    )
    hidden_states = _added(attended, bias, hidden_states)
    if ends is not None:
        hidden_states = hidden_states.index_select(0, ends())
    output, bias = layer.mlp(layer.pre_mlp_layernorm(hidden_states))
    return _added(output, bias, hidden_states), context


def _added(values: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return values.add_(residual) if bias is None else values.add_(bias).add_(residual)


def _wanted(ends: Ends, gathers: bool, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hand only the positions of ``ends`` to the head (a forward pre-hook)."""
    hidden_T1E = gather_from_sequence_parallel_region(inputs[0]) if gathers else inputs[0]
    return hidden_T1E.index_select(0, ends()), *inputs[1:]
