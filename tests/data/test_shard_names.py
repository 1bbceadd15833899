"""A data set from a stranger names no more shards and samples than there can be, whatever it stands for."""

from __future__ import annotations

import base64
import json
import zlib
from itertools import islice
from pathlib import Path

import pytest
from braceexpand import braceexpand
from data_helpers import open_reader, write_raw
from test_bad_data import good

from megavlm.data.shard_names import _expansions, check_names
from megavlm.data.tokenizer import Tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "data", [good(i) for i in range(4)])


def split(data: Path, *names: str, key: str = "split_parts") -> None:
    tree: dict[str, object] = {"split_parts": {"train": ["shard-000000.tar"]}}
    tree[key] = {"train": list(names)} if key == "split_parts" else list(names)
    (data / ".nv-meta" / "split.yaml").write_text(json.dumps(tree))


BOMBS = ["shard-{0..999999999999}.tar", "{a,b}" * 60 + ".tar", "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar",
         "{x,{0..99999999}}.tar", "{" + "0" * 3900 + "..99999}.tar"]  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_ranges_of_names_are_bounded(name: str, data: Path, tokenizer: Tokenizer) -> None:
    for key in ("split_parts", "exclude"):
        split(data, name, key=key)
        with pytest.raises(ValueError, match=r"split\.yaml: .* makes it more than 1,000,000 shards"):
            open_reader([data], tokenizer)


@pytest.mark.parametrize(
    "name",
    ["a.tar", "{00..13}.tar", "{5..1..2}", "{a,b{1..3},}x", r"\{0..9\}", "{x}{0..4}", "{a..e}", "{0..9}{a,b}", "{}"],
)
def test_the_count_is_that_of_the_library(name: str) -> None:
    counted, real = _expansions(name), len(list(islice(braceexpand(name), 100)))
    assert counted == real or ("a..e" in name and counted >= real)


def test_aliases_samples_and_braces(data: Path, tokenizer: Tokenizer) -> None:
    check_names(data)
    meta = data / ".nv-meta"
    whole, counts = (meta / "split.yaml").read_text(), (meta / ".info.json").read_text()
    (meta / "split.yaml").write_text(
        "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
        + "split_parts: {train: *a9}\n"
    )
    with pytest.raises(ValueError, match=r"split\.yaml: is damaged: .*aliases written out"):
        open_reader([data], tokenizer)
    split(data, "shard-{0..9.tar")
    with pytest.raises(ValueError, match=r"split\.yaml: the braces in .* do not match"):
        open_reader([data], tokenizer)
    (meta / "split.yaml").write_text(whole)
    for wrong in (10**15, -1, "many"):
        info = json.loads(counts)
        info["shard_counts"] = dict.fromkeys(info["shard_counts"], wrong)
        (meta / ".info.json").write_text(json.dumps(info))
        with pytest.raises(ValueError, match=r"\.info\.json: promises .* more than its size can hold"):
            open_reader([data], tokenizer)
    (meta / ".info.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"\.info\.json: is damaged"):
        open_reader([data], tokenizer)


def test_a_state_that_unpacks_without_end(data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavlm.data.reader._MOST_STATE", 1 << 20)
    reader = open_reader([data], tokenizer)
    state = reader.state()
    for content in (zlib.compress(b" " * (8 << 20)), zlib.compress(b"[" * 100_000), zlib.compress(b"null")[:-3]):
        with pytest.raises(ValueError, match="broken reader state"):
            open_reader([data], tokenizer).restore(state | {"loader": base64.b64encode(content).decode()})
    open_reader([data], tokenizer).restore(state)
