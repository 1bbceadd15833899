"""Plain data in a recipe: every container is the same data set, prepared once whoever asks, wherever it lies."""

from __future__ import annotations

import atexit
import functools
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import encode_image, open_reader, prepare, smooth_image, take

from megavlm import cli
from megavlm.config.errors import UserError
from megavlm.config.schema import DataConfig, DataSource
from megavlm.data import cache, preparing
from megavlm.data.tokenizer import Tokenizer

COUNT = 12
FORK = multiprocessing.get_context("fork")


def pictures(folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    found = {f"{i}.png": encode_image(smooth_image(i, 24, 16 + i), "PNG") for i in range(COUNT)}
    for name, data in found.items():
        (folder / name).write_bytes(data)
    return found


def messages(i: int, **keys: Any) -> dict:
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": f"Number {i}."}]
    return {"id": str(i), "messages": turns} | keys


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    pictures(tmp_path / "plain/i")
    records = [messages(i, images=[f"i/{i}.png"]) for i in range(COUNT)]
    (tmp_path / "plain/sft.json").write_text(json.dumps(records))
    return tmp_path / "plain"


def config(root: Path, **keys: Any) -> DataConfig:
    return DataConfig(train=(DataSource(path="x"),), sequence_length=64, cache=str(root / "cache"), **keys)


def located(root: Path, path: object, images: object = None, **keys: Any) -> Path:
    source = DataSource(path=str(path), images=None if images is None else str(images))
    return Path(cache.located(source, config(root, **keys)).path)


def samples(directory: Path) -> list[tuple[str, bytes]]:
    """What was said last, and the picture, of each sample of the shards."""
    found = []
    for shard in sorted(directory.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            files = {one.name: tar.extractfile(one).read() for one in tar.getmembers()}  # type: ignore[union-attr]
        for name in files:
            if name.endswith(".json"):
                turns = json.loads(files[name])["conversations"]
                found.append((turns[-1]["value"], files[name.replace(".json", ".img0")]))
    return found


def write_tar(path: Path, folder: Path, kind: str) -> None:
    """Write samples: with names of their pictures, without, or with their names where nothing is shown by them."""
    keys = {"named": {"images": ["{}.png"]}, "plain": {}, "other": {"file_name": "{}.png", "format": "png"}}[kind]
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for i in range(COUNT):
            own = {key: [one.format(f"{i:03d}") for one in value] if isinstance(value, list)
                   else value.format(f"{i:03d}") for key, value in keys.items()}  # fmt: skip
            for name, data in ((f"{i:03d}.json", json.dumps(messages(i, **own)).encode()),
                               (f"{i:03d}.png", (folder / f"{i}.png").read_bytes()),
                               (f"{i:03d}.meta.json", b"{}")):  # fmt: skip
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_tables(root: Path, folder: Path) -> tuple[Path, Path]:
    """The hub's parquet, in two files, and what ``datasets`` saves: two Arrow streams and ``state.json``."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [messages(i, images=[{"bytes": (folder / f"{i}.png").read_bytes(), "path": None}]) for i in range(COUNT)]
    (root / "parquet").mkdir(parents=True)
    (root / "saved").mkdir()
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for part, name in enumerate(names):
        table = pyarrow.Table.from_pylist(rows[part * 6 : part * 6 + 6])
        parquet.write_table(table, root / f"parquet/train-{part:05d}.parquet")
        with pyarrow.ipc.new_stream(root / "saved" / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": None}
    (root / "saved/state.json").write_text(json.dumps(state))
    (root / "saved/dataset_info.json").write_text(json.dumps({"features": {}}))
    return root / "parquet", root / "saved"


def test_every_container_is_the_same_data_set(plain: Path, tmp_path: Path) -> None:
    expected = samples(located(tmp_path, plain / "sft.json"))
    assert [answer for answer, _ in expected] == [f"Number {i}." for i in range(COUNT)]
    assert [data for _, data in expected] == [(plain / f"i/{i}.png").read_bytes() for i in range(COUNT)]
    records = json.loads((plain / "sft.json").read_text())
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-16")
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/a.tar", plain / "i", "named")
    write_tar(tmp_path / "b.tar", plain / "i", "plain")
    write_tar(tmp_path / "c.tgz", plain / "i", "other")
    tables = write_tables(tmp_path / "tables", plain / "i")
    for path, images in ((tmp_path / "lines.jsonl", plain), (tmp_path / "tars", None), (tmp_path / "b.tar", None),
                         (tmp_path / "c.tgz", None),
                         *((one, None) for one in tables)):  # fmt: skip
        assert samples(located(tmp_path, path, images)) == expected, path


def test_it_is_prepared_once_and_again_where_anything_changes(plain: Path, tmp_path: Path) -> None:
    first = located(tmp_path, plain / "sft.json")
    before = (first / "shard-000000.tar").stat()
    cache._prepared.cache_clear()
    (plain / "sft.json").touch()  # other times, the same bytes
    assert located(tmp_path, plain / "sft.json") == first
    assert (first / "shard-000000.tar").stat().st_ino == before.st_ino
    text = (plain / "sft.json").read_text()
    (plain / "sft.json").write_text(text.replace("Number 3.", "Number three."))
    cache._prepared.cache_clear()
    second = located(tmp_path, plain / "sft.json")
    assert second != first and first.is_dir() and samples(second)[3][0] == "Number three."
    (plain / "other").mkdir()
    for i in range(COUNT):
        (plain / f"other/i{i}").mkdir()
    with pytest.raises(UserError, match="all 12 records are rejected; first: image"):
        located(tmp_path, plain / "sft.json", plain / "other")
    assert sorted(one.name for one in (tmp_path / "cache").iterdir()) == sorted([first.name, second.name, "known"])


def test_a_reader_goes_on_with_what_was_prepared_anew_elsewhere(
    plain: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = DataSource(path=str(plain / "sft.json"))
    keys = {"packing_buffer_size": 4, "shuffle_buffer_size": 4, "sequence_length": 64}
    reader = open_reader([source], tokenizer, cache=str(tmp_path / "one"), **keys)
    assert all(next(reader).sample_keys[0].startswith("sft.json/") for _ in range(5))
    state = json.loads(json.dumps(reader.state()))
    expected = take(reader, 6)
    reader.close()
    # Another machine: the same data at another place, and a cache of its own.
    moved = plain.rename(tmp_path / "moved")
    again = open_reader([DataSource(path=str(moved / "sft.json"))], tokenizer, cache=str(tmp_path / "two"), **keys)
    again.restore(state)
    assert take(again, 6) == expected
    again.close()


def _ask(root: Path, path: Path, start: Any, told: Any) -> None:
    messages_of: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages_of.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megavlm.data.cache").addHandler(handler)
    logging.getLogger("megavlm.data.cache").setLevel(logging.INFO)
    write = cache.write_samples

    def slowly(*args: Any) -> Any:
        time.sleep(0.5)
        return write(*args)

    cache.write_samples = slowly  # type: ignore[assignment]
    start.wait()
    found = located(root, path)
    told.put((str(found), sum("preparing it, once" in one for one in messages_of)))


def test_of_several_at_once_one_prepares_it(plain: Path, tmp_path: Path) -> None:
    start, told = FORK.Barrier(3), FORK.Queue()
    asking = [FORK.Process(target=_ask, args=(tmp_path, plain / "sft.json", start, told)) for _ in range(3)]
    for one in asking:
        one.start()
    answers = [told.get(timeout=600) for _ in asking]
    for one in asking:
        one.join(600)
    assert len({path for path, _ in answers}) == 1 and sum(written for _, written in answers) == 1
    assert len(samples(Path(answers[0][0]))) == COUNT


def _hang(root: Path, path: Path) -> None:
    def finish(_: object) -> None:
        (root / "here").touch()
        time.sleep(3000)

    cache.finish = finish  # type: ignore[assignment]
    located(root, path)


def test_a_killed_writer_is_taken_over(plain: Path, tmp_path: Path) -> None:
    process = FORK.Process(target=_hang, args=(tmp_path, plain / "sft.json"))
    process.start()
    end = time.monotonic() + 600
    while not (tmp_path / "here").exists():
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(600)
    assert any(one.name.startswith(".sft-") for one in (tmp_path / "cache").iterdir())
    found = located(tmp_path, plain / "sft.json")
    assert len(samples(found)) == COUNT
    assert sorted(one.name for one in (tmp_path / "cache").iterdir()) == sorted([found.name, "known"])


def test_what_cannot_be_used_is_one_line(plain: Path, tmp_path: Path) -> None:
    found = located(tmp_path, plain / "sft.json")
    card = json.loads((found / cache.CARD).read_text())
    for broken, message in (
        ({**card, "version": 99}, "is of version 99, this megavlm's is 2; remove the directory"),
        ({**card, "key": "x"}, "its cache.json is of 'x'"),
        ({}, "has no whole cache.json"),
    ):
        (found / cache.CARD).write_text(json.dumps(broken))
        cache._prepared.cache_clear()
        with pytest.raises(UserError, match=message) as error:
            located(tmp_path, plain / "sft.json")
        assert len(str(error.value).splitlines()) == 1
    records = [messages(i, images=[f"i/{i if i > 2 else 'no'}.png"]) for i in range(COUNT)]
    (plain / "some.json").write_text(json.dumps(records))
    assert len(samples(located(tmp_path, plain / "some.json"))) == COUNT - 3
    with pytest.raises(UserError, match=r"3 of 12 records are rejected \(3 image missing\), more than data.max_bad_f"):
        located(tmp_path, plain / "some.json", max_bad_after_samples=10)
    # Pictures that come later are no part of the key: the line says what to remove.
    (plain / "i/no.png").write_bytes((plain / "i/0.png").read_bytes())
    cache._prepared.cache_clear()
    with pytest.raises(UserError, match=r"remove (\S+)$") as refused:
        located(tmp_path, plain / "some.json", max_bad_after_samples=10)
    shutil.rmtree(str(refused.value).rpartition(" ")[2])
    cache._prepared.cache_clear()
    assert len(samples(located(tmp_path, plain / "some.json", max_bad_after_samples=10))) == COUNT
    for path, message in (
        ("no.json", "does not exist"),
        ("i", "is a folder, and not one of"),
        ("http://x/y", "is not read"),
    ):
        where = path if "://" in path else plain / path
        with pytest.raises(UserError, match=message):
            located(tmp_path, where)
    with pytest.raises(UserError, match="is prepared already"):
        prepare(tmp_path, [], name="again", images=plain, json=found)
    (plain / "dict").mkdir()
    (plain / "dict/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(UserError, match="holds train, test; give the folder of one of them"):
        located(tmp_path, plain / "dict")
    (plain / "cut.tar").write_bytes(b"\x01" * 2000)
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        located(tmp_path, plain / "cut.tar")


@functools.cache
def _object_store() -> Any:
    """One server for the process: the storage client keeps the address that it has met first."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    atexit.register(server.stop)
    return server


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A real S3 server on the loopback interface, and an empty bucket."""
    boto3 = pytest.importorskip("boto3")
    host, port = _object_store().get_host_and_port()
    for name, value in (("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "x"),
                        ("AWS_SECRET_ACCESS_KEY", "y"), ("AWS_DEFAULT_REGION", "us-east-1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    yield client
    for one in client.list_objects_v2(Bucket="pictures").get("Contents", []):
        client.delete_object(Bucket="pictures", Key=one["Key"])
    client.delete_bucket(Bucket="pictures")


def test_an_object_store(bucket: Any, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = samples(located(tmp_path, plain / "sft.json"))
    tables = write_tables(tmp_path / "tables", plain / "i")
    for file in [*plain.rglob("*"), *(tmp_path / "tables").rglob("*")]:
        if file.is_file():
            bucket.upload_file(str(file), "pictures", f"set/{file.relative_to(tmp_path)}")
    base = "s3://pictures/set"
    first = located(tmp_path, f"{base}/plain/sft.json")
    assert samples(first) == expected and not (first / ".source").exists()
    assert samples(located(tmp_path, plain / "sft.json", f"{base}/plain")) == expected
    for one in tables:
        assert samples(located(tmp_path, f"{base}/{one.relative_to(tmp_path)}")) == expected
    # Data and pictures that lie in no folder.
    bucket.create_bucket(Bucket="no-folder")
    bucket.upload_file(str(plain / "i/3.png"), "no-folder", "3.png")
    bucket.put_object(Bucket="no-folder", Key="x.jsonl", Body=json.dumps(messages(3, images=["3.png"])).encode())
    for images in (None, "s3://no-folder/"):
        assert samples(located(tmp_path, "s3://no-folder/x.jsonl", images)) == [expected[3]]
    # Records may name whole URLs; another version of the object is another data set.
    records = [messages(i, images=[f"{base}/plain/i/{i}.png"]) for i in range(COUNT)]
    bucket.put_object(Bucket="pictures", Key="set/plain/sft.json", Body=json.dumps(records).encode())
    cache._prepared.cache_clear()
    second = located(tmp_path, f"{base}/plain/sft.json")
    assert second != first and samples(second) == expected
    assert cli.main(["prepare", f"{base}/plain/sft.json", "--out", str(tmp_path / "out")]) == 0
    assert samples(tmp_path / "out") == expected
    capsys.readouterr()
    for url, message in ((f"{base}/no.json", "there is nothing at this URL"), ("s3://absent/x", "nothing at this URL")):
        assert cli.main(["prepare", url, "--out", str(tmp_path / "none")]) == 2
        told = capsys.readouterr().err
        assert message in told and len(told.splitlines()) == 1
    assert preparing.Preparation(f"{base}/plain/sft.json").folder == f"{base}/plain"


def test_inspect_takes_plain_data(
    plain: Path, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    words = ["--tokenizer", str(tokenizer_path), "--packs", "0", "--samples", "2", "-o", str(tmp_path / "page.html")]
    records = json.loads((plain / "sft.json").read_text())
    records[0]["messages"][1]["weight"] = 0.5
    (plain / "sft.json").write_text(json.dumps(records))
    assert cli.main(["inspect", str(plain / "sft.json"), *words]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("sft.json/sft-000000") >= 2 and '; weight 0.5"' in page
    assert [one.name for one in (tmp_path / "home/megavlm/data").iterdir() if one.name.startswith("sft-")]
