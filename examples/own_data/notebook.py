"""Make ``own_data.ipynb`` of ``own_data.py``: ``python examples/own_data/notebook.py``."""

import json
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("own_data.py")


def notebook(script: str) -> str:
    """Return a script of ``# %%`` cells (Jupytext's percent format) as a notebook without outputs."""
    cells: list[dict[str, Any]] = []
    for number, piece in enumerate(script.split("# %%")[1:]):
        head, _, body = piece.partition("\n")
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if "[markdown]" in head:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
            cell |= {"cell_type": "markdown", "source": text.splitlines(keepends=True)}
        else:
            source = body.strip("\n").splitlines(keepends=True)
            cell |= {"cell_type": "code", "execution_count": None, "outputs": [], "source": source}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    tree = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCRIPT.with_suffix(".ipynb").write_text(notebook(SCRIPT.read_text(encoding="utf-8")), encoding="utf-8")
