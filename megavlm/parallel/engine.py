"""The recipe's ``engine`` branch at run time: what this machine can do of it, and how Megatron-Core is told.

Needs of FP8: Transformer Engine 2.9's ``quantization.py`` (compute capability, CUDA) and Megatron-Core 0.16.1's
``fp8_utils.py`` (Transformer Engine's version).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from megavlm.config.errors import RecipeError
from megavlm.config.schema import EngineConfig, Recipe
from megavlm.parallel import wgrad
from megavlm.parallel.device import has_cuda, transformer_engine_installed
from megavlm.parallel.megatron_versions import cuda_graph_fields

Part = Literal["language", "vision", "connector"]

_INSTALL_TE = "install transformer-engine[pytorch] (2.9 to 2.11 for Megatron-Core 0.16) on a CUDA machine"
_INSTALL_APEX = "build NVIDIA Apex from its source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (the Dockerfile's APEX=1)"
_WITHOUT = "or set engine.fp8 to null"


@dataclass(frozen=True)
class Machine:
    """What the ``engine`` branch asks of a machine."""

    capability: tuple[int, int] | None = None
    """Compute capability of the device; None without CUDA."""
    cuda: tuple[int, ...] = ()
    """CUDA version of torch."""
    transformer_engine: tuple[int, ...] | None = None
    """Its version; None where it is not installed."""
    fused_wgrad: bool = False
    """Whether gradient_accumulation_fusion can be had: from Apex, or as a product of torch (parallel/wgrad.py)."""


def this_machine() -> Machine:
    """Return what this process finds."""
    if not has_cuda():
        return Machine()
    return Machine(
        capability=torch.cuda.get_device_capability(),
        cuda=_numbers(torch.version.cuda or ""),
        transformer_engine=_installed_version("transformer-engine") if transformer_engine_installed() else None,
        fused_wgrad=wgrad.has_apex() or wgrad.works(),
    )


def _numbers(text: str) -> tuple[int, ...]:
    """``2.9.0.post1`` as (2, 9, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _installed_version(package: str) -> tuple[int, ...] | None:
    try:
        return _numbers(version(package))
    except PackageNotFoundError:
        return None


def check_machine(recipe: Recipe, machine: Machine) -> None:
    """Refuse what ``machine`` cannot do; called before a process group starts.

    Raises:
        RecipeError: with a line for each key: what is missing, and what to install or set.
    """
    lines = [*_fp8_lines(recipe.engine, machine), *_kernel_lines(recipe, machine)]
    if lines:
        raise RecipeError.of(lines)


# Oldest Transformer Engine, compute capability and CUDA of each way of scaling.
_NEEDS: dict[str, tuple[tuple[int, ...], tuple[int, int], tuple[int, ...]]] = {
    "delayed": ((1, 9), (8, 9), (12, 1)),
    "tensorwise": ((2, 2), (8, 9), (12, 1)),
    "blockwise": ((2, 3), (9, 0), (12, 9)),
    "mxfp8": ((2, 1), (10, 0), (12, 8)),
}


def _fp8_lines(engine: EngineConfig, machine: Machine) -> Iterator[str]:
    if engine.fp8 is None:
        return
    if machine.capability is None:
        yield f"engine.fp8: there is no CUDA device; {_INSTALL_TE}, {_WITHOUT}"
        return
    if machine.transformer_engine is None:
        yield f"engine.fp8: transformer-engine is not installed; {_INSTALL_TE}, {_WITHOUT}"
        return
    key, has = f"engine.fp8_recipe: {engine.fp8_recipe}", machine.transformer_engine
    oldest, capability, cuda = _NEEDS[engine.fp8_recipe]
    if has < oldest:
        yield f"{key} needs transformer-engine {_dotted(oldest)}, this is {_dotted(has)}; upgrade it"
    if machine.capability < capability:
        other = "another recipe, " if capability > (8, 9) else ""
        yield (
            f"{key} needs compute capability {_dotted(capability)}, this device has {_dotted(machine.capability)};"
            f" take {other}another GPU, {_WITHOUT}"
        )
    elif engine.fp8_recipe == "mxfp8" and machine.capability >= (12, 0):
        yield f"{key} does not run on compute capability 12; take tensorwise, {_WITHOUT}"
    if machine.cuda < cuda:
        yield f"{key} needs a torch of CUDA {_dotted(cuda)}, this is of {_dotted(machine.cuda)}; upgrade it, {_WITHOUT}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _kernel_lines(recipe: Recipe, machine: Machine) -> Iterator[str]:
    engine = recipe.engine
    kernels = {
        "apply_rope_fusion": engine.apply_rope_fusion == "on",
        "cross_entropy_fusion_impl": engine.cross_entropy_fusion_impl == "te",
        "tp_comm_overlap": engine.tp_comm_overlap,
        "cuda_graph_impl": engine.cuda_graph_impl != "none",
    }
    if machine.transformer_engine is None:
        for name, wanted in kernels.items():
            if wanted:
                yield f"engine.{name}: is Transformer Engine's, which is not here; {_INSTALL_TE}, or leave the key out"
    if engine.gradient_accumulation_fusion == "on" and not machine.fused_wgrad:
        yield (
            "engine.gradient_accumulation_fusion: needs CUDA with torch 2.8 or newer, or NVIDIA Apex; "
            f"{_INSTALL_APEX}, or set it to auto"
        )


def settings(engine: EngineConfig, part: Part, machine: Machine, *, engine_layers: bool, bf16: bool) -> dict[str, Any]:
    """Return the fields of Megatron-Core's TransformerConfig that the ``engine`` branch decides.

    Args:
        engine: the branch.
        part: whose configuration it is.
        machine: what there is.
        engine_layers: the layers are Transformer Engine's.
        bf16: the weights are.
    """
    cuda = machine.capability is not None

    def fused(choice: str, automatic: bool) -> bool:
        return automatic if choice == "auto" else choice == "on"

    fields: dict[str, Any] = {
        "bias_dropout_fusion": fused(engine.bias_dropout_fusion, cuda),
        "gradient_accumulation_fusion": fused(engine.gradient_accumulation_fusion, machine.fused_wgrad),
    }
    if part == "language":
        fields |= {
            "bias_activation_fusion": fused(engine.bias_activation_fusion, cuda),
            "apply_rope_fusion": fused(engine.apply_rope_fusion, engine_layers),
            "cross_entropy_loss_fusion": fused(engine.cross_entropy_loss_fusion, cuda and bf16),
            "cross_entropy_fusion_impl": engine.cross_entropy_fusion_impl,
            "tp_comm_overlap": engine.tp_comm_overlap,
            "cuda_graph_impl": engine.cuda_graph_impl,
            # Packed attention takes segment borders, of which every micro-batch has another number.
            **cuda_graph_fields(["mlp"] if engine.cuda_graph_impl != "none" else []),
        }
    stays = {"language": False, "vision": engine.vision_bf16, "connector": engine.connector_bf16}[part]
    if engine.fp8 is None or stays:
        return fields
    fields |= {
        "fp8": engine.fp8,
        "fp8_recipe": engine.fp8_recipe,
        "fp8_margin": engine.fp8_margin,
        "fp8_amax_history_len": engine.fp8_amax_history_len,
        "fp8_amax_compute_algo": engine.fp8_amax_compute_algo,
        "fp8_wgrad": engine.fp8_wgrad,
        "fp8_param": engine.fp8_param_gather,
    }
    if part == "language":
        fields |= {
            "first_last_layers_bf16": engine.first_last_layers_bf16,
            "num_layers_at_start_in_bf16": engine.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": engine.num_layers_at_end_in_bf16,
        }
    return fields


@contextlib.contextmanager
def without_fp8(configs: Iterable[Any]) -> Iterator[None]:
    """Compute in the weights' own number type inside the block: FP8 products want rows in multiples of 8 (or 16).

    Args:
        configs: Megatron-Core's TransformerConfig of every part that computes.
    """
    kept = [(config, config.fp8) for config in {id(one): one for one in configs}.values()]
    for config, _ in kept:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in kept:
            config.fp8 = fp8


@contextlib.contextmanager
def user_buffers(recipe: Recipe) -> Iterator[None]:
    """Have Transformer Engine's buffers for ``engine.tp_comm_overlap`` inside the block; a collective at its start.

    They are made before the model, once per process, for the activations of one pack: [S, hidden_size]. Not run on a
    GPU yet.
    """
    engine = recipe.engine
    if not engine.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base  # noqa: PLC0415 - only where it is installed

    initialize: Any = base.initialize_ub
    fp8 = engine.fp8 is not None
    precision: dict[str, Any] = {"use_fp8": fp8}
    if hasattr(base, "UserBufferQuantizationMode"):  # 2.7 and later
        modes = base.UserBufferQuantizationMode
        kinds = [modes.FP8 if fp8 else modes.NONE]
        if fp8 and engine.first_last_layers_bf16:
            kinds.append(modes.NONE)
        precision = {"quantization_modes": kinds}
    initialize(
        shape=[recipe.data.sequence_length, recipe.model.language.hidden_size],
        tp_size=recipe.parallel.tensor_model_parallel_size,
        ub_cfgs={},
        bootstrap_backend="nccl",
        **precision,
    )
    try:
        yield
    finally:
        base.destroy_ub()
