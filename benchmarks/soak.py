"""Kill a training run again and again, start it again, and see whether it ends as if nothing had happened.

``python benchmarks/soak.py --kills 100 --seed 1``: a tiny recipe on ``--ranks`` processes (pipeline stages over gloo),
SIGKILL to one rank or to all at a random moment: while starting, in a step, in a save. Prints a Markdown table, and
exits with 1 if a resume failed or the final weights and optimizer state differ from those of an uninterrupted run.

``--data-parallel`` replicas of ``--ranks`` stages each; ``--set`` keys of the recipe; ``--forked`` takes processes from
the tests' fork server, where a start costs hundredths of a second in the place of seconds for each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STEPS_PER_KILL = 10
PATIENCE_SECONDS = 300.0


@dataclass
class Tally:
    """What was counted."""

    kills: int = 0
    starts: int = 0
    resumed: int = 0
    failed: int = 0
    lost_steps: list[int] = field(default_factory=list)
    while_starting: int = 0
    partial_left: int = 0


class Job:
    """One start of the job: its processes, without torchrun, so that what is killed is known exactly."""

    def __init__(self, words: list[str], ranks: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            with log.open("ab") as file:
                env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", "megavlm", *words]
                process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
            self.processes.append(process)

    def kill(self, which: list[int]) -> None:
        """Kill some ranks at once, and wait for the others to leave by themselves."""
        for rank in which:
            self.processes[rank].kill()
        self.wait()

    def wait(self, patience: float = PATIENCE_SECONDS) -> list[int]:
        """Return the exit codes; whoever does not leave in time is killed and counts as failed."""
        end = time.monotonic() + patience
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        return [process.wait() for process in self.processes]

    @property
    def running(self) -> bool:
        """Whether all ranks still run."""
        return all(process.poll() is None for process in self.processes)


class ForkedJob(Job):
    """The same, from processes that the tests' fork server makes."""

    def __init__(self, words: list[str], ranks: int, log: Path) -> None:
        import ranks as server

        self.job = server.start(words, ranks, timeout=24 * 3600, grace=PATIENCE_SECONDS, log=log, apart=False)

    def kill(self, which: list[int]) -> None:
        """Kill some ranks at once, and wait for the others to leave by themselves."""
        self.job.signal(signal.SIGKILL, *which)
        self.wait()

    def wait(self, patience: float = PATIENCE_SECONDS) -> list[int]:
        """Return the exit codes; if somebody does not leave in time, all are killed."""
        try:
            return self.job.wait(check=False, seconds=patience).codes
        except TimeoutError:
            return [-int(signal.SIGKILL)]
        finally:
            self.job.__exit__()

    @property
    def running(self) -> bool:
        """Whether all ranks still run."""
        for pid in self.job.pids.values():
            try:
                if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                    return False
            except psutil.NoSuchProcess:
                return False
        return True


def last_step(run: Path) -> int:
    """Return the last step that the run's metrics speak of."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0


def newest_checkpoint(run: Path) -> int:
    """Return the step of the newest published checkpoint, 0 without one."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????")), default=0)


def digest(run: Path) -> str:
    """Return a digest of every tensor of the last checkpoint, optimizer state included."""
    import torch

    from megavlm.parallel.device import prepare_device

    prepare_device()
    from megavlm.checkpoint.slots import Slot
    from megavlm.checkpoint.stream import CheckpointReader

    reader, total = CheckpointReader(max((run / "checkpoints").glob("step-????????"))), sha256()
    for key, entry in sorted(reader.tensors().items()):
        whole = reader.read(Slot(key, tuple(entry.size))).flatten().contiguous()
        total.update(key.encode() + whole.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def torment(start: Callable[[], Job], run: Path, ranks: int, kills: int, steps: int, rng: random.Random) -> Tally:
    """Kill and restart until ``kills`` kills are done, then let the run end."""
    tally = Tally()
    while newest_checkpoint(run) < steps:
        tally.starts += 1
        before, expected = last_step(run), newest_checkpoint(run)
        job = start()
        if tally.kills >= kills:
            tally.failed += any(job.wait(patience=24 * 3600))
            continue
        starting = rng.random() < 0.15
        if starting:
            time.sleep(rng.uniform(0.2, 3.0))
        else:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while job.running and last_step(run) <= max(before, expected) and time.monotonic() < deadline:
                if last_step(run) != before:
                    break
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 4.0))
        if not job.running:
            codes = job.wait()
            tally.failed += any(codes)
            continue
        which = list(range(ranks)) if rng.random() < 0.5 else [rng.randrange(ranks)]
        job.kill(which)
        tally.kills += 1
        tally.while_starting += starting
        tally.resumed += not starting
        tally.lost_steps.append(max(0, last_step(run) - newest_checkpoint(run)))
        tally.partial_left += bool(list((run / "checkpoints").glob("*.partial")))
        if tally.kills % 10 == 0:
            print(f"{tally.kills} kills, step {last_step(run)} of {steps}", file=sys.stderr, flush=True)
    return tally


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2, help="pipeline stages (1, 2 or 4) of a replica")
    parser.add_argument("--steps", type=int, help=f"of the run (default {STEPS_PER_KILL} per kill)")
    parser.add_argument("--async-save", action="store_true", help="checkpoints in a thread")
    parser.add_argument("--data-parallel", type=int, default=1, help="replicas of the stages")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--forked", action="store_true", help="processes from the tests' fork server")
    args = parser.parse_args()
    from run_data import make_run_data

    steps = args.steps or STEPS_PER_KILL * args.kills
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder)
        data = make_run_data(root)
        settings = (
            f"training.train_steps={steps}",
            f"parallel.pipeline_model_parallel_size={args.ranks}",
            f"checkpoint.async_save={str(args.async_save).lower()}",
            "checkpoint.save_interval=4",
            "checkpoint.keep=2",
            "logging.tensorboard=false",
            "parallel.distributed_timeout_minutes=1",
            "data.max_bad_fraction=1.0",  # some of the samples are too long on purpose
            *args.set,
        )
        kind, processes = (ForkedJob if args.forked else Job), args.ranks * args.data_parallel
        start = time.perf_counter()
        whole = kind(data.words(root / "whole", *settings), processes, root / "whole.log")
        assert not any(whole.wait(patience=24 * 3600)), (root / "whole.log").read_text()[-3000:]
        alone = time.perf_counter() - start
        words, log = data.words(root / "run", *settings), root / "run.log"
        begin = partial(kind, words, processes, log)
        tally = torment(begin, root / "run", processes, args.kills, steps, random.Random(args.seed))
        seconds = time.perf_counter() - start - alone
        equal = digest(root / "whole") == digest(root / "run")
        damaged = log.read_text(errors="replace").count("is damaged and is passed over")
    lost = tally.lost_steps or [0]
    rows = {
        "kills": f"{tally.kills} ({tally.while_starting} of them while starting)",
        "starts": tally.starts,
        "starts that failed by themselves": tally.failed,
        "steps of the run": steps,
        "steps lost per kill": f"mean {sum(lost) / len(lost):.2f}, largest {max(lost)} (a checkpoint every 4 steps)",
        "kills that left a partial checkpoint": tally.partial_left,
        "published checkpoints that were damaged": damaged,
        "final weights and optimizer state equal the uninterrupted run's": "yes, bit for bit" if equal else "NO",
        "seconds": f"{seconds:.0f} (uninterrupted {alone:.0f})",
    }
    print(f"`python benchmarks/soak.py {' '.join(sys.argv[1:])}`, {processes} ranks\n\n| | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    return int(not equal or bool(tally.failed) or bool(damaged))


if __name__ == "__main__":
    sys.exit(main())
