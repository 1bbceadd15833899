"""Every benchmark of this machine, one after the other; their tables go to standard output (``make bench``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("data_path.py", "vs_transformers.py", "pipeline_balance.py")


def main() -> int:
    """Run them; return 1 if one failed."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    failed = []
    for name in BENCHMARKS:
        if not (HERE / name).is_file():
            print(f"benchmarks/{name} is not there: left out", file=sys.stderr)
            continue
        print(f"## {name}\n", flush=True)
        if subprocess.run([sys.executable, str(HERE / name)], cwd=HERE.parent, env=env, check=False).returncode:
            failed.append(name)
        print(flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
