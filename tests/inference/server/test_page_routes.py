"""What the page is told and given, without a browser."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from learnt import ANSWER
from run_data import RunData
from serving import Served

from megavlm.checkpoint.assets import write_record
from megavlm.data.image_header import MAX_SIDE
from megavlm.inference.server.about import about_checkpoint
from megavlm.inference.server.examples import examples
from megavlm.inference.server.web import POLICY


def get(served: Served, path: str, body: object = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=600)
    sent = None if body is None else json.dumps(body)
    kind = {"Content-Type": "application/json"} if body is not None else {}
    connection.request("POST" if sent else "GET", path, sent, {**kind, **headers})
    response = connection.getresponse()
    return response.status, response.read(), dict(response.getheaders())


def test_the_page_has_a_policy_and_loads_its_own_files_only(served: Served) -> None:
    status, text, headers = get(served, "/")
    assert status == 200 and headers["content-security-policy"] == POLICY and "'unsafe" not in POLICY
    assert b"http:" not in text.replace(b"http-equiv", b"") and b"https:" not in text and b"style=" not in text
    for name in ("main.js", "chat.css", "icon.svg", "balloons.png"):
        status, _, headers = get(served, f"/page/{name}")
        assert status == 200 and headers["x-content-type-options"] == "nosniff"
        assert get(served, f"/page/{name}", None, **{"If-None-Match": headers["etag"]})[0] == 304
    for name in ("nothing.js", "..%2fapp.py", "%2e%2e/web.py"):
        status, text, _ = get(served, f"/page/{name}")
        assert status == 404 and b"error" in text


def test_what_the_model_is_and_can(served: Served) -> None:
    told = json.loads(get(served, "/page/model.json")[1])
    assert told["name"] == "tiny" and told["family"] is None and told["limits"]["images"] == 2
    assert told["defaults"]["length"] == 40 and told["system"] is True
    names = [one["name"] for one in told["abilities"]]
    assert names == ["Pictures", "Several at once", "Boxes", "Context"]
    # The tokenizer has tokens for boxes; of the pictures all fit the limits.
    assert [one["title"] for one in told["examples"]] == ["Describe", "Find", "Read", "Chart", "Compare"]
    assert told["examples"][1]["question"] == "Where is the red balloon?"


def test_plans_and_boxes_of_the_page(served: Served) -> None:
    found = json.loads(get(served, "/page/plan?width=640&height=480&images=2")[1])
    assert found["tokens"] == 4 and found["planes"][0]["size"] == [32, 32]
    for wrong in (
        "width=0&height=1",
        "width=1",
        f"width={MAX_SIDE + 1}&height=1",
        "width=1&height=%C2%B2",
        "width=1&height=1&images=3",
    ):
        status, text, _ = get(served, f"/page/plan?{wrong}")
        assert status == 400 and len(text) < 2000, wrong
    body = {"text": ANSWER, "width": 320, "height": 320}
    found = json.loads(get(served, "/page/boxes", body)[1])
    assert found == {"boxes": [{"name": "red disc", "sides": [0.125, 0.25, 0.5, 0.625]}]}
    for wrong in (
        {},
        [],
        {**body, "text": 1},
        {**body, "width": None},
        {**body, "height": [1]},
        {**body, "images": True},
    ):
        assert get(served, "/page/boxes", wrong)[0] == 400, wrong
    assert get(served, "/page/boxes", {**body, "text": "x" * (2 << 20)})[0] == 413


@pytest.mark.parametrize(
    ("record", "title", "finds", "pixels"),
    [
        ({"family": "qwen2_5_vl"}, "Qwen2.5-VL", "bbox coordinates", True),
        ({"family": "qwen3_vl"}, "Qwen3-VL", "bbox coordinates", False),
        ({"family": "internvl"}, "InternVL", "<ref>{thing}</ref>", False),
        ({"family": "llava_onevision1_5"}, "LLaVA-OneVision-1.5", None, False),
        ({"family": "codefuse_vlm"}, "CodeFuse", None, False),
    ],
)
def test_families(
    record: dict[str, str], title: str, finds: str | None, pixels: bool, run_data: RunData, tmp_path: Path
) -> None:
    write_record(tmp_path, record)
    model = run_data.recipe(tmp_path, "model.template=checkpoint").model
    found = about_checkpoint(tmp_path, model, box_tokens=False)
    assert found.family is not None and title in found.family
    assert found.told_by is not None and found.told_by.box_pixels is pixels
    assert found.finds is None if finds is None else finds in (found.finds or "")
    taught = about_checkpoint(tmp_path, run_data.recipe(tmp_path, "model.template=minigpt_v2").model, box_tokens=False)
    assert taught.finds == "[refer] give me the location of {thing}"  # whatever it was made of


def test_examples_are_small_and_drawn_the_same() -> None:
    assert sum(len(data) for one in examples() for _, data in one.pictures) < 60_000
    names: dict[str, bytes] = {}
    for one in examples():
        for name, data in one.pictures:
            assert names.setdefault(name, data) == data
