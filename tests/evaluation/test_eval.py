"""``megavlm eval`` on a checkpoint of a short run: the same answers at every layout, and refusals."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from ranks import megavlm
from run_data import RunData

from megavlm.commands import eval as main
from megavlm.config.errors import UserError
from megavlm.data.schema import Turn
from megavlm.evaluation.benchmarks.published import published
from megavlm.evaluation.own import check_metrics, metrics_of, scores_of, spread
from megavlm.evaluation.records import HeldOutRecord, asked, read_records
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
    page = (tmp_path / "one" / "report.html").read_text()
    assert "12 questions" in page and "Beside published figures" not in page and page.count('<div class="card ') == 4
    assert scores["scores"].keys() == {"exact_match"} and not list((tmp_path / "one").glob("*part*"))
    # Again with other metrics: what was answered is not asked again, only scored; as messages, it is the same.
    records = []
    for one in json.loads(run_data.heldout_json.read_text()):
        turns = [{"role": turn["from"], "content": turn["value"].replace("<img>", "").replace("</img>", "")}
                 for turn in one["conversations"]]  # fmt: skip
        paths = re.findall(r"<img>(.*?)</img>", json.dumps(one["conversations"]))
        for turn in turns:
            turn["content"] = re.sub(r"Picture \d+: \S+\n", "<image>\n", turn["content"])
        records.append({**one, "messages": turns, "images": paths} | {"conversations": None})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-16")
    data = ["--data", tmp_path / "own.jsonl", "--images", run_data.images, "--out", tmp_path / "own"]
    common = ["--max-new-tokens=5", "--limit=12", "--panel-samples=4"]
    megavlm(["eval", trained, *data, *common, "--metric=contains,anls"], world=2)
    lines = [json.loads(line) for line in (tmp_path / "own" / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == alone
    lines[0]["prediction"] = f"The answer is {lines[0]['answer']}!"
    (tmp_path / "own" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    megavlm(["eval", trained, *data, *common, "--metric=contains,anls"], world=1)
    scores = json.loads((tmp_path / "own" / "scores.json").read_text())
    assert scores["scores"].keys() == {"contains", "anls"} and scores["scores"]["contains"] > 8.3
    first = json.loads((tmp_path / "own" / "predictions.jsonl").read_text().splitlines()[0])
    assert first["score"] == 1.0 and first["prediction"].startswith("The answer is")


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
    with pytest.raises(ValueError, match=r"data\.sequence_length: .* question .* takes"):
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
        "1 films, but <video> stands 0 times": {"video": "a.mp4"},
        "'task' is not valid Unicode": {"task": "\ud800"},
        "'id' is not valid Unicode": {"id": "x\udfff"},
        "'answer' is not valid Unicode": {"answer": "\ud800"},
        "'choices' must be text, not dict": {"choices": [{}]},
        "is not valid Unicode text": {"conversations": [turns[0] | {"value": "<image>\ud83d"}, turns[1]]},
    }.items():
        (tmp_path / "c.json").write_text(json.dumps([llava, llava | told]))
        with pytest.raises(ValueError, match=f"record 1: .*{wrong}"):
            read_records(tmp_path / "c.json", tmp_path)


def held_out(*answers: str, **keys: object) -> HeldOutRecord:
    return HeldOutRecord("r", "all", (Turn("user", "<img></img>What?"),), answers, [], [], **keys)


def test_metrics_by_key() -> None:
    box = "<box>(0,0),(100,100)</box>"
    records = [held_out("12"), held_out("a cat", metric="contains"), held_out(box, metric="iou"),
               held_out(*["red"] * 4, "blue", metric="vqa")]  # fmt: skip
    said = ["12.5", "It is a cat.", "<box>(0,0),(100,50)</box>", "Red"]
    check_metrics(records, ["relaxed", "exact"])
    found = scores_of(records, ["relaxed", "exact"], said)
    assert found.values == pytest.approx(
        {"relaxed_accuracy": 100, "exact_match": 0, "contains": 100, "iou50": 100, "mean_iou": 50, "vqa_accuracy": 100}
    )
    assert found.each == [1, 1, 1, 1] and next(iter(found.values)) == "relaxed_accuracy"
    assert metrics_of("ANLS, exact,anls") == ("anls", "exact")
    for text, answers, wanted in (("concatenate", ["cat"], 0), ("A Cat!", ["dog", "cat"], 1), ("110", ["10"], 0),
                                  ("\u4e00\u53ea\u732b\u3002", ["\u732b"], 1), ("x", [""], 0)):  # fmt: skip
        assert scores_of([held_out(*answers)], ["contains"], [text]).values["contains"] == 100 * wanted, text
    pytest.importorskip("pycocoevalcap")
    captions = [held_out("a red flag on a pole", "a flag"), held_out("two cats asleep on a sofa")]
    assert scores_of(captions, ["cider"], ["a red flag on a pole", "a dog"]).values["cider"] > 100
    for record, chosen, message in (
        (held_out("red"), ["vqa"], "answers of several people"),
        (held_out("red", metric="iou"), ["exact"], "metric iou needs a box"),
        (held_out("red", metric="bleu"), ["exact"], "record r: no metric 'bleu'"),
    ):
        with pytest.raises(UserError, match=message):
            check_metrics([record], chosen)


def test_prompts() -> None:
    record = HeldOutRecord("r", "all", (Turn("system", "S"), Turn("user", "Picture 1: <img></img>\nWhat?")), ("a",),
                           ["a", "b"], [Path("x")])  # fmt: skip
    assert asked(record, None) == record.question
    assert asked(record, "{question} Be brief.")[1].text == "Picture 1: <img></img>\nWhat? Be brief."
    assert asked(record, '{pictures}Q: {question} {"a": 1}\n{options}')[1].text == (
        '<img></img>Q: What? {"a": 1}\nA. a\nB. b'
    )
    with pytest.raises(UserError, match="record r has no 'choices'"):
        asked(held_out("a"), "{question}{options}")


def test_records_in_every_form(tmp_path: Path) -> None:
    """What ``prepare`` reads is asked: messages, alpaca, COCO's captions (a question a picture), VizWiz's answers."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "x"}]
    people = [{"answer": "red", "answer_confidence": "yes"}] * 4
    described = [{"id": i, "image_id": 1, "caption": text} for i, text in enumerate(("A flag.", "Red."))]
    captions = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": described}
    for content, question, answers in (
        ([{"messages": said, "images": ["a.jpg"], "answers": ["x", "y"]}], "Picture 1: <img></img>\nWhat?", ("x", "y")),
        (
            [{"instruction": "<image>What?", "output": "x", "images": ["a.jpg"]}],
            "Picture 1: <img></img>\nWhat?",
            ("x",),
        ),
        ([{"image": "a.jpg", "question": "What?", "answers": people}], "<img></img>What? Answer:", ("red",) * 4),
        (captions, "<img></img>Generate the caption in English:", ("A flag.", "Red.")),
    ):
        (tmp_path / "d.json").write_text(json.dumps(content))
        (record,) = read_records(tmp_path / "d.json")
        assert record.question[-1].text == question and record.answers == answers
        assert record.images == [tmp_path / "a.jpg"]
    (tmp_path / "d.json").write_text(json.dumps([{"messages": said, "images": ["a.jpg"], "id": 1}] * 2))
    assert [one.id for one in read_records(tmp_path / "d.json")] == ["1#0", "1#1"]


def test_what_would_be_left_out_is_refused(tmp_path: Path) -> None:
    said = [{"from": "user", "value": "Which?"}, {"from": "assistant", "value": "1"}]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": said, "choices": [str(i) for i in range(27)]}]))
    (record,) = read_records(tmp_path / "d.json")
    with pytest.raises(UserError, match="27 'choices', more than there are letters"):
        asked(record, "{question} {options}")
    with pytest.raises(UserError, match="annotations"):
        read_records(tmp_path / "d.json", annotations=tmp_path / "none.json")


def test_figures_of_others_stand_beside_the_published_file_alone() -> None:
    assert "Qwen-VL" in published("gqa", 12578)["exact_match"]
    assert not published("gqa", 120) and not published("gqa", 12577) and not published("mmmu", 900)


def test_spread_takes_all_tasks_in_turn() -> None:
    assert spread(["a", "a", "b", "a", "c"], 3) == [0, 2, 4]
    assert spread(["a", "b"], 5) == [0, 1]
    assert spread([], 3) == []
