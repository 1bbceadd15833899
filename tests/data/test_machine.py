"""A fault of the machine is never counted as bad data: it ends the work, and nothing is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import socket
import tarfile
from pathlib import Path

import pytest
from data_helpers import encode_image, open_reader, prepare, write_raw
from PIL import Image
from test_bad_data import GOOD, good

from megavlm import cli
from megavlm.data import fetch, machine, shards
from megavlm.data import preparing as prepare_module
from megavlm.data.formats.parquet import unreadable
from megavlm.data.images import ImageError
from megavlm.data.machine import is_local_fault, is_machine_fault
from megavlm.data.shards import TaskWriter
from megavlm.data.tokenizer import Tokenizer

FAULTS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.ESTALE]


def chat(image: str, **keys: object) -> dict:
    turns = [{"from": "user", "value": f"<img>{image}</img>what?"}, {"from": "assistant", "value": "red"}]
    return {"conversations": turns} | keys


def words(tmp_path: Path, records: list) -> list[str]:
    (tmp_path / "d.json").write_text(json.dumps(records))
    return ["prepare", str(tmp_path / "d.json"), "--out", str(tmp_path / "out")]


def test_whose_fault_an_error_is() -> None:
    for number in FAULTS:
        assert is_machine_fault(OSError(number, "x")), errno.errorcode[number]
    assert is_machine_fault(MemoryError()) and is_local_fault(MemoryError())
    for number in (errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP):
        assert not is_machine_fault(OSError(number, "x")), errno.errorcode[number]
    assert not is_machine_fault(OSError("image file is truncated")) and not is_machine_fault(ImageError("empty"))
    for error in (socket.gaierror(-2, "x"), ConnectionResetError(errno.ECONNRESET, "x"), TimeoutError(), OSError("x")):
        assert not is_local_fault(error)
    assert is_local_fault(OSError(errno.EMFILE, "x")) and is_local_fault(OSError(errno.ENOSPC, "x"))
    with pytest.raises(OSError, match="x"):
        raise unreadable(Path("a.parquet"), OSError(errno.EIO, "x"))
    assert isinstance(unreadable(Path("a.parquet"), OSError("x")), ValueError)


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize("where", ["resolve", "read_bytes", "stat"])
def test_prepare_ends(
    number: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(encode_image(Image.new("RGB", (8, 8))))
    command = words(tmp_path, [chat("a.jpg"), chat("b.jpg"), chat("a.jpg")])
    real = getattr(Path, where)

    def failing(self: Path, *args: object, **options: object) -> object:
        if self.name == "b.jpg":
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, where, failing)
    assert cli.main(command) == cli.FAILED
    assert f"b.jpg: {os.strerror(number)}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "b.jpg", "d.json"]
    monkeypatch.setattr(Path, where, real)
    assert cli.main(command) == 0
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""


def test_one_picture_without_rights_or_sense_costs_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_image(Image.new("RGB", (8, 8))))
    (tmp_path / "secret.jpg").write_bytes(b"")
    real = Path.read_bytes

    def denied(self: Path) -> bytes:
        if self.name == "secret.jpg":
            raise PermissionError(errno.EACCES, "no", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", denied)
    monkeypatch.setattr(prepare_module, "MAX_BYTES", 1000)
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(1001)
    names = ["a.jpg", "secret.jpg", "n" * 300, "a.jpg/b", "large.jpg"]
    with caplog.at_level(logging.INFO):
        prepare(tmp_path, [chat(name) for name in names], name="set", images=tmp_path)
    assert "1 samples with 1 images in 1 shards; 4 rejected" in caplog.text
    assert "2 image missing, 1 unreadable image, 1 bad image (too large)" in caplog.text


def test_a_fetch_that_this_machine_cannot_make_is_no_bad_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(error: OSError) -> None:
        monkeypatch.setattr(fetch, "_connect", lambda *_: (_ for _ in ()).throw(error))

    connect(OSError(errno.EMFILE, "too many open files"))
    with pytest.raises(OSError, match="too many open files") as caught:
        fetch.fetch("http://example.com/a.jpg")
    assert not isinstance(caught.value, fetch.FetchError)
    connect(ConnectionRefusedError(errno.ECONNREFUSED, "refused"))
    with pytest.raises(fetch.FetchError, match="refused"):
        fetch.fetch("http://example.com/a.jpg")


def test_many_tasks_need_few_files(tmp_path: Path) -> None:
    """300 tasks in turn, with room for 100 files more; each gets all of its samples."""
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 100, before[1]))
    try:
        with TaskWriter(tmp_path, 2, by_task=True) as writer:
            for index in range(900):
                writer.write(f"t{index % 300}", f"s-{index:05d}", [("json", b"{}"), ("img0", b"x" * index)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(writer.sets) == 300 and writer.shards == 600
    for task in range(300):
        names = []
        for path in sorted((tmp_path / f"t{task}").iterdir()):
            with tarfile.open(path) as tar:
                names += [(member.name, member.size) for member in tar]
            assert path.stat().st_size % tarfile.RECORDSIZE == 0
        wanted = [n for i in (task, task + 300, task + 600) for n in ((f"s-{i:05d}.json", 2), (f"s-{i:05d}.img0", i))]
        assert names == wanted


def test_prepare_by_task_writes_the_same_with_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_image(Image.new("RGB", (8, 8))))
    records = [chat("a.jpg", task=f"t{i % 5}", id=i) for i in range(30)]
    long = ["\U00020000" * 80, "\U00020000" * 81, "Ocr", "ocr", "a/b", "a-b", "."]
    records += [chat("a.jpg", task=task) for task in long]
    whole = prepare(tmp_path, records, name="set", images=tmp_path, by_task=True)
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    (tmp_path / "few").mkdir()
    few = prepare(tmp_path / "few", records, name="set", images=tmp_path, by_task=True)
    for path in sorted(whole.rglob("*.tar")):
        assert path.read_bytes() == (few / path.relative_to(whole)).read_bytes()
    folders = sorted(path.name for path in whole.iterdir() if path.is_dir())
    assert len(folders) == 5 + len(long) and len({name.casefold() for name in folders}) == len(folders)
    assert all(len(name.encode()) < 100 for name in folders)


def test_text_that_is_not_unicode_costs_its_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_image(Image.new("RGB", (8, 8))))
    half = "\ud83d"
    bad = [
        chat("a.jpg", task=half),
        chat("a.jpg", id=f"x{half}"),
        chat(f"{half}.jpg"),
        chat("a.jpg") | {"conversations": [{"from": half, "value": "x"}]},
        {"conversations": [{"from": "user", "value": half}, {"from": "assistant", "value": "x"}]},
        chat("a.jpg", system=half),
        chat("a.jpg", **{half: 1}),  # a key that is only told
    ]
    with caplog.at_level(logging.INFO):
        prepare(tmp_path, [chat("a.jpg"), *bad], name="set", images=tmp_path, by_task=True)
    assert "2 samples with 2 images in 1 shards; 6 rejected" in caplog.text
    assert "6 bad record" in caplog.text
    caplog.text.encode(errors="backslashreplace")


def test_an_index_that_misses_samples_is_no_data_set(tmp_path: Path) -> None:
    data = write_raw(tmp_path / "data", [good(i) for i in range(GOOD)])
    shutil.rmtree(data / ".nv-meta")
    with pytest.raises(OSError, match="12 of 13 samples are in the index"):
        shards.write_metadata(data, ["shard-000000.tar"], GOOD + 1)


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError(errno.EIO, "bad disk")])
def test_training_ends_too(
    error: Exception, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_raw(tmp_path / "data", [good(i) for i in range(GOOD)])
    monkeypatch.setattr("megavlm.data.energon_dataset.encode_conversation", lambda *_: (_ for _ in ()).throw(error))
    reader = open_reader([data], tokenizer)
    with pytest.raises(Exception, match=str(error.args[-1])) as caught:
        next(iter(reader))
    assert "FatalSampleError" in repr(caught.value) or "FatalSampleError" in repr(caught.value.__cause__)


def test_a_file_is_there_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert machine.is_file(tmp_path / "a")
    for name in ("b", "a/c", "n" * 300, "\ud800", "x\0y"):
        assert not machine.is_file(tmp_path / name)
    monkeypatch.setattr(Path, "is_file", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "x")))
    with pytest.raises(OSError, match="x"):
        machine.is_file(tmp_path / "a")
