"""Runs that are killed, stopped, poisoned or out of disk, at exactly known moments, and what becomes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from launch import under_torchrun
from ranks import megavlm
from run_data import RunData
from test_expert_commands import EP2, EXPERTS

from megavlm.checkpoint.manifest import check
from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.cli import main
from megavlm.parallel.faults import ONCE, VARIABLE
from megavlm.training.stopping import STOPPED

pytestmark = pytest.mark.reliability

SAVES = ("checkpoint.save_interval=2", "checkpoint.keep=2", "logging.tensorboard=false")


def run(
    data: RunData, output: Path, *overrides: str, fault: str = "", ranks: int = 1, restarts: int = 0
) -> tuple[int, str]:
    """Run ``megavlm train``; return exit code and output. Under torchrun where it sees a rank fail, or restarts it."""
    train = data.words(output, *SAVES, *overrides)
    if ranks == 1 or not fault.endswith(("kill", "stop", "term", "usr1")):
        world = None if ranks == 1 else ranks
        done = megavlm(train, world, check=False, env={VARIABLE: fault}, apart=False, timeout=600)
        return done.code, done.output
    words = ["-m", "megavlm", *train]
    return under_torchrun(words, ranks=ranks, restarts=restarts, env={VARIABLE: fault}, timeout=600)


def losses(output: Path) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm of each step.

    Each is in the file once, and a step that was lost and taken again gave both again, bit for bit.
    """
    found: dict[int, tuple[float, float]] = {}
    for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            assert line["step"] not in found
            found[line["step"]] = (line["loss"], line["grad_norm"])
    undone = output / "metrics.undone.jsonl"
    for line in map(json.loads, undone.read_text().splitlines() if undone.is_file() else ()):
        if "loss" in line:
            assert found[line["step"]] == (line["loss"], line["grad_norm"]), line["step"]
    return found


def tensors(output: Path) -> dict[str, tuple[str, str]]:
    """Return a digest of every tensor of the last checkpoint, optimizer state included."""
    newest = max((output / "checkpoints").glob("step-????????"))
    reader = CheckpointReader(newest)
    found = {}
    for key, entry in reader.tensors().items():
        whole = reader.read(Slot(key, tuple(entry.size))).flatten().contiguous()
        found[key] = (str(whole.dtype), sha256(whole.view(torch.uint8).numpy().tobytes()).hexdigest())
    assert any(key.startswith("optimizer.") for key in found)
    return found


def seen(output: Path) -> dict[str, object]:
    """Return what was read up to the last checkpoint: a digest over the samples' keys in their order, and counts."""
    newest = max((output / "checkpoints").glob("step-????????"))
    counters: dict[str, object] = json.loads((newest / "reader-0.json").read_text())["counters"]
    assert counters["samples"] and len(str(counters["history"])) == 64
    return counters


@pytest.fixture(scope="module")
def uninterrupted(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    code, text = run(run_data, output)
    assert code == 0, text
    return output


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("checkpoint.start", 2),
        ("checkpoint.in_small_files", 2),
        ("checkpoint.in_shard", 2),
        ("checkpoint.before_manifest", 2),
        ("checkpoint.before_publish", 2),
        ("checkpoint.before_pointer", 4),
        ("checkpoint.before_retention", 4),
    ],
)
def test_a_kill_in_a_save_costs_at_most_the_steps_since_the_one_before(
    point: str, newest: int, run_data: RunData, uninterrupted: Path, tmp_path: Path
) -> None:
    code, text = run(run_data, tmp_path / "run", fault=f"{point}:step4:kill")
    assert code == -signal.SIGKILL, text
    for path in (tmp_path / "run" / "checkpoints").glob("step-????????"):
        check(path)
    code, text = run(run_data, tmp_path / "run")
    assert code == 0 and f"at step {newest}" in text, text
    assert_same(tmp_path / "run", uninterrupted)


def assert_same(output: Path, uninterrupted: Path) -> None:
    """The losses of all steps, the last checkpoint's tensors and what is in the directory are equal."""
    assert losses(output) == losses(uninterrupted)
    assert tensors(output) == tensors(uninterrupted)
    assert seen(output) == seen(uninterrupted)
    assert names(output) == names(uninterrupted) == ["latest", "step-00000004", "step-00000006"]


@pytest.mark.parametrize("point", ["checkpoint.in_shard", "checkpoint.before_publish"])
def test_a_kill_in_an_asynchronous_save(point: str, run_data: RunData, uninterrupted: Path, tmp_path: Path) -> None:
    """The steps that were taken while the thread wrote do not show in what it wrote."""
    words = ("checkpoint.async_save=true",)
    code, text = run(run_data, tmp_path / "run", *words, fault=f"{point}:kill")
    assert code == -signal.SIGKILL, text
    code, text = run(run_data, tmp_path / "run", *words)
    assert code == 0, text
    assert_same(tmp_path / "run", uninterrupted)


def cut_off(uninterrupted: Path, output: Path) -> Path:
    """Copy a run as if it had ended with step 4."""
    shutil.copytree(uninterrupted, output)
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    (output / "metrics.jsonl").unlink()
    return output


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
)
def test_a_resume_at_another_layout_goes_on_alike(
    layout: str, run_data: RunData, uninterrupted: Path, tmp_path: Path
) -> None:
    """Sums are made in another order, so losses and norms agree to 1e-4; the samples are the same."""
    output = cut_off(uninterrupted, tmp_path / "run")
    code, text = run(run_data, output, layout, ranks=2)
    assert code == 0 and "at step 4" in text, text
    expected, found = losses(uninterrupted), losses(output)
    assert sorted(found) == [5, 6]
    for step, values in found.items():
        assert values == pytest.approx(expected[step], rel=1e-4)
    counts = [
        json.loads((one / "checkpoints" / "step-00000006" / "run.json").read_text()) for one in (output, uninterrupted)
    ]
    assert all(counts[0][key] == counts[1][key] for key in ("tokens", "images", "supervised_tokens"))
    assert seen(output) == seen(uninterrupted)


@pytest.mark.dist
def test_another_data_parallel_size_is_refused_before_the_first_step(
    run_data: RunData, uninterrupted: Path, tmp_path: Path
) -> None:
    output = cut_off(uninterrupted, tmp_path / "run")
    code, text = run(run_data, output, ranks=2)
    assert code != 0 and "saved with data-parallel size 1, this run has 2" in text and "| loss" not in text
    assert "start from the weights alone" in text
    code, text = run(run_data, output, "data.num_workers=1")
    assert code == 2 and "num_workers 0" in text and "| loss" not in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_really_is_full(run_data: RunData, tmp_path: Path) -> None:
    """Room for two checkpoints of 5 MiB, not for the third that is written before the first is deleted."""
    (tmp_path / "small").mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=13m", "tmpfs", str(tmp_path / "small")], check=False)
    if mount.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        code, text = run(run_data, tmp_path / "small" / "run")
        assert code == 1 and "No space left on device" in text, text
        assert names(tmp_path / "small" / "run") == ["latest", "step-00000002", "step-00000004"]
        for path in (tmp_path / "small" / "run" / "checkpoints").glob("step-*"):
            check(path)
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


@pytest.mark.parametrize("sent", ["term", "usr1"])
def test_a_signal_finishes_the_step_and_publishes_one_checkpoint(
    sent: str, run_data: RunData, uninterrupted: Path, tmp_path: Path
) -> None:
    """Also where it comes twice, and again in the middle of the save."""
    again = "checkpoint.before_manifest:step3:usr1,checkpoint.before_publish:step3:term"
    code, text = run(run_data, tmp_path / "run", fault=f"step.begin:step3:{sent},step.end:step3:{sent},{again}")
    assert code == STOPPED == 75, text
    assert "asked to stop" in text and names(tmp_path / "run") == ["latest", "step-00000002", "step-00000003"]
    code, text = run(run_data, tmp_path / "run")
    assert code == 0 and "at step 3" in text
    assert losses(tmp_path / "run") == losses(uninterrupted)
    assert tensors(tmp_path / "run") == tensors(uninterrupted)


@pytest.mark.dist
def test_a_signal_on_one_rank_stops_all(run_data: RunData, tmp_path: Path) -> None:
    code, text = run(run_data, tmp_path / "run", fault="step.end:rank1:step3:usr1", ranks=2)
    assert code != 0 and "exitcode  : 75" in text
    assert names(tmp_path / "run") == ["latest", "step-00000002", "step-00000003"]


@pytest.mark.dist
@pytest.mark.parametrize("fault", ["loss.value:rank1:step3:nan", "gradient.value:rank1:step3:inf"])
def test_a_poisoned_step_changes_nothing_on_any_rank(fault: str, run_data: RunData, tmp_path: Path) -> None:
    code, text = run(run_data, tmp_path / "run", fault=fault, ranks=2)
    assert code == 0, text
    assert "step 3 changed nothing: the " in text
    line = json.loads((tmp_path / "run" / "skipped_steps.jsonl").read_text())
    assert line["step"] == 3 and line["samples"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "run.json").read_text())
    assert state["step"] == 6 and state["skipped_steps"] == 1 and state["skipped_in_row"] == 0


def test_too_many_poisoned_steps_end_the_run_without_a_checkpoint(run_data: RunData, tmp_path: Path) -> None:
    faults = ",".join(f"loss.value:step{step}:nan" for step in (3, 4, 5))
    code, text = run(run_data, tmp_path / "run", "training.max_skipped_steps=2", fault=faults)
    assert code == 1 and "3 steps in a row were skipped" in text
    assert names(tmp_path / "run") == ["latest", "step-00000002", "step-00000004"]
    # Started again, those steps are tried again.
    assert run(run_data, tmp_path / "run", "training.max_skipped_steps=2")[0] == 0


def test_a_loss_spike_is_skipped_where_that_is_asked_for(run_data: RunData, tmp_path: Path) -> None:
    words = ("training.train_steps=24", "training.loss_spike_factor=1.0001", "optimizer.lr=1e-9")
    code, text = run(run_data, tmp_path / "run", *words, "training.max_skipped_steps=9")
    assert code == 0 and "changed nothing: the loss is above" in text


@pytest.mark.dist
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_on_one_rank(policy: str, run_data: RunData, tmp_path: Path) -> None:
    """The error reaches all ranks, the checkpoint before stays, nothing partial is left, the policy is obeyed."""
    words = (f"checkpoint.on_error={policy}", "parallel.pipeline_model_parallel_size=2")
    code, text = run(run_data, tmp_path / "run", *words, fault="checkpoint.in_shard:rank1:step4:full", ranks=2)
    assert "No space left on device" in text
    if policy == "stop":
        assert code == 1 and names(tmp_path / "run") == ["latest", "step-00000002"]
    else:
        assert code == 0 and "the run goes on" in text
        assert names(tmp_path / "run") == ["latest", "step-00000002", "step-00000006"]


@pytest.mark.parametrize(
    "point", [f"checkpoint.{name}" for name in ("start", "in_small_files", "before_manifest", "after_shards")]
)
def test_a_full_disk_elsewhere(point: str, run_data: RunData, tmp_path: Path) -> None:
    code, text = run(run_data, tmp_path / "run", fault=f"{point}:step4:full")
    assert code == 1 and "No space left on device" in text
    assert names(tmp_path / "run") == ["latest", "step-00000002"]


def test_figures_that_cannot_be_written_cost_no_step(run_data: RunData, uninterrupted: Path, tmp_path: Path) -> None:
    """The logging rank alone writes them: an error there would leave the other ranks waiting."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    code, text = run(run_data, tmp_path / "run")
    assert code == 0 and "figures of step 6 cannot be written: [Errno 28] No space left" in text, text
    assert tensors(tmp_path / "run") == tensors(uninterrupted)


def test_damage_is_passed_over_with_a_warning_and_refused_by_name(
    run_data: RunData, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    newest = output / "checkpoints" / "step-00000006"
    shard = next(newest.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, text = run(run_data, tmp_path / "other", f"checkpoint.load={newest}")
    assert code == 2 and f"{shard.name}: its contents are not those that were saved" in text
    code, text = run(run_data, output)
    assert code == 0 and "step-00000006 is damaged and is passed over" in text and "at step 4" in text
    assert losses(output) == losses(uninterrupted)
    assert tensors(output) == tensors(uninterrupted)


def test_a_damaged_later_checkpoint_does_not_count_as_kept(
    run_data: RunData, uninterrupted: Path, tmp_path: Path
) -> None:
    """Two damaged ones lie above: the whole ones below are kept, and `latest` names what the run goes on from."""
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    root = output / "checkpoints"
    for step in (8, 10):
        shutil.copytree(root / "step-00000006", root / f"step-{step:08d}")
        (root / f"step-{step:08d}" / "run.json").write_text("{}")
    (root / "latest").write_text("step-00000010\n")
    code, text = run(run_data, output, "training.train_steps=7", "checkpoint.save_interval=1")
    assert code == 0 and "step-00000010 is damaged" in text and "at step 6" in text, text
    kept = ["step-00000006", "step-00000007", "step-00000008", "step-00000010"]
    assert names(output) == ["latest", *kept] and (root / "latest").read_text() == "step-00000007\n"
    code, text = run(run_data, output, "training.train_steps=7")
    assert code == 0 and "the run is complete at step 7" in text


def test_the_pointer_follows_the_resume(run_data: RunData, uninterrupted: Path, tmp_path: Path) -> None:
    """A kill between publishing and moving the pointer: whoever asks afterwards is told what the run goes on from."""
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    pointer = output / "checkpoints" / "latest"
    pointer.write_text("step-00000004\n")
    assert run(run_data, output)[0] == 0
    assert pointer.read_text() == "step-00000006\n"


def test_starting_anew_among_the_checkpoints_of_another_run_is_refused(run_data: RunData, uninterrupted: Path) -> None:
    code, text = run(run_data, uninterrupted, "checkpoint.resume=false")
    assert code == 2 and "checkpoint.resume: false, but " in text and "choose another output_dir" in text


@pytest.mark.dist
def test_a_killed_rank_ends_the_job_and_max_restarts_brings_it_back(
    run_data: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank dies while the other is in a collective; the restarted job ends like one that nothing happened to."""
    (tmp_path / "once").mkdir()
    monkeypatch.setenv(ONCE, str(tmp_path / "once"))
    words = ("parallel.pipeline_model_parallel_size=2",)
    code, text = run(run_data, tmp_path / "whole", *words, ranks=2)
    assert code == 0, text
    fault = "step.in_collective:rank1:step5:kill"
    code, text = run(run_data, tmp_path / "run", *words, fault=fault, ranks=2, restarts=1)
    assert code == 0, text
    assert "step 5: lost rank 1 (host " in text and "resumed from" in text and "at step 4" in text
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "whole")
    assert doctor(tmp_path / "run") == 0


@pytest.mark.dist
def test_ranks_that_share_experts_are_killed_in_a_save_and_in_a_step(run_data: RunData, tmp_path: Path) -> None:
    """Started again twice, the run ends with losses, experts, biases and moments of one that nothing happened to."""

    def start(output: str, fault: str = "") -> tuple[bool, str]:
        words = run_data.words(tmp_path / output, *SAVES, *EXPERTS, EP2)
        done = megavlm(words, 2, check=False, env={VARIABLE: fault}, timeout=600)
        return done.codes[1] == -signal.SIGKILL, done.output

    for output, fault, at in (
        ("whole", "", None),
        ("run", "checkpoint.in_shard:rank1:step4:kill", None),
        ("run", "step.in_collective:rank1:step5:kill", 2),
        ("run", "", 4),
    ):
        killed, text = start(output, fault)
        assert killed == bool(fault), text
        assert at is None or f"at step {at}" in text, text
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert any(key.endswith(".expert_bias") for key in tensors(tmp_path / "run"))


@pytest.mark.dist
def test_a_hung_rank_costs_the_time_out_and_leaves_nothing_running(run_data: RunData, tmp_path: Path) -> None:
    words = ("parallel.pipeline_model_parallel_size=2", "parallel.distributed_timeout_minutes=0.2")
    start = time.monotonic()
    code, text = run(run_data, tmp_path / "run", *words, fault="step.in_collective:rank1:step5:stop", ranks=2)
    assert code != 0 and time.monotonic() - start < 500
    assert text.count("lost rank 1 (host ") == 1 and "step 5: lost" in text
    for path in (tmp_path / "run" / "heartbeats").glob("rank-*.json"):
        pid = json.loads(path.read_text())["pid"]
        assert not Path(f"/proc/{pid}").exists(), path
    assert doctor(tmp_path / "run") == 1


def doctor(output: Path) -> int:
    return main(["doctor", str(output)])


def test_doctor_says_what_happened(
    run_data: RunData, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(uninterrupted) == 0
    text = capsys.readouterr().out
    assert "step 6 of 6" in text and "step-00000006" in text and "no problem found" in text
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    (output / "checkpoints" / "step-00000006" / "run.json").write_text("{}")
    (output / "checkpoints" / "step-00000008.partial").mkdir()
    (output / "skipped_steps.jsonl").write_text(
        '{"step": 3, "why": "the loss is not finite", "samples": ["a", "b"]}\n{"st'
    )
    (output / "quarantine-0.jsonl").write_text('{"key": "a", "cause": "too long"}\n')
    assert main(["doctor", "--json", str(output)]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["last_step"] == 6 and facts["skipped_samples"] == {"too long": 1} and len(facts["skipped_steps"]) == 1
    assert "step-00000006 is damaged" in facts["problems"][0] and "step-00000008.partial" in facts["problems"][1]
    # A rank that says that it trains, just now: a thread may be writing the partial one.
    beat = output / "heartbeats" / "rank-0.json"
    beat.write_text(json.dumps(json.loads(beat.read_text()) | {"phase": "training", "time": time.time()}))
    assert main(["doctor", "--json", str(output)]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1
    beat.write_text(json.dumps(json.loads(beat.read_text()) | {"time": time.time() - 7200}))
    assert main(["doctor", "--json", str(output)]) == 1
    assert any("was killed, crashed or hangs" in one for one in json.loads(capsys.readouterr().out)["problems"])
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert main(["doctor", str(tmp_path)]) == 2
