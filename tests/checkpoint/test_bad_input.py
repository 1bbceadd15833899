"""Full disks, kills, and two conversions at once: a clear error or a clean restart, and nothing is ever damaged."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hf_makers
import pytest
import torch
from hf_makers import digest, equal, load_state
from ranks import start
from safetensors.torch import save_file

from megavlm.checkpoint import manifest
from megavlm.checkpoint.publish import publishing
from megavlm.cli import main
from megavlm.parallel import faults

# Some 60 MB: enough to be caught in the middle.
LARGE = hf_makers.sizes(vocab=60_000)


def convert_in(source: Path, out: Path) -> int:
    return main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)])


def convert_out(checkpoint: Path, out: Path, *more: str) -> int:
    return main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(out), *more])


def one_line(error: str, *parts: str) -> None:
    lines = [line for line in error.splitlines() if line.startswith("megavlm: error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    for part in parts:
        assert part in lines[0], error


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``hf``, and ``m`` converted from it; not to be changed."""
    root = tmp_path_factory.mktemp("large")
    hf_makers.megatron(hf_makers.write(root / "hf", s=LARGE), root / "m")
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_an_existing_output_is_never_touched(
    source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "weights.bin").write_bytes(b"precious")
    (out / "run.json").write_text("{}")
    before = digest(tmp_path)
    for to in (out, source, checkpoint):
        for convert, given in ((convert_in, source), (convert_out, checkpoint)):
            assert convert(given, to) == 2
            one_line(capsys.readouterr().err, f"{to}: exists already and is left as it is; give another --out")
    assert digest(tmp_path) == before


def test_an_empty_output_directory_is_fine(source: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "a", tmp_path / "b"):
        out.mkdir()
    assert convert_in(source, tmp_path / "a") == 0 and convert_out(tmp_path / "a", tmp_path / "b") == 0
    assert equal(load_state(tmp_path / "b"), load_state(source))


def test_a_second_conversion_into_the_same_output_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with publishing(tmp_path / "out") as partial:
        (partial / "first").write_text("first")
        assert convert_in(source, tmp_path / "out") == 2
        one_line(capsys.readouterr().err, "out is held by megavlm convert (on host")
        assert (partial / "first").is_file()
    assert set(digest(tmp_path / "out")) == {"first"}


@pytest.mark.parametrize("free", [0, 300_000], ids=["at-once", "in-the-middle"])
@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_disk_that_fills_while_it_is_written(
    direction: str, free: int, source: Path, checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Another process took the space between the check at the start and the writing."""
    monkeypatch.setattr("megavlm.checkpoint.publish.shutil.disk_usage", lambda path: os_usage(10 << 30))
    (small_disk / "theirs").write_bytes(bytes((4 << 20) - free))
    out = small_disk / "out"
    assert (convert_in(source, out) if direction == "in" else convert_out(checkpoint, out)) == 1
    one_line(capsys.readouterr().err, str(small_disk), "No space left on device")
    assert [path.name for path in small_disk.iterdir()] == ["theirs"]
    if direction == "in" and free:  # and at every point behind the tensors: index, common values, recipe, ...
        size = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
        for pages in range(1, 8):
            (small_disk / "theirs").write_bytes(bytes((4 << 20) - -(-size // 4096) * 4096 - pages * 4096))
            assert convert_in(source, out) == 1, pages
            one_line(capsys.readouterr().err, str(small_disk), "No space left on device")
            assert [path.name for path in small_disk.iterdir()] == ["theirs"]
    # With room again, it works.
    (small_disk / "theirs").unlink()
    assert (convert_in(source, out) if direction == "in" else convert_out(checkpoint, out)) == 0


class os_usage:  # noqa: N801 - stands for shutil's tuple
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_disk_that_is_too_small_is_said_at_once(
    large: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for convert, given in ((convert_in, large / "hf"), (convert_out, large / "m")):
        assert convert(given, small_disk / "out") == 2
        one_line(capsys.readouterr().err, f"{small_disk}/out: needs 0.1 GiB, and 0.0 GiB are free there")
        assert not list(small_disk.iterdir())


def test_a_file_that_grows_too_large(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit or quota that ends in the middle of a large tensor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for convert, given in ((convert_in, large / "hf"), (convert_out, large / "m")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, hard))  # Python ignores SIGXFSZ
        try:
            assert convert(given, tmp_path / "out") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        one_line(capsys.readouterr().err, f"{tmp_path}/out: File too large")
        assert not list(tmp_path.iterdir())


def test_no_permission(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_in(source, Path("/proc/nowhere/out")) in (1, 2)  # root may write anywhere else
    one_line(capsys.readouterr().err, "/proc/nowhere")
    (tmp_path / "file").write_text("")
    assert convert_in(source, tmp_path / "file" / "out") == 1
    one_line(capsys.readouterr().err, f"{tmp_path}/file: ")


@pytest.mark.parametrize(
    ("direction", "number"), [("in", signal.SIGKILL), ("in", signal.SIGTERM), ("out", signal.SIGKILL)]
)
def test_interrupted_and_started_again(direction: str, number: signal.Signals, large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("hf-to-megatron", "--hf", large / "hf", "--out", out)
    watched = tmp_path / "out.partial" / "__0_0.distcp"
    if direction == "out":
        words = ("megatron-to-hf", "--megatron", large / "m", "--out", out)
        watched = tmp_path / "out.partial" / "model.safetensors"
    for _ in range(20):  # on a busy machine it may be through before it is seen to have begun
        with start(["convert", *words]) as job:
            while not watched.exists() and not job.poll():
                time.sleep(0.0005)
            job.signal(number)
            code, said = job.wait(check=False).code, job.stderr
        if code:
            break
        shutil.rmtree(out)
    assert code and not out.exists(), said
    # The lock of a process that is dead holds nobody up.
    assert {path.name for path in tmp_path.iterdir()} - {".out.lock"} == {"out.partial"}
    if direction == "in":
        assert convert_in(large / "hf", out) == 0
        assert {k: v for k, v in digest(out).items() if k.endswith(".distcp")} == {
            k: v for k, v in digest(large / "m").items() if k.endswith(".distcp")
        }
    else:
        assert convert_out(large / "m", out) == 0
        assert equal(load_state(out), load_state(large / "hf"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_anywhere_leaves_nothing(
    error: type[BaseException], source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for where in ("incoming._write_rest", "incoming._check_index", "outgoing._write_assets",
                  "incoming.CheckpointReader", "incoming.ReadBack.expect", "outgoing.ReadBack._check",
                  "outgoing.FolderedWriter.close"):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(f"megavlm.checkpoint.hf.{where}", fail)
            with pytest.raises(error):
                convert_in(source, tmp_path / "out") if where[0] == "i" else convert_out(checkpoint, tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"hf", "m"}, where


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_disk_that_keeps_other_bytes_is_found_before_the_output_appears(
    direction: str, source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One bit of the file is changed after it was written."""
    monkeypatch.setattr(faults, "_faults", faults.parse("conversion.before_read_back:flip"))
    monkeypatch.setattr(faults, "_fired", set())
    command = {"in": ["hf-to-megatron", "--hf", str(source)], "out": ["megatron-to-hf", "--megatron", str(checkpoint)]}
    assert main(["convert", *command[direction], "--out", str(tmp_path / "out")]) == 1
    one_line(capsys.readouterr().err, "what was written differs from what the disk holds", "the disk's health")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "m"}


def test_a_checkpoint_whose_weights_changed_is_not_exported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of a weight: no shape or number type tells, but the manifest that a run writes."""
    (checkpoint / "run.json").write_text("{}")
    manifest.write_manifest(checkpoint, {})
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert convert_out(checkpoint, tmp_path / "out") == 2
    one_line(capsys.readouterr().err, str(shard), "its contents are not those that were saved", "--no-verify")
    assert not (tmp_path / "out").exists()
    assert convert_out(checkpoint, tmp_path / "out", "--no-verify") == 0


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_table_that_does_not_lead_back_is_found(
    direction: str, source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megavlm.checkpoint.hf.shapes import Rule

    name = {"in": "to_theirs", "out": "to_ours"}[direction]
    turn = getattr(Rule, name)

    def wrong(self: Rule, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        *others, last = turn(self, tensors)
        last = last.clone()
        last.view(-1).view(torch.int32)[-1] ^= 1
        return [*others, last]

    monkeypatch.setattr(Rule, name, wrong)
    with pytest.raises(RuntimeError, match="what is written, turned back, differs from"):
        convert_in(source, tmp_path / "out") if direction == "in" else convert_out(checkpoint, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "m"}


def test_a_recipe_that_would_fill_the_memory(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever reads a checkpoint's recipe: 400 bytes of aliases of aliases cost one line, with the file."""
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    (checkpoint / "recipe.yaml").write_text(bomb)
    for words in (["generate", str(checkpoint), "--prompt", "hi"], ["train", str(checkpoint / "recipe.yaml")],
                  ["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(tmp_path / "out")],
                  ["convert", "hf-to-megatron", "--adapter", str(adapter(tmp_path)), "--base", str(checkpoint),
                   "--out", str(tmp_path / "out")]):  # fmt: skip
        assert main(words) == 2
        one_line(
            capsys.readouterr().err, f"{checkpoint}/recipe.yaml: ", "more than 250,000 values, aliases written out"
        )


def adapter(root: Path) -> Path:
    """Write the files of an adapter, as far as they are read before its base is."""
    directory = root / "adapter"
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    save_file({"x.lora_A.weight": torch.ones(4, 4)}, directory / "adapter_model.safetensors")
    return directory
