"""Loading: what a recipe and its overrides become, and the line that each mistake costs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megavlm.config import yaml12
from megavlm.config.load import RecipeError, load_recipe, shipped_recipes
from megavlm.families.presets import expand_presets


def test_values_of_presets_file_and_overrides(load):
    recipe = load("optimizer.lr=2e-4", "model.vision.num_layers=2", "training.train_steps=1e3")
    assert recipe.optimizer.lr == 2e-4
    assert recipe.training.train_steps == 1000 and isinstance(recipe.training.train_steps, int)
    assert recipe.model.vision.num_layers == 2
    assert recipe.model.vision.hidden_size == 96  # from the preset
    assert recipe.parallel.tensor_model_parallel_size == 1  # the default


def test_overrides_reach_lists_and_absent_branches(load):
    recipe = load(
        "data.train.0.weight=2",
        "data.train.1.path=/b",
        "data.validation.0.path=/v",
        "parallel.sequence_parallel=false",
        "modules.vision.layer_decay=0.95",
        "checkpoint=null",
        "checkpoint.keep=3",
        "data.system_message=''",
        "logging={log_interval: 5, tensorboard: false}",
    )
    assert [source.weight for source in recipe.data.train] == [2.0, 1.0]
    assert isinstance(recipe.data.train[0].weight, float)
    assert recipe.data.train[1].path == "/b"
    assert recipe.data.validation[0].path == "/v"
    assert recipe.modules.vision.layer_decay == 0.95
    assert recipe.checkpoint.keep == 3
    assert recipe.data.system_message == ""
    assert (recipe.logging.log_interval, recipe.logging.tensorboard) == (5, False)


def test_an_override_may_hold_an_equals_sign(load):
    assert load("output_dir=/runs/a=b").output_dir == "/runs/a=b"


def test_another_connector_drops_what_the_whole_model_set_for_its_own(load):
    recipe = load("model.connector.preset=mlp2x_gelu")
    assert not hasattr(recipe.model.connector, "num_queries")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 100000),
        ("1.5e3", 1500),
        (".5", 0.5),
        ("1_000", 1000),
        ("-3", -3),
        ("true", True),
        ("yes", "yes"),
        ("no", "no"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("[1, 2]", [1, 2]),
    ],
)
def test_plain_scalars(text, value):
    parsed = yaml12.parse(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("text", ["1e-4", "no", "010", "1:30", "2024-01-01", "~", "", "true", "<<", "a: b", "a\n b\n"])
def test_written_text_reads_back(text):
    assert yaml12.parse(yaml12.dump({"key": text})) == {"key": text}


def test_merge_keys_are_not_duplicates():
    assert yaml12.parse("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3")["b"] == {"p": 1, "q": 3}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        (["lr=1"], "lr: unknown key; did you mean optimizer.lr?"),
        (["optimzer.lr=1"], "optimzer: unknown key; did you mean optimizer?"),
        (["parallel.xyzzy=1"], "parallel.xyzzy: unknown key; remove it, or correct its name"),
        (["data.train.0.wieght=1"], "data.train.0.wieght: unknown key; did you mean data.train.0.weight?"),
        (["optimizer.lr=abc"], 'optimizer.lr: expected number > 0, got "abc"; change the value'),
        (["optimizer.lr=true"], "optimizer.lr: expected number > 0, got true; change the value"),
        (["optimizer.lr=.nan"], "optimizer.lr: '.nan' is not valid YAML, nan is not a finite number; quote the value"),
        (["optimizer.lr=-1"], "optimizer.lr: expected number > 0, got -1; change the value"),
        (["training.train_steps=2.5"], "training.train_steps: expected integer > 0 or null, got 2.5; change the value"),
        (["training.train_steps=true"], "training.train_steps: expected integer > 0 or null, got true; change the"),
        (["training.train_steps='7'"], 'training.train_steps: expected integer > 0 or null, got "7"; change the value'),
        (["parallel.sequence_parallel=yes"], 'parallel.sequence_parallel: expected true or false, got "yes"'),
        (["parallel.sequence_parallel=1"], "parallel.sequence_parallel: expected true or false, got 1"),
        (["optimizer.schedule=cosin"], 'expected cosine | constant | WSD, got "cosin"; did you mean cosine?'),
        (["output_dir=3"], "output_dir: expected text, got 3; quote it, or write '' for empty"),
        (["output_dir="], "output_dir: expected text, got null; quote it, or write '' for empty"),
        (["data.train=[]"], "data.train: the list must have at least one entry; add one"),
        (["data.train=/a"], "data.train: expected a list, got \"/a\"; write its entries with '-' or in brackets"),
        (["training=7"], "training: expected keys under it, got 7"),
        (["data.tokenizer=3"], "data.tokenizer: expected text or null, got 3"),
        (["training={train_steps: 5}"], "training.global_batch_size: missing (Packs per step over all"),
        (["model.preset=tyni"], "model.preset: no model preset 'tyni'; there are"),
        (["model.vision.preset=nope"], "model.vision.preset: no vision preset 'nope'; there are"),
        (
            ["model={preset: null, vision: {preset: tiny_vit}, connector: {preset: linear}}"],
            "model.language.preset: missi",
        ),
        (["optimizer.lr"], "optimizer.lr: an override has the form key=value, such as optimizer.lr=1e-4; add '='"),
        (["optimizer..lr=1"], "'optimizer..lr' is not a dotted key"),
        (["=1"], "'' is not a dotted key"),
        (["optimizer.lr=[1"], "optimizer.lr: '[1' is not valid YAML, line 1"),
        (["optimizer.lr.x=1"], "optimizer.lr.x: optimizer.lr is a value, 0.001, not a branch; set optimizer.lr itself"),
        (["data.train.5.path=/a"], "data.train.5.path: the list has 1 entries; write a number from 0 to 1"),
        (["data.train.first.path=/a"], "data.train.first.path: 'first' is not a position in a list"),
    ],
)
def test_wrong_values_cost_one_line(refused, overrides, expected):
    (line,) = refused(*overrides)
    assert expected in line


def test_several_mistakes_cost_a_line_each_and_at_most_five(refused):
    lines = refused("optimizer.lr=x", "optimizer.min_lr=y", "bogus=1")
    assert [line.partition(":")[0] for line in lines] == ["bogus", "optimizer.lr", "optimizer.min_lr"]
    lines = refused(*(f"bogus{number}=1" for number in range(8)))
    assert len(lines) == 5 and lines[-1].endswith("(and 3 more)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "not valid YAML, line 2, column 1: duplicate key 'a'; correct the file"),
        ("model:\n  preset: tiny\n data: 3\n", "not valid YAML, line 3"),
        ("- a\n", "a recipe is a mapping of keys"),
        ("", "a recipe is a mapping of keys"),
        ("1: 2\n", "line 1, column 1: key 1 is not text"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: !!bool maybe\n", "not valid YAML"),
    ],
)
def test_wrong_files_cost_one_line(refused, tmp_path, text, expected):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    (line,) = refused(recipe=path)
    assert line.startswith(f"{path}: ") and expected in line


def test_absent_recipes(refused, tmp_path):
    (line,) = refused(recipe=tmp_path / "absent.yaml")
    assert line.startswith(f"{tmp_path}/absent.yaml: no such file") and "qwen_vl_7b" in line
    (line,) = refused(recipe="qwen_vl_8b")
    assert line.startswith("qwen_vl_8b: no such recipe; did you mean qwen_vl_7b?") and "codefuse_vl_14b" in line
    (line,) = refused(recipe="qwen_vl_7b/stf")
    assert line.startswith("qwen_vl_7b/stf: no such recipe; did you mean qwen_vl_7b/sft?")
    (line,) = refused(recipe="runs/mine")
    assert line.startswith("runs/mine: no such file; give a recipe's YAML file, or one of allava_3b/longer")
    (line,) = refused(recipe=tmp_path)
    assert "is a directory" in line
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    (line,) = refused(recipe=binary)
    assert "is not UTF-8 text" in line


def test_the_shipped_recipes_load(tmp_path, monkeypatch):

    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "qwen_vl_7b/sft", "codefuse_vl_14b/align"} <= set(shipped_recipes())
    for name in shipped_recipes():
        assert load_recipe(name, (), expand_presets).output_dir


def test_without_presets_every_value_is_asked_for(recipe_file: Path):
    with pytest.raises(RecipeError, match=r"model\.vision: missing"):
        load_recipe(recipe_file)


def test_overrides_from_a_file_go_into_the_branches(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("parallel: {tensor_model_parallel_size: 4, sequence_parallel: true}\n")
    second.write_text("parallel: {tensor_model_parallel_size: 1, sequence_parallel: false}\noutput_dir: elsewhere\n")
    recipe = load_recipe("quickstart", ["output_dir=here"], expand_presets, [first, second])
    assert recipe.parallel.tensor_model_parallel_size == 1
    assert recipe.parallel.pipeline_model_parallel_size == 2  # the recipe's own
    assert recipe.output_dir == "here"  # key=value wins


def test_an_overrides_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "no.yaml"
    with pytest.raises(RecipeError, match=f"--overrides: no file '{missing}'"):
        load_recipe("quickstart", [], expand_presets, [missing])
    missing.write_text("- a list\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping of keys"):
        load_recipe("quickstart", [], expand_presets, [missing])
    missing.write_text("parallel: {tensor_parallel: 2}\n")
    with pytest.raises(RecipeError, match=r"parallel\.tensor_parallel: unknown key"):
        load_recipe("quickstart", [], expand_presets, [missing])


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {p: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30))
BOMBS = {
    "aliases of aliases": (LAUGHS, "line 6, column 14: more than 250,000 values, aliases written out"),
    "aliases in mappings": (
        LAUGHS.replace("[*", "[{k: *").replace(",*", "},{k: *").replace("]\n", "}]\n").replace("x}]", "x]"),
        "more than 250,000 values, aliases written out",
    ),
    "merge keys": (MERGES, "more than 250,000 values, aliases written out"),
    "itself": ("a: &a [*a]", "*a stands inside of what it repeats"),
    "itself, deeper": ("a: &a {b: {c: *a}}", "*a stands inside of what it repeats"),
    "lists in lists": ("a: " + "[" * 20_000, "more than 100 branches inside each other"),
    "text": ("a: " + "x" * (5 << 20), "characters, which are more than 4,194,304"),
    "a whole number": ("a: " + "9" * 4000, "a whole number of more than 64 bits"),
    "a whole number in sixteens": ("a: !!int '0x" + "f" * 9000 + "'", "a whole number of more than 64 bits"),
    "nothing for a number": ("a: !!int ''", "string index out of range"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_a_file_becomes_is_bounded(name, tmp_path):
    text, message = BOMBS[name]
    (tmp_path / "bomb.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstart", [], expand_presets, [tmp_path / "bomb.yaml"])
    assert time.monotonic() - started < 300  # seconds; unbounded it is days
    assert message in str(error.value) and str(error.value).startswith(f"{tmp_path}/bomb.yaml: not valid YAML")


def test_aliases_within_the_bounds_stay():
    shared = "a: &a {p: [1, 2], q: &q 3}\nb: [*a, *a]\nc: {<<: *a, r: *q}"
    assert yaml12.parse(shared) == {
        "a": {"p": [1, 2], "q": 3},
        "b": [{"p": [1, 2], "q": 3}] * 2,
        "c": {"p": [1, 2], "q": 3, "r": 3},
    }
    many = {f"task-{i}": {"path": f"/data/{i}", "weight": 1.5, "name": "x", "task": "y"} for i in range(3000)}
    assert yaml12.parse(yaml12.dump(many)) == many


@pytest.mark.parametrize(
    "override",
    [
        "model.language.num_layers=1000000000",
        "model.vision.hidden_size=1000000000000",
        "model.connector.num_queries=1e12",
    ],
)
def test_sizes_that_no_model_has(load, override):
    with pytest.raises(RecipeError, match="expected integer > 0"):
        load(override)
