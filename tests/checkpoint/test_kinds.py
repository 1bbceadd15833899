"""A directory of another kind than was asked for: the line says what it is, and the command that is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megavlm.cli import main

IN, OUT = "megavlm convert hf-to-megatron", "megavlm convert megatron-to-hf"


def touched(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("{}")

    return make


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "hugging face": (touched("config.json", "model.safetensors"), f"convert them once: {IN} --hf {{path}} --out"),
    "shards": (touched("model.safetensors.index.json", "model-00001-of-00002.safetensors"), f"{IN} --hf {{path}}"),
    "pickles": (touched("config.json", "pytorch_model-00001-of-00002.bin"), f"{IN} --hf {{path}} --out CHECKPOINT"),
    "no weights": (touched("config.json", "tokenizer.json"), "a Hugging Face directory without its weights; download"),
    "peft": (touched("adapter_config.json", "adapter_model.safetensors"), f"{IN} --adapter {{path}} --base CHECKPOINT"),
    "megatron-lm": (touched("latest_checkpointed_iteration.txt", "iter_0000001/x.pt"), "of Megatron-LM, which is not"),
    "distributed": (touched(".metadata", "__0_0.distcp"), "a distributed checkpoint without run.json"),
    "data": (touched(".nv-meta/.info.json"), "a data set that megavlm prepare made"),
    "unfinished": (touched("checkpoints/step-00000001.partial/x"), "unfinished: what was writing it was interrupted"),
    "small files": (touched("conversion.json"), "the folder of small files in a checkpoint; give {parent}"),
    "others": (touched("a/model.safetensors", "b/run.json", "c/x"), "a directory of others; give one of a, b in it"),
    "nothing": (touched("notes/x.txt"), "give a step-... directory, or a run's output_dir"),
}  # fmt: skip
READERS: dict[str, Callable[[Path, Path], list[str]]] = {
    "generate": lambda path, _: ["generate", str(path), "--prompt", "hi"],
    "chat": lambda path, _: ["chat", str(path)],
    "serve": lambda path, _: ["serve", str(path)],
    "eval": lambda path, tmp: [
        "eval", str(path), "--data", str(tmp / "x.json"), "--images", str(tmp), "--out", str(tmp / "out"),
    ],
    "export": lambda path, tmp: ["convert", "megatron-to-hf", "--megatron", str(path), "--out", str(tmp / "out")],
    "merge": lambda path, tmp: ["convert", "merge", "--megatron", str(path), "--out", str(tmp / "out")],
    "verify": lambda path, tmp: ["convert", "verify", "--megatron", str(path), "--reference", str(tmp / "x")],
    "train": lambda path, tmp: [
        "train", "quickstart", f"checkpoint.load={path}", f"output_dir={tmp}/run", f"data.train.0.path={tmp}/data",
        f"data.tokenizer={tmp}/t.json", f"data.validation.0.path={tmp}/data", "parallel={}",
    ],
}  # fmt: skip


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2, words
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_checkpoint(reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / ".nv-meta").mkdir(parents=True)
    for name in ("x.json", "t.json", "x"):
        (tmp_path / name).write_text("[]")
    for kind, (make, message) in OTHERS.items():
        path = tmp_path / f"given-{kind}"
        path.mkdir()
        make(path)
        error = said(READERS[reader](path, tmp_path), capsys)
        if reader == "train" and kind in (
            "hugging face",
            "shards",
            "pickles",
            "no weights",
        ):  # which it takes, if they are whole
            assert error.startswith(f"megavlm: error: checkpoint.load: {path}"), error
            continue
        assert f"{path}: no checkpoint; " in error and message.format(path=path, parent=path.parent) in error, error
        assert (": checkpoint.load: " in error) == (reader == "train")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_what_is_no_hugging_face_directory(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {kind: tmp_path / f"given-{kind}" for kind in OTHERS if kind not in ("hugging face", "shards", "pickles")}
    for kind, path in given.items():
        path.mkdir()
        OTHERS[kind][0](path)
    given |= {"checkpoint": checkpoint, "run": checkpoint.parent}
    checkpoint.rename(checkpoint.with_name("step-00000001"))
    given["checkpoint"] = checkpoint.with_name("step-00000001")
    for kind, path in given.items():
        error = said(["convert", "hf-to-megatron", "--hf", str(path), "--out", str(tmp_path / "out")], capsys)
        message = (
            f"{OUT} --megatron {path}" if kind not in OTHERS else OTHERS[kind][1].format(path=path, parent=tmp_path)
        )
        assert f"{path}: holds no weights; " in error, error
        assert (message if kind != "nothing" else "looked for model.safetensors.index.json") in error, error
        words = ["convert", "hf-to-megatron", "--adapter", str(path), "--base", str(given["checkpoint"]), "--out"]
        if kind != "peft":
            assert f"{path}: has no adapter_config.json" in said([*words, str(tmp_path / "out")], capsys)
    for kind in ("data", "unfinished", "megatron-lm"):
        error = said(["convert", "inspect", str(given[kind])], capsys)
        assert OTHERS[kind][1] in error, error
    facts = main(["convert", "inspect", str(given["checkpoint"]), "--json"])
    assert facts == 0 and json.loads(capsys.readouterr().out)["kind"] == "Megatron distributed checkpoint"
