"""Questions answered by yes or no: MME and POPE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megavlm.config.errors import MissingFileError, UserError
from megavlm.evaluation.benchmarks.files import make_items, picture_in, read_lines, text
from megavlm.evaluation.benchmarks.spec import BenchmarkFiles, Item

_PICTURES = (".jpg", ".png", ".jpeg")
_TEXTS, _INNER = "questions_answers_YN", "MME_Benchmark"


def read_mme(source: BenchmarkFiles) -> list[Item]:
    """Read MME's folder (``MME_Benchmark_release_version``, or ``MME_Benchmark`` in it): a folder per sub-task.

    A sub-task has either ``images/`` and ``questions_answers_YN/``, or pictures and texts side by side. The text
    of a picture has a line per question: question, tab, Yes or No. The questions of a picture are one unit.

    Raises:
        MissingFileError: the folder is missing.
        UserError: it is not of this format.
    """
    if not source.data.is_dir():
        raise MissingFileError(f"{source.data}: MME's folder, with a folder per sub-task, is not there")
    inner = source.data / _INNER
    root = inner if inner.is_dir() else source.data
    files = []
    for task in sorted(path for path in root.iterdir() if path.is_dir()):
        folder = task / _TEXTS
        files += sorted((folder if folder.is_dir() else task).glob("*.txt"))
    pictures: dict[Path, dict[str, Path]] = {}

    def make(path: Path) -> Iterator[Item]:
        task = path.parent.parent if path.parent.name == _TEXTS else path.parent
        if task not in pictures:  # artwork's lie in images/toy_dataset
            found = sorted(one for one in task.rglob("*") if one.suffix.lower() in _PICTURES)
            pictures[task] = {one.stem: one for one in found}
        picture = pictures[task].get(path.stem, path.with_suffix(_PICTURES[0]))
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        for index, line in enumerate(lines):
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise UserError(f"line {index + 1} is not a question, a tab, and Yes or No")
            unit = f"{task.name}/{path.stem}"
            answers = (answer.strip().lower(),)
            yield Item(f"{unit}#{index}", question.strip(), (picture,), answers, kind=task.name, unit=unit)

    return make_items(source.data, ((path.relative_to(root), path) for path in files), make)


def read_pope(source: BenchmarkFiles) -> list[Item]:
    """Read ``coco_pope_adversarial.json`` and its like (AoiDragon/POPE): JSON lines of COCO's val2014.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """

    def make(pair: tuple[int, Any]) -> Iterator[Item]:
        index, entry = pair
        label = text(entry, "label", "").lower()
        if source.answers and label not in ("yes", "no"):
            raise UserError(f"'label' is {label!r}, which is not yes or no")
        yield Item(
            id=text(entry, "question_id", str(index)),
            question=text(entry, "text"),
            pictures=(picture_in(source.images, text(entry, "image")),),
            answers=(label,) if label else (),
        )

    rows = ((line, (index, entry)) for index, (line, entry) in enumerate(read_lines(source.data)))
    return make_items(source.data, rows, make, "line")
