"""``checkpoint.load`` of a Hugging Face directory, and ``checkpoint.export_hf`` back to one."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from family_cases import load, qwen2
from hf_makers import digest as digests
from ranks import megavlm
from run_data import RunData
from test_trained_assets import convert, made
from tiny import tiny_recipe

from megavlm.checkpoint.hf import converted
from megavlm.checkpoint.hf import exporter as exporter_module
from megavlm.checkpoint.hf.directory import expand_recipe
from megavlm.checkpoint.hf.exporter import Exporter
from megavlm.checkpoint.saver import Saver
from megavlm.config.errors import UserError
from megavlm.config.load import RecipeError, load_recipe, recipes_of_any_model
from megavlm.config.schema import Recipe
from megavlm.weights.source import Source

TP = "parallel.tensor_model_parallel_size=2"
SMALL = (
    "data.sequence_length=256", "data.num_workers=0", "training.train_steps=2", "training.global_batch_size=2",
    "training.precision=fp32", "optimizer.lr=1e-3", "optimizer.warmup_steps=1", "checkpoint.save_interval=1",
    "data.max_bad_fraction=1",
)  # fmt: skip


def words(hf: Path, run: Path, data: RunData, *more: str) -> list[str]:
    return [f"checkpoint.load={hf}", f"output_dir={run}", f"data.train.0.path={data.root / 'train'}", *SMALL, *more]


def recipe(hf: Path, run: Path, *more: str, name: str = "sft") -> Recipe:
    return load_recipe(name, [f"checkpoint.load={hf}", f"output_dir={run}", *more], expand_recipe)


@pytest.mark.dist
def test_from_a_directory_and_home_in_one_command(run_data: RunData, tmp_path: Path) -> None:
    hf, run = made(tmp_path, "llava"), tmp_path / "run"
    before = digests(hf)
    layout = (TP, "parallel.sequence_parallel=true", "checkpoint.export_hf=last")
    text = megavlm(["train", "sft", *words(hf, run, run_data, *layout)], world=2).output
    assert "converting it, once" in text and "80 tensors" in text and digests(hf) == before
    # What it started from is what the command makes of the directory.
    place = next(path for path in (tmp_path / "converted").iterdir() if not path.name.startswith("."))
    convert("hf-to-megatron", "--hf", hf, "--out", tmp_path / "first")
    assert _tensors(place) == _tensors(tmp_path / "first")
    # And what went home is what the command writes of the last checkpoint.
    convert("megatron-to-hf", "--megatron", run, "--out", tmp_path / "home")
    assert [path.name for path in (run / "hf").glob("[!.]*")] == ["step-00000002"]
    assert digests(run / "hf" / "step-00000002") == digests(tmp_path / "home")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(load(tmp_path / "home")[name], load(hf)[name])


def _tensors(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}


@pytest.mark.long
@pytest.mark.family("llava")
@pytest.mark.dist
def test_a_run_from_a_directory_is_a_run_from_its_conversion(run_data: RunData, tmp_path: Path) -> None:
    hf = made(tmp_path, "llava")
    layout = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")
    layout = (*layout, "training.precision=bf16", "training.global_batch_size=4", "checkpoint.export_hf=every")
    direct, second = tmp_path / "direct", tmp_path / "second"
    megavlm(["train", "sft", *words(hf, direct, run_data, *layout)], world=4)
    convert("hf-to-megatron", "--hf", hf, "--out", tmp_path / "first")
    same = ["modules.vision.freeze=true", "optimizer.weight_decay=0", "optimizer.adam_beta2=0.98"]
    same += ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "checkpoint.export_hf=null"]
    base = [str(tmp_path / "first" / "recipe.yaml"), *words(tmp_path / "first", second, run_data, *layout), *same]
    megavlm(["train", *base, "parallel.recompute_granularity=selective"], world=4)
    convert("megatron-to-hf", "--megatron", second, "--out", tmp_path / "home")
    assert digests(direct / "hf" / "step-00000002") == digests(tmp_path / "home")
    assert (direct / "hf" / "step-00000001" / "model.safetensors").is_file()

    # Started again: nothing is left to do, and nothing is converted; an export that is missing is made.
    shutil.rmtree(tmp_path / "converted")
    shutil.rmtree(direct / "hf" / "step-00000002")
    again = megavlm(["train", "sft", *words(hf, direct, run_data, *layout)], world=4).output
    assert "nothing to do" in again and not (tmp_path / "converted").exists()
    assert digests(direct / "hf" / "step-00000002") == digests(tmp_path / "home")


@pytest.mark.long
@pytest.mark.family("llava")
@pytest.mark.dist
def test_adapters_on_a_directory(run_data: RunData, tmp_path: Path) -> None:
    """Merged and alone at another layout, and resumed after the base was deleted: it is made again, the same."""
    hf, run = made(tmp_path, "qwen2", siglip=True), tmp_path / "run"
    layout = ("parallel.pipeline_model_parallel_size=2", "lora.rank=4", "lora.alpha=8")
    first = words(hf, run, run_data, *layout)
    megavlm(["train", "lora", *first, "training.exit_after_minutes=0.0001"], world=2)
    assert not (run / "hf").exists()  # the run has not ended
    shutil.rmtree(tmp_path / "converted")
    megavlm(["train", "lora", *first], world=2)
    merged, alone = run / "hf" / "step-00000002", run / "hf" / "step-00000002-adapter"
    settings = json.loads((alone / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(hf) and settings["r"] == 4
    convert("megatron-to-hf", "--megatron", run, "--out", tmp_path / "whole")
    convert("megatron-to-hf", "--megatron", run, "--out", tmp_path / "adapter", "--adapter", "--base-name", hf)
    assert digests(merged) == digests(tmp_path / "whole") and digests(alone) == digests(tmp_path / "adapter")


def test_what_contradicts_the_directory_is_named_and_the_rest_is_the_recipes(tmp_path: Path) -> None:
    hf, run = made(tmp_path, "llava"), tmp_path / "run"
    model = recipe(hf, run).model
    assert model.language.vocab_size == 512 and model.image.kind == "crop"
    with pytest.raises(RecipeError) as caught:
        recipe(hf, run, "model.language.hidden_size=32", "model.connector.preset=resampler")
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"model.connector.preset: 'resampler', but {hf} has 'mlp2x_gelu'; leave it out of the recipe, which takes the "
        "directory's then, or load another directory"
    )
    assert lines[1].startswith(f"model.language.hidden_size: 32, but {hf} has 64;") and len(lines) == 2
    with pytest.raises(RecipeError, match=r"model.vision.hidden_size: 1024 \(of the preset 'clip_vit_l_14_336'\)"):
        recipe(hf, run, "model.vision.preset=clip_vit_l_14_336")
    own = recipe(hf, run, "model.template=qwen_vl", "model.image.kind=pad", "model.vision.tensor_parallel=replicate",
                 "modules.vision.freeze=false", "lora.rank=2", "lora.targets=[q_proj]")  # fmt: skip
    assert (own.model.template, own.model.image.kind, own.model.vision.tensor_parallel) == (
        "qwen_vl",
        "pad",
        "replicate",
    )
    assert own.model.language == model.language
    with pytest.raises(RecipeError, match=r"model.language.hiden_size: unknown key; did you mean"):
        recipe(hf, run, "model.language.hiden_size=32")
    for name in recipes_of_any_model():
        with pytest.raises(RecipeError, match=r"checkpoint.load: no directory 'gone', and the recipe has no model of"):
            recipe(Path("gone"), run, name=name)
    assert recipes_of_any_model() == ["lora", "sft"]


def _pointer(hf: Path) -> None:
    (hf / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


def _pointed_tokenizer(hf: Path) -> None:
    (hf / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


def _shard(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = hf / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (folder / "x.incomplete").touch()


def _incomplete(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "model.safetensors.incomplete")


def _cut(hf: Path) -> None:
    os.truncate(hf / "model.safetensors", 5000)


def _narrow(hf: Path) -> None:
    tree = json.loads((hf / "config.json").read_text())
    tree["text_config"]["hidden_size"] = "64"
    (hf / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_pointer, r"model\.safetensors: is a pointer of Git LFS, not the file"),
        (_pointed_tokenizer, r"tokenizer\.json: is a pointer of Git LFS"),
        (
            _shard,
            r"missing, though model.safetensors.index.json names it \(a download is not finished: .*x.incomplete\)",
        ),
        (_incomplete, r"holds no weights \(a download is not finished: .*model.safetensors.incomplete\)"),
        (_cut, r"model.safetensors: truncated"),
        (_narrow, r"hf: gives model.language.hidden_size = '64': Input should be a valid integer"),
    ],
)
def test_a_directory_that_is_half_downloaded_or_was_edited(harm, message: str, tmp_path: Path, capsys) -> None:
    hf = made(tmp_path, "llava")
    harm(hf)
    with pytest.raises(UserError, match=message) as caught:
        recipe(hf, tmp_path / "run")
    assert str(caught.value).startswith("checkpoint.load: ") and "\n" not in str(caught.value)


def test_a_part_is_no_model(tmp_path: Path) -> None:
    qwen2().save_pretrained(tmp_path / "hf")
    with pytest.raises(RecipeError, match="it has no vision and no connector: compose"):
        recipe(tmp_path / "hf", tmp_path / "run")


def test_a_conversion_is_found_by_what_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = made(tmp_path, "llava")
    own = recipe(hf, tmp_path / "run")
    place = converted.place_of(hf, own)
    assert place == converted.place_of(hf, own) and place.parent == tmp_path / "converted"
    (hf / "chat_template.jinja").write_text((hf / "chat_template.jinja").read_text() + " ")
    edited = converted.place_of(hf, own)
    os.utime(hf / "model.safetensors")
    touched = converted.place_of(hf, own)
    monkeypatch.setattr(converted, "FORMAT", converted.FORMAT + 1)
    assert len({place, edited, touched, converted.place_of(hf, own)}) == 4


@pytest.mark.long
@pytest.mark.family("llava")
def test_two_runs_that_convert_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf = made(tmp_path, "llava")
    place = converted.place_of(hf, recipe(hf, tmp_path / "run"))
    both = [converted._Conversion(hf, place, tmp_path / f"{name}.log") for name in "ab"]
    end = time.monotonic() + 600
    while not all([one.look() for one in both]):  # noqa: C419 - both have to look
        assert time.monotonic() < end
        time.sleep(0.1)
    assert [path.name for path in place.parent.iterdir() if not path.name.startswith(".")] == [place.name]
    assert sorted(Source(hf).tensors) and (place / "run.json").is_file()
    _pointer(hf)
    late = converted._Conversion(hf, place.with_name("other"), tmp_path / "c.log")
    with pytest.raises(UserError, match=r"checkpoint.load: .*is a pointer of Git LFS"):
        while not late.look():
            time.sleep(0.1)


def test_an_export_that_cannot_start_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process for one of three: the others are made, and its checkpoint stays."""
    started: list[str] = []

    class Ended:
        running = False

        def __init__(self, words: tuple[str, ...], _log: Path) -> None:
            started.append(Path(words[2]).name)
            if len(started) == 2:
                raise OSError(errno.EMFILE, "Too many open files")

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(exporter_module, "ConvertProcess", Ended)
    monkeypatch.setattr(exporter_module, "holds_adapters", lambda _: False)
    own = tiny_recipe(checkpoint={"export_hf": "every"}, training={"train_steps": 3})
    exporter = Exporter(dataclasses.replace(own, output_dir=str(tmp_path)), 0)
    steps = [tmp_path / "checkpoints" / f"step-{step:08d}" for step in (1, 2, 3)]
    for step in steps:
        exporter._waiting.append(
            exporter_module._DirectoryToWrite(step, tmp_path / "hf" / step.name, ("", "", str(step)))
        )
    exporter.finish(lambda: False)
    assert started == [step.name for step in steps] and exporter.needed() == {steps[1]}


def test_a_checkpoint_stays_until_its_export_has_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``keep=1``: through newer checkpoints and a stop; then it goes, and damaged later ones are not exported."""
    running: list[str] = []

    class Slow:
        running = True

        def __init__(self, words: tuple[str, ...], _log: Path) -> None:
            running.append(Path(words[2]).name)

        def wait(self) -> int:
            return 0

        def end(self) -> None:
            pass

    monkeypatch.setattr(exporter_module, "ConvertProcess", Slow)
    monkeypatch.setattr(exporter_module, "holds_adapters", lambda _: False)
    own = tiny_recipe(checkpoint={"export_hf": 2, "save_interval": 1}, training={"train_steps": 6})
    own = dataclasses.replace(own, output_dir=str(tmp_path))
    root, exporter = tmp_path / "checkpoints", Exporter(own, 0)
    saver = Saver(root, keep=1, needed=exporter.needed)
    steps = {step: root / f"step-{step:08d}" for step in range(1, 7)}

    def there() -> list[int]:
        return [step for step, path in steps.items() if path.is_dir()]

    for step in range(1, 6):
        steps[step].mkdir(parents=True)
        (steps[step] / "run.json").write_text("{}")
        (root / "latest").write_text(steps[step].name)
        saver.prune()  # as each new one does
        exporter.published(steps[step])
    assert there() == [2, 4, 5] and running == [steps[2].name]
    assert not exporter.finish(lambda: True)  # stopped: the next start has them still
    assert there() == [2, 4, 5]
    steps[6].mkdir()  # damaged: the run goes on from the fifth, and will write it anew
    (steps[6] / "run.json").write_text("{}")
    exporter, running[:] = Exporter(own, 0), []
    saver = Saver(root, keep=1, needed=exporter.needed)
    exporter.resumed(steps[5])
    assert exporter.needed() == {steps[2], steps[4]}
    monkeypatch.setattr(Slow, "running", False)
    assert exporter.finish(lambda: False) and running == [steps[2].name, steps[4].name]
    saver.prune()
    assert there() == [5, 6]


def test_keys_of_a_checkpoint_s_model_are_changed(tmp_path: Path) -> None:
    """As of a Hugging Face directory: a recipe that names no parts takes the checkpoint's, and says the rest."""
    checkpoint = tmp_path / "m"
    convert("hf-to-megatron", "--hf", made(tmp_path, "llava"), "--out", checkpoint)
    own = {"image": {"kind": "squash"}, "vision": {"tensor_parallel": "replicate"}}
    model = expand_recipe({"checkpoint": {"load": str(checkpoint)}, "model": own})["model"]
    assert (model["image"]["kind"], model["vision"]["tensor_parallel"]) == ("squash", "replicate")
    whole = load_recipe(checkpoint / "recipe.yaml", []).model
    assert model["language"]["hidden_size"] == whole.language.hidden_size and model["template"] == whole.template


@pytest.mark.long
@pytest.mark.family("llava")
def test_an_export_that_fails_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf, run = made(tmp_path, "llava"), tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000004"
    convert("hf-to-megatron", "--hf", hf, "--out", checkpoint)
    own = recipe(hf, run, "checkpoint.export_hf=2", "checkpoint.save_interval=2", "training.train_steps=9")
    caplog.set_level(logging.INFO)
    exporter = Exporter(own, 0)
    assert [step for step in range(1, 10) if exporter.due(step)] == [2, 4, 6, 8, 9]
    assert not any(Exporter(own, 1).due(step) for step in range(10))
    (run / "hf").write_text("in the way")
    exporter.published(checkpoint)
    exporter.finish(lambda: False)
    assert "was not written, and the run goes on; its checkpoint stays" in caplog.text and exporter.needed() == {
        checkpoint
    }
    (run / "hf").unlink()
    caplog.clear()
    shards = [path for path in checkpoint.glob("*.distcp") if path.stat().st_size]
    os.truncate(shards[0], 100)
    exporter.published(checkpoint)
    assert exporter.needed() == {checkpoint}
    exporter.finish(lambda: False)
    assert f"{run / 'hf' / checkpoint.name} was not written" in caplog.text and "convert megatron-to-hf" in caplog.text
    assert not list((run / "hf").glob("step*"))
    exporter.published(checkpoint)
    exporter.finish(lambda: True)  # stopped: left for the next start
    assert "the run's next start does it" in caplog.text and not exporter.needed()
