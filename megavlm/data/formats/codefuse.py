"""CodeFuse-VLM's training folder: one JSON file per task, each a list of LLaVA records.

Source: ``make_supervised_data_module`` in ``llava/train/train.py`` of github.com/codefuse-ai/CodeFuse-MFT-VLM: every
``NAME.json`` of the folder that does not begin with a dot is a task of its own. Here a task may also be a folder
``NAME`` with any number of ``.json`` and ``.jsonl`` files. The name becomes the record's ``task``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megavlm.data.formats.base import Broken, Record, Source, load_json
from megavlm.data.formats.llava import convert

_SUFFIXES = (".json", ".jsonl")


def matches(source: Source) -> bool:
    """Whether it is a directory with task files."""
    return source.path.is_dir() and bool(_task_files(source.path))


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the records of all tasks, the tasks in order of their names.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: It has no task files, or one of them is no JSON list.
    """
    if not source.path.exists():
        raise FileNotFoundError(f"{source.path} does not exist")
    files = _task_files(source.path) if source.path.is_dir() else []
    if not files:
        raise ValueError(f"{source.path} is no folder with a JSON file, or a folder of them, per task")
    for task, path in files:
        content = load_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of LLaVA records")
        yield from convert(content, task)


def _task_files(directory: Path) -> list[tuple[str, Path]]:
    found = []
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += [(entry.name, path) for path in sorted(entry.iterdir()) if _is_data(path)]
        elif _is_data(entry):
            found.append((entry.stem, entry))
    return found


def _is_data(path: Path) -> bool:
    return path.suffix in _SUFFIXES and path.is_file() and not path.name.startswith(".")
