"""``examples/own_data``: script and notebook are one text, and the notebook runs from its first cell to its last."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT

FOLDER = ROOT / "examples" / "own_data"


def test_the_notebook_is_the_script() -> None:
    spec = importlib.util.spec_from_file_location("own_data_notebook", FOLDER / "notebook.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    script = (FOLDER / "own_data.py").read_text(encoding="utf-8")
    text = (FOLDER / "own_data.ipynb").read_text(encoding="utf-8")
    assert text == made.notebook(script), "run python examples/own_data/notebook.py"
    # Nothing of the script is left out: its lines are the cells' lines, in order.
    cells = json.loads(text)["cells"]
    lines = [line.rstrip() for cell in cells for line in "".join(cell["source"]).splitlines() if line.strip()]
    own = [line for line in script.splitlines() if line.strip() not in ("", "#") and not line.startswith("# %%")]
    words = [line if line == kept else line.removeprefix("# ") for line, kept in zip(own, lines, strict=True)]
    assert words == lines


@pytest.mark.long
@pytest.mark.dist
def test_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """All cells, one after the other, in one namespace, as a kernel would run them; the commands are real processes."""
    for name, value in {"OWN_DATA": "story", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.chdir(tmp_path)
    ran: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads((FOLDER / "own_data.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), ran)
    here = tmp_path / "story"
    assert "12 samples" in capfd.readouterr().out and (here / "inspect.html").stat().st_size > 100_000
    assert len({size for path in (here / "photos").iterdir() if (size := ran["Image"].open(path).size)}) > 100

    loss, held_out = (ran["curves"][name] for name in ("loss/total", "validation/total"))
    assert loss[0][1] > 5 and loss[-1][1] < 0.3 and held_out[-1][1] < held_out[0][1] < loss[0][1]
    # There are four colours, and whole sentences are compared.
    assert ran["scores"]["records"] == 24 and ran["scores"]["scores"]["exact_match"] > 80
    assert ran["first"][1]["content"] == ran["theirs"] == ran["answered"].splitlines()[-1]
    assert {path.name for path in ran["home"].iterdir()} >= {"config.json", "model.safetensors", "chat_template.jinja"}
    # A run that is over, started again, finds all as it was.
    again = ran["megavlm"]("train", ran["RECIPE"], *ran["overrides"])
    assert f"resumed from runs/tiny/checkpoints/step-{loss[-1][0]:08}" in again
