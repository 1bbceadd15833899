"""CodeFuse-VLM's training data: a folder of tasks with LLaVA records, or parquet with prompts, answers and pictures.

Source: ``make_supervised_data_module`` and the two data sets in ``llava/train/train.py`` of
github.com/codefuse-ai/CodeFuse-MFT-VLM.

- Without ``--is_parquet``, every ``NAME.json`` of the folder that does not begin with a dot is a task of its own. Here
  a task may also be a folder ``NAME`` with any number of ``.json``, ``.jsonl`` and ``.parquet`` files.
- With it (as ``scripts/*_multinode.sh`` train), the folder's parquet files are one data set. A row has ``image``
  (``{"bytes", "path"}``) and either ``prompt`` and ``ground_truth``, or lists ``prompts`` and ``ground_truths`` for
  several rounds. The picture stands where ``<image>`` is; without one, in front of the first prompt.

The name of file or folder becomes the record's ``task``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megavlm.config.errors import MissingFileError, UserError
from megavlm.data.formats.base import Broken, BrokenError, Record, field, identity
from megavlm.data.formats.llava import convert
from megavlm.data.formats.source import Source
from megavlm.data.formats.tables import files_of

_ROW_KEYS = {"id", "prompt", "ground_truth", "prompts", "ground_truths", "conversations"}
_SUFFIXES = (".json", ".jsonl", ".parquet")


def matches(source: Source) -> bool:
    """Whether it is a folder whose first task has conversations, or parquet with prompts and answers."""
    if not source.is_folder:
        return bool(files_of(source.path)) and any(map(_is_row, source.head))
    tasks = _task_files(source.path)
    first = source.below(tasks[0][1]) if tasks else None
    return first is not None and first.is_list and any(_is_row(row) or "conversations" in row for row in first.head)


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the records of all tasks, the tasks in order of their names.

    Raises:
        MissingFileError: There is no such file or folder.
        UserError: It has no task files, or one of them holds no list.
    """
    if not source.path.exists():
        raise MissingFileError(f"{source.path} does not exist")
    path = source.path.absolute()
    if not source.is_folder:
        tasks = [(path.name if path.is_dir() else path.stem, source.path)]
    else:
        tasks = _task_files(source.path)
    if not tasks:
        raise UserError(f"{source.path} is no folder with a file of JSON or parquet, or a folder of them, per task")
    for task, file in tasks:
        yield from convert(_llava(source.below(file).rows(), file.name), source.ignored, task)


def _is_row(record: Record) -> bool:
    return {"prompts", "ground_truths"} <= record.keys() or {"prompt", "ground_truth"} <= record.keys()


def _llava(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Rows of prompts and answers as LLaVA records; others as they are."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not _is_row(row):
            yield row
            continue
        try:
            yield _conversation(row, f"{name}/{number}")
        except BrokenError as error:
            yield error.about(identity(row, "id") or f"{name}/{number}")


def _conversation(row: Record, row_id: str) -> Record:
    if "prompts" in row:
        prompts, answers = field(row, "prompts", list), field(row, "ground_truths", list)
    else:
        prompts, answers = [field(row, "prompt")], [field(row, "ground_truth")]
    if not prompts or len(prompts) != len(answers):
        raise BrokenError("no answer", f"{len(prompts)} prompts, but {len(answers)} answers")
    if not all(isinstance(text, str) for text in (*prompts, *answers)):
        raise BrokenError("bad record", "a prompt or an answer is no text")
    if (row.get("image") or row.get("images")) and not any("<image>" in prompt for prompt in prompts):
        prompts = [f"<image>\n{prompts[0]}", *prompts[1:]]
    turns = []
    for prompt, answer in zip(prompts, answers, strict=True):
        turns += [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    kept = {key: value for key, value in row.items() if key not in _ROW_KEYS and value is not None}
    return {"id": identity(row, "id") or row_id, "conversations": turns} | kept


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
