"""A mixture of experts in the MLP's place: Megatron-Core's layer, with a router that counts real tokens alone.

Megatron-Core's own router scales its losses by the tokens of the micro-batch and lets the schedule divide by the
supervised tokens of the global batch, which are others where labels are masked; and its counts for the experts' biases
take no padding mask that is shorter than the experts are many. Here the objective is what a reader expects::

    loss over supervised tokens + sum over layers of (moe_aux_loss_coeff * balance + moe_z_loss_coeff * z)

where *balance* (Switch Transformer, arXiv 2101.03961, eq. 4) and *z* (ST-MoE, arXiv 2202.08906, eq. 5) are of a pack's
real tokens, and the mean over the packs of the global batch: the same at every layout and number of micro-batches.

Shape legend: N tokens of a pack on this rank (S, or S / TP with sequence parallelism), X experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.layers.activation import swiglu
from megavlm.layers.arrival import wait_for_weights
from megavlm.layers.expert_products import copies, has_buffer, products, summed
from megavlm.parallel.device import has_kernels
from megavlm.parallel.megatron_versions import activation_of, permuted


def _mend_megatron() -> None:
    """Mend slips of Megatron-Core 0.16: a name that is there with Transformer Engine alone, CPU tensors, and a scale.

    The scale of the routers' losses is kept from call to call and written into; made by an answer, in inference mode,
    it could not be written by a training behind it in the same process.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    plain = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = plain(tensor, as_numpy, record_stream)
        # Of what is on the CPU already it makes no numbers, which all-to-all asks for.
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    token_dispatcher.maybe_move_tensor_to_cpu = move
    keep = MoEAuxLossAutoScaler.set_loss_scale

    def set_loss_scale(scale: Tensor) -> None:
        if not torch.is_inference_mode_enabled():  # where there are no gradients to be scaled
            keep(scale)

    MoEAuxLossAutoScaler.set_loss_scale = staticmethod(set_loss_scale)


def _permute_on_cpu() -> None:
    """Have Megatron-Core's dispatchers copy, order and add up tokens as a CPU does best; on a CPU alone.

    Three functions of ``moe_utils``, as the dispatchers call them, with what they give; of their options (fused
    kernels, padding, probabilities on the way back) none is used here. With CUDA they stay Megatron-Core's own.
    """
    sort = token_dispatcher.sort_chunks_by_idxs

    def permute(
        tokens: Tensor, routing_map: Tensor, probs: Tensor | None = None, num_out_tokens: Any = None, **options: Any
    ) -> Any:
        per_expert = options.pop("tokens_per_expert", None)
        assert not any(options.values()), options
        experts, order = routing_map.t().nonzero(as_tuple=True)
        weights = None if probs is None else probs[order, experts]
        return permuted(copies(tokens, order), weights, order, per_expert)

    def unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, restore_shape: Any, **options: Any) -> Tensor:
        options.pop("routing_map", None)
        assert not any(value is not None and value is not False for value in options.values()), options
        return summed(permuted_tokens, sorted_indices, restore_shape[0])

    def sort_chunks(tokens: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, *args: Any, **options: Any) -> Any:
        if torch.equal(sorted_idxs, torch.arange(len(sorted_idxs))):
            return tokens, args[0] if args else options.get("probs")
        return sort(tokens, split_sizes, sorted_idxs, *args, **options)

    token_dispatcher.permute, token_dispatcher.unpermute = permute, unpermute
    token_dispatcher.sort_chunks_by_idxs = sort_chunks


_mend_megatron()
if not has_kernels():
    _permute_on_cpu()

TALLY = ("balance", "z", "dropped")
"""What a router's tally has behind the loads of its experts."""


class PackRouter(TopKRouter):
    """Megatron-Core's router with losses, loads and capacity of a pack's real tokens; without a bias on its scores.

    Losses and loads are of training's forward passes whose gradients are wanted: where layers are recomputed, of one of
    the two. A router that is frozen has no losses.

    Attributes:
        gradient_scale: what the losses are multiplied by, so that what the schedule divides the gradient by leaves them
            their mean over packs: supervised tokens over packs, of the global batch.
        tally: [X + 3] fp64 since it was last taken: tokens that chose each expert, then what ``TALLY`` lists, summed
            over packs (on this rank; add them up over the tensor- and data-parallel ranks).
    """

    expert_bias: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = None
        bias: Tensor | None = getattr(self, "expert_bias")  # noqa: B009 - Megatron-Core says of no type what it is
        if bias is not None:  # on the device that modules are built on, which may be no real one
            self.expert_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=self.weight.device)
        self.gradient_scale: float | Tensor = 1.0
        self.tally: Tensor | None = None

    def take_tally(self) -> Tensor:
        """Return [X + 3] fp64 of what was counted, and count anew."""
        tally, self.tally = self.tally, None
        if tally is None:
            tally = torch.zeros(self.num_experts + len(TALLY), dtype=torch.float64, device=self.weight.device)
        return tally

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weight of each expert for each token, and where it is not zero: [N, X] both.

        Args:
            logits: [N, 1, X].
            padding_mask: [N, 1], true where there is no token; None where all are real.
        """
        logits = logits.view(-1, self.num_experts)
        padding = torch.zeros_like(logits[:, 0], dtype=torch.bool) if padding_mask is None else padding_mask.view(-1)
        counted = self.training and torch.is_grad_enabled()
        tokens = self._real_tokens(padding) if counted else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._learns(self.config.moe_z_loss_coeff)):
            z = None if tokens is None else self._z_loss(logits, padding, tokens)
        if z is not None and self._learns(self.config.moe_z_loss_coeff):
            logits = MoEAuxLossAutoScaler.apply(logits, z * self.config.moe_z_loss_coeff * self.gradient_scale)
        probs, routing_map = moe_utils.topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
        )
        chosen = taken = routing_map & ~padding[:, None]
        # Also where there is no gradient: of a layer that is recomputed, both passes must give the same.
        if self.training and self.config.moe_expert_capacity_factor is not None:
            taken = self._within_capacity(probs, chosen, self.config.moe_expert_capacity_factor)
            probs, routing_map = probs * taken, taken
        if tokens is None or z is None:
            return probs, routing_map
        best = self.score_function == "softmax" and self.config.moe_router_num_groups is None
        learns = self._learns(self.get_aux_loss_coeff("aux_loss"))
        with torch.set_grad_enabled(learns):  # else a figure alone
            counts = chosen.sum(0)
            balance = self._balance_loss(logits, padding, tokens, counts if best else None)
        if learns:
            loss = balance * self.config.moe_aux_loss_coeff * self.gradient_scale
            probs = MoEAuxLossAutoScaler.apply(probs, loss)
        dropped = counts.new_zeros(()) if taken is chosen else (chosen & ~taken).sum()
        self._count(counts, dropped, balance, z)
        return probs, routing_map

    def _learns(self, coefficient: float | None) -> bool:
        return bool(coefficient) and self.weight.requires_grad

    def _real_tokens(self, padding: Tensor) -> Tensor:
        """Return how many real tokens the pack has, on all its tensor-parallel ranks; at least 1."""
        real = (~padding).sum().float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(real, group=self.tp_cp_group)
        return real.clamp(min=1)

    @staticmethod
    def _z_loss(logits: Tensor, padding: Tensor, tokens: Tensor) -> Tensor:
        """Return this rank's part of the mean over real tokens of log(sum(exp(logits))) squared."""
        squares = torch.logsumexp(logits.float(), dim=-1).square().masked_fill(padding, 0)
        return squares.sum() / tokens

    def _balance_loss(self, logits: Tensor, padding: Tensor, tokens: Tensor, counts: Tensor | None) -> Tensor:
        """Return this rank's part of X * sum over experts of (part of the tokens' choices) * (mean score).

        ``counts``, [X], are of the choices where they are those of the best scores; None where they are not.
        """
        if counts is None:
            best, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=padding
            )
            counts = best.sum(0)
        else:
            scores = torch.softmax(logits.float(), dim=-1).masked_fill(padding[:, None], 0)
        counts = counts.float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        return self.num_experts * (counts / (tokens * self.topk) * (scores.float().sum(0) / tokens)).sum()

    @torch.no_grad()
    def _within_capacity(self, probs: Tensor, chosen: Tensor, factor: float) -> Tensor:
        """Return which choices an expert takes, [N, X]: of the whole pack's those that score best."""
        group, scores = self.tp_cp_group, probs.masked_fill(~chosen, -1.0)
        if group.size() > 1:
            parts = [torch.empty_like(scores) for _ in range(group.size())]
            dist.all_gather(parts, scores.contiguous(), group=group)
            scores = torch.cat(parts)
        # How many real tokens there are the device alone knows: of as many as all positions would allow, the first.
        most = min(math.ceil(len(scores) * self.topk / self.num_experts * factor), len(scores))
        capacity = ((scores >= 0).any(-1).sum().double() * self.topk / self.num_experts * factor).ceil()
        best = scores.topk(most, dim=0).indices
        within = torch.arange(most, device=scores.device).unsqueeze(1) < capacity
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, best, within.expand_as(best)) & (scores >= 0)
        return taken.chunk(group.size())[group.rank()]

    @torch.no_grad()
    def _count(self, counts: Tensor, dropped: Tensor, balance: Tensor, z: Tensor) -> None:
        rest = torch.stack([balance, z, dropped.float()])
        tally = torch.cat([counts.double(), rest.double()])
        self.tally = tally if self.tally is None else self.tally + tally


class Experts(SequentialMLP):
    """Megatron-Core's experts, one after the other; on a CPU they begin alike at every expert parallelism.

    There Megatron-Core draws all weights from one stream, which is the same on all ranks of a stage: each rank's first
    expert would be the same one.

    With CUDA the forward pass is Megatron-Core's own. On a CPU, gated MLPs by SiLU without biases and adapters (all
    families' but MoE-LLaVA's on Phi-2, and a composed model's) are computed by ``layers/expert_products.py``.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        group = kwargs["pg_collection"].ep
        before = group.rank() * num_local_experts
        self._skip(before, config)
        super().__init__(num_local_experts, config, *args, **kwargs)
        self._skip(group.size() * num_local_experts - before - num_local_experts, config)
        if config.add_bias_linear:
            for expert in self.local_experts:
                expert.linear_fc2.register_forward_hook(self._own_memory)
                # One rank has it: not summed over tensor-parallel ranks, which have other experts; counted in the norm.
                bias = expert.linear_fc2.bias
                bias.sequence_parallel = False
                # By hand: Transformer Engine's layers of 0.19 have the marks already, and others.
                bias.tensor_model_parallel, bias.partition_dim, bias.partition_stride = True, 0, 1
        linears = [linear for expert in self.local_experts for linear in (expert.linear_fc1, expert.linear_fc2)]
        # Not beside adapters, nor with weights in 4 bits: these are the layers' own affair.
        plain = all({name for name, _ in linear.named_parameters()} == {"weight"} for linear in linears)
        # What ``use_te_activation_func`` brings is the gated SiLU of experts_mlp, where there are no kernels.
        self.in_slices = not has_kernels() and config.use_te_activation_func and plain

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Return what the experts give of their tokens, and no bias.

        Args:
            tokens: [M, H] copies of tokens, in the order of this rank's experts.
            tokens_per_expert: [X] of them.
            probs: [M] weight of each.
        """
        if not self.in_slices:
            found: tuple[Tensor, None] = super().forward(tokens, tokens_per_expert, probs)
            return found
        columns, rows = self._linears()
        wait_for_weights(*columns, *rows)  # which nobody calls
        weights = [[linear.weight for linear in one] for one in (columns, rows)]
        return products(tokens, probs, tokens_per_expert.tolist(), *weights), None

    def written_weights(self) -> list[Any]:
        """Return weights whose part of the gradient buffer need not be zeroed: the first gradient is written there."""
        if not self.in_slices:
            return []
        weights = [linear.weight for one in self._linears() for linear in one]
        return [weight for weight in weights if weight.requires_grad and has_buffer(weight)]

    def _linears(self) -> tuple[list[Any], list[Any]]:
        columns = [expert.linear_fc1 for expert in self.local_experts]
        return columns, [expert.linear_fc2 for expert in self.local_experts]

    @staticmethod
    def _own_memory(_layer: Any, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Copy what Megatron-Core's MLP adds the weighed bias into: of one rank it is a view that autograd guards."""
        return output[0].clone(), output[1]

    @staticmethod
    def _skip(count: int, config: TransformerConfig) -> None:
        """Draw the weights of experts that other ranks have, as Megatron-Core would, and throw them away."""
        if not (config.use_cpu_initialization and config.perform_initialization):
            return
        width = config.moe_ffn_hidden_size
        for _ in range(count):
            config.init_method(torch.empty(width * (1 + config.gated_linear_unit), config.hidden_size))
            config.output_layer_init_method(torch.empty(config.hidden_size, width))


def experts_mlp(linears: Mapping[str, Any]) -> ModuleSpec:
    """Return the spec of an MLP that is a mixture of experts, which are computed one after the other.

    ``linears`` replaces linear layers (of the routed experts experts.linear_fc1, experts.linear_fc2, of the shared ones
    shared_experts.linear_fc1, ..): by Transformer Engine's (not run on a GPU), or such with adapters.
    """
    plain: dict[str, Any] = {"linear_fc1": ColumnParallelLinear, "linear_fc2": RowParallelLinear}
    routed, shared = (
        # The activation is taken only where the configuration says use_te_activation_func.
        MLPSubmodules(
            **{name: linears.get(f"{kind}.{name}", one) for name, one in plain.items()},
            activation_func=activation_of(swiglu),
        )
        for kind in ("experts", "shared_experts")
    )
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=Experts, submodules=routed),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
            router=PackRouter,
        ),
        metainfo={"fuse_pre_mlp_layernorm": False},
    )


def routers_of(model: nn.Module) -> Iterator[tuple[int, PackRouter]]:
    """Yield number (from 0, in the whole model) and router of each layer of a chunk that has experts.

    Experts themselves, thousands of modules, are not looked through: each step asks.
    """
    if isinstance(model, MoELayer):
        yield model.layer_number - 1, model.router
        return
    for child in model.children():
        yield from routers_of(child)
