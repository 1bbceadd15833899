"""The command line: what it prints, what it exits with, and what it does not import."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yardstick

import megavlm
from megavlm import cli
from megavlm.config.errors import MachineError, OtherRankError, RecipeError, UserError, set_speaker
from megavlm.config.keys import leaf_keys

RECIPE = """\
output_dir: {root}/run
model: {{preset: tiny}}
data: {{train: [{{path: {root}/train}}], tokenizer: {root}/tokenizer.model, sequence_length: 256}}
optimizer: {{lr: 1e-3}}
training: {{train_steps: 10, global_batch_size: 8}}
"""

WATCH = """\
import sys
from megavlm.cli import main
code = main(sys.argv[1:])
loaded = [name for name in ("torch", "megatron", "numpy") if name in sys.modules]
sys.exit(f"imported {loaded}" if loaded else code)
"""


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "train" / ".nv-meta").mkdir(parents=True)
    (tmp_path / "tokenizer.model").write_text("tokenizer")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(root=tmp_path))
    return path


@pytest.fixture
def fake_module(monkeypatch):
    """Put a module in a subcommand's place."""

    def put(name, run, add_arguments=lambda parser: None):
        module = types.ModuleType(name)
        module.run, module.add_arguments = run, add_arguments
        monkeypatch.setitem(sys.modules, name, module)

    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_ERROR_FILE", cli.TRACEBACK):
        monkeypatch.delenv(variable, raising=False)
    return put


@pytest.fixture
def fake_train(fake_module, monkeypatch):
    """Put a function in the place of the training that follows the checks."""
    return lambda run: monkeypatch.setattr("megavlm.commands.train.train", run)


def start(*words, **environment):
    clean = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    return subprocess.run(
        [sys.executable, *words], env=clean | environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_a_wrong_key_in_a_real_process(recipe_file):
    done = start("-m", "megavlm", "train", str(recipe_file), "optimizer.lrr=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megavlm: error: optimizer.lrr: unknown key; did you mean optimizer.lr?\n"


def test_a_wrong_layout_is_refused_before_torch_is_imported(recipe_file):
    done = start("-c", WATCH, "train", str(recipe_file), "parallel.pipeline_model_parallel_size=3", WORLD_SIZE="3")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("megavlm: error: parallel.pipeline_model_parallel_size: ")


def test_other_ranks_exit_silently(recipe_file):
    done = start("-m", "megavlm", "train", str(recipe_file), "optimizer.lr=x", WORLD_SIZE="2", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_help_needs_neither_torch_nor_the_training_code():
    done = start("-c", WATCH, "train", "--help")
    assert done.returncode == 0, done.stderr
    for key in leaf_keys():
        assert key.path in done.stdout


WATCH_ALL = """\
import contextlib, io, json, sys
from megavlm.cli import main
told = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(words)
        except SystemExit as left:
            code = left.code
    loaded = [name for name in ("torch", "megatron", "transformers", "fastapi") if name in sys.modules]
    told.append([words, code, out.getvalue(), loaded])
print(json.dumps(told))
"""


def test_help_and_checks_of_every_command_come_before_torch(run_data, tmp_path):
    checkpoint = tmp_path / "step"
    checkpoint.mkdir()
    (checkpoint / "recipe.yaml").write_text((run_data.root / "recipe.yaml").read_text())
    (checkpoint / "run.json").write_text("{}")
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"id": "1", "conversations": [
        {"from": "user", "value": "<img>absent.jpg</img>What?"}, {"from": "assistant", "value": "A cat."},
    ]}]))  # fmt: skip
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        own, at, port = str(checkpoint), "--image=/absent.jpg", f"--port={taken.getsockname()[1]}"
        wrong = {
            ("generate", own, "--prompt=x", "--temperature=-1"): "temperature",
            ("generate", own, "--prompt=x", at): "/absent.jpg",
            ("chat", own, at): "/absent.jpg",
            ("serve", own, "--top-p=2"): "top_p",
            ("serve", own, port): "cannot listen there",
            ("eval", own, f"--data={records}", "--metric=bleu"): "no metric 'bleu'",
            ("eval", own, f"--data={records}", "--metric="): "no metric ''",
            ("eval", own, f"--data={records}", f"--images={tmp_path}", f"--out={tmp_path}/o"): "absent.jpg",
            ("eval", own, "--benchmark=mmee", f"--data={records}"): "mmee",
            ("eval", own, "--benchmark=mme", "--data=/absent"): "/absent",
        }
        words = [*map(list, wrong), *([command, "--help"] for command in cli._COMMANDS)]
        done = start("-c", WATCH_ALL, json.dumps(words))
    assert done.returncode == 0, done.stderr
    for words, code, text, loaded in json.loads(done.stdout):
        assert loaded == [], words
        expected = wrong.get(tuple(words))
        assert code == (0 if expected is None else 2), (words, text)
        assert (expected or "usage: megavlm") in text, (words, text)


def processor_time(*words):
    """Return the seconds of a processor that a Python takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert start(*words).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_help_takes_little_processor_time(command):
    """Two to three yardsticks, half a second or so; with torch it would be six and more."""
    took = []
    for _ in range(3):  # the load may change in between
        took.append(processor_time("-m", "megavlm", command, "--help") / yardstick.seconds())
        if took[-1] < 5:
            break
    assert min(took) < 5, took


def test_train_hands_over_the_checked_recipe(recipe_file, fake_train):
    got = []
    fake_train(lambda recipe: got.append(recipe) or 7)
    assert cli.main(["train", str(recipe_file), "optimizer.lr=2e-3"]) == 7
    assert got[0].optimizer.lr == 2e-3


def test_print_config_prints_what_loads_again(recipe_file, tmp_path, capsys, fake_module):
    # An absent tokenizer and a layout of 2 processes: printing asks for neither.
    words = ["parallel.tensor_model_parallel_size=2", "--print-config", "data.tokenizer=/absent"]
    assert cli.main(["train", str(recipe_file), *words]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert cli.main(["train", str(again), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert "tensor_model_parallel_size: 2\n" in printed


def test_print_config_still_checks_the_rules(recipe_file, capsys, fake_module):
    assert cli.main(["train", str(recipe_file), "--print-config", "optimizer.min_lr=1"]) == 2
    assert capsys.readouterr().err.startswith("megavlm: error: optimizer.min_lr: ")


@pytest.mark.parametrize(
    ("command", "module"), [("prepare", "prepare"), ("eval", "eval"), ("render-text", "render_text")]
)
def test_subcommands_bring_their_arguments(command, module, fake_module, capsys):
    fake_module(
        f"megavlm.commands.{module}", lambda args: args.number, lambda parser: parser.add_argument("--number", type=int)
    )
    assert cli.main([command, "--number", "3"]) == 3
    assert cli.main([command, "--number", "three"]) == 2
    assert capsys.readouterr().err == (
        f"megavlm: error: argument --number: invalid int value: 'three'; see megavlm {command} --help\n"
    )
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0 and "--number" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: command"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: RECIPE;"),
        (["train", "qwen_vl_7b/sft", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_usage_errors_cost_one_line(words, expected, capsys, fake_module):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("megavlm: error: ") and expected in error


def test_version_and_help(capsys):
    for words, expected in ((["--version"], f"megavlm {megavlm.__version__}\n"), (["--help"], "quickstart")):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(words)
        assert exit_info.value.code == 0
        assert expected in capsys.readouterr().out


def test_a_wrong_world_size(recipe_file, monkeypatch, capsys, fake_module):
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert cli.main(["train", str(recipe_file)]) == 2
    assert "WORLD_SIZE: 'many' is not a number of processes" in capsys.readouterr().err


def test_missing_files_cost_one_line_wherever_they_are_opened(fake_module, capsys, tmp_path):
    fake_module("megavlm.commands.prepare", lambda args: (tmp_path / "absent.json").read_text())
    assert cli.main(["prepare"]) == 2
    assert capsys.readouterr().err == f"megavlm: error: {tmp_path}/absent.json: no such file or directory\n"


def test_a_library_s_value_error_keeps_its_traceback(fake_module):
    def run(args):
        json.loads("{")

    fake_module("megavlm.commands.prepare", run)
    with pytest.raises(ValueError, match="Expecting property name"):
        cli.main(["prepare"])


def test_a_user_error_is_one_wherever_it_comes_from(fake_module, capsys):
    """From a package that brings presets of its own, too."""
    made = {}
    exec(compile("def fail(error):\n    raise error", "/elsewhere/plugin.py", "exec"), made)
    fake_module("megavlm.commands.prepare", lambda args: made["fail"](UserError("key: rule; remedy")))
    assert cli.main(["prepare"]) == 2
    assert capsys.readouterr().err == "megavlm: error: key: rule; remedy\n"
    fake_module("megavlm.commands.prepare", lambda args: made["fail"](ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["prepare"])


def _made(text):
    """A function whose lines lie in the package, as far as its traceback tells."""
    made = {}
    exec(compile(f"def fail():\n    {text}", str(Path(cli.__file__).parent / "data" / "prepare.py"), "exec"), made)
    return made["fail"]


@pytest.mark.parametrize(
    "bug",
    [
        "list(zip([1], [1, 2], strict=True))",
        "first, second = [1]",
        "int('x')",
        "bytes([300])",
        "raise ValueError('an invariant')",
        "{}['key']",
        "open(__import__('os').__file__ + '.absent')",
        "raise FileNotFoundError('by no name')",
    ],
)
def test_a_bug_in_our_own_lines_is_never_shown_as_wrong_input(fake_module, bug):
    fake_module("megavlm.commands.prepare", lambda args: _made(bug)())
    with pytest.raises((ValueError, KeyError, FileNotFoundError)):
        cli.main(["prepare"])


@pytest.mark.parametrize("kind", ["UserError", "RecipeError", "MissingFileError"])
def test_what_the_user_did_wrong_is_a_line_and_exit_code_2(fake_module, capsys, kind):
    fake_module(
        "megavlm.commands.prepare",
        lambda args: _made(f"from megavlm.config.errors import {kind}; raise {kind}('key: rule; remedy')")(),
    )
    assert cli.main(["prepare"]) == 2
    assert capsys.readouterr().err == "megavlm: error: key: rule; remedy\n"


def test_torchrun_gets_the_error_of_any_rank(recipe_file, tmp_path, monkeypatch, capsys, fake_module):
    error_file = tmp_path / "attempt_0" / "1" / "error.json"
    error_file.parent.parent.mkdir()
    error_file.parent.mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", str(recipe_file), "optimizer.lr=x"]) == 2
    assert capsys.readouterr().err.startswith("megavlm: error: optimizer.lr: expected number > 0")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", str(recipe_file), "optimizer.lr=x"]) == 2
    assert capsys.readouterr().err == ""
    message = json.loads(error_file.read_text())["message"]
    assert message["message"].startswith("optimizer.lr: expected number > 0")
    assert int(message["extraInfo"]["timestamp"]) > 0


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MachineError("the disk is full"), 1, "megavlm: error: the disk is full\n"),
        (OtherRankError("rank 1 says why", 2), 2, ""),
        (OtherRankError("rank 1 says why"), 1, ""),
    ],
)
def test_what_is_no_bug_has_no_traceback(recipe_file, fake_train, capsys, error, code, said):
    def run(recipe):
        raise error

    fake_train(run)
    assert cli.main(["train", str(recipe_file)]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(28, "No space left on device"), KeyError("x")])
def test_what_may_be_one_has(recipe_file, fake_train, error):
    def run(recipe):
        raise error

    fake_train(run)
    with pytest.raises(type(error)):
        cli.main(["train", str(recipe_file)])


@pytest.fixture
def as_rank(tmp_path, monkeypatch, fake_module):
    """Take the place of a rank; return a function that fails as it, and what it printed."""

    def fail(error, capsys, rank, local=None, group=0, *, torchrun=True):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank if local is None else local), ("GROUP_RANK", group)):
            monkeypatch.setenv(name, str(value))
        if torchrun:
            folder = tmp_path / f"machine{group}" / "attempt_0" / str(rank)
            folder.mkdir(parents=True, exist_ok=True)
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        cli._report(error, 2)
        return capsys.readouterr().err

    return fail


def test_ranks_of_one_torchrun_say_a_line_once(as_rank, capsys):
    for group in (0, 1):
        said = [as_rank(FileNotFoundError(2, "no", "/x"), capsys, rank, group=group) for rank in (3, 0, 1)]
        assert said == ["megavlm: error: /x: no such file or directory\n", "", ""]
    assert as_rank(FileNotFoundError(2, "no", "/y"), capsys, 1) != ""  # what this rank alone has seen
    # The recipe is the same on all machines: the first one says what is wrong with it.
    said = [as_rank(RecipeError("key: rule"), capsys, rank, group=rank // 2) for rank in (2, 3, 1, 0)]
    assert said == ["", "", "megavlm: error: key: rule\n", ""]


def test_under_another_launcher(as_rank, capsys):
    said = [as_rank(RecipeError("key: rule"), capsys, rank, local=rank % 2, torchrun=False) for rank in range(4)]
    assert [bool(text) for text in said] == [True, False, False, False]
    error = FileNotFoundError(2, "no", "/x")
    said = [as_rank(error, capsys, rank, local=rank % 2, torchrun=False) for rank in range(4)]
    assert [bool(text) for text in said] == [True, False, True, False]


def test_ranks_that_have_agreed_who_speaks(as_rank, capsys):
    error = RecipeError("key: rule")
    set_speaker(error, 2)
    assert [bool(as_rank(error, capsys, rank)) for rank in range(4)] == [False, False, True, False]
    wrapped = MachineError("the disk is full")
    wrapped.__cause__ = error
    assert [bool(as_rank(wrapped, capsys, rank)) for rank in range(4)] == [False, False, True, False]


def test_torchruns_report_has_no_stack_of_ours(as_rank, capsys, tmp_path):
    as_rank(RecipeError("key: rule"), capsys, 0)
    message = json.loads((tmp_path / "machine0" / "attempt_0" / "0" / "error.json").read_text())["message"]
    assert message["message"] == "key: rule" and "key: rule" not in message["extraInfo"]["py_callstack"]
