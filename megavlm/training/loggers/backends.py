"""What each package asks for: a run that begins or goes on, figures, pictures, an end. Used in the logger's process.

Facts from the packages' own documentation: ``wandb.init(id=..., resume="allow")``, a metric of its own as the x axis
(``define_metric``); MLflow's ``MlflowClient``, whose parameters cannot change once written; ``swanlab.init(id=...,
resume="allow")``, whose id has 21 letters and digits.
"""

from __future__ import annotations

import os
import re
import secrets
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from megavlm.data.images import decode_with_pil

_ONLINE_SECONDS = 60
"""How long W&B may take to answer before the run is written without it."""


@dataclass(frozen=True)
class Start:
    """What a logger is told about the run."""

    name: str
    """The run's directory, without its parents."""
    setting: str
    """The value of the recipe's key: project or experiment."""
    folder: Path
    """Where it may keep files."""
    recipe: Mapping[str, Any]
    recipe_yaml: str
    run: str | None
    """Id of the run to go on with; None for a new one."""


class Backend(Protocol):
    """One package. Whatever a method raises is told in a line; unless it is of the value, it is called again later."""

    def open(self) -> tuple[str, str]:
        """Begin a run or go on with it; returns its id and where people see it."""

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Write figures of a step."""

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Write a picture of a step."""

    def close(self, done: bool | None) -> None:
        """End: the run is complete (True), was stopped (False), or failed or was killed (None)."""


class WandbRun(Backend):
    """Weights & Biases. Without a login or an answer the run is written to disk, for ``wandb sync``."""

    def __init__(self, start: Start, say: Callable[[str], None]) -> None:
        self._start, self._say = start, say
        self._run: Any = None

    @override
    def open(self) -> tuple[str, str]:
        import wandb  # noqa: PLC0415 - optional; so are those below

        start, run = self._start, self._start.run or _letters(8)
        entity, _, project = start.setting.rpartition("/")
        words: dict[str, Any] = {
            "project": project, "entity": entity or None, "name": start.name, "id": run, "resume": "allow",
            "dir": str(start.folder), "config": dict(start.recipe),
        }  # fmt: skip
        settings: dict[str, Any] = {"console": "off", "silent": True, "init_timeout": _ONLINE_SECONDS}
        settings["disable_code"] = True
        try:
            self._run = wandb.init(**words, settings=wandb.Settings(**settings))
        except (wandb.Error, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
                raise  # a full disk, say: no better offline
            self._run = wandb.init(**words, mode="offline", settings=wandb.Settings(**settings))
            where = f"{one_line(error)} The run is written to {self._run.settings.sync_dir}; wandb sync sends it"
        else:
            where = str(self._run.settings.sync_dir if self._run.offline else self._run.url)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # the x axis
        return run, where

    @override
    def figures(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step}, step=step)

    @override
    def picture(self, name: str, png: bytes, step: int) -> None:
        import wandb  # noqa: PLC0415

        self._run.log({name: wandb.Image(decode_with_pil(png)), "step": step}, step=step)

    @override
    def close(self, done: bool | None) -> None:
        self._run.finish(exit_code=1 if done is None else 0)


class MlflowRun(Backend):
    """MLflow, by its client alone: no global run, no fluent calls."""

    _PARAMS, _METRICS, _LONGEST = 100, 1000, 6000  # of one request; letters of a parameter

    def __init__(self, start: Start, say: Callable[[str], None]) -> None:
        self._start, self._say = start, say
        self._client: Any = None
        self._run = ""

    @override
    def open(self) -> tuple[str, str]:
        # We try again ourselves; the package would be silent for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (self._start.folder / "mlflow").resolve().as_uri()
        from mlflow import MlflowClient  # noqa: PLC0415
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        start, self._client = self._start, MlflowClient(uri)
        if start.run is not None and not self._run:
            try:
                self._client.update_run(start.run, status="RUNNING")
                self._run = start.run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._say(f"the run {start.run} is gone; a new one begins.")
        if not self._run:
            self._run = self._client.create_run(self._experiment(), run_name=start.name).info.run_id
        self._client.log_text(self._run, start.recipe_yaml, "recipe.yaml")
        self._parameters(start.recipe)
        return self._run, f"run {self._run} of experiment {start.setting} at {uri}"

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        name = self._start.setting
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run has just made it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _parameters(self, recipe: Mapping[str, Any]) -> None:
        """Write each key as a parameter; one that has another value than at an earlier start as a tag, by its name."""
        from mlflow.entities import Param, RunTag  # noqa: PLC0415

        known = self._client.get_run(self._run).data
        values = {key: str(value)[: self._LONGEST] for key, value in flat(recipe)}
        new = [Param(key, value) for key, value in values.items() if key not in known.params]
        for first in range(0, len(new), self._PARAMS):
            self._client.log_batch(self._run, params=new[first : first + self._PARAMS])
        changed = {
            f"now.{key}": value
            for key, value in values.items()
            if key in known.params and known.tags.get(f"now.{key}", known.params[key]) != value
        }
        if changed:
            self._client.log_batch(self._run, tags=[RunTag(key, value) for key, value in changed.items()])

    @override
    def figures(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        now = int(time.time() * 1000)
        metrics = [Metric(_plain(name), value, now, step) for name, value in values.items()]
        try:
            for first in range(0, len(metrics), self._METRICS):
                self._client.log_batch(self._run, metrics=metrics[first : first + self._METRICS])
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise ValueError(str(error)) from error
            raise

    @override
    def picture(self, name: str, png: bytes, step: int) -> None:
        self._client.log_image(self._run, decode_with_pil(png), key=_plain(name), step=step)

    @override
    def close(self, done: bool | None) -> None:
        status = {True: "FINISHED", False: "KILLED", None: "FAILED"}[done]
        self._client.set_terminated(self._run, status)


class SwanlabRun(Backend):
    """SwanLab. Without a login or an answer the run is written to disk, for ``swanlab sync``."""

    def __init__(self, start: Start, say: Callable[[str], None]) -> None:
        self._start, self._say = start, say
        self._run: Any = None

    @override
    def open(self) -> tuple[str, str]:
        import swanlab  # noqa: PLC0415

        start, run = self._start, self._start.run or _letters(21)
        workspace, _, project = start.setting.rpartition("/")
        folder = start.folder / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        words: dict[str, Any] = {
            "project": project, "workspace": workspace or None, "name": start.name, "id": run, "resume": "allow",
            "log_dir": str(folder), "config": dict(start.recipe),
        }  # fmt: skip
        try:
            self._run = swanlab.init(**words, reinit=True)
        except Exception as error:  # without a login, RuntimeError; of the server, requests' and the package's own
            if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
                raise
            self._run = swanlab.init(**words, mode="offline", reinit=True)
            return run, f"{one_line(error)} The run is written to {self._run.dir}; swanlab sync sends it"
        return run, str(self._run.url if self._run.mode == "online" else self._run.dir)

    @override
    def figures(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    @override
    def picture(self, name: str, png: bytes, step: int) -> None:
        import swanlab  # noqa: PLC0415

        self._run.log({name: swanlab.Image(decode_with_pil(png))}, step=step)

    @override
    def close(self, done: bool | None) -> None:
        self._run.finish(state="crashed" if done is None else "success")


def flat(tree: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of a recipe by their dotted names: ``data.train.0.path``."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = dict(enumerate(value)) if isinstance(value, list) and _has_branches(value) else value
        if isinstance(inner, Mapping):
            found += flat({str(name): item for name, item in inner.items()}, f"{before}{key}.")
        else:
            found.append((f"{before}{key}", value))
    return found


def _has_branches(values: list[Any]) -> bool:
    return any(isinstance(value, Mapping) for value in values)


def one_line(error: BaseException) -> str:
    """Return what an error says, on one line that ends as a sentence does."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _plain(name: str) -> str:
    """Return a name of letters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def _letters(count: int) -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(count))
