"""What Megatron-Core says of an optimizer's state in a checkpoint, put right.

**Padding.** The distributed optimizer joins its buckets without the padding behind each, and then cuts the parameters
out by offsets that count it (megatron-core 0.16 to 0.19, ``sharded_param_state_fully_reshardable``): behind a padded
bucket, masters and moments would be stored under their neighbours' names. Inside :func:`padding_left_out` the offsets
do not count it.

**The other optimizer.** A run may go on with ``parallel.use_distributed_optimizer`` switched. Both kinds store moments
alike; they name the fp32 masters, and place the parameter groups, differently.

**Expert parallelism.** With it Megatron-Core has an optimizer for experts beside the other, and keeps their states
apart. A checkpoint has one state, whatever the layout (:func:`together`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor

from megavlm.checkpoint.slots import METADATA
from megavlm.config.errors import UserError
from megavlm.parallel.device import synchronize

STATE = "optimizer.state."
MASTERS = ("param", "fp32_param")
"""What the distributed and the plain bf16 optimizer call a master; the plain fp32 one has none."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def each(optimizer: Any) -> list[Any]:
    """Return Megatron-Core's optimizers behind ``optimizer`` that have parameters on this rank."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chained if not getattr(one, "is_stub_optimizer", False)]


def describe(optimizer: Any, model: dict[str, Any], *, loading: bool = False) -> Any:
    """Return Megatron-Core's sharded state of an optimizer; a collective.

    Args:
        optimizer: Megatron-Core's.
        model: :func:`megavlm.checkpoint.slots.model_state` of its model.
        loading: describe what is to be read, instead of what is there.
    """
    host = contextlib.nullcontext() if loading else in_host_memory(optimizer)
    with padding_left_out(optimizer), host:
        if is_apart(optimizer):
            optimizer._synchronize_steps()
            states = [
                one.sharded_state_dict(model, is_loading=loading, metadata=dict(METADATA))
                for one in optimizer.chained_optimizers
            ]
            return together(states, loading=loading)
        return optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(METADATA))


@contextlib.contextmanager
def padding_left_out(optimizer: Any) -> Iterator[None]:
    """Let every buffer of a distributed optimizer give offsets that do not count the padding behind its buckets."""
    kept = []
    for buffer in (buffer for one in each(optimizer) for buffer in getattr(one, "buffers", ())):
        kept.append((buffer, buffer.param_index_map))
        before, shift = 0, []
        for bucket in buffer.buckets:
            shift.append(bucket.offset - before)
            before += bucket.numel_unpadded
        buffer.param_index_map = {
            param: (start - shift[bucket], stop - shift[bucket], bucket)
            for param, (start, stop, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, offsets in kept:
            buffer.param_index_map = offsets


@contextlib.contextmanager
def in_host_memory(optimizer: Any) -> Iterator[None]:
    """Let a distributed optimizer show copies of its state in host memory, if it is on a GPU.

    Megatron-Core takes each parameter's state to the host by itself, through pageable memory, and waits for each: a
    quarter of the speed on an H200 (benchmarks/gpu.md). Here all copies are under way at once, into pinned memory that
    torch keeps for the next save. Not run on a GPU.
    """
    staged = [one for one in each(optimizer) if isinstance(one, DistributedOptimizer)]
    try:
        for one in staged:
            copies = {
                param: {
                    name: value.to("cpu", non_blocking=True) if isinstance(value, Tensor) else value
                    for name, value in one._get_main_param_and_optimizer_states(param).items()
                }
                for param in one.model_param_group_index_map
            }
            one._get_main_param_and_optimizer_states = copies.__getitem__
        synchronize()
        yield
    finally:
        for one in staged:
            one.__dict__.pop("_get_main_param_and_optimizer_states", None)


def in_memory(optimizer: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """Yield what this rank's optimizer really works on.

    Yields:
        A parameter of the model, where the share of this rank begins in it (in elements), and the share's flat masters
        and moments by the name that a checkpoint has for them.
    """
    for one in each(optimizer):
        if isinstance(one, DistributedOptimizer):
            for param in one.model_param_group_index_map:
                held = one._get_main_param_and_optimizer_states(param)
                yield param, one._get_model_param_range_map(param)["param"].start, _flat(held)
        elif isinstance(one, FP32Optimizer):
            for param in one.get_parameters():
                yield param, 0, _flat(one.optimizer.state[param])
        else:
            groups = zip(one.float16_groups, one.fp32_from_float16_groups, strict=True)
            for param, master in (pair for group in groups for pair in zip(*group, strict=True)):
                yield param, 0, _flat({"fp32_param": master, **one.optimizer.state[master]})
            for param in (param for group in one.fp32_from_fp32_groups for param in group):
                yield param, 0, _flat(one.optimizer.state[param])


def _flat(held: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().reshape(-1) for name, value in held.items() if name in (*MASTERS, *MOMENTS)}


def shares(optimizer: Any) -> dict[Tensor, list[tuple[int, int]]]:
    """Return how each parameter is cut over the data-parallel ranks: [start, stop) in elements of it, without gaps.

    Parameters that are not cut are left out.
    """
    found = {}
    for one in each(optimizer):
        for buffer in getattr(one, "buffers", ()):
            for param, (start, stop, number) in buffer.param_index_map.items():
                bucket = buffer.buckets[number]
                size = bucket.grad_data.numel() // buffer.data_parallel_world_size
                borders = range(bucket.offset, bucket.offset + bucket.grad_data.numel() + 1, size)
                inner = [border - start for border in borders if start < border < stop]
                found[param] = list(pairwise([0, *inner, stop - start]))
    return found


def master_name(keys: Iterable[str]) -> str | None:
    """Return what the masters among a checkpoint's ``keys`` are called, or None where there are none."""
    names = {key.removeprefix(STATE).partition(".")[0] for key in keys if key.startswith(STATE)}
    return next((name for name in MASTERS if name in names), None)


def _own_master_name(optimizer: Any) -> str | None:
    one, *_ = each(optimizer)
    if isinstance(one, DistributedOptimizer):
        return "param"
    return None if isinstance(one, FP32Optimizer) else "fp32_param"


def is_apart(optimizer: Any) -> bool:
    """Whether experts, which are spread over other ranks than the rest, have an optimizer of their own."""
    return type(optimizer) is ChainedOptimizer and len(optimizer.chained_optimizers) > 1


_EXPERTS = "experts"
"""Where the described state of the experts' own optimizer lies: it has no place of its own in a checkpoint."""
_KNOWN_BY = ("wd_mult", "lr_mult", "is_decoupled_lr")
"""What Megatron-Core knows a saved parameter group by."""
_OF_A_KIND = (*_KNOWN_BY, "max_lr", "min_lr", "default_config")
"""What parameter groups differ in."""


def _kind(group: dict[str, Any], keys: Iterable[str] = _OF_A_KIND) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in keys)


def _grouped(state: dict[str, Any]) -> dict[str, Any]:
    """Return where a described state has its parameter groups: the plain fp32 optimizer at the top."""
    inner = state.get("optimizer")
    return inner if isinstance(inner, dict) else state


def together(states: list[dict[str, Any]], *, loading: bool) -> dict[str, Any]:
    """Return the states of several optimizers as one optimizer's, so that expert parallelism may change.

    Args:
        states: described by Megatron-Core; the second is of experts.
        loading: they are to be read: parameter groups are left out, for :func:`answer` to fill in.
    """
    whole, experts = states
    groups = [group for state in states for group in _grouped(state).pop("param_groups")]
    if not loading:
        kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
        for group in groups:
            kinds.setdefault(_kind(group), {**group, "is_expert_parallel": False})
        _grouped(whole)["param_groups"] = list(kinds.values())
    # Of them a checkpoint has no more than tensors. The list of a first stage without experts has none, and cannot be
    # merged with that of a stage that has some.
    kept = {
        key: value
        for key, value in experts.items()
        if not isinstance(value, str) and not (isinstance(value, list) and not any(value))
    }
    return {**whole, _EXPERTS: kept}


def _taken_apart(loaded: dict[str, Any], optimizer: Any) -> list[dict[str, Any]]:
    """Return the state of each optimizer of what was read for :func:`together`, with parameter groups of its own.

    Raises:
        UserError: nothing was saved of a kind of groups.
    """
    experts = loaded.pop(_EXPERTS, {})
    there = (loaded if "param_groups" in loaded else loaded["optimizer"]).pop("param_groups")
    saved, alike = {_kind(group): group for group in there}, {_kind(group, _KNOWN_BY): group for group in there}
    states = [loaded, {**{key: value for key, value in loaded.items() if isinstance(value, str)}, **experts}]
    for one, state in zip(optimizer.chained_optimizers, states, strict=True):
        groups = one.optimizer.state_dict()["param_groups"]
        missing = [_kind(group, _KNOWN_BY) for group in groups if _kind(group, _KNOWN_BY) not in alike]
        if missing:
            raise UserError(f"the checkpoint has no parameter group with {_KNOWN_BY} = {missing[0]}")
        own = (*_OF_A_KIND, "is_expert_parallel", "params")  # rates too, which a run may change
        # Where each kind of optimizer has them, the one that saved and this one.
        inner = state.setdefault("optimizer", {})
        inner["param_groups"] = state["param_groups"] = [
            {
                **saved.get(_kind(group), alike[_kind(group, _KNOWN_BY)]),
                **{key: group[key] for key in own if key in group},
            }
            for group in groups
        ]
        # Of a stage without experts nothing was read.
        if isinstance(one, FP32Optimizer):
            state.setdefault("state", {})
        elif not isinstance(one, DistributedOptimizer):
            inner.setdefault("state", {})
            state.setdefault("fp32_from_fp16_params", [[] for _ in groups])
    return states


def ask(state: dict[str, Any], optimizer: Any, stored: Iterable[str]) -> dict[str, Any]:
    """Return what to ask a checkpoint for: masters by its own name for them, or not at all if it has none.

    Args:
        state: :func:`describe` of this run's optimizer, for loading.
        optimizer: the run's.
        stored: keys of the checkpoint.
    """
    if not each(optimizer):
        return state
    own, theirs = _own_master_name(optimizer), master_name(stored)
    if own in (None, theirs):
        return state
    prefix = f"{STATE}{own}."

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: one for name, item in value.items() if (one := renamed(item)) is not _LEFT_OUT}
        if isinstance(value, list):
            return [one for item in value if (one := renamed(item)) is not _LEFT_OUT]
        if not isinstance(value, ShardedTensor | ShardedTensorFactory) or not value.key.startswith(prefix):
            return value
        if theirs is None:
            return _LEFT_OUT
        return dataclasses.replace(value, key=f"{STATE}{theirs}.{value.key.removeprefix(prefix)}")

    return dict(renamed(state))


_LEFT_OUT = object()


def answer(loaded: dict[str, Any], optimizer: Any, stored: Iterable[str]) -> dict[str, Any]:
    """Return what was read for :func:`ask` as the run's own optimizer takes it; weights are in the model already."""
    if not each(optimizer):
        return loaded
    own, theirs = _own_master_name(optimizer), master_name(stored)
    if is_apart(optimizer):
        pairs = zip(_taken_apart(loaded, optimizer), optimizer.chained_optimizers, strict=True)
        apart: dict[Any, Any] = dict(enumerate(_answer(state, one, own, theirs) for state, one in pairs))
        return apart
    return _answer(loaded, optimizer, own, theirs)


def _answer(loaded: dict[str, Any], optimizer: Any, own: str | None, theirs: str | None) -> dict[str, Any]:
    """Return what was read as one optimizer takes it, from masters of one name to those of another."""
    if own == theirs:
        return loaded
    # The plain fp32 optimizer keeps its parameter groups at the top. A plain one's groups hold its own parameters.
    inner = loaded.get("optimizer", {})
    groups = inner["param_groups"] if theirs is not None else loaded["param_groups"]
    if own == "param":
        result = {**loaded, "optimizer": {"param_groups": groups}, "param_state": loaded.get("param_state", {})}
        result["param_state_sharding_type"] = METADATA["distrib_optim_sharding_type"]
        if theirs is None:
            weights = (param for one in each(optimizer) for buffer in one.buffers for param in buffer.param_index_map)
            for number, param in enumerate(weights):
                result["param_state"][number]["param"] = param.detach().float()
        return result
    mine = (loaded if own is None else inner)["param_groups"]
    state = (loaded if own is None else inner).get("state", {})
    plain = {"state": state, "param_groups": [{**there, **here} for there, here in zip(groups, mine, strict=True)]}
    if own is None:
        return plain
    result = {**loaded, "optimizer": plain}
    if theirs is None:
        (one,) = each(optimizer)
        result["fp32_from_fp16_params"] = [[p.detach().float() for p in group] for group in one.float16_groups]
    return result
