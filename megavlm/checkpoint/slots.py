"""Where each parameter of a model lies in a Megatron distributed checkpoint.

The canonical names are those of the parameters in one process (``language.decoder.layers.3.mlp.linear_fc2.weight``);
a checkpoint stacks the layers of a block under one key. Both are asked from Megatron-Core's own
``sharded_state_dict`` of the model, built on the meta device, so that nothing here can drift from what is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megavlm.architectures.context import BuildContext
from megavlm.checkpoint.containers import sharded_state
from megavlm.config import architecture as registry
from megavlm.config.schema import LoraConfig, ModelConfig, ParallelConfig
from megavlm.models.build import MODULES
from megavlm.models.fusion import build_fusion
from megavlm.models.levels import make_connector

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""How checkpoints are saved: optimizer state as full tensors in the model's own shapes."""

EXPERT = ".local_experts."
"""In the names of the parameters of experts."""


@dataclass(frozen=True)
class Slot:
    """The place of one parameter.

    Attributes:
        key: key of the tensor in the checkpoint.
        shape: of the parameter, the whole of it (without the rows that pad a vocabulary).
        layer: its index on the leading axis of the stacked tensor; None where nothing is stacked.
        layers: length of that axis.
        vocabulary: its rows are the vocabulary, so the checkpoint may have more of them.
        expert: its index on the axis of experts, behind that of layers if there is one; None for no expert.
        experts: length of that axis.
    """

    key: str
    shape: tuple[int, ...]
    layer: int | None = None
    layers: int = 0
    vocabulary: bool = False
    expert: int | None = None
    experts: int = 0

    @property
    def place(self) -> tuple[int, ...]:
        """Its index on each axis on which the tensor is stacked."""
        return tuple(index for index in (self.layer, self.expert) if index is not None)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the parameter with those axes."""
        return (*(1 for _ in self.place), *self.shape)

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the tensor under ``key``."""
        layers = () if self.layer is None else (self.layers,)
        return (*layers, *(() if self.expert is None else (self.experts,)), *self.shape)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the parameter begins in that tensor."""
        return (*self.place, *(0 for _ in self.shape))

    @property
    def words(self) -> str:
        """Return how messages call it: the key, and which layer and expert of it."""
        named = {"layer": self.layer, "expert": self.expert}
        return ", ".join([self.key, *(f"{axis} {index}" for axis, index in named.items() if index is not None)])


def model_state(modules: Sequence[Any]) -> dict[str, Any]:
    """Return the sharded tensors of a rank's bare chunks, named as Megatron-Core's optimizer expects.

    What is no tensor is left out: extra state of layers, such as Transformer Engine's scales for delayed FP8. It is a
    pickle, which loading would have to run; a layer without it starts as a new one does (docs/precision.md).
    """
    metadata: dict[str, Any] = {**METADATA, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    if len(modules) == 1:
        return {"model": _tensors(sharded_state(modules[0], metadata=metadata))}
    return {f"model{i}": _tensors(sharded_state(module, metadata=metadata)) for i, module in enumerate(modules)}


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}


def build_part(part: str, model: ModelConfig, context: BuildContext) -> Any:
    """Build ``vision``, ``connector`` or ``language`` whole, in this process alone."""
    registry.load()
    if part == "vision":
        return registry.VISION.find(model.vision.preset).build(model.vision, context)
    if part == "connector":
        connector = make_connector(model, context)
        build_fusion(model, connector, context, 0)  # its weights are the connector's
        return connector
    return registry.LANGUAGE.find(model.language.preset).build(model.language, context)


def find_slots(model: ModelConfig, parts: Sequence[str] = MODULES, lora: LoraConfig | None = None) -> dict[str, Slot]:
    """Return the slot of every parameter of ``parts``, by canonical name; those of adapters too, if ``lora`` has some.

    Process groups of one process must be up (:func:`megavlm.parallel.state.process_groups`).
    """
    context = BuildContext(
        ParallelConfig(), initialize=False, lora=dataclasses.replace(lora or LoraConfig(), quantize=None)
    )
    metadata: dict[str, Any] = {**METADATA, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    slots: dict[str, Slot] = {}
    for part in parts:
        with torch.device("meta"):
            module = build_part(part, model, context)
        for name, entry in sharded_state(module, f"{part}.", metadata).items():
            head = name.startswith("language.output_layer.")
            rows = model.language.output_rows if head else model.language.vocab_size
            slot = _slot(entry, rows, expert=EXPERT in name)
            if slot is not None:
                slots[name] = slot
    return slots


def _slot(entry: Any, vocab_size: int, *, expert: bool) -> Slot | None:
    """Read Megatron-Core's description of one entry; None for what is no tensor."""
    whole = entry
    if isinstance(entry, ShardedTensorFactory):  # gate and up of a gated MLP: two parts of one tensor
        first = entry.build()
        while not isinstance(first, ShardedTensor):
            first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        whole = first
    if not isinstance(whole, ShardedTensor):
        return None
    stacked = whole.prepend_axis_num
    assert stacked - expert in (0, 1), whole.key
    shape = tuple(whole.global_shape[stacked:])
    if whole.allow_shape_mismatch:  # embedding and output layer, padded to a multiple of TP
        shape = (vocab_size, *shape[1:])
    axes: list[tuple[int | None, int]] = list(zip(whole.global_offset[:stacked], whole.global_shape, strict=False))
    layer, layers = axes[0] if stacked > expert else (None, 0)
    number, experts = axes[-1] if expert else (None, 0)
    return Slot(whole.key, shape, layer, layers, whole.allow_shape_mismatch, number, experts)
