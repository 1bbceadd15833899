"""Which loggers there are: the key of each in the recipe, its package and the extra that brings it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from megavlm.config.errors import RecipeError
from megavlm.config.logs import LoggingConfig

FOLDER = "loggers"
"""In the run's directory: what loggers keep there."""


@dataclass(frozen=True)
class Known:
    """One of them."""

    key: str
    """Of the branch ``logging``; also the name of the extra and of the package that is imported."""
    title: str
    """How people call it."""
    backend: str
    """Its class in :mod:`megavlm.training.loggers.backends`."""


LOGGERS = (
    Known("wandb", "W&B", "WandbRun"),
    Known("mlflow", "MLflow", "MlflowRun"),
    Known("swanlab", "SwanLab", "SwanlabRun"),
)


def wanted(settings: LoggingConfig) -> list[tuple[Known, str]]:
    """Return the loggers that a recipe asks for, with what its keys say."""
    return [(one, value) for one in LOGGERS if (value := getattr(settings, one.key)) is not None]


def check_loggers(settings: LoggingConfig) -> None:
    """Check that the packages of the recipe's loggers are installed.

    Raises:
        RecipeError: with a line for each that is not.
    """
    lines = [
        f"logging.{one.key}: the package {one.key} is missing: pip install 'megavlm[{one.key}]', or set this to null"
        for one, _ in wanted(settings)
        if importlib.util.find_spec(one.key) is None
    ]
    if lines:
        raise RecipeError.of(lines)
