"""The examples of Kubernetes, SkyPilot and ssh: read by each one's own tool, and run as far as one machine can.

kubeflow-trainer-api (JobSet) and kubeflow-training (PyTorchJob) are the projects' own models, made from the definitions
that a cluster has. SkyPilot is too large for ``make dev``: ``python3 -m venv V && V/bin/pip install skypilot``, then
``MEGAVLM_SKY_PYTHON=V/bin/python`` for these tests.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from launch import ROOT
from run_data import RunData

from megavlm.parallel.faults import ONCE, VARIABLE

EXAMPLES = ROOT / "examples"
STEPS = 20


def package(name: str, distribution: str) -> Any:
    return pytest.importorskip(name, reason=f"pip install -c constraints.txt {distribution} (make dev does it)")


def load(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    return tree


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


def test_jobset_is_one_to_its_project() -> None:
    package("kubeflow_trainer_api", "kubeflow-trainer-api")
    models = importlib.import_module("kubeflow_trainer_api.models")
    tree = load(EXAMPLES / "kubernetes" / "jobset.yaml")
    assert models.JobsetV1alpha2JobSet.from_dict(tree).to_dict() == tree  # what it does not know, it drops
    wrong = json.loads(json.dumps(tree).replace('"onExitCodes"', '"onExitCode"'))
    assert models.JobsetV1alpha2JobSet.from_dict(wrong).to_dict() != wrong

    (job,) = tree["spec"]["replicatedJobs"]
    own = job["template"]["spec"]
    (container,) = own["template"]["spec"]["containers"]
    variables = environment(container)
    assert own["completions"] == own["parallelism"] == int(variables["NNODES"])
    name = tree["metadata"]["name"]
    assert variables["HEAD"] == f"{name}-{job['name']}-0-0.{tree['spec']['network']['subdomain']}"
    (rule,) = own["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert int(variables["NPROC"]) == int(container["resources"]["limits"]["nvidia.com/gpu"])


def test_pytorchjob_is_one_to_its_project() -> None:
    training = package("kubeflow.training", "kubeflow-training")
    from kubernetes.client import ApiClient

    tree = load(EXAMPLES / "kubernetes" / "pytorchjob.yaml")
    client = ApiClient()

    def again(given: dict[str, Any]) -> Any:
        answer = type("Answer", (), {"data": json.dumps(given)})()
        for name in dir(training.models):
            setattr(importlib.import_module("kubernetes.client.models"), name, getattr(training.models, name))
        return client.sanitize_for_serialization(client.deserialize(answer, "KubeflowOrgV1PyTorchJob"))

    assert again(tree) == tree
    wrong = json.loads(json.dumps(tree).replace('"restartPolicy"', '"restartPolice"'))
    assert again(wrong) != wrong

    replicas = tree["spec"]["pytorchReplicaSpecs"]
    master, worker = (replicas[kind]["template"]["spec"]["containers"][0] for kind in ("Master", "Worker"))
    variables = environment(master)
    assert int(variables["NNODES"]) == sum(one["replicas"] for one in replicas.values())
    assert variables["HEAD"] == f"{tree['metadata']['name']}-master-0"
    assert variables | {"NODE_RANK": "worker"} == environment(worker)
    assert {**worker, "env": master["env"]} == master
    assert int(variables["AGAIN"]) >= 128  # the operator's rule of ExitCode


def test_skypilot_takes_its_files(tmp_path: Path) -> None:
    python = os.environ.get("MEGAVLM_SKY_PYTHON")
    if python is None:
        pytest.skip("SkyPilot: set MEGAVLM_SKY_PYTHON to a Python that has it (the text of this file)")
    program = (
        "import sys, yaml, sky; from sky.utils import common_utils, schemas\n"
        "task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, [r.job_recovery for r in task.resources])\n"
        "common_utils.validate_schema(yaml.safe_load(open(sys.argv[2])), schemas.get_volume_schema(), 'volume: ')"
    )
    files = [str(EXAMPLES / "skypilot" / name) for name in ("train.yaml", "volume.yaml")]
    done = subprocess.run(
        [python, "-c", program, *files], cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 [{") and "'recover_on_exit_codes': [75]" in done.stdout


def test_skypilots_node_is_started_as_its_variables_say(tmp_path: Path) -> None:
    task = load(EXAMPLES / "skypilot" / "train.yaml")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "node.sh").write_text('echo "$HEAD $NNODES $NODE_RANK $NPROC $RECIPE"')
    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }  # fmt: skip
    env = {**os.environ, **task["envs"], **variables}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "10.0.0.1 2 1 8 codefuse_vl_14b/align\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A repository whose multinode_torchrun.sh does what ``DO`` says."""
    folder = tmp_path / "home" / "examples"
    folder.mkdir(parents=True)
    (folder / "starts.sh").write_text((EXAMPLES / "starts.sh").read_text())
    script = folder / "multinode_torchrun.sh"
    script.write_text('#!/usr/bin/env bash\necho "$HEAD,$*,${WORLD_SIZE-},${PET_NNODES-}"\neval "$DO"\n')
    script.chmod(0o755)
    return tmp_path / "home"


def node(home: Path, do: str, **variables: str) -> subprocess.Popen[str]:
    env = {
        **os.environ, "MEGAVLM_HOME": str(home), "OUTPUT_DIR": str(home / "run"), "HEAD": "localhost", "DO": do,
        "WORLD_SIZE": "9", "PET_NNODES": "9", **variables,
    }  # fmt: skip
    return subprocess.Popen(["bash", str(EXAMPLES / "node.sh"), "a=1"], env=env, stdout=subprocess.PIPE, text=True)


def test_exit_codes_of_a_node_say_whether_to_start_it_again(home: Path) -> None:
    (home / "run" / "checkpoints").mkdir(parents=True)
    (home / "run" / "logs" / "megavlm").mkdir(parents=True)
    expected = [("exit 0", {}, 0), ("exit 2", {}, 2), ("exit 75", {}, 75), ("exit 75", {"AGAIN": "138"}, 138)]
    expected += [("exit 1", {"NODE_RANK": "1"}, 75)] * 5  # the first node counts
    for do, variables, code in expected:
        one = node(home, do, **variables)
        out = one.communicate(timeout=600)[0]
        assert one.returncode == code and out.startswith("localhost,a=1,,\n"), (do, out)
    crashes = []
    for _ in range(4):
        one = node(home, "exit 1")
        crashes.append((one.wait(300), (one.stdout.read() if one.stdout else "")[-60:]))
    assert [code for code, _ in crashes] == [75, 75, 75, 3] and "giving up" in crashes[3][1]
    (home / "run" / "checkpoints" / "latest").write_text("step-00000010")  # a new checkpoint: worth another start
    assert node(home, "kill -9 $$").wait(300) == 75


def test_a_node_that_is_told_to_stop_saves(home: Path) -> None:
    one = node(home, 'trap "exit 75" TERM; echo up; while :; do sleep 0.05; done', AGAIN="138")
    assert one.stdout is not None
    while one.stdout.readline() != "up\n":
        pass
    one.send_signal(signal.SIGTERM)
    assert one.wait(300) == 138 and "goes on from none" in one.stdout.read()
    # Also before the first node has a name.
    one = node(home, "exit 0", HEAD="no-such-host.invalid")
    time.sleep(0.5)
    one.send_signal(signal.SIGTERM)
    assert one.wait(300) == 75


class Launch:
    """``examples/ssh/launch.sh`` on two "hosts" that are both this machine, over a script in ssh's place."""

    def __init__(self, data: RunData, output: Path, overrides: str = "", **variables: str) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        ssh = output.parent / "ssh"
        # As sshd does: a login shell's own environment, and the words as one line.
        ssh.write_text('#!/usr/bin/env bash\nhost=$1; shift\nexec env -i HOME="$HOME" PATH="$PATH" bash -c "$*"\n')
        ssh.chmod(0o755)
        always = f"training.train_steps={STEPS} parallel.pipeline_model_parallel_size=2 logging.tensorboard=false"
        self.output = output
        env = {
            **os.environ, "HOSTS": "localhost 127.0.0.1", "SSH": str(ssh), "RECIPE": str(data.root / "recipe.yaml"),
            "OUTPUT_DIR": str(output), "PYTHON": sys.executable, "OVERRIDES": f"{always} {overrides}", "NPROC": "1",
            "PORT": str(port), "IFNAME": "lo", "OMP_NUM_THREADS": "1", "MAX_RESTARTS": "0", **variables,
        }  # fmt: skip
        words = ["bash", str(EXAMPLES / "ssh" / "launch.sh"), "data.system_message=two 'words'"]
        self.process = subprocess.Popen(words, env=env, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 600
        while max(losses(self.output), default=0) < step:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Return the exit code and all that was printed."""
        try:
            text = self.process.communicate(timeout=600)[0]
        finally:
            if self.process.poll() is None:
                for one in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                    one.kill()
        return self.process.returncode, text


def losses(output: Path) -> dict[int, float]:
    path = output / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.reliability
@pytest.mark.dist
def test_ssh_stops_goes_on_and_starts_again_after_a_crash(run_data: RunData, tmp_path: Path) -> None:
    output = tmp_path / "the run"
    run = Launch(run_data, output)
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGTERM)
    code, text = run.end()
    assert code == 75 and "told to stop" in text and "start it again to go on from step-" in text, text
    stopped = max(losses(output))
    assert 3 <= stopped < STEPS
    assert "two 'words'" in (output / "checkpoints" / f"step-{stopped:08}" / "recipe.yaml").read_text()
    (tmp_path / "once").mkdir()
    fault = {VARIABLE: f"step.in_collective:rank1:step{stopped + 3}:kill", ONCE: str(tmp_path / "once")}
    code, text = Launch(run_data, output, **fault).end()
    assert code == 0 and "start 2 on" in text and "the run is complete" in text, text
    assert sorted(losses(output)) == list(range(1, STEPS + 1))


def test_ssh_does_not_start_again_what_cannot_get_better(home: Path) -> None:
    script = home / "examples" / "multinode_torchrun.sh"
    script.write_text('#!/usr/bin/env bash\necho "$HEAD $NNODES $RECIPE"\neval "$OVERRIDES"\n')
    ssh = home / "ssh"
    ssh.write_text('#!/usr/bin/env bash\nhost=$1; shift\nexport HOST="$host"; exec bash -c "$*"\n')
    ssh.chmod(0o755)
    run = home / "run"

    def launch(do: str) -> tuple[int, str]:
        env = {
            **os.environ, "HOSTS": "a b", "SSH": str(ssh), "MEGAVLM_HOME": str(home), "OUTPUT_DIR": str(run),
            "OVERRIDES": do, "RECIPE": "one's own",
        }  # fmt: skip
        words = ["bash", str(EXAMPLES / "ssh" / "launch.sh")]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = launch("exit 0")
    assert code == 0 and text.count("a 2 one's own") == 2 and "the run is complete" in text, text
    code, text = launch("[[ $HOST == a ]] && exit 2; exit 1")
    assert code == 2 and "start 2" not in text, text
    code, text = launch("exit 1")
    assert code == 3 and "start 4 on" in text and "start 5 on" not in text and "giving up" in text, text
    # What stopped by itself, as a node was taken away, goes on; and is not a crash.
    code, text = launch(f"n=$(ls {run}/s* | wc -l); touch {run}/s$HOST$n; ((n > 11)) || exit 75")
    assert code == 0 and "start 6 on" in text, text
