"""The shipped job scripts on a real Slurm of two nodes: preempted, signalled, crashed, cancelled, requeued."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from launch import ROOT
from run_data import RunData

from megavlm.parallel.faults import ONCE, VARIABLE

pytestmark = pytest.mark.slurm

STEPS = 100
SCRIPT = str(ROOT / "examples" / "slurm" / "pretrain_14b.sh")
# Two nodes with one rank each stand for eight with eight; all else is the script's.
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60")
OVERRIDES = (
    f"training.train_steps={STEPS} parallel.pipeline_model_parallel_size=2 data.num_workers=1 "
    "checkpoint.keep=100 logging.tensorboard=false optimizer.schedule=constant data.max_bad_fraction=1"
)


def submit(cluster: Cluster, data: RunData, output: Path, *words: str, **variables: str) -> str:
    """Submit the script with the tiny recipe; return the job's id."""
    defaults = {
        "RECIPE": str(data.root / "recipe.yaml"), "OUTPUT_DIR": str(output), "OVERRIDES": OVERRIDES,
        "MEGAVLM_HOME": str(ROOT), "PYTHON": sys.executable, "IFNAME": "lo", "OMP_NUM_THREADS": "1", "EXIT_WAIT": "30",
    }  # fmt: skip
    return cluster.submit(*SMALL, *words, SCRIPT, **{**defaults, **variables})


def losses(output: Path) -> dict[int, float]:
    """Return the loss of each step, which is there once; one that was lost and taken again gave the same."""
    found: dict[int, float] = {}
    for name in ("metrics.jsonl", "metrics.undone.jsonl"):
        path = output / name
        for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            if "loss" in line:
                assert name != "metrics.jsonl" or line["step"] not in found
                assert found.setdefault(line["step"], line["loss"]) == line["loss"], line["step"]
    return found


def wait_for_step(cluster: Cluster, output: Path, step: int) -> None:
    cluster.wait(lambda: max(losses(output), default=0) >= step, f"step {step}", 600)


def job_log(cluster: Cluster, job: str) -> str:
    return next(cluster.root.glob(f"*-{job}.out")).read_text()


def rank_log(output: Path, job: str, rank: int) -> str:
    return (output / "logs" / f"job-{job}" / f"rank-{rank:04}.log").read_text()


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a job that nothing happens to."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    job = submit(cluster, run_data, output)
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "COMPLETED" and end["Restarts"] == "0", cluster.logs()
    assert "layout: TP 1 x PP 2 x DP 1" in rank_log(output, job, 0)
    assert rank_log(output, job, 1) is not None
    found = losses(output)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def test_a_job_of_higher_priority_preempts_and_the_run_comes_back(
    cluster: Cluster, run_data: RunData, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    """Slurm itself sends SIGTERM, here to the ranks and to what they forked, and wants the nodes back."""
    steps = 3 * STEPS  # Slurm takes some seconds to preempt
    job = submit(cluster, run_data, tmp_path / "run", OVERRIDES=f"{OVERRIDES} training.train_steps={steps}")
    wait_for_step(cluster, tmp_path / "run", 3)
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    assert cluster.wait_for_end(other)["JobState"] == "COMPLETED"
    assert max(losses(tmp_path / "run")) < steps, cluster.logs()
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "COMPLETED" and end["Restarts"] == "1", cluster.logs()
    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(1, steps + 1)) and uninterrupted.items() <= found.items()
    assert rank_log(tmp_path / "run", job, 0).count("resumed from") == 1


def test_the_signal_before_the_time_limit(
    cluster: Cluster, run_data: RunData, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    """--signal=B:USR1@... sends what scancel --batch sends: SIGUSR1 to the batch shell alone."""
    job = submit(cluster, run_data, tmp_path / "run")
    wait_for_step(cluster, tmp_path / "run", 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "COMPLETED" and end["Restarts"] == "1", cluster.logs()
    assert losses(tmp_path / "run") == uninterrupted
    log = job_log(cluster, job)
    assert "told to stop" in log
    assert "the job goes back into the queue, and on from step-000000" in log


def test_the_time_limit_itself(
    cluster: Cluster, run_data: RunData, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    """Slurm sends the signal 30 minutes before the limit, which is at once; it looks every 30 s."""
    output, words = tmp_path / "run", ("--time=30", "--signal=B:USR1@1800")
    job = submit(cluster, run_data, output, *words, OVERRIDES=f"{OVERRIDES} training.train_steps=100000")
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "restart", 600)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    log = job_log(cluster, job)
    assert log.count("told to stop") == 1 and "the job goes back into the queue" in log
    wait_for_step(cluster, output, max(losses(output), default=0) + 20)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job)["JobState"] == "CANCELLED"
    found = losses(output)
    assert sorted(found) == list(range(1, max(found) + 1))
    assert all(found[step] == loss for step, loss in uninterrupted.items() if step in found)


def test_a_node_that_fails_gives_the_job_back(
    cluster: Cluster, run_data: RunData, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    job = submit(cluster, run_data, tmp_path / "run", OVERRIDES=f"{OVERRIDES} checkpoint.save_interval=4")
    wait_for_step(cluster, tmp_path / "run", 9)
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "restart")
    cluster.wait(lambda: is_back(cluster, "node2"), "node2 that is up")
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "COMPLETED" and end["Restarts"] == "1", cluster.logs()
    assert losses(tmp_path / "run") == uninterrupted


def is_back(cluster: Cluster, node: str) -> bool:
    """Ask for a node to be taken back; Slurm may have done so by itself, and refuses while it cleans up."""
    cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    return "DOWN" not in cluster.run("scontrol", "--oneliner", "show", "node", node).partition("State=")[2].split()[0]


def test_a_killed_rank_costs_a_start_in_the_same_job(
    cluster: Cluster, run_data: RunData, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    (tmp_path / "once").mkdir()
    fault = {VARIABLE: "step.in_collective:rank1:step9:kill", ONCE: str(tmp_path / "once")}
    job = submit(cluster, run_data, tmp_path / "run", **fault, OVERRIDES=f"{OVERRIDES} checkpoint.save_interval=4")
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "COMPLETED" and end["Restarts"] == "0", cluster.logs()
    assert losses(tmp_path / "run") == uninterrupted
    log = rank_log(tmp_path / "run", job, 0)
    assert "step 9: lost rank 1 (host " in log and "at step 8" in log
    assert "the ranks ended with exit code 137" in job_log(cluster, job)


def test_a_run_that_crashes_again_and_again_fails(cluster: Cluster, run_data: RunData, tmp_path: Path) -> None:
    fault = {VARIABLE: "step.begin:rank1:step2:exit", "MAX_RESTARTS": "1"}
    job = submit(cluster, run_data, tmp_path / "run", **fault)
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "FAILED" and end["ExitCode"] == "1:0" and end["Restarts"] == "0", cluster.logs()
    log = job_log(cluster, job)
    assert log.count("start ") == 2 and "more than 1 starts in a row ended without a new checkpoint" in log


def test_wrong_input_fails_at_once_with_its_line(cluster: Cluster, run_data: RunData, tmp_path: Path) -> None:
    job = submit(cluster, run_data, tmp_path / "run", OVERRIDES="optimizer.lrr=1")
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "FAILED" and end["ExitCode"] == "2:0", cluster.logs()
    log = job_log(cluster, job)
    assert log.count("start ") == 1 and "megavlm: error: optimizer.lrr: unknown key" in log


def test_a_job_that_may_not_be_requeued_saves_and_ends_with_75(
    cluster: Cluster, run_data: RunData, tmp_path: Path
) -> None:
    job = submit(cluster, run_data, tmp_path / "run")
    wait_for_step(cluster, tmp_path / "run", 3)
    cluster.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "FAILED" and end["ExitCode"] == "75:0", cluster.logs()
    assert "was not requeued" in job_log(cluster, job)
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, run_data: RunData, tmp_path: Path) -> None:
    job = submit(cluster, run_data, tmp_path / "run")
    wait_for_step(cluster, tmp_path / "run", 3)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job)["JobState"] == "CANCELLED"
    cluster.wait(lambda: cluster.run("squeue", "-h", "-j", job) == "", "an empty queue")
    assert cluster.job(job)["Restarts"] == "0"
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file(), cluster.logs()
    assert max(losses(tmp_path / "run")) < STEPS
