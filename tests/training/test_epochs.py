"""``training.epochs``: steps counted from the packed data, once, the same after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import megavlm
from run_data import RunData

from megavlm.config import yaml12
from megavlm.config.checks import RecipeError, check_recipe
from megavlm.data.energon_dataset import PackEncoder
from megavlm.data.media import plan_of
from megavlm.data.reader import PackReader
from megavlm.data.tokenizer import tokenizer_of
from megavlm.training.epochs import DataLength, count_packs, steps_of

EPOCHS = ("training.train_steps=null", "training.epochs=0.1")


@pytest.mark.parametrize("packing", ["carry_over", "none"])
def test_packs_are_counted_as_the_reader_makes_them(packing: str, run_data: RunData, tmp_path: Path) -> None:
    recipe = run_data.recipe(tmp_path, f"data.packing={packing}")
    tokenizer, plan = tokenizer_of(recipe), plan_of(recipe.model)
    reader = PackReader(recipe.data.train, recipe.data, tokenizer, plan, rank=0, world_size=1, seed=1, training=False)
    made = [pack for pack in reader if pack.sample_keys]
    encoder = PackEncoder(recipe.data, ["pictures"], tokenizer, plan)
    path = Path(recipe.data.train[0].path)
    whole = count_packs(path, 0, encoder)
    parts = [count_packs(path, 0, encoder, rank, 3) for rank in range(3)]
    assert sum(part.samples for part in parts) == whole.samples
    if packing == "none":
        assert whole.packs == len(made) == sum(part.packs for part in parts)
    else:  # the reader's last packs are what is left over, which in training others fill
        assert len(made) - 8 <= whole.packs <= len(made)
        assert sum(part.packs for part in parts) == pytest.approx(whole.packs, rel=0.05)


def test_an_epoch_of_several_data_sets(run_data: RunData, tmp_path: Path) -> None:
    recipe = run_data.recipe(tmp_path, "training.global_batch_size=10")
    large, small = DataLength(1000, 100.0), DataLength(100, 50.0)
    assert steps_of(2.0, [large], [3.0], recipe) == (20, [2.0])
    # By their sizes, each is passed once; with equal weights the small one ten times meanwhile.
    assert steps_of(1.0, [large, small], [10.0, 1.0], recipe) == (15, pytest.approx([1.0, 1.0]))
    assert steps_of(1.0, [large, small], [1.0, 1.0], recipe) == (60, pytest.approx([1.0, 10.0]))
    assert steps_of(1e-9, [large], [1.0], recipe)[0] == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["training.epochs=1"], "training.train_steps: and training.epochs are both set; set one to null"),
        (["training.train_steps=null"], "training.train_steps: missing; set it, or training.epochs"),
    ],
)
def test_exactly_one_of_them(overrides: list[str], line: str, run_data: RunData, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=line):
        check_recipe(run_data.recipe(tmp_path, *overrides))


@pytest.mark.dist
def test_a_run_of_epochs_and_its_restart(run_data: RunData, tmp_path: Path) -> None:
    words = run_data.words(tmp_path / "run", *EPOCHS, "optimizer.warmup_steps=1", "data.validation=[]")
    first = megavlm([*words, "training.exit_after_minutes=0.0001"], world=2).output
    assert "counting data.train" in first and "training.epochs: 0.1 is" in first
    (line,) = [line for line in first.splitlines() if "training.epochs: 0.1 is" in line]
    steps = int(line.partition(" is ")[2].split()[0])
    assert "pictures 0.1" in line and steps > 1
    again = megavlm(words, world=2).output
    assert line.partition(" ")[2] in again and "counting" not in again and f"step {steps}/{steps} " in again
    saved = yaml12.parse((tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "recipe.yaml").read_text())
    assert (saved["training"]["train_steps"], saved["training"]["epochs"]) == (steps, None)
    assert json.loads((tmp_path / "run" / "epochs.json").read_text())["sets"][0]["samples"] > 100
    long = megavlm([*words, "optimizer.warmup_steps=500"], world=2, check=False)
    assert long.code == 2 and f"optimizer.warmup_steps: 500 must be below training.train_steps ({steps})" in long.output
