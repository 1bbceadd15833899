"""Grounding in the notations of families: RefCOCO is asked in their words, scored, and drawn where the boxes are."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_files import COUNT, MAKERS
from PIL import Image
from tokenizer_files import write_llava

from megavlm import cli
from megavlm.checkpoint.assets import write_record
from megavlm.config.errors import UserError
from megavlm.data.box_space import BoxSpace
from megavlm.data.plans_native import NativePlan
from megavlm.data.plans_single import PadPlan
from megavlm.data.schema import Turn
from megavlm.evaluation.benchmarks import BENCHMARKS
from megavlm.evaluation.benchmarks.own_words import as_taught
from megavlm.evaluation.benchmarks.spec import NOT_ASKED, Item
from megavlm.evaluation.metrics import score
from megavlm.evaluation.own import check_metrics, scores_of
from megavlm.evaluation.records import HeldOutRecord

# The file's box is (2, 3.5, 20, 30) in pictures of 40 x 32 pixels. The words are written once more, from
# eval_scripts/eval_ref.py and RefCOCOEvalData of Vision-CAIR/MiniGPT-4, and caption2box of THUDM/CogVLM.
FORMS = {
    "qwen_vl": ("<ref>left square</ref><box>", "(49,109),(500,937)</box>", "(500,109),(950,937)</box>"),
    "minigpt_v2": (
        "[refer] give me the location of left square", "{<5><10><50><93>}", "{<50><10><95><93>}",
    ),
    "cogvlm_base": (
        "Where is left square? answer in [[x0,y0,x1,y1]] format.", "It is at [[050,109,500,937]]", "[[500,109,950,937]]",
    ),
}  # fmt: skip


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]


def drawn(page: str, colour: str) -> tuple[float, float, float, float]:
    """Where the first picture of a report has a solid box, as parts of its sides: ``right`` is green."""
    data = re.findall(r'class="card ' + colour + r'".*?src="data:image/jpeg;base64,([^"]+)"', page, re.S)[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    strong = pixels[..., 1] - pixels[..., 0] if colour == "right" else pixels[..., 0] - pixels[..., 1]
    down, across = np.nonzero((strong > 70) & (pixels[..., 2] < 110))
    height, width = pixels.shape[:2]
    return across.min() / width, down.min() / height, across.max() / width, down.max() / height


@pytest.mark.parametrize("template", FORMS)
def test_refcoco_is_asked_scored_and_drawn(template: str, random_checkpoint: Path, tmp_path: Path) -> None:
    asked, right, wrong = FORMS[template]
    data = MAKERS["refcoco"](tmp_path / "data")
    for number in range(COUNT):  # so that nothing but boxes is coloured
        Image.new("RGB", (40, 32), (128, 128, 128)).save(
            tmp_path / "data" / "train2014" / f"COCO_train2014_{number:012d}.jpg"
        )
    tokenizer = [] if template == "qwen_vl" else [f"data.tokenizer={write_llava(tmp_path)}"]
    words = ["eval", str(random_checkpoint), f"model.template={template}", *tokenizer, "--benchmark=refcoco", *data]
    words += [f"--out={tmp_path / 'out'}", "--panel-samples=2", "--max-new-tokens=4"]
    assert cli.main(words) == 0
    found = rows(tmp_path / "out")
    identity = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert identity["prompt"] == ("plain" if template == "qwen_vl" else "chat") and not any("problem" in one for one in found)
    for said, points, colour, place in (
        (right, 100.0, "right", (2 / 40, 3.5 / 32, 20 / 40, 30 / 32)),
        (wrong, 0.0, "wrong", (20 / 40, 3.5 / 32, 38 / 40, 30 / 32)),
        ("I see no square.", 0.0, None, None),
    ):
        lines = [json.dumps({**one, "prediction": said}) + "\n" for one in found]
        (tmp_path / "out" / "predictions.jsonl").write_text("".join(lines), "utf-8")
        assert cli.main(words) == 0  # all are answered: it scores them
        scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
        assert scores == {"iou50": points}
        assert [one["score"] for one in rows(tmp_path / "out")] == [points / 100] * COUNT
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert asked in re.sub(r"&lt;", "<", re.sub(r"&gt;", ">", page))
        if colour is not None and place is not None:
            assert drawn(page, colour) == pytest.approx(place, abs=0.02)
