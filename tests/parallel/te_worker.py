"""Builds a model for each case with Transformer Engine's layers and says what it is made of; torch is told of a GPU.

Argument: JSON of cases by name, each branches for ``tests.tiny``. Writes JSON by name: the error, or the classes of the
language's, tower's and connector's parts and what differs from the same model of torch's layers in a checkpoint.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

# An H100, as far as constructors ask. Its tensors lie on the CPU.
cuda: Any = torch.cuda
cuda.is_available = lambda: True
cuda.device_count = lambda: 1
cuda.current_device = lambda: "cpu"
cuda.get_device_capability = lambda *_, **__: (9, 0)
_PROPERTIES = {"major": 9, "minor": 0, "multi_processor_count": 132, "name": "H100", "total_memory": 80 << 30}
cuda.get_device_properties = lambda *_, **__: type("Properties", (), _PROPERTIES)()

from megavlm.parallel.device import prepare_device  # noqa: E402

prepare_device()

from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.architectures import context  # noqa: E402
from megavlm.architectures.adapters import prepare_adapters  # noqa: E402
from megavlm.checkpoint.slots import model_state  # noqa: E402
from megavlm.models.vlm import build_chunks  # noqa: E402

context.has_kernels = lambda: False  # weights are drawn on the CPU, which a device's random state would be needed for


PARTS = ("core_attention", "q_layernorm", "final_layernorm", "ln_pre", "ln_post")
"""What is reported besides linear layers."""


def model(branches: dict[str, Any], *, engine: bool) -> Any:
    """Return the model of a case."""
    recipe = tiny_recipe(**{"training": {"precision": "bf16"}, **branches})
    made = context.BuildContext(
        recipe.parallel, torch.bfloat16, transformer_engine=engine, engine=recipe.engine, lora=recipe.lora
    )
    (chunk,) = build_chunks(recipe.model, made, IMAGE_TOKEN)
    if recipe.lora.rank is not None:
        prepare_adapters(chunk.language, recipe.lora, 1)
    return chunk


def parts(module: Any) -> dict[str, str]:
    """Return by name the classes of the parts that compute, with the FP8 format: ``TERowParallelLinear hybrid``."""
    found = {}
    for name, part in module.named_modules():
        own = [c.__name__ for c in type(part).__mro__ if c.__module__.startswith(("megatron.", "transformer_engine."))]
        linear = bool(own) and own[0].endswith("ParallelLinear")
        if linear or name.rpartition(".")[2] in PARTS:
            kind = (
                own[0] if linear else type(part).__name__
            )  # ours that are derived from its linear layers count as those
            found[name] = f"{kind} {getattr(getattr(part, 'config', None), 'fp8', None) or ''}".strip()
    return found


def stored(chunk: Any) -> dict[str, tuple[int, ...]]:
    """Return key and shape of what a checkpoint holds of a model, without Transformer Engine's own state."""
    state = model_state([chunk])
    return {
        entry.key: tuple(entry.global_shape)
        for entry in _leaves(state)
        if hasattr(entry, "global_shape")
        and not entry.key.endswith("_extra_state")
        and "_extra_state/" not in entry.key
    }


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree


def report(branches: dict[str, Any]) -> dict[str, Any]:
    """Return what the test wants to know of a case."""
    chunk = model(branches, engine=True)
    plain = {name: values for name, values in branches.items() if name != "engine"}
    ours, torchs = stored(chunk), stored(model(plain, engine=False))
    return {
        "language": parts(chunk.language),
        "vision": parts(chunk.vision),
        "connector": parts(chunk.connector),
        "differs": sorted(map(str, set(ours.items()) ^ set(torchs.items()))),
        "tensors": len(ours),
    }


def main() -> None:
    """Build all cases."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    results = {}
    for name, branches in json.loads(sys.argv[1]).items():
        try:
            results[name] = report(branches)
        except Exception:
            results[name] = {"error": traceback.format_exc(limit=-6)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
