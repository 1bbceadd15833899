"""Where Megatron-Core 0.16 (Python 3.11) and 0.17 to 0.19 (Python 3.12) differ: all of it that matters here.

What follows says which version does what; the rest of the package calls these and knows one Megatron-Core. Modules of
Megatron-Core that not every process needs are imported when they are called for, and never before
:func:`megavlm.parallel.device.prepare_device`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megavlm.config.errors import UserError

CHECKPOINT_DEFAULTS = {"common_backend": "torch", "common_backend_version": 1}
"""Keys of a checkpoint's ``metadata.json`` that 0.19 neither writes nor needs, and what 0.16 takes them to be."""

_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What 0.16 knows a saved parameter group by (``optimizer/optimizer.py``)."""


class ActivationModule(torch.nn.Module):
    """A function of one tensor as the activation of an MLP; see :func:`activation_of`."""

    function: Callable[[Tensor], Tensor]

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``function(x)``."""
        return self.function(x)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing, whatever the prefix: 0.16 asks each part of an MLP for its share of a checkpoint."""
        return {}


def activation_of(function: Callable[[Tensor], Tensor]) -> type[ActivationModule]:
    """Return what ``MLPSubmodules.activation_func`` takes, for a function of one tensor: a class.

    0.16 takes a function as the activation itself and makes an object of a class; 0.19 calls whatever it is given with
    ``config=`` and asks for a module (``typed_torch.apply_module``).
    """
    return type(f"Module_{function.__name__}", (ActivationModule,), {"function": staticmethod(function)})


def cuda_graph_fields(parts: list[str]) -> dict[str, Any]:
    """Return the field of ``TransformerConfig`` for the parts of a layer that become CUDA graphs.

    It is called ``cuda_graph_scope`` up to 0.17, ``cuda_graph_modules`` since 0.18.
    """
    return {cuda_graph_field(): parts}


def cuda_graph_field() -> str:
    """Return that field's name."""
    from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: PLC0415

    fields = TransformerConfig.__dataclass_fields__
    return "cuda_graph_modules" if "cuda_graph_modules" in fields else "cuda_graph_scope"


def permuted(tokens: Tensor, probs: Tensor | None, order: Tensor, tokens_per_expert: Tensor | None) -> tuple[Any, ...]:
    """Return what ``moe_utils.permute`` gives: where it can pad (after 0.16), two values more, of what it padded."""
    return (tokens, probs, order, None, tokens_per_expert) if _permute_pads() else (tokens, probs, order)


@functools.cache
def _permute_pads() -> bool:
    from megatron.core.transformer.moe import moe_utils  # noqa: PLC0415

    return "tokens_per_expert" in inspect.signature(moe_utils.permute).parameters


def rotary_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return what Megatron-Core says of a rotation beside its angles, as 0.16 calls it.

    What 0.16 has as ``multi_latent_attention`` is ``mla_rotary_interleaved`` since 0.19, at the same position.
    """
    interleaved = options.pop("mla_rotary_interleaved", None)
    return options if interleaved is None else {**options, "multi_latent_attention": interleaved}


def sum_marked_gradients(modules: list[Any]) -> None:
    """Add up over the tensor-parallel ranks the gradients of parameters that ask for it, as for the pipeline's chunks.

    Of norms under sequence parallelism, and of queries and keys. ``finalize_model_grads`` does it too, and has no part
    of its own for modules that are no chunks.

    Args:
        modules: in Megatron-Core's DistributedDataParallel, their gradients reduced over data-parallel ranks.
    """
    from megatron.core.distributed import finalize_model_grads as finalize  # noqa: PLC0415

    module = inspect.getmodule(finalize)
    module._allreduce_non_tensor_model_parallel_grads(modules, modules[0].config)  # type: ignore[union-attr]


def open_files_plainly() -> None:
    """Let Megatron-Core open the files of checkpoints as Python does; they lie on this machine's file systems.

    Where multi-storage-client is installed, it opens them through that, which takes a record of each of the reads of an
    archive, twenty a tensor: half of the processor time of a load of many small tensors.
    """
    from megatron.core.msc_utils import MultiStorageClientFeature  # noqa: PLC0415

    MultiStorageClientFeature.disable()


def plan_save(strategy: Any, sharded: Any, directory: Any) -> Any:
    """Plan an asynchronous save with Megatron-Core's own writer.

    0.19 takes that of nvidia-resiliency-ext by default, another package, and has a parameter for the choice.

    Args:
        strategy: a ``TorchDistSaveShardedStrategy``.
        sharded: the sharded state dict.
        directory: where to.

    Returns:
        An ``AsyncRequest``.
    """
    open_files_plainly()
    choice = (
        {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(strategy.async_save).parameters else {}
    )
    return strategy.async_save(sharded, directory, **choice)


@contextlib.contextmanager
def groups_known_by_kind() -> Iterator[None]:
    """Let the optimizer's load find a saved parameter group by its kind and not by its learning rates.

    Since 0.19 ``max_lr``, ``min_lr`` and the like are part of what a group is known by, so that a run could not go on
    with a changed rate (KeyError). All groups of a kind then get what was saved of one of them: their step, which they
    have in common, and settings, over which the recipe's are laid afterwards. The optimizer that is not distributed
    would give them one dictionary, in every version, and so the parameters of the last (ValueError in torch).
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer  # noqa: PLC0415

    kept = [(module, module.param_group_identifier_keys) for module in (optimizer, distrib_optimizer)]
    match = optimizer.MegatronOptimizer.__dict__["_filter_and_reorder_param_groups"]
    try:
        for module, _ in kept:
            module.param_group_identifier_keys = _GROUP_KEYS
        optimizer.MegatronOptimizer._filter_and_reorder_param_groups = staticmethod(_matched_groups)
        yield
    finally:
        optimizer.MegatronOptimizer._filter_and_reorder_param_groups = match
        for module, keys in kept:
            module.param_group_identifier_keys = keys


def _matched_groups(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each current group what was saved of its kind, with the parameters that stand at its place.

    Raises:
        UserError: nothing was saved of a kind.
    """

    def kind(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in _GROUP_KEYS)

    by_kind = {kind(group): group for group in saved}
    missing = [kind(group) for group in current if kind(group) not in by_kind]
    if missing:
        raise UserError(f"the checkpoint has no parameter group with {_GROUP_KEYS} = {missing[0]}")
    return [{**by_kind[kind(group)], "params": at["params"]} for group, at in zip(current, saved, strict=True)]
