"""W&B, MLflow and SwanLab: the real packages, offline; and what a run does where they fail.

Where a package is not installed its cases are skipped: ``pip install -c constraints.txt -e '.[loggers]'`` (``make dev``
does it).
"""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from run_data import RunData

from megavlm.config.errors import RecipeError
from megavlm.config.logs import LoggingConfig
from megavlm.training.loggers import outlet
from megavlm.training.loggers.backends import flat, one_line
from megavlm.training.loggers.known import LOGGERS, Known, check_loggers
from megavlm.training.loggers.process import Answers, KeptRun, Sender

BLOCK = 32768  # of LevelDB's log format, which W&B and SwanLab both write


def needs(*keys: str) -> list[Known]:
    missing = [key for key in keys if importlib.util.find_spec(key) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed; pip install -c constraints.txt -e '.[loggers]'")
    return [one for one in LOGGERS if one.key in keys]


@pytest.fixture(autouse=True)
def _without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # to read it in this process; the logger sets it for itself


def start(folder: Path, step: int, setting: str = "photos") -> dict[str, Any]:
    tree = {"output_dir": "runs/one", "data": {"train": [{"path": "/data/a"}]}, "optimizer": {"lr": 0.1 + step}}
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "name": "one", "setting": setting, "folder": str(folder), "recipe": tree, "recipe_yaml": "optimizer: {}\n",
        "step": step,
    }  # fmt: skip


def log(known: list[Known], folder: Path, after: int, steps: int) -> None:
    """Log ``steps`` steps and a picture to each."""
    outlets = [outlet.Outlet(one, start(folder, after)) for one in known]
    for one in outlets:
        for step in range(after + 1, after + steps + 1):
            one.figures({"loss/total": 1 / step, "lr/vision": float("nan")}, step)
        one.picture("held_out", np.full((20, 30, 3), 9, np.uint8), after + steps)
    for one in outlets:
        one.close(True)


def parts(path: Path) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after a header of 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb_runs(folder: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Return id, configuration and history of each part of a run that W&B has written offline."""
    from wandb.proto import wandb_internal_pb2 as messages

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        name, config, history = "", {}, []
        for part in parts(path):
            record = messages.Record()
            record.ParseFromString(part)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                name = record.run.run_id
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                items = record.history.item
                history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        found.append((name, config, history))
    return found


def test_real_packages_take_figures_pictures_and_recipe_and_go_on_with_their_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    known, folder = needs("wandb", "mlflow", "swanlab"), tmp_path / "one" / "loggers"
    log(known, folder, 0, 3)
    first = {one.key: json.loads((folder / f"{one.key}.json").read_text()) for one in known}
    assert [one["step"] for one in first.values()] == [3, 3, 3]
    log(known, folder, 2, 2)  # killed in step 4, and on from the checkpoint of step 2: step 3 is there already
    second = {one.key: json.loads((folder / f"{one.key}.json").read_text()) for one in known}
    assert {key: one["run"] for key, one in first.items()} == {key: one["run"] for key, one in second.items()}
    assert [one["step"] for one in second.values()] == [4, 4, 4]

    runs = wandb_runs(folder)
    assert [name for name, _, _ in runs] == [first["wandb"]["run"]] * 2
    assert runs[0][1]["data"]["train"][0]["path"] == "/data/a"
    history = [row for _, _, rows in runs for row in rows]
    assert [(row["step"], row["loss/total"]) for row in history if "loss/total" in row] == [
        (step, 1 / step) for step in (1, 2, 3, 4)
    ]
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/held_out*.png"))) == 2

    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlflow").as_uri())
    run = client.get_run(first["mlflow"]["run"])
    experiment = client.get_experiment_by_name("photos")
    assert experiment is not None and run.info.experiment_id == experiment.experiment_id
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss/total")] == [
        (step, 1 / step) for step in (1, 2, 3, 4)
    ]
    assert run.data.params["data.train.0.path"] == "/data/a" and run.data.params["optimizer.lr"] == "0.1"
    assert run.data.tags["now.optimizer.lr"] == "2.1"  # parameters cannot change
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"images", "recipe.yaml"}

    folders = sorted((folder / "swanlab").glob("run-*"))
    assert [one.name.rpartition("-")[2] for one in folders] == [first["swanlab"]["run"]] * 2
    assert all(list(one.glob("media/**/*.png")) for one in folders)
    told = [sum(b"loss/total" in part for part in parts(next(one.glob("*.swanlab")))) for one in folders]
    assert told[0] > told[1] > 0  # 3 steps, 1 step
    assert "/data/a" in (folders[0] / "files" / "config.yaml").read_text()

    # Without a login, a line, and nothing is lost.
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("W&B: No API key configured.") and "wandb sync sends it" in line for line in lines)
    assert any(line.startswith("SwanLab: ") and "swanlab sync sends it" in line for line in lines)
    assert not [line for line in lines if "not sent" in line or "did not end" in line]

    log(known[1:2], folder, 0, 1)  # a run that begins anew is a new one
    assert json.loads((folder / "mlflow.json").read_text())["run"] != first["mlflow"]["run"]


def test_a_server_that_is_down_costs_a_line_and_a_restart_finds_it(
    run_data: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("mlflow")
    output = tmp_path / "run"
    words = ["logging.mlflow=photos", "logging.tensorboard=false", "logging.panel_interval=3"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = ranks.megavlm(run_data.words(output, *words, "training.train_steps=3"), world=2)
    told = [line for line in done.stdout.splitlines() if "MLflow: " in line]
    assert len(told) == 2 and "Training goes on" in told[0], told  # of rank 0 alone
    assert told[1].endswith("MLflow: 5 figures or pictures were not sent; figures are in metrics.jsonl"), told

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    ranks.megavlm(run_data.words(output, *words, "training.train_steps=6"), world=2)
    from mlflow import MlflowClient

    client = MlflowClient((output / "loggers" / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'photos'")
    (run,) = client.search_runs([experiment.experiment_id])
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    figures = {row["step"]: row["loss"] for row in rows if "loss" in row}
    curve = {one.step: one.value for one in client.get_metric_history(run.info.run_id, "loss/total")}
    assert sorted(figures) == [1, 2, 3, 4, 5, 6] and curve == {step: figures[step] for step in (4, 5, 6)}
    assert run.data.params["data.train.0.name"] == "pictures" and run.info.status == "FINISHED"
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2  # the panel, and a small copy of it


class Backend:
    """Takes items, or fails as often as it is told."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures, self.closed = list(failures), "open"
        self.taken: list[int | str] = []

    def _fail(self) -> None:
        error = self.failures.pop(0) if self.failures else None
        if error is not None:
            raise error

    def open(self) -> tuple[str, str]:
        self._fail()
        return "id", "at the server"

    def figures(self, values: dict[str, float], step: int) -> None:
        self._fail()
        self.taken.append(step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        self.taken.append(f"{name} {png!r}")

    def close(self, done: bool | None) -> None:
        self.closed = str(done)


def send(backend: Any, folder: Path, items: list[dict[str, Any]], after: int = 0) -> tuple[list[str], int]:
    out = io.StringIO()
    sender = Sender(backend, KeptRun(folder / "x.json", after), Answers("X", out), again_seconds=0)
    sender.run(iter(items))
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    return [one["say"] for one in answers if "say" in one], sum(one.get("sent", 0) for one in answers)


def test_items_wait_for_a_server_and_those_that_nobody_takes_are_passed_over(tmp_path: Path) -> None:
    items: list[dict[str, Any]] = [{"step": step, "values": {}} for step in (1, 2, 3)]
    items.append({"step": 3, "name": "held_out", "png": "YQ=="})
    down = ConnectionError("refused\nby the server")
    backend = Backend(down, down, None, down, None, ValueError("no name"))
    said, sent = send(backend, tmp_path, [*items, {"end": False}])
    assert backend.taken == [1, 3, "held_out b'a'"] and backend.closed == "False" and sent == 4
    assert said == [
        "X: refused by the server. Training goes on; figures are in metrics.jsonl, and are sent once it answers.",
        "X: at the server",
        "X: it answers again; nothing was lost.",
        "X: no name. Figures of step 2 are in metrics.jsonl only.",
    ]
    # Killed: no word of the end; and what was sent is not sent again.
    again = Backend()
    send(again, tmp_path, [*items, {"step": 4, "values": {}}], after=2)
    assert again.taken == [4] and again.closed == "None"


def test_a_disk_that_is_full_costs_a_line_until_there_is_room(tmp_path: Path) -> None:
    beside = tmp_path / "x.json.new"
    beside.symlink_to("/dev/full")
    room = threading.Timer(0.2, beside.unlink)
    room.start()
    backend = Backend()
    said, sent = send(backend, tmp_path, [{"step": step, "values": {}} for step in (1, 2, 3)])
    room.join()
    assert backend.taken == [1, 2, 3] and sent == 3  # nothing is lost, and nothing is sent twice
    assert "No space left on device" in said[1] and "Training goes on; figures are in metrics.jsonl" in said[1]
    assert said[-1] == "X: it answers again; nothing was lost." and len(said) <= 5
    assert json.loads((tmp_path / "x.json").read_text())["run"] == "id"


def test_what_a_server_never_takes_is_counted_and_the_end_is_not_held_up(tmp_path: Path) -> None:
    backend = Backend(*[ConnectionError("down")] * 9)
    out = io.StringIO()
    sender = Sender(backend, KeptRun(tmp_path / "x.json", 0), Answers("X", out))  # type: ignore[arg-type]
    sender.ended.set()
    sender.run(iter([{"step": 1, "values": {}}, {"end": True}]))
    assert '"sent"' not in out.getvalue() and out.getvalue().count("down.") == 1


def test_a_process_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = subprocess.Popen
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
    monkeypatch.setattr(outlet, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: real([sys.executable, "-c", program], **more))
    one = outlet.Outlet(LOGGERS[0], start(tmp_path, 0))
    one.figures({"loss": 1.0}, 1)
    one.close(True)
    assert "W&B: did not end within 1 seconds" in caplog.text and "1 figures or pictures were not sent" in caplog.text
    assert one._process.poll() is not None


def test_what_is_missing_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    check_loggers(LoggingConfig())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        check_loggers(LoggingConfig(wandb="one", swanlab="two"))
    assert str(caught.value).splitlines() == [
        f"logging.{key}: the package {key} is missing: pip install 'megavlm[{key}]', or set this to null"
        for key in ("wandb", "swanlab")
    ]


def test_names_and_lines() -> None:
    tree = {"a": {"b": [{"c": 1}, {"c": 2}], "d": [1, 2], "e": []}, "f": None}
    assert flat(tree) == [("a.b.0.c", 1), ("a.b.1.c", 2), ("a.d", [1, 2]), ("a.e", []), ("f", None)]
    assert one_line(ValueError("a\n b")) == "a b." and one_line(KeyError()) == "KeyError."
