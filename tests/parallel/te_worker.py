"""Builds a model for each case with Transformer Engine's layers and says what it is made of; torch is told of a GPU.

Arguments: JSON of cases by name, each branches for ``tests.tiny``; a file to write. Cases of its own are all models of
``every_part`` (each registered part, and what registries do not hold by name), and each model of the shipped recipes at
its full width, of few layers. Nothing is drawn: memory that nobody writes is none.

Writes JSON by name: the error, or the classes of the language's, tower's and connector's parts, what differs from the
same model of torch's layers in a checkpoint, and what the recipe says that the test goes by.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
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

cuda.Stream = type("Stream", (), {})
cuda.get_rng_state, cuda.manual_seed = torch.get_rng_state, torch.manual_seed
for _name in ("normal_", "uniform_"):
    setattr(torch.Tensor, _name, lambda self, *_, **__: self)

from megavlm.parallel.device import prepare_device  # noqa: E402

prepare_device()

import every_part  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.tensor_parallel import random  # noqa: E402
from test_matrix import ELSEWHERE, branches, packed, partner  # noqa: E402
from tiny import IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.architectures import context  # noqa: E402
from megavlm.architectures.adapters import prepare_adapters  # noqa: E402
from megavlm.checkpoint.slots import model_state  # noqa: E402
from megavlm.config import architecture as registry  # noqa: E402
from megavlm.config.help import to_tree  # noqa: E402
from megavlm.config.load import load_recipe, shipped_recipes  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.families.presets import expand_presets, load_presets  # noqa: E402
from megavlm.models.vlm import build_chunks  # noqa: E402

context.has_kernels = lambda: False  # weights are drawn on the CPU, which a device's random state would be needed for


PARTS = ("core_attention", "q_layernorm", "final_layernorm", "ln_pre", "ln_post")
"""What is reported besides linear layers."""


ONE_GPU = (
    "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1",
    "parallel.expert_model_parallel_size=1", "parallel.context_parallel_size=1", "parallel.sequence_parallel=false",
    "parallel.num_layers_in_first_pipeline_stage=null", "parallel.virtual_pipeline_model_parallel_size=null",
)  # fmt: skip


KINDS = {"vision": registry.VISION, "connector": registry.CONNECTORS, "language": registry.LANGUAGE}


def small(name: str) -> Recipe | None:
    """Return a shipped recipe with small sizes and all else that it says; None of parts that have no small sizes."""
    recipe = load_recipe(name, ONE_GPU, expand_presets)
    names = {kind: getattr(recipe.model, kind).preset for kind in KINDS}
    if any(KINDS[kind].find(one).architecture.name in ELSEWHERE for kind, one in names.items()):
        return None
    tree = to_tree(recipe)
    sizes = branches(**names)
    for name in ("image", "video"):  # whose tiles are of other sizes, and which are no parts
        tree["model"].pop(name, None)
    if "rotary_sections" in tree["model"]["language"]:  # parts of a head
        sizes["language"].pop("kv_channels")
    tree["model"] |= {"preset": None} | {kind: {**tree["model"][kind], **sizes[kind]} for kind in KINDS}
    return tiny_recipe(**{branch: tree[branch] for branch in ("model", "lora", "engine", "parallel", "training")})


def registered(kind: str, name: str, *, fp8: bool = False) -> Recipe:
    """Return a small model with a part, and others that go with it."""
    fits = "qwen2_vl_vit" if kind == "connector" and packed(kind, name) else "clip_vit"
    names = {"vision": fits, "connector": "linear", "language": "llama", kind: name, **partner(kind, name)}
    language = registry.LANGUAGE.find(names["language"])
    if {"cross_attention_layers", "cross_hidden_size"} & {*language.values}:  # of their own: every_part, recipes
        names["language"] = "llama"
    engine = {"fp8": "hybrid", "vision_bf16": kind != "vision", "connector_bf16": kind != "connector"} if fp8 else {}
    return tiny_recipe(training={"precision": "bf16"}, model=branches(**names), engine=engine)


def all_cases(given: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Recipe]]]:
    """Yield names of cases and what makes their recipes."""
    for name, given_branches in given.items():
        yield name, lambda own=given_branches: tiny_recipe(**{"training": {"precision": "bf16"}, **own})
    for kind, own in KINDS.items():
        for name in (name.replace("<N>", "2") for name in own.names()):
            if own.find(name).architecture.name not in ELSEWHERE:
                yield f"{kind}: {name}", lambda kind=kind, name=name: registered(kind, name)
                if kind != "language" or own.find(name).architecture.products is not None:
                    yield f"{kind}: {name} in FP8", lambda kind=kind, name=name: registered(kind, name, fp8=True)
    for name, make in every_part.MAKERS.items():
        yield f"part: {name}", lambda make=make: make().recipe
    seen = set()
    for name in shipped_recipes():
        recipe = small(name)
        key = repr((recipe.model, recipe.lora, recipe.engine)) if recipe is not None else ""
        if recipe is not None and key not in seen:
            seen.add(key)
            yield f"recipe: {name}", lambda recipe=recipe: recipe


def model(recipe: Recipe, *, engine: bool) -> Any:
    """Return the model of a case."""
    own = {"engine": recipe.engine} if engine else {}
    made = context.BuildContext(
        recipe.parallel, torch.bfloat16, transformer_engine=engine, lora=recipe.lora,
        deepstack=len(getattr(recipe.model.vision, "deepstack_layers", ())), **own,
    )  # fmt: skip
    random.get_cuda_rng_tracker().reset()  # of adapters' dropout, of the model before
    (chunk,) = build_chunks(recipe.model, made, IMAGE_TOKEN)
    if recipe.lora.rank is not None:
        prepare_adapters(chunk.language, recipe.lora, 1)
    return chunk


FACTS = (
    "num_layers", "kv_channels", "attention_mask", "sliding_window", "sliding_window_pattern", "qk_layernorm",
    "cross_attention_layers", "visual_expert", "use_parallel_residual", "pre_layernorms",
    "kv_lora_rank",
)  # fmt: skip


def facts(recipe: Recipe) -> dict[str, Any]:
    """Return what the test goes by."""
    language, vision = recipe.model.language, recipe.model.vision
    return {
        "language": {name: getattr(language, name) for name in FACTS if hasattr(language, name)},
        "lora": recipe.lora.rank is not None,
        "presets": {kind: getattr(recipe.model, kind).preset for kind in KINDS},
        "architecture": registry.LANGUAGE.find(language.preset).architecture.name,
        "tower": registry.VISION.find(vision.preset).architecture.name,
        "behind": {at: getattr(vision, f"{at}branch_norms", "") == "behind" for at in ("", "high_")},
        "fp8": recipe.engine.fp8 or "",
        "vision_fp8": (not recipe.engine.vision_bf16 and recipe.engine.fp8) or "",
        "connector_fp8": (not recipe.engine.connector_bf16 and recipe.engine.fp8) or "",
    }


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


def report(recipe: Recipe) -> dict[str, Any]:
    """Return what the test wants to know of a case."""
    chunk = model(recipe, engine=True)
    ours, torchs = stored(chunk), stored(model(recipe, engine=False))
    return {
        "language": parts(chunk.language),
        "vision": parts(chunk.vision),
        "connector": parts(chunk.connector),
        "differs": sorted(map(str, set(ours.items()) ^ set(torchs.items()))),
        "tensors": len(ours),
        "facts": facts(recipe),
    }


def main() -> None:
    """Build all cases."""
    load_presets()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    random._set_cuda_rng_state = lambda *_, **__: None
    results = {}
    for name, make in all_cases(json.loads(sys.argv[1])):
        try:
            recipe = make()
            results[name] = report(recipe)
        except Exception:
            results[name] = {"error": traceback.format_exc(limit=-6)}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
