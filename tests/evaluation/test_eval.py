"""``megavlm eval`` on a checkpoint of a short run: the same answers at every layout, and refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image
from ranks import megavlm
from run_data import RunData

from megavlm.commands import eval as main
from megavlm.evaluation.records import read_records
from megavlm.parallel.lock import HeldError, held


@pytest.fixture(scope="module")
def trained(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of three steps."""
    output = tmp_path_factory.mktemp("trained")
    megavlm(run_data.words(output, "training.train_steps=3"), world=1)
    return output


def evaluate(data: RunData, run: Path, out: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """Run ``megavlm eval`` on 12 records; return the predictions."""
    words = ["eval", run, *overrides, "--data", data.heldout_json, "--images", data.images, "--out", out]
    megavlm([*words, "--max-new-tokens=5", "--limit=12", "--panel-samples=4"], world=ranks)
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def test_layouts_answer_alike(run_data: RunData, trained: Path, tmp_path: Path) -> None:
    alone = evaluate(run_data, trained, tmp_path / "one")
    assert len(alone) == 12
    # Trained on one process, evaluated on two replicas of two tensor-parallel ranks.
    words = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    assert evaluate(run_data, trained, tmp_path / "four", *words, ranks=4) == alone
    scores = json.loads((tmp_path / "one" / "scores.json").read_text())
    assert scores["records"] == 12
    assert sum(scores["counts"].values()) == 12
    assert 0 < scores["chance_accuracy"] < 1
    assert scores["checkpoint"].endswith("step-00000003")
    with Image.open(tmp_path / "one" / "panel.png") as panel:
        assert panel.width > 400


def arguments(*words: str) -> argparse.Namespace:
    """Parse the command's arguments."""
    parser = argparse.ArgumentParser()
    main.add_arguments(parser)
    return parser.parse_args(list(words))


def test_refusals(run_data: RunData, trained: Path, tmp_path: Path) -> None:
    common = [f"--data={run_data.heldout_json}", f"--images={run_data.images}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        main.run(arguments(str(tmp_path), *common))
    with pytest.raises(ValueError, match="not divisible"):
        main.run(arguments(str(trained), "parallel.tensor_model_parallel_size=3", *common))
    with pytest.raises(ValueError, match=r"data\.sequence_length: record .* takes"):
        main.run(arguments(str(trained), "--max-new-tokens=180", *common))
    with pytest.raises(ValueError, match="--limit must be at least 1"):
        main.run(arguments(str(trained), "--limit=0", *common))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--out: .*/file/x: .* is no directory; move the file"):
        main.run(arguments(str(trained), *common, f"--out={tmp_path / 'file' / 'x'}"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with (
        held(tmp_path / "out" / "lock.json", "eval", "theirs"),
        pytest.raises(HeldError, match=r"^--out: .*/out is held by megavlm eval "),
    ):
        main.run(arguments(str(trained), *common))
    assert not list((tmp_path / "out").iterdir())


def test_records(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    turns = [
        {"from": "user", "value": "<img>a.jpg</img>Colour?"},
        {"from": "assistant", "value": "black"},
        {"from": "user", "value": "<img>missing.jpg</img>And this?"},  # after the first answer: not asked
        {"from": "assistant", "value": "white"},
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns, "answer": "Black", "task": "t"}]))
    first, second = read_records(path, tmp_path)
    assert (first.id, first.task, first.answer, first.choices) == ("0", "all", "black", [])
    assert [turn.role for turn in first.question] == ["user"]
    assert first.images == [tmp_path / "a.jpg"]
    assert (second.task, second.answer) == ("t", "Black")
    turns[0]["value"] = "<img>b.jpg</img>Colour?"
    path.write_text(json.dumps([{"conversations": turns}]))
    with pytest.raises(FileNotFoundError, match=r"record 0: no image 'b\.jpg'"):
        read_records(path, tmp_path)
    path.write_text(json.dumps([{"conversations": []}]))
    with pytest.raises(ValueError, match="record 0: no turns"):
        read_records(path, tmp_path)


def test_records_in_other_forms_and_encodings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A LLaVA record is asked with its picture; what would be asked otherwise than it is written is refused."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    turns = [{"from": "human", "value": "<image>\r\nColour?"}, {"from": "gpt", "value": "b\u0142\u0119kit"}]
    llava = {"id": 1, "image": "a.jpg", "conversations": turns, "task": "t", "choices": ["a", "b"], "split": "x"}
    entries = [llava, llava | {"image": None, "images": ["a.jpg"], "system": "Be brief.", "answer": 7}]
    files = {
        "a.json": json.dumps(entries).encode(),
        "b.jsonl": "\n".join(json.dumps(one, ensure_ascii=False) for one in entries).encode("utf-16"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        first, second = read_records(tmp_path / name, tmp_path)
        assert first.images == second.images == [tmp_path / "a.jpg"]
        assert [turn.text for turn in first.question] == ["Picture 1: <img></img>\nColour?"]
        assert [turn.role for turn in second.question] == ["system", "user"]
        assert (first.answer, second.answer) == ("b\u0142\u0119kit", "7") and first.choices == ["a", "b"]
    assert "keys of the records that are not used: split (2 records)" in caplog.text
    for wrong, told in {
        "more <image> than the record has": {"image": None},
        "'video' is not supported": {"video": "a.mp4"},
        "'task' is not valid Unicode": {"task": "\ud800"},
        "'id' is not valid Unicode": {"id": "x\udfff"},
        "'answer' is not valid Unicode": {"answer": "\ud800"},
        "'choices' must be text, not dict": {"choices": [{}]},
        "is not valid Unicode text": {"conversations": [turns[0] | {"value": "<image>\ud83d"}, turns[1]]},
    }.items():
        (tmp_path / "c.json").write_text(json.dumps([llava, llava | told]))
        with pytest.raises(ValueError, match=f"record 1: .*{wrong}"):
            read_records(tmp_path / "c.json", tmp_path)


def test_spread_takes_all_tasks_in_turn() -> None:
    assert main.spread(["a", "a", "b", "a", "c"], 3) == [0, 2, 4]
    assert main.spread(["a", "b"], 5) == [0, 1]
    assert main.spread([], 3) == []
