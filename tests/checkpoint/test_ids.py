"""config.json and the tokenizer's files say which token an image is; and checkpoints keep all files that say ids."""

from __future__ import annotations

import json
from pathlib import Path

import hf_makers
import pytest
from tokenizer_files import write_llama, write_llava

from megavlm.checkpoint import assets
from megavlm.cli import main
from megavlm.data.tokenizer import load_tokenizer


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize("start", [115, 116])
def test_an_image_that_is_two_tokens(
    start: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen-VL's image_start_id, 115 here, beside a tokenizer in which <img> is something else."""
    vocab = {f"t{i}": i for i in range(120)} | {"</s>": 120, "<img>": start}
    del vocab[f"t{start}"]
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for name, i in vocab.items() if name in ("</s>", "<img>")]  # fmt: skip
    tree = {"version": "1.0", "added_tokens": added, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}}
    (source / "tokenizer.json").write_text(json.dumps(tree))
    assert convert("hf-to-megatron", "--hf", source, "--out", tmp_path / "m") == (0 if start == 115 else 2)
    if start != 115:
        wanted = f"token has the id 115, but {source}/tokenizer.json gives <img> the id 116; correct one"
        assert f"{source}/config.json: the image start {wanted}" in capsys.readouterr().err


def test_a_checkpoint_takes_along_every_file_that_says_ids(tmp_path: Path) -> None:
    path = write_llama(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<image>": 360}')
    (tmp_path / "notes.json").write_text("{}")
    assets.inherit(None, path, tmp_path / "m")
    copied = tmp_path / "m" / assets.FOLDER
    assert sorted(file.name for file in copied.iterdir()) == ["added_tokens.json", path.name]
    assert load_tokenizer(copied / path.name).imgpad_id == 360


def test_another_tokenizer_than_the_parents_replaces_it(tmp_path: Path) -> None:
    parent, given = tmp_path / "parent" / assets.FOLDER, tmp_path / "given"
    parent.mkdir(parents=True)
    given.mkdir()
    write_llava(parent)
    for name in ("tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "config.json"):
        (parent / name).write_text("{}")
    path = write_llama(given)
    (given / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"360": {"content": "<image>"}}}')
    assets.inherit(tmp_path / "parent", path, tmp_path / "m")
    names = sorted(file.name for file in (tmp_path / "m" / assets.FOLDER).iterdir())
    assert names == ["config.json", "preprocessor_config.json", path.name, "tokenizer_config.json"]
    assert load_tokenizer(tmp_path / "m" / assets.FOLDER / path.name).imgpad_id == 360
    assets.inherit(tmp_path / "parent", parent / "tokenizer.json", tmp_path / "same")
    assert hf_makers.digest(tmp_path / "same" / assets.FOLDER) == hf_makers.digest(parent)
