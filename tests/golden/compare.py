"""Compare the losses and gradient norms of today's models with those that are kept here, or with another commit's.

    python tests/golden/compare.py                     # this tree with the committed numbers, within 1e-5
    python tests/golden/compare.py --against COMMIT    # both trees on this machine, bit for bit
    python tests/golden/compare.py --write             # renews the numbers; the commit's message says why they changed

Exit code 0: the same; 1: different, with a line for each step that is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent))

from golden.cases import CASES, Measured  # noqa: E402

LOSS, NORM = 1e-5, 4e-5
"""Relative differences that other processors may make; updates of Adam make much of little, and norms show it first."""


def differences(
    found: Mapping[str, Measured], expected: Mapping[str, Measured], *, loss: float = LOSS, norm: float = NORM
) -> list[str]:
    """Return a line for every case and step that is not as expected; with tolerances of 0 every bit counts.

    Args:
        found: of each case what ``cases.measure`` returned.
        expected: the same, of another time or tree. A case that one of both has skipped is not compared.
        loss: relative tolerance of losses.
        norm: relative tolerance of gradient norms.
    """
    lines = []
    for name, mine in found.items():
        if name not in expected:
            lines.append(f"{name}: has no numbers to be compared with; write them with --write")
            continue
        theirs = expected[name]
        if "skipped" in mine or "skipped" in theirs:
            continue
        for kind, tolerance in (("loss", loss), ("grad_norm", norm)):
            if len(mine[kind]) != len(theirs[kind]):
                lines.append(f"{name}: {len(mine[kind])} steps, expected {len(theirs[kind])}")
                continue
            for step, (one, other) in enumerate(zip(mine[kind], theirs[kind], strict=True), 1):
                if not abs(one - other) <= tolerance * abs(other):  # NaN is never the same
                    lines.append(f"{name}: step {step}: {kind} {one!r}, expected {other!r} (within {tolerance:g})")
    return lines


def kept(names: Sequence[str] = tuple(CASES)) -> dict[str, Measured]:
    """Return the committed numbers."""
    files = {name: HERE / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def measured(tree: Path, names: Sequence[str]) -> dict[str, Measured]:
    """Run this file's cases in a tree, in a process of its own that imports that tree's package and tests.

    Raises:
        SystemExit: it failed; what it said is above.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as work:
        out = Path(work) / "out.json"
        env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        words = [sys.executable, str(HERE / "cases.py"), str(tree), str(out), *names]
        if subprocess.run(words, env=env, check=False).returncode:
            raise SystemExit(f"compare.py: the cases failed in {tree}")
        found: dict[str, Measured] = json.loads(out.read_text())
        return found


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A temporary git worktree of a commit; nothing of it is left.

    Raises:
        SystemExit: there is no such commit, or it has no ``tests/ranks.py``.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as work:
        tree = Path(work) / "tree"
        words = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run(
            [*words, "add", "--detach", str(tree), commit], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"compare.py: --against {commit}: {done.stderr.strip().splitlines()[-1]}")
        try:
            if not (tree / "tests" / "ranks.py").is_file():
                raise SystemExit(f"compare.py: --against {commit}: is older than tests/ranks.py, which runs the cases")
            yield tree
        finally:
            subprocess.run([*words, "remove", "--force", str(tree)], check=True)


def main(words: Sequence[str] | None = None) -> int:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=list(CASES), default=list(CASES))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--against", metavar="COMMIT", help="run this commit too, and demand the same bits")
    what.add_argument("--write", action="store_true", help="renew the committed numbers")
    args = parser.parse_args(words)
    found = measured(ROOT, args.only)
    for name, one in found.items():
        if "skipped" in one:
            print(f"{name}: skipped: {one['skipped']}")
    if args.write:
        for name, one in found.items():
            if "skipped" not in one:
                (HERE / f"{name}.json").write_text(json.dumps(one, indent=1) + "\n")
                print(f"wrote {name}.json")
        return 0
    if args.against is None:
        lines = differences(found, kept(list(found)))
    else:
        with worktree(args.against) as tree:
            lines = differences(found, measured(tree, args.only), loss=0.0, norm=0.0)
    print("\n".join(lines) or f"the same: {', '.join(n for n, one in found.items() if 'skipped' not in one)}")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
