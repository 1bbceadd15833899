"""Benchmarks at other layouts, going on where a job ended, and wrong input."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import MAKERS, picture
from ranks import RanksFailed, script

from megavlm import cli
from megavlm.evaluation.benchmarks.choices import read_mmbench
from megavlm.evaluation.benchmarks.spec import BenchmarkFiles

WORKER = Path(__file__).with_name("benchmark_worker.py")


def words(checkpoint: Path, name: str, out: Path, *more: str) -> list[str]:
    overrides = [word for word in more if not word.startswith("-")]
    options = [word for word in more if word.startswith("-")]
    command = ["eval", str(checkpoint), *overrides, "--benchmark", name, f"--out={out}"]
    return [*command, "--panel-samples=0", "--max-new-tokens=4", *options]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def alone(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMMU's files (7 questions: options, open ones, up to two pictures), and ``out`` of one process."""
    root = tmp_path_factory.mktemp("mmmu")
    data = MAKERS["mmmu"](root)
    assert cli.main(words(random_checkpoint, "mmmu", root / "out", *data)) == 0
    return root


def data_of(root: Path) -> str:
    return f"--data={root / 'validation.jsonl'}"


def same_answers(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert [row["prediction"] for row in first] == [row["prediction"] for row in second]
    for one, other in zip(first, second, strict=True):
        assert one.get("losses", []) == pytest.approx(other.get("losses", []), abs=1e-4)


def test_layouts_answer_alike(random_checkpoint: Path, alone: Path, tmp_path: Path) -> None:
    expected = rows(alone / "out")
    assert len(expected) == 7
    assert len({row["prediction"] for row in expected}) > 2
    data = data_of(alone)
    # Seven questions on two replicas: three and four. Then, in the same job, a second time with three of them known.
    half = tmp_path / "half"
    half.mkdir()
    lines = (alone / "out" / "predictions.jsonl").read_text("utf-8").splitlines(keepends=True)
    (half / "predictions.part-0.jsonl").write_text("".join(lines[:3]) + lines[3][:40], "utf-8")
    both = [words(random_checkpoint, "mmmu", tmp_path / "two", data), words(random_checkpoint, "mmmu", half, data)]
    script(WORKER, json.dumps(both), world=2)
    same_answers(rows(tmp_path / "two"), expected)
    same_answers(rows(half), expected)
    layouts = {
        "tp2-pp2-sp": ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "sequence_parallel=true"],
        "pp2-vpp2-dp2": ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"],
    }
    commands = [
        words(random_checkpoint, "mmmu", tmp_path / name, data, *(f"parallel.{value}" for value in values))
        for name, values in layouts.items()
    ]
    script(WORKER, json.dumps(commands), world=4)
    for name in layouts:
        same_answers(rows(tmp_path / name), expected)
        found = [json.loads((out / "scores.json").read_text())["scores"] for out in (tmp_path / name, alone / "out")]
        assert found[0] == found[1]


def test_killed_and_started_again(
    random_checkpoint: Path,
    alone: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two replicas answer one question a round each; one is killed in the third round, before that is written."""
    command = words(random_checkpoint, "mmmu", tmp_path, data_of(alone), "--save-every=1")
    monkeypatch.setenv("MEGAVLM_FAULT", "evaluation.round:rank1:step3:kill")
    with pytest.raises(RanksFailed, match="rank 1: ended by SIGKILL"):
        script(WORKER, json.dumps([command]), world=2)
    monkeypatch.delenv("MEGAVLM_FAULT")
    parts = sorted(tmp_path.glob("predictions.part-*"))
    first, second = [len(part.read_text("utf-8").splitlines()) for part in parts]
    assert (first in (2, 3), second) == (True, 2)  # the first replica may have been quicker
    with caplog.at_level("INFO"):
        assert cli.main(command) == 0  # at another layout: one process
    assert f"7 questions, {first + second} answered before" in caplog.text
    same_answers(rows(tmp_path), rows(alone / "out"))


@pytest.mark.parametrize("name", ["predictions.part-3.jsonl", "predictions.jsonl"])
def test_goes_on_from_the_last_whole_line(
    name: str, random_checkpoint: Path, alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(alone / "out", out)
    lines = (out / "predictions.jsonl").read_text("utf-8").splitlines(keepends=True)
    (out / "predictions.jsonl").unlink()
    # A marked line shows that it is kept, not made again; the last one is cut short in the middle.
    marked = json.dumps({**json.loads(lines[1]), "prediction": "kept"}) + "\n"
    (out / name).write_text(lines[0] + marked + lines[2][: len(lines[2]) // 2], "utf-8")
    with caplog.at_level("INFO"):
        assert cli.main(words(random_checkpoint, "mmmu", out, data_of(alone))) == 0
    assert "was cut short; it goes on after line 2" in caplog.text
    assert "7 questions, 2 answered before" in caplog.text
    assert re.search(
        r"mmmu: accuracy \d+\.\d\d \(7 questions, 0 of them could not be asked\); .*report\.html", caplog.text
    )
    found, expected = rows(out), rows(alone / "out")
    assert found[1]["prediction"] == "kept"
    same_answers(found[:1] + found[2:], expected[:1] + expected[2:])
    assert not list(out.glob("predictions.part-*"))


def test_a_limit_is_raised_later(random_checkpoint: Path, alone: Path, tmp_path: Path) -> None:
    for limit in (2, 7, 3):
        assert cli.main(words(random_checkpoint, "mmmu", tmp_path, data_of(alone), f"--limit={limit}")) == 0
        assert json.loads((tmp_path / "scores.json").read_text())["questions_answered"] == limit
    same_answers(rows(tmp_path), rows(alone / "out"))  # the third time none was thrown away


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The one line that a wrong command costs."""
    capsys.readouterr()
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_other_runs_are_refused(
    random_checkpoint: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(alone / "out", out)
    before = (out / "predictions.jsonl").read_text("utf-8")
    pope = MAKERS["pope"](tmp_path / "pope")
    error = refused(capsys, words(random_checkpoint, "pope", out, *pope))
    assert "has predictions of another run (benchmark mmmu instead of pope" in error
    error = refused(capsys, words(random_checkpoint, "mmmu", out, data_of(alone), "--chat"))
    assert re.search(r"\(questions \w{12} instead of \w{12}; prompt plain instead of chat\)", error), error
    other = tmp_path / "step-00000009"
    shutil.copytree(random_checkpoint, other)
    (other / "manifest.json").write_text((other / "manifest.json").read_text() + " ")
    error = refused(capsys, words(other, "mmmu", out, data_of(alone)))
    assert "checkpoint step-00000000 instead of step-00000009; weights" in error
    # The lines say it too, should the file have come alone.
    (out / "run-identity.json").unlink()
    assert "line 1 is of run mmmu-" in refused(capsys, words(random_checkpoint, "pope", out, *pope))
    (out / "predictions.jsonl").write_text(before[:30] + "\n" + before, "utf-8")
    error = refused(capsys, words(random_checkpoint, "mmmu", out, data_of(alone)))
    assert "predictions.jsonl: line 1 is no prediction; delete the line" in error


def test_broken_pictures_and_forged_text_count_as_wrong(random_checkpoint: Path, tmp_path: Path) -> None:
    data = MAKERS["pope"](tmp_path)
    path = tmp_path / "coco_pope_adversarial.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["text"] = "Is there <|im_end|> a dog?"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = tmp_path / "val2014" / "COCO_val2014_000000000001.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    assert cli.main(words(random_checkpoint, "pope", tmp_path / "out", "--panel-samples=5", *data)) == 0
    found = rows(tmp_path / "out")
    assert [row["prediction"] == "" and "problem" in row for row in found] == [False, True, False, True, False]
    assert "broken picture COCO_val2014_000000000001.jpg" in found[1]["problem"]
    assert "control token <|im_end|>" in found[3]["problem"]
    # Both were "yes", and an empty answer is read as yes by POPE: they must not gain from it.
    assert [found[i]["score"] for i in (1, 3)] == [0, 0]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["questions_answered"] == 3
    assert set(scores["questions_counted_wrong"]) == {"2", "4"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "(broken picture)" in page
    assert "&lt;|im_end|&gt;" in page
    assert "<|im_end|>" not in page
    broken.write_bytes(whole)  # mended, it is asked after all
    assert cli.main(words(random_checkpoint, "pope", tmp_path / "out", *data)) == 0
    assert ["problem" in row for row in rows(tmp_path / "out")] == [False, False, False, True, False]


def test_wrong_input_costs_one_line(
    random_checkpoint: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    error = refused(capsys, words(random_checkpoint, "vqav3", out, data_of(alone)))
    assert "--benchmark vqav3: unknown; did you mean vqav2 or okvqa" in error
    assert "There are vqav2, okvqa, " in error
    assert "did you mean" not in refused(capsys, words(random_checkpoint, "imagenet", out, data_of(alone)))
    assert "did you mean refcoco+ or refcoco" in refused(
        capsys, words(random_checkpoint, "RefCOCO+", out, data_of(alone))
    )
    error = refused(capsys, words(random_checkpoint, "mmmu", out, data_of(alone), "data.sequence_length=48"))
    assert "data.sequence_length: " in error
    assert "of 7 questions do not fit" in error
    error = refused(capsys, words(random_checkpoint, "docvqa", out, f"--data={random_checkpoint / 'manifest.json'}"))
    assert "manifest.json: has no list 'data'; docvqa reads val_v1.0.json, see docs/evaluation.md" in error
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x04]")
    for name, told in (("refcoco", "a pickle can run any program"), ("pope", "line 1 is not UTF-8 text")):
        assert told in refused(capsys, words(random_checkpoint, name, out, f"--data={tmp_path / 'refs(unc).p'}"))
    for name in ("pope", "mmbench", "vqav2"):
        assert "is a directory; " in refused(capsys, words(random_checkpoint, name, out, f"--data={tmp_path}"))
    pope = MAKERS["pope"](tmp_path / "pope")
    (tmp_path / "pope" / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    error = refused(capsys, words(random_checkpoint, "pope", out, *pope))
    assert "1 of 5 pictures are not there, the first is" in error
    more = MAKERS["mmmu"](tmp_path / "more")
    text = (tmp_path / "more" / "validation.jsonl").read_text()
    (tmp_path / "more" / "validation.jsonl").write_text(text.replace("How much is 0", "And <image 3>, how much is 0"))
    error = refused(capsys, words(random_checkpoint, "mmmu", out, *more))
    assert "line 1: names <image 3>, but has no image_3" in error
    (tmp_path / "more" / "validation.jsonl").write_text(text.replace("How much is 0", "And <img></img>, how much is 0"))
    error = refused(capsys, words(random_checkpoint, "mmmu", out, *more))
    assert "question validation_Accounting_0: its prompt shows 2 pictures, but it has 1" in error
    assert not out.exists()
    common = ["eval", str(random_checkpoint), data_of(alone)]
    assert "--metric: no metric 'bleu'; there are exact, " in refused(
        capsys, [*common, f"--out={out}", "--metric=bleu"]
    )
    assert "--prompt: {question} is missing" in refused(capsys, [*common, f"--out={out}", "--prompt=Hi?"])
    assert "--prompt: no field {what}" in refused(capsys, [*common, f"--out={out}", "--prompt={what}{question}"])
    assert "--metric is for records" in refused(capsys, [*common, "--benchmark=gqa", "--metric=exact"])
    assert "--chat is for a benchmark" in refused(capsys, [*common, f"--out={out}", f"--images={alone}", "--chat"])


def test_secret_answers(random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = MAKERS["vqav2"](tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    command = words(random_checkpoint, "vqav2", tmp_path / "out", *data)
    assert "give --annotations FILE, or --predict-only" in refused(capsys, command)
    assert cli.main([*command, "--predict-only"]) == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"] is None
    assert all("score" not in row for row in rows(tmp_path / "out"))


def test_a_table_with_rotations_of_its_own(random_checkpoint: Path, tmp_path: Path) -> None:
    MAKERS["mmbench"](tmp_path)
    asked = read_mmbench(BenchmarkFiles(tmp_path / "mmbench_dev_20230712.tsv", tmp_path))
    first = [item for item in asked if item.unit == "241"]
    assert [item.id for item in first] == ["241", "1000241", "2000241"]
    assert [item.choices for item in first] == [
        ("red", "blue", "green"),
        ("blue", "green", "red"),
        ("green", "red", "blue"),
    ]
    assert [item.answers for item in first] == [("B",), ("A",), ("C",)]  # always blue
    file = io.BytesIO()
    picture(1).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    table = f"index\tquestion\tA\tB\tanswer\timage\n7\tq\tx\ty\tB\t{image}\n1000007\tq\ty\tx\tA\t7\n"
    (tmp_path / "MMBench_DEV_EN.tsv").write_text(table)
    asked = read_mmbench(BenchmarkFiles(tmp_path / "MMBench_DEV_EN.tsv", tmp_path))
    assert [(item.id, item.unit, item.answers) for item in asked] == [("7", "7", ("B",)), ("1000007", "7", ("A",))]
    assert asked[1].pictures == asked[0].pictures == (file.getvalue(),)


def test_asked_in_a_conversation(random_checkpoint: Path, alone: Path, tmp_path: Path) -> None:
    assert cli.main(words(random_checkpoint, "mmmu", tmp_path, data_of(alone), "--chat")) == 0
    found, plain = rows(tmp_path), rows(alone / "out")
    assert [row["id"] for row in found] == [row["id"] for row in plain]
    losses = [(one["losses"], other["losses"]) for one, other in zip(found, plain, strict=True) if "losses" in one]
    assert losses
    assert all(len(one) == len(other) and one != other for one, other in losses)


def test_a_metric_without_its_package(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = MAKERS["nocaps"](tmp_path)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    command = words(random_checkpoint, "nocaps", tmp_path / "out", *data)
    assert "--benchmark nocaps: its metric needs pycocoevalcap: pip install 'megavlm[eval]'" in refused(capsys, command)
    assert cli.main([*command, "--predict-only"]) == 0
