"""One optimizer of two: of the pipeline's chunks, and of a tower that every rank of the job holds whole.

Each is Megatron-Core's distributed optimizer, over its own data-parallel ranks. In a checkpoint they are one, as where
the first stage has the tower: so a run may change ``parallel.vision_placement`` whenever it goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import megatron.core.optimizer as megatron
from megatron.core.optimizer import ChainedOptimizer


@contextlib.contextmanager
def groups_of_all(modules: Sequence[Any]) -> Iterator[None]:
    """Give optimizers that are made inside the parameter groups of all ``modules``, in Megatron-Core's order.

    Those of others' parameters stay empty, as on a pipeline stage that has none of a group.
    """
    find = megatron._get_param_groups

    def chosen(model_chunks: Sequence[Any], *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        own = {id(parameter) for chunk in model_chunks for parameter in chunk.parameters()}
        groups = find(list(modules), *args, **kwargs)
        return [{**group, "params": [p for p in group["params"] if id(p) in own]} for group in groups]

    megatron._get_param_groups = chosen
    try:
        yield
    finally:
        megatron._get_param_groups = find


class JoinedOptimizer(ChainedOptimizer):
    """Optimizers with equal parameter groups, whose checkpoint is that of one.

    Args:
        optimizers: Megatron-Core's distributed ones, made inside :func:`groups_of_all`.
    """

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        """Return the state of all of them as of one: groups laid over each other, parameters counted through."""
        self._synchronize_steps()
        states = [one.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs) for one in self._each]
        joined = dict(states[0])
        groups = zip(*(state["optimizer"]["param_groups"] for state in states), strict=True)
        joined["optimizer"] = {
            **states[0]["optimizer"],
            "param_groups": [{k: v for one in reversed(same) for k, v in one.items()} for same in groups],
        }
        entries = [entry for state in states for _, entry in sorted(state["param_state"].items())]
        joined["param_state"] = dict(enumerate(entries))
        return joined

    def load_state_dict(self, state_dict: Any) -> None:
        """Take a state of :meth:`sharded_state_dict` apart again."""
        entries = [entry for _, entry in sorted(state_dict["param_state"].items())]
        begin = 0
        for one in self._each:
            end = begin + sum(len(buffer.param_index_map) for buffer in one.buffers)
            groups = [dict(group) for group in state_dict["optimizer"]["param_groups"]]
            own = {**state_dict, "optimizer": {**state_dict["optimizer"], "param_groups": groups}}
            one.load_state_dict({**own, "param_state": dict(enumerate(entries[begin:end]))})
            begin = end
        assert begin == len(entries), f"state of {len(entries)} parameters for {begin}"
        self._synchronize_steps()

    @property
    def _each(self) -> Sequence[Any]:
        return self.chained_optimizers
