"""What older versions saved wrongly is recognised and named, by every load and by ``megavlm doctor``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import proof_cases
import pytest
import ranks
from test_proof import BUCKETS, MODEL

from megavlm.checkpoint import manifest
from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.cli import main

RESAMPLER = {**MODEL, "connector": {"preset": "resampler", "num_queries": 4, "head_dim": 16}}
STEP = "step-00000002"


def job(model: dict[str, Any], *, world: int = 1, **parallel: Any) -> dict[str, Any]:
    return {"model": model, "parallel": parallel, "training": {"global_batch_size": 6 * world, "precision": "bf16"}}


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an older version whose padded buckets shifted the optimizer's state."""
    root = tmp_path_factory.mktemp("shifted") / "run" / "checkpoints"
    ranks.run(proof_cases.save_as_before, job(MODEL, **BUCKETS), str(root), world=3)
    return root


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an older version that has one half of the connector."""
    root = tmp_path_factory.mktemp("halved") / "run" / "checkpoints"
    ranks.run(proof_cases.save_as_before, job(MODEL, tensor_model_parallel_size=2), str(root), world=2)
    return root


def doctor(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["doctor", str(root.parent), "--json", *flags])
    checkpoints = json.loads(capsys.readouterr().out)["checkpoints"]
    return code, str(checkpoints[0]["problem"])


@pytest.mark.dist
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"use_distributed_optimizer": False})])
def test_a_shifted_state_is_refused_and_its_weights_are_taken(
    world: int, parallel: dict[str, Any], shifted: Path
) -> None:
    recipe = job(MODEL, world=world, **parallel)
    said = ranks.run(proof_cases.loaded, recipe, str(shifted / STEP), state=True, world=world)
    for text in said:  # all ranks alike, whoever found it
        assert text.startswith("UserError") and "its optimizer state is shifted: optimizer.state.param." in text
        assert "its weights are whole: start from them, with a new optimizer state" in text
        assert f"by checkpoint.load={shifted / STEP} and another output_dir" in text
    assert ranks.run(proof_cases.loaded, recipe, str(shifted / STEP), state=False, world=world) == [""] * world


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("state", [True, False])
def test_half_a_connector_is_lost(size: int, state: bool, halved: Path) -> None:
    recipe = job(MODEL, tensor_model_parallel_size=size)
    said = ranks.run(proof_cases.loaded, recipe, str(halved / STEP), state=state, world=size)[0]
    assert "connector.layers.0.weight is lost: an older version, at tensor parallelism 2, wrote the first rank" in said
    with pytest.raises(ValueError, match=r"connector\.layers\.0\.bias is lost: an older version"):
        CheckpointReader(halved / STEP).read(Slot("connector.layers.0.bias", (64,)))


@pytest.mark.dist
def test_doctor_names_both(shifted: Path, halved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, problem = doctor(shifted, capsys)
    assert code == 1 and "its optimizer state is shifted: optimizer.state.param." in problem
    assert doctor(shifted, capsys, "--quick") == (0, "None")  # sizes alone
    for flags in ([], ["--quick"]):
        code, problem = doctor(halved, capsys, *flags)
        assert code == 1 and "connector.layers.0.weight is lost: an older version" in problem


@pytest.mark.dist
def test_what_was_saved_rightly_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By an older version too: one bucket, no tensor parallelism; then another model is no loss."""
    root = tmp_path / "run" / "checkpoints"
    ranks.run(proof_cases.save_as_before, job(MODEL), str(root))
    assert not manifest.is_proven(root / STEP)
    assert ranks.run(proof_cases.loaded, job(MODEL), str(root / STEP), state=True) == [""]
    assert doctor(root, capsys) == (0, "None")
    wider = {**MODEL, "vision": {**MODEL["vision"], "ffn_hidden_size": 192}}
    (said,) = ranks.run(proof_cases.loaded, job(wider), str(root / STEP), state=False)
    assert "has the shape [2, 96, 48], the recipe's is [2, 192, 48]" in said


def entries(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tree = json.loads((path / "manifest.json").read_text())
        text = change(tree)
        (path / "manifest.json").write_text(text if isinstance(text, str) else json.dumps(tree))

    return edit


def of_bytes(value: str) -> Callable[[dict[str, Any]], str]:
    def change(tree: dict[str, Any]) -> str:
        tree["files"]["run.json"]["bytes"] = "HERE"
        return json.dumps(tree).replace('"HERE"', value)

    return change


def named(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["files"].update({name: {"bytes": 1}})


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "infinite": (of_bytes("1e400"), "run.json has inf bytes"),
    "nan": (of_bytes("NaN"), "run.json has nan bytes"),
    "fraction": (of_bytes("1.5"), "run.json has 1.5 bytes"),
    "true": (of_bytes("true"), "run.json has True bytes"),
    "text": (of_bytes('"12"'), "run.json has '12' bytes"),
    "negative": (of_bytes("-1"), "run.json has -1 bytes"),
    "many digits": (of_bytes("9" * 5000), "broken: Exceeds the limit"),
    "empty": (lambda tree: tree.update(files={}), "does not name run.json"),
    "no shard": (lambda tree: tree.update(files={k: v for k, v in tree["files"].items() if "distcp" not in k}),
                 "does not name __0_"),
    "list": (lambda tree: tree.update(files=[]), 'it is no object with "files"'),
    "number": (lambda _: "7", 'it is no object with "files"'),
    "deep": (lambda _: "[" * 100_000, "maximum recursion depth"),
    "null": (lambda tree: tree["files"].update({"run.json": None}), "says None of run.json"),
    "digest": (lambda tree: tree["files"]["run.json"].update(sha256=5), "run.json has the digest 5"),
    "version": (lambda tree: tree.update(version=2), "version 2 is not known"),
    "outside": (named("../x"), "outside of the checkpoint"),
    "absolute": (named("/etc/passwd"), "outside of the checkpoint"),
    "nothing": (named(""), "outside of the checkpoint"),
    "zero byte": (named("a\0b"), "outside of the checkpoint"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    ranks.run("run_cases:train", job(RESAMPLER), str(root), None, (0,))
    (path,) = root.glob("step-*")
    manifest.check(path)
    return path


@pytest.mark.dist
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_manifest_is_damage(name: str, whole: Path, tmp_path: Path) -> None:
    change, said = MALFORMED[name]
    path = Path(shutil.copytree(whole, tmp_path / whole.name))
    entries(change)(path)
    with pytest.raises(ValueError, match=r"manifest\.json: broken: ") as error:
        manifest.check(path)
    assert said in str(error.value) and len(str(error.value)) < 300
    assert manifest.is_proven(path) in (True, False)


@pytest.mark.dist
def test_a_shard_that_nobody_names_is_missed(whole: Path, tmp_path: Path) -> None:
    """Gone from the directory and from the manifest: the index still names it."""
    path = Path(shutil.copytree(whole, tmp_path / whole.name))
    shard = next(path.glob("*.distcp"))
    entries(lambda tree: tree["files"].pop(shard.name))(path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"does not name {shard.name}"):
        manifest.check(path)
