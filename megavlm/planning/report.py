"""A plan as text, as JSON, and as overrides for ``megavlm train``. All figures are predictions, and called so."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megavlm.config import yaml12
from megavlm.planning.gpus import GIB, GPUS, HEADROOM, Efficiency, Gpu
from megavlm.planning.launch import overrides
from megavlm.planning.layout import GPUS_PER_NODE, Layout
from megavlm.planning.memory import StageMemory
from megavlm.planning.placement import Placements
from megavlm.planning.search import Plan, Refusal, Search
from megavlm.planning.workload import Workload


@dataclass(frozen=True)
class PlanPage:
    """What a page tells."""

    found: Search
    own: Plan | str
    """The recipe's own layout, or why it does not work."""
    gpu: Gpu
    workload: Workload
    listed: int
    """Layouts to list."""
    command: list[str]
    """That trains with the first of them, in pieces of a line each."""
    placements: Placements


def overrides_file(plan: Plan, gpu: Gpu, recipe_name: str) -> str:
    """Return a YAML file for ``megavlm train RECIPE --overrides FILE``."""
    head = (
        f"# megavlm plan {recipe_name} --gpus {plan.layout.gpus} --gpu {gpu.name}\n"
        f"# Predicted, not measured: {plan.time.step:.3g} s a step, MFU {100 * plan.time.mfu:.0f} %.\n"
    )
    return head + yaml12.dump(overrides(plan))


def as_json(report: PlanPage) -> dict[str, Any]:
    """Return the search as plain data: bytes, seconds, shares between 0 and 1."""
    found, own, placements = report.found, report.own, report.placements
    return {
        "predicted": True,
        "gpus": found.gpus,
        "gpu": asdict(report.gpu),
        "workload": asdict(report.workload),
        "tried": found.tried,
        "plans": [_plan_json(plan) for plan in found.plans[: report.listed]],
        "recipe_as_it_is": own if isinstance(own, str) else _plan_json(own),
        "vision_placement": {
            name: plan if isinstance(plan, str) else _plan_json(plan) for name, plan in _both(placements)
        }
        | {"better": placements.better, "reason": placements.reason()},
        "refused": [asdict(refusal) for refusal in found.refusals],
        "launch": report.command,
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    return {
        "overrides": overrides(plan),
        "data_parallel_size": layout.data,
        "context_parallel_size": layout.context,
        "microbatches": layout.microbatches,
        "layers_per_stage": list(layout.layers_per_stage),
        "memory": [{**asdict(memory), "total": memory.total} for memory in plan.memory],
        "time": asdict(plan.time),
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
    }


def _views(workload: Workload) -> str:
    return "" if workload.views == workload.images else f" ({workload.views:g} views)"


def _unit(workload: Workload) -> str:
    return "images" if workload.views == workload.images else "views"


def as_text(report: PlanPage) -> str:
    """Return the search as a page of text."""
    found, gpu, workload = report.found, report.gpu, report.workload
    lines = [
        f"Predicted, not measured: {found.gpus} x {gpu.name} in nodes of {GPUS_PER_NODE}.",
        *_measured(gpu),
        f"A micro-batch is one pack: {workload.tokens} tokens, {workload.images:g} images{_views(workload)} and"
        f" {workload.samples:g} samples on average, {workload.most_views} {_unit(workload)} at most.",
        "",
    ]
    if found.plans:
        lines += [*_table(found.plans[: report.listed]), "", *_chosen(found.plans[0], gpu)]
        lines += [
            "",
            *_placements(report.placements),
            "",
            _own(report.own, found.plans[0]),
            "",
            "Start it with (and your data and output_dir):",
        ]
        lines += ["  " + " \\\n      ".join(report.command)]
    if found.refusals:
        lines += ["", f"Refused (of {found.tried} layouts looked at, sizes of which none is left):"]
        lines += [f"  {_sizes(refusal)}: {refusal.reason}" for refusal in found.refusals]
    return "\n".join(lines)


def _measured(gpu: Gpu) -> list[str]:
    """Say what of the time was measured, and on what."""
    rates = gpu.rates
    if rates is None:
        return []
    other = rates.device != gpu.device if gpu.device else False
    return [
        f"Products, attention and copies are as fast as measured on {rates.device or 'a device without a name'}"
        + (f", which is no {gpu.name}" if other else "")
        + "; links and FP8 are assumed."
    ]


def _table(plans: tuple[Plan, ...]) -> list[str]:
    rows = [["", "TP", "CP", "PP", "VPP", "DP", "layers per stage", "recompute", "fullest", "bubble", "step", "MFU"]]
    rows[0] += ["days", "GPU-hours"]
    spread = any(plan.layout.experts > 1 for plan in plans)
    rows[0][5:5] = ["EP"] * int(spread)
    for number, plan in enumerate(plans):
        layout, time = plan.layout, plan.time
        rows.append(
            [
                "*" if number == 0 else "",
                *_cells(layout, spread=spread),
                _layers(layout.layers_per_stage),
                plan.recipe.parallel.recompute_granularity or "-",
                f"{max(memory.total for memory in plan.memory) / GIB:.1f} GiB",
                f"{100 * time.bubble:.1f} %",
                f"{time.step:.3g} s",
                f"{100 * time.mfu:.1f} %",
                "-" if plan.days is None else f"{plan.days:.3g}",
                "-" if plan.gpu_hours is None else f"{plan.gpu_hours:.4g}",
            ]
        )
    return _aligned(rows)


def _sizes(of: Layout | Refusal) -> str:
    """Return TP 2 x CP 2 x PP 4, say; without CP where it is 1."""
    return f"TP {of.tensor}{f' x CP {of.context}' if of.context > 1 else ''} x PP {of.pipeline}"


def _cells(layout: Layout, *, spread: bool = False) -> list[str]:
    sizes = (
        layout.tensor,
        layout.context if layout.context > 1 else None,
        layout.pipeline,
        layout.virtual,
        *([layout.experts] if spread else []),
        layout.data,
    )
    return [str(value or "-") for value in sizes]


def _both(placements: Placements) -> list[tuple[str, Plan | str]]:
    return [("first_stage", placements.first_stage), ("all_ranks", placements.all_ranks)]


def _placements(placements: Placements) -> list[str]:
    """Say what either placement of the tower gives."""
    rows = [["", "TP", "CP", "PP", "VPP", "DP", "layers per stage", "fullest", "bubble", "encoding", "step"]]
    refused = []
    for name, plan in _both(placements):
        if isinstance(plan, str):
            refused.append(f"{name}: {plan}")
            continue
        layout, time = plan.layout, plan.time
        rows.append(
            [
                name,
                *_cells(layout),
                _layers(layout.layers_per_stage),
                f"{max(memory.total for memory in plan.memory) / GIB:.1f} GiB",
                f"{100 * time.bubble:.1f} %",
                f"{time.vision:.3g} s" if time.vision else "-",
                f"{time.step:.3g} s",
            ]
        )
    head = "Who encodes (parallel.vision_placement), either at its fastest layout:"
    return [head, *_aligned(rows), *refused, f"Take {placements.reason()}."]


def _layers(stages: tuple[int, ...]) -> str:
    """Return 7 + 3 x 11, say."""
    first, rest = stages[0], stages[1:]
    if all(stage == first for stage in rest):
        return str(first) if not rest else f"{len(stages)} x {first}"
    return f"{first} + {len(rest)} x {rest[0]}" if len(rest) > 1 else f"{first} + {rest[0]}"


def _aligned(rows: list[list[str]]) -> list[str]:
    if "CP" in rows[0] and all(row[rows[0].index("CP")] == "-" for row in rows[1:]):  # in none of them
        column = rows[0].index("CP")
        rows = [row[:column] + row[column + 1 :] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _chosen(plan: Plan, gpu: Gpu) -> list[str]:
    """Describe the plan that was picked, stage by stage."""
    layout, time = plan.layout, plan.time
    parts = list(asdict(plan.memory[0]))
    rows = [["stage", "layers", *parts, "total GiB", "ms per micro-batch"]]
    for stage, memory in enumerate(plan.memory):
        if stage in (0, layout.pipeline - 1) or memory != plan.memory[stage - 1]:
            rows.append(_stage_row(str(stage), layout.layers_per_stage[stage], memory, time.stage_seconds[stage]))
    free = gpu.memory_bytes - max(memory.total for memory in plan.memory)
    return [
        f"Chosen (*): {_sizes(layout)}"
        + (f" x VPP {layout.virtual}" if layout.virtual else "")
        + (f" x EP {layout.experts}" if layout.experts > 1 else "")
        + f" x DP {layout.data}, {layout.microbatches} micro-batches a step; GiB at the peak of a rank of each stage:",
        *_aligned(rows),
        f"{free / GIB:.1f} GiB of {gpu.memory_bytes / GIB:.1f} stay free (a plan leaves {100 * HEADROOM:.0f} %).",
        f"A step of {time.step:.3g} s: {time.pipeline:.3g} s of passes, {100 * time.bubble:.1f} % of it bubble;"
        f" optimizer {1e3 * time.optimizer:.3g} ms.",
        f"MFU {100 * time.mfu:.1f} % of useful work; {100 * time.mfu_conventional:.1f} % as most published figures"
        f" count (the whole square of attention), {100 * time.hfu:.1f} % with what is recomputed.",
        f"Communication per step: tensor-parallel {1e3 * time.tensor_parallel:.3g} ms exposed; a message between stages"
        f" {1e3 * time.p2p:.3g} ms; data-parallel {1e3 * time.data_parallel:.3g} ms,"
        f" {1e3 * time.data_parallel_exposed:.3g} ms of it exposed.",
    ]


def _stage_row(name: str, layers: int, memory: StageMemory, seconds: float) -> list[str]:
    parts = [f"{value / GIB:.2f}" for value in asdict(memory).values()]
    return [name, str(layers), *parts, f"{memory.total / GIB:.1f}", f"{1e3 * seconds:.1f}"]


def _own(own: Plan | str, best: Plan) -> str:
    if isinstance(own, str):
        return f"The recipe's own layout is refused: {own}"
    layout = own.layout
    virtual = f" x VPP {layout.virtual}" if layout.virtual else ""
    virtual += f" x EP {layout.experts}" if layout.experts > 1 else ""
    slower = 100 * (own.time.step / best.time.step - 1)
    return (
        f"The recipe's own layout: {_sizes(layout)}{virtual} x DP {layout.data},"
        f" layers {_layers(layout.layers_per_stage)}: {own.time.step:.3g} s a step ({slower:+.0f} %),"
        f" fullest stage {max(memory.total for memory in own.memory) / GIB:.1f} GiB."
    )


def gpu_table() -> str:
    """Return the GPUs as a Markdown table."""
    lines = [
        "| GPU | memory GiB | bf16 TFLOP/s | FP8 TFLOP/s | memory GB/s | NVLink GB/s | network GB/s | figures from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS.values():
        fp8 = f"{gpu.fp8_flops / 1e12:.0f}" if gpu.fp8_flops else "-"
        lines.append(
            f"| {gpu.name} | {gpu.memory_bytes / GIB:.1f} | {gpu.bf16_flops / 1e12:.0f} | {fp8} |"
            f" {gpu.bandwidth / 1e9:.0f} | {gpu.nvlink / 1e9:.0f} | {gpu.network / 1e9:.0f} | {gpu.source} |"
        )
    return "\n".join(lines)


_EFFICIENCIES = {
    "gemm": "matrix products, bf16",
    "fp8_gemm": "language model's linear layers, FP8",
    "tower": "tower's matrix products",
    "attention": "fused attention",
    "memory": "element-wise work, of the memory bandwidth",
    "nvlink": "collectives in a node, of NVLink",
    "network": "between nodes, of the network cards",
}


def efficiency_table() -> str:
    """Return the efficiencies as a Markdown table."""
    kinds: dict[Efficiency, list[str]] = {}
    for gpu in GPUS.values():
        kinds.setdefault(gpu.efficiency, []).append(gpu.name)
    lines = ["| of the peak | " + " | ".join(", ".join(names) for names in kinds.values()) + " |"]
    lines.append("|---|" + "---|" * len(kinds))
    for name, words in _EFFICIENCIES.items():
        shares = [getattr(kind, name) for kind in kinds]
        lines.append(f"| {words} | " + " | ".join(f"{share:.2f}" if share else "-" for share in shares) + " |")
    own = " | ".join(f"{1e3 * kind.expert_layer:g} ms" for kind in kinds)
    lines.append(f"| no share: a layer with experts, beside its work, forward | {own} |")
    return "\n".join(lines)
