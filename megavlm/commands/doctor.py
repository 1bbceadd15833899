"""``megavlm doctor``: read a run's directory and say what happened."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from megavlm.checkpoint.manifest import check, is_proven
from megavlm.checkpoint.paths import latest, newest_first, read_run
from megavlm.config import yaml12
from megavlm.config.errors import MissingFileError, UserError
from megavlm.parallel.lock import LOCK_FILE, read_holder
from megavlm.training.heartbeat import read_heartbeats

Facts = dict[str, Any]
_WORKING = ("training", "saving")

_POINTS_OF_A_TREND = 8
"""Below so many points, a median of the first and one of the last quarter say nothing."""
_SLOWER = 1.15
"""A step time that grew by this factor is worth a word."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "Read a run's directory and say what happened: how far it came, which rank was last heard of, "
    parser.description += (
        "what was skipped and why, and which checkpoints are whole. Exit code 1 if something is wrong."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output_dir of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="compare sizes of checkpoint files, not their digests")


def run(args: argparse.Namespace) -> int:
    """Examine and print; 1 if something is wrong.

    Raises:
        MissingFileError: there is no such directory.
        UserError: no run has written to it.
    """
    if not args.run.is_dir():
        raise MissingFileError(f"{args.run}: no such file or directory")
    facts = examine(args.run, quick=args.quick)
    print(json.dumps(facts, indent=2) if args.json else "\n".join(describe(facts)))  # noqa: T201 - what was asked for
    return int(bool(facts["problems"]))


def examine(directory: Path, *, quick: bool = False) -> Facts:
    """Return what a run's directory tells.

    Raises:
        UserError: no run has written to it.
    """
    root, beats = directory / "checkpoints", read_heartbeats(directory)
    metrics = _lines(directory / "metrics.jsonl")
    if not (beats or metrics or root.is_dir()):
        raise UserError(f"{directory}: no run has written here; give a run's output_dir")
    checkpoints = [one for path in newest_first(root) if (one := _checkpoint(path, quick=quick)) is not None]
    steps = [line["step"] for line in metrics if isinstance(line.get("step"), int)]
    facts: Facts = {
        "run": str(directory),
        "last_step": max([*steps, *(beat["step"] for beat in beats)], default=0),
        "train_steps": _train_steps(root),
        "ranks": beats,
        "slowest_rank": min(beats, key=lambda beat: beat.get("waited_seconds", 0.0))["rank"]
        if len(beats) > 1
        else None,
        "slowest_measured": _slowest(metrics),
        "step_seconds": _trend(metrics),
        "skipped_steps": _lines(directory / "skipped_steps.jsonl"),
        "skipped_samples": _quarantine(directory),
        "checkpoints": checkpoints,
        "partial": [path.name for path in root.glob("*.partial")],
        "patience_seconds": _patience(metrics),
        "holder": _holder(directory),
        "steps_with_two_losses": _contradictions(metrics),
    }
    facts["problems"] = list(_problems(facts, root))
    return facts


def _holder(directory: Path) -> Facts | None:
    """Return who holds the directory, and whether it lives: null where that cannot be seen from here."""
    found = read_holder(directory / LOCK_FILE)
    return None if found is None else {"who": str(found[0]), "lives": found[1]}


def _contradictions(metrics: list[Facts]) -> list[int]:
    """Return the steps that have several losses: more than one run has written here."""
    losses: dict[int, set[float]] = {}
    for line in metrics:
        if isinstance(line.get("step"), int) and isinstance(line.get("loss"), float):
            losses.setdefault(line["step"], set()).add(line["loss"])
    return sorted(step for step, found in losses.items() if len(found) > 1)


def _patience(metrics: list[Facts]) -> float:
    """Return for how long a rank that is well may say nothing: some steps, and what is done between them."""
    steps = [line["step_seconds"] for line in metrics if isinstance(line.get("step_seconds"), int | float)]
    return max(60.0, 10 * median(steps[-20:])) if steps else 600.0


def _slowest(metrics: list[Facts]) -> Facts | None:
    """Return the rank that computed longest in most timed steps, and by how much at the median of those."""
    timed = [line for line in metrics if isinstance(line.get("slowest_rank"), float)]
    if not timed:
        return None
    rank, count = Counter(line["slowest_rank"] for line in timed).most_common(1)[0]
    own = [line for line in timed if line["slowest_rank"] == rank]
    ratio = median(line["slowest_rank_ratio"] for line in own)
    host = own[-1].get("slowest_host")
    return {"rank": int(rank), "host": host, "points": count, "of": len(timed), "ratio_to_its_stage": round(ratio, 3)}


def _trend(metrics: list[Facts]) -> Facts | None:
    """Return the median step time of the first and the last quarter of the run's points, in order of steps."""
    by_step = {line["step"]: line["step_seconds"] for line in metrics if "step_seconds" in line and "step" in line}
    seconds = [by_step[step] for step in sorted(by_step)]
    if len(seconds) < _POINTS_OF_A_TREND:
        return None
    quarter = len(seconds) // 4
    first, last = median(seconds[:quarter]), median(seconds[-quarter:])
    return {"first": first, "last": last, "factor": round(last / first, 3)}


def _train_steps(root: Path) -> int | None:
    newest = latest(root)
    try:
        return int(yaml12.parse((newest / "recipe.yaml").read_text())["training"]["train_steps"]) if newest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checkpoint(path: Path, *, quick: bool) -> Facts | None:
    """Return what a checkpoint is like; nothing where its run deleted it, as one too many, while it was looked at."""
    problem = None
    try:
        check(path, share=-1 if quick else 0)
        step = read_run(path)["step"]
        if not is_proven(path) and (path / "recipe.yaml").is_file():
            _examine(path, quick=quick)
    except (UserError, OSError, KeyError) as error:
        problem, step = str(error), None
    try:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except FileNotFoundError:
        size = 0
    if not path.is_dir():
        return None
    return {"name": path.name, "step": step, "bytes": size, "problem": problem}


def _examine(path: Path, *, quick: bool) -> None:
    """Look for what older versions saved wrongly.

    Raises:
        UserError: naming the tensor.
    """
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415 - others need neither torch nor Megatron-Core

    prepare_device()
    from megavlm.checkpoint.damage import examine as look  # noqa: PLC0415
    from megavlm.checkpoint.hf.shapes import alone  # noqa: PLC0415

    with alone():
        look(path, values=not quick)


def _quarantine(directory: Path) -> dict[str, int]:
    """Return how many samples were left out, by cause."""
    causes: Counter[str] = Counter()
    for path in directory.glob("quarantine-*.jsonl"):
        causes.update(str(line.get("cause")) for line in _lines(path))
    return dict(causes.most_common())


def _lines(path: Path) -> list[Facts]:
    """Return the objects of a file of JSON lines; the last line may have been cut off."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _problems(facts: Facts, root: Path) -> Iterator[str]:
    for one in facts["checkpoints"]:
        if one["problem"]:
            yield f"{one['name']} is damaged: {one['problem']}"
    pointer = latest(root)
    if facts["checkpoints"] and (pointer is None or not (root / "latest").is_file()):
        yield "the file latest is missing; the next save makes it anew"
    twice = facts["steps_with_two_losses"]
    if twice:
        yield (
            f"metrics.jsonl has several losses of {len(twice)} steps, the first is {twice[0]}: two runs have written "
            "here at the same time (older versions let them), or with different recipes; train anew elsewhere, or go "
            "on only from a checkpoint below that step"
        )
    done = bool(facts["ranks"]) and all(beat.get("phase") == "done" for beat in facts["ranks"])
    # A rank that failed knew of it; one that was killed still says that it trains.
    lost = [beat for beat in facts["ranks"] if beat.get("phase") in _WORKING]
    failed = [beat["rank"] for beat in facts["ranks"] if beat.get("phase") == "failed"]
    if failed and not lost:
        yield f"the run ended with an error on rank {', '.join(map(str, failed))}: see its log"
    if lost and not done:
        behind = min(lost, key=lambda beat: (beat["step"], beat["time"]))
        age = timedelta(seconds=round(time.time() - behind["time"]))
        others_left = len(lost) < len(facts["ranks"])
        silent = age.total_seconds() > facts["patience_seconds"] * (10 if behind["phase"] == "saving" else 1)
        dead = facts["holder"] is not None and facts["holder"]["lives"] is False
        if silent or others_left or dead:
            yield (
                f"rank {behind['rank']} (host {behind['host']}, pid {behind['pid']}) was last heard of in step "
                f"{behind['step']} ({behind['phase']}), {age} ago: it was killed, crashed or hangs"
            )
        elif facts["partial"]:
            return  # a thread writes it while the run goes on
    for name in facts["partial"]:
        yield f"{name} was not finished; the next save removes it"


def describe(facts: Facts) -> Iterator[str]:
    """Yield the facts as lines for people."""
    of = f" of {facts['train_steps']}" if facts["train_steps"] else ""
    yield f"{facts['run']}: step {facts['last_step']}{of}"
    for beat in facts["ranks"]:
        age = timedelta(seconds=round(time.time() - beat["time"]))
        yield f"  rank {beat['rank']}: step {beat['step']}, {beat['phase']}, {age} ago on {beat['host']}"
    if facts["holder"] is not None:
        state = {True: "lives", False: "is dead: the next start goes on at once", None: "cannot be seen from here"}
        yield f"held by {facts['holder']['who']}, which {state[facts['holder']['lives']]}"
    slowest, trend = facts["slowest_measured"], facts["step_seconds"]
    if slowest is not None and len(facts["ranks"]) > 1:
        yield (
            f"slowest rank: {slowest['rank']} on {slowest['host']}, in {slowest['points']} of {slowest['of']} timed "
            f"points; it computes {slowest['ratio_to_its_stage']:.2f} x its stage's mean"
        )
    elif facts["slowest_rank"] is not None:
        yield f"slowest rank: {facts['slowest_rank']} (it waits least for the others)"
    if trend is not None:
        word = ": the run became slower" if trend["factor"] >= _SLOWER else ""
        yield f"step time: {trend['first']:.3f} s at first, {trend['last']:.3f} s at last{word}"
    yield f"steps skipped: {len(facts['skipped_steps'])}"
    for line in facts["skipped_steps"][-5:]:
        samples = ", ".join(map(str, line.get("samples", [])[:4]))
        yield f"  step {line.get('step')}: {line.get('why')}; samples {samples} ..."
    yield f"samples left out: {sum(facts['skipped_samples'].values())}"
    for cause, count in facts["skipped_samples"].items():
        yield f"  {count} x {cause}"
    yield "checkpoints:" if facts["checkpoints"] else "checkpoints: none"
    for one in facts["checkpoints"]:
        yield f"  {one['name']}, {one['bytes'] / 2**20:.1f} MiB: {one['problem'] or 'whole'}"
    yield from (f"problem: {problem}" for problem in facts["problems"])
    if not facts["problems"]:
        yield "no problem found"
