"""The recipe finds its tokenizer: a file, a directory, or the one that lies in a checkpoint."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megavlm import cli
from megavlm.config.errors import RecipeError
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer import TOKENIZER_FILES, find_tokenizer, with_tokenizer
from megavlm.families.presets import expand_presets
from megavlm.inference.checkpoint import recipe_of

RECIPE = """\
output_dir: {root}/run
model: {{preset: tiny}}
data: {{train: [{{path: {root}/train}}], sequence_length: 256}}
optimizer: {{lr: 1e-3}}
training: {{train_steps: 10, global_batch_size: 8}}
"""
Train = Callable[..., tuple[int, str | None, str]]


@pytest.fixture()
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "train" / ".nv-meta").mkdir(parents=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(root=tmp_path))
    return path


@pytest.fixture()
def checkpoint(tmp_path: Path, recipe_file: Path) -> Path:
    """A run's directory with a checkpoint whose ``hf`` directory is still empty."""
    step = tmp_path / "base" / "checkpoints" / "step-00000001"
    (step / "hf").mkdir(parents=True)
    (step / "run.json").write_text("{}")
    (step / "recipe.yaml").write_text(recipe_file.read_text())
    (step.parent / "latest").write_text(step.name)
    return step


@pytest.fixture()
def train(recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Run ``megavlm train``; return the exit code, the tokenizer that the training loop gets, and stderr."""
    for variable in ("WORLD_SIZE", "RANK", "TORCHELASTIC_ERROR_FILE", cli.TRACEBACK):
        monkeypatch.delenv(variable, raising=False)

    def run(*overrides: str) -> tuple[int, str | None, str]:
        got: list[Recipe] = []
        monkeypatch.setattr("megavlm.commands.train.train", lambda recipe: got.append(recipe) or 0)
        code = cli.main(["train", str(recipe_file), *overrides])
        return code, got[0].data.tokenizer if got else None, capsys.readouterr().err

    return run


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_order_of_the_kinds(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None and find_tokenizer(tmp_path / "absent") is None
    touch(tmp_path / "tokenizer_config.json")
    assert find_tokenizer(tmp_path) is None
    for name in ("spiece.model", "tokenizer.model", "tokenizer.json", "qwen.tiktoken"):
        touch(tmp_path / name)
        assert find_tokenizer(tmp_path) == tmp_path / name
    (tmp_path / "tokenizer.model").unlink()
    for name in ("other.model", "qwen.tiktoken", "tokenizer.json"):
        (touch if name == "other.model" else Path.unlink)(tmp_path / name)
    assert find_tokenizer(tmp_path) is None  # which of two models it is, nobody says
    assert not any("py" in Path(pattern).suffix for pattern in TOKENIZER_FILES)


def test_training_sees_an_absolute_file(
    train: Train, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, inside = touch(tmp_path / "t" / "tokenizer.json"), touch(checkpoint / "hf" / "qwen.tiktoken")
    (tmp_path / "link.json").symlink_to(file)
    for overrides, want in [
        (["data.tokenizer=t/tokenizer.json"], file),
        (["data.tokenizer=t"], file),
        (["data.tokenizer=link.json"], tmp_path / "link.json"),
        ([f"checkpoint.load={checkpoint}"], inside),
        (["checkpoint.load=base"], inside),
        (["checkpoint.load=base", "data.tokenizer=t"], file),
    ]:
        assert train(*overrides) == (0, str(want), "")


def test_a_checkpoint_s_recipe_names_it_where_it_has_none(train: Train, tmp_path: Path, checkpoint: Path) -> None:
    file = touch(tmp_path / "t.model")
    recipe = checkpoint / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("data: {", f"data: {{tokenizer: {file}, "))
    assert train(f"checkpoint.load={checkpoint}") == (0, str(file), "")
    file.unlink()
    code, _, error = train(f"checkpoint.load={checkpoint}")
    assert code == 2 and f"in hf/, and '{file}', which its recipe names, is gone; set it to" in error


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "data.tokenizer: null takes it from checkpoint.load, and that is null as well; set one of the two"),
        (["data.tokenizer={root}/no.json"], "data.tokenizer: no file '{root}/no.json'; give the path of a tokenizer"),
        (["data.tokenizer={root}/train"], "data.tokenizer: '{root}/train' holds no tokenizer (*.tiktoken, tokenizer."),
        (["checkpoint.load={root}/base"], "data.tokenizer: {root}/base/checkpoints/step-00000001 has no tokenizer (*."),
        (["checkpoint.load={root}/train"], "checkpoint.load: {root}/train: no checkpoint; it is a data set that"),
    ],
)
def test_one_line_where_there_is_none(
    train: Train, tmp_path: Path, checkpoint: Path, overrides: list[str], expected: str
) -> None:
    code, tokenizer, error = train(*(override.format(root=tmp_path) for override in overrides))
    assert (code, tokenizer, error.count("\n")) == (2, None, 1)
    assert error.startswith("megavlm: error: " + expected.format(root=tmp_path))


def test_printing_needs_no_files(train: Train, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides in ([], ["checkpoint.load=/absent"]):
        assert cli.main(["train", str(recipe_file), "--print-config", *overrides]) == 0
        assert "  tokenizer: null\n" in capsys.readouterr().out


def test_evaluation_looks_in_its_checkpoint(checkpoint: Path, recipe_file: Path, tmp_path: Path) -> None:
    def tokenizer(named: str | None, *overrides: str) -> str | None:
        text = recipe_file.read_text()
        if named is not None:
            text = text.replace("data: {", f"data: {{tokenizer: {named}, ")
        (checkpoint / "recipe.yaml").write_text(text)
        return recipe_of(checkpoint, overrides)[0].data.tokenizer

    with pytest.raises(RecipeError, match=r"^data\.tokenizer: .* has no tokenizer .* in hf/; set it"):
        tokenizer(None)
    inside, file = touch(checkpoint / "hf" / "tokenizer.json"), touch(tmp_path / "t.model")
    assert tokenizer(None) == tokenizer("/gone/t.model") == str(inside)
    assert tokenizer(str(file)) == str(file)
    # A typing error is not a reason to take another one.
    with pytest.raises(RecipeError, match=r"no file '/gone/typo\.model'"):
        tokenizer("/gone/t.model", "data.tokenizer=/gone/typo.model")


def test_a_checkpoint_with_a_broken_recipe(checkpoint: Path, recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, (), expand_presets)
    inside = touch(checkpoint / "hf" / "tokenizer.model")
    for text in ("[", "data: 3", "data: {tokenizer: 3}", ""):
        (checkpoint / "recipe.yaml").write_text(text)
        found = with_tokenizer(recipe, checkpoint)
        assert found == dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=str(inside)))


def test_it_is_found_without_torch(recipe_file: Path) -> None:
    code = (
        "import sys; from megavlm.cli import main; c = main(sys.argv[1:]); sys.exit(1 if 'torch' in sys.modules else c)"
    )
    done = subprocess.run([sys.executable, "-c", code, "train", str(recipe_file)], capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
