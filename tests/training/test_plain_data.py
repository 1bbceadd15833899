"""A run from plain data is the run from what ``megavlm prepare`` made of it, on several ranks that start at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import megavlm
from run_data import RunData

OVERRIDES = ("training.validation_interval=3", "logging.panel_interval=null", "logging.tensorboard=false")


def losses(output: Path) -> list[tuple[str, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(key, value) for line in lines for key, value in sorted(line.items()) if "loss" in key]


@pytest.mark.dist
def test_a_run_from_plain_data(run_data: RunData, tmp_path: Path) -> None:
    raw = run_data.heldout_json.parent / "train.json"
    records = [
        {"id": one["id"], "messages": [_message(turn) for turn in one["conversations"]]}
        for one in json.loads(raw.read_text())
    ]
    plain = tmp_path / "messages.jsonl"
    plain.write_text("\n".join(map(json.dumps, records)), encoding="utf-16")
    megavlm(run_data.words(tmp_path / "prepared", *OVERRIDES), world=2)
    expected = losses(tmp_path / "prepared")
    assert len(expected) > 6
    given = (
        f"data.train.0.path={plain}", f"data.train.0.images={run_data.images}", "data.train.0.format=messages",
        f"data.validation.0.path={run_data.heldout_json}", f"data.validation.0.images={run_data.images}",
        "data.validation.0.name=heldout", f"data.cache={tmp_path / 'cache'}",
    )  # fmt: skip
    megavlm(run_data.words(tmp_path / "plain", *OVERRIDES, *given), world=2)
    assert losses(tmp_path / "plain") == expected
    assert len([one for one in (tmp_path / "cache").iterdir() if one.name != "known"]) == 2
    # The checkpoint's recipe names the data that was given.
    (recipe,) = (tmp_path / "plain/checkpoints").glob("step-*/recipe.yaml")
    assert str(plain) in recipe.read_text() and "cache/messages-" not in recipe.read_text()
    refused = megavlm(run_data.words(tmp_path / "no", "data.train.0.images=/tmp"), check=False)
    assert refused.code == 2 and "data.train.0.images: " in refused.stderr and "is prepared already" in refused.stderr


def _message(turn: dict[str, str]) -> dict[str, object]:
    """A turn in Qwen-VL's form as a message of parts, which becomes the same again."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(turn["value"].split("Picture ")):
        if number:
            path, _, piece = piece.partition("<img>")[2].partition("</img>\n")
            parts.append({"type": "image", "image": path})
        if piece:
            parts.append({"type": "text", "text": piece})
    return {"role": turn["from"], "content": parts}
