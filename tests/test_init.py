"""``megavlm init``: a recipe that runs, of a model's directory and a file of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import megavlm
from run_data import RunData
from test_cache import bucket  # noqa: F401 - a fixture
from test_trained_assets import convert, made

from megavlm.checkpoint.hf.directory import expand_recipe
from megavlm.cli import main
from megavlm.commands.init import Measured, _choose, _length
from megavlm.config.checks import check_paths, check_recipe
from megavlm.config.errors import UserError
from megavlm.config.load import load_recipe
from megavlm.data.cache import is_prepared


def _model(root: Path) -> Path:
    """A small LLaVA whose positions hold the samples."""
    hf = made(root, "llava")
    tree = json.loads((hf / "config.json").read_text())
    tree["text_config"]["max_position_embeddings"] = 2048
    (hf / "config.json").write_text(json.dumps(tree))
    return hf


def _records(data: RunData, path: Path, count: int) -> Path:
    records = json.loads((data.root / "raw" / "train.json").read_text())
    path.write_text(json.dumps((records * 3)[:count]))
    return path


def _init(data: RunData, root: Path, count: int, *more: str) -> list[str]:
    file = _records(data, root / "mine.json", count)
    words = ["init", "--model", str(root / "hf"), "--data", str(file), "--images", str(data.images)]
    return [*words, "--out", str(root / "mine.yaml"), *more]


def test_it_looks_and_writes_a_recipe_that_holds(
    run_data: RunData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bucket: Any,  # noqa: F811 - the fixture
) -> None:
    _model(tmp_path)
    assert main(_init(run_data, tmp_path, 220)) == 0
    assert capsys.readouterr().out.strip() == f"megavlm train {tmp_path / 'mine.yaml'}"
    text = (tmp_path / "mine.yaml").read_text()
    recipe = load_recipe(tmp_path / "mine.yaml", [], expand_recipe)
    check_recipe(recipe, 1)
    check_paths(recipe)
    assert recipe.data.sequence_length % 256 == 0 and 1024 <= recipe.data.sequence_length <= 2048
    assert (len(recipe.data.train), len(recipe.data.validation)) == (1, 1) and recipe.training.validation_interval
    assert recipe.training.epochs == 3 and recipe.training.precision == "fp32" and recipe.lora.rank is None
    assert "209 samples; of 209 that were measured" in " ".join(text.split("\n# ")).replace("# ", "")
    assert recipe.optimizer.warmup_steps >= 1 and recipe.checkpoint.export_hf == "last"
    # Nothing is written over, and prepared data is taken as it is, with nothing held out.
    assert main(_init(run_data, tmp_path, 220)) == 2 and "exists already" in capsys.readouterr().err
    (tmp_path / "mine.yaml").unlink()
    records = tmp_path / "mine-data" / "records" / "train.jsonl"
    before = records.read_bytes()
    assert main(_init(run_data, tmp_path, 210)) == 2 and "mine-data: exists already" in capsys.readouterr().err
    assert records.read_bytes() == before
    assert recipe.data.train[0].path == str(records) and recipe.data.train[0].images == str(run_data.images)
    (prepared,) = (path for path in (tmp_path / "mine-data").glob("train-*") if is_prepared(path))
    words = ["init", "--model", str(tmp_path / "hf"), "--data", str(prepared)]
    assert main([*words, "--out", str(tmp_path / "gpu.yaml"), "--gpus", "16", "--gpu", "h100-80g"]) == 0
    assert capsys.readouterr().out.startswith("torchrun --nnodes 2 --rdzv-backend c10d")
    other = load_recipe(tmp_path / "gpu.yaml", [], expand_recipe)
    check_recipe(other, 16)
    assert other.data.validation == () and other.training.validation_interval is None
    assert other.training.precision == "bf16" and other.training.global_batch_size % 16 == 0
    # Records on an object store stay there.
    bucket.upload_file(str(tmp_path / "mine.json"), "pictures", "mine.json")
    words[4] = "s3://pictures/mine.json"
    assert main([*words, "--images", str(run_data.images), "--out", str(tmp_path / "far.yaml")]) == 0
    far = load_recipe(tmp_path / "far.yaml", [], expand_recipe)
    check_paths(far)
    assert [source.path for source in far.data.train] == ["s3://pictures/mine.json"] and far.data.validation == ()


def test_what_fails_leaves_nothing(
    run_data: RunData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the same words with more GPUs begin anew."""

    def none_fits(*_: Any) -> Any:
        raise UserError("qlora does not fit; give more")

    _model(tmp_path)
    monkeypatch.setattr("megavlm.commands.init._choose", none_fits)
    assert main(_init(run_data, tmp_path, 20)) == 2 and "give more" in capsys.readouterr().err
    assert not (tmp_path / "mine-data").exists() and not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gone"], "--model gone: no such file or directory"),
        (["--model", "."], "--model .: is neither a Hugging Face directory nor a checkpoint of megavlm"),
        (["--data", "gone"], "--data gone: no such file or directory"),
        (["--data", "s3://nowhere/mine.json", "--images", "gone"], "image directory gone does not exist"),
        (["--data", "ftp://nowhere/mine.json"], "ftp://nowhere/mine.json: ftp:// is not read; take a path, or s3://"),
        (["--gpus", "0"], "--gpus must be at least 1, not 0"),
        (["--gpu", "abacus"], "no figures for 'abacus'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, run_data: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made(tmp_path, "llava")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main([*_init(run_data, tmp_path, 5), *arguments]) == 2
    assert message in capsys.readouterr().err


def _measured(*lengths: int, samples: int = 100_000) -> Measured:
    return Measured(samples, tuple(sorted(lengths)), 1.0, "")


def test_the_length_of_packs_follows_the_samples() -> None:
    assert _length(_measured(*[600] * 100), 32768) == 2560  # four of them
    assert _length(_measured(*[600] * 100, samples=20), 32768) == 1024  # there are few
    assert _length(_measured(*[600] * 100), 2048) == 2048
    assert _length(_measured(*[5000] * 99, 6000), 32768) == 6144  # all of them fit
    assert _length(_measured(*[1000] * 199, 30000), 32768) == 4096  # one that is far longer is left out


@pytest.mark.parametrize(
    ("model", "gpus", "kind", "method"),
    [
        ("llava_1_5_7b", 8, "h100-80g", "full"),
        ("llava_1_5_7b", 1, "h100-80g", "lora"),
        ("llava_1_6_vicuna_13b", 1, "rtx-4090", "qlora"),
    ],
)
def test_what_is_trained_is_what_fits(model: str, gpus: int, kind: str, method: str) -> None:
    tree: dict[str, Any] = {
        "output_dir": "runs/x",
        "model": {"preset": model},
        "data": {"train": [{"path": "x"}], "sequence_length": 2048},
        "optimizer": {"lr": 1e-5},
        "training": {"epochs": 1, "global_batch_size": 1, "precision": "bf16"},
        "checkpoint": {"load": "x"},
    }
    choice = _choose(tree, gpus, kind, _measured(*[800] * 10))
    assert choice.method == method and choice.plan is not None and choice.plan.layout.gpus == gpus
    assert f"{method} takes" in choice.why
    if method == "full":
        tree["model"] = {"preset": "internvl2_5_78b"}
        with pytest.raises(UserError, match="qlora does not fit 1 x rtx-4090"):
            _choose(tree, 1, "rtx-4090", _measured(*[800] * 10))


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.family("llava")
def test_from_own_records_to_an_answer(run_data: RunData, tmp_path: Path) -> None:
    """The whole first hour in three commands, and what comes home speaks."""
    _model(tmp_path)
    megavlm(_init(run_data, tmp_path, 220))
    run = tmp_path / "run"
    text = megavlm(["train", str(tmp_path / "mine.yaml"), f"output_dir={run}", "training.epochs=0.2",
                    "training.validation_interval=3"]).output  # fmt: skip
    assert "training.epochs: 0.2 is" in text and "exported" in text and "validation loss" in text
    (home,) = (path for path in (run / "hf").iterdir() if not path.name.startswith("."))
    convert("hf-to-megatron", "--hf", home, "--out", tmp_path / "again")
    picture = next(iter(sorted(run_data.images.rglob("*.jpg"))))
    words = ["--image", str(picture), "--prompt", "What?", "--max-new-tokens", "8"]
    one, other = (megavlm(["generate", str(path), *words]).output for path in (run, tmp_path / "again"))
    answers = [[line for line in text.splitlines() if " loaded " not in line] for text in (one, other)]
    assert answers[0] == answers[1]
