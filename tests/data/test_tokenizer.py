"""Qwen's and megavlm's own tokenizers keep special tokens whole; the SentencePiece one gives back any text exactly."""

import base64
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megavlm.data.tokenizer import (
    QWEN_SPECIALS,
    SENTENCEPIECE_SPECIALS,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

ALPHABET = "ab Z9\n\n  \t\r\0\u2581é你好\U0001f389<>|0xA\u00a0\u3000\ufeff\u0301"


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)

    def char() -> str:
        if rng.random() < 0.8:
            return rng.choice(ALPHABET)
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    return ["".join(char() for _ in range(rng.randrange(30))) for _ in range(count)]


def test_sentencepiece_round_trips_any_text(tokenizer: Tokenizer) -> None:
    texts = [
        *random_texts(1500),
        "",
        " ",
        "\n",
        "a  b\n\n\nc ",
        " <s> <unk> <0x0A> ",
        "<ref>x</ref><box>(1,2),(3,4)</box>",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_specials_are_single_tokens(tokenizer: Tokenizer) -> None:
    for token in SENTENCEPIECE_SPECIALS:
        assert len(tokenizer.encode(token)) == 1
    assert len(tokenizer.encode("\n")) == 1
    text = "<|im_start|>user\nhi<img><imgpad></img><|im_end|><|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.ids["<|im_start|>"] and ids[-2:] == [tokenizer.ids["<|im_end|>"], tokenizer.eos_id]
    assert ids[-5:-2] == [tokenizer.ids["<img>"], tokenizer.imgpad_id, tokenizer.ids["</img>"]]
    assert tokenizer.decode(ids) == text


def test_training_is_deterministic(tmp_path: Path) -> None:
    texts = [f"some text number {i}" for i in range(50)]
    for name in "ab":
        train_sentencepiece(texts, tmp_path / f"{name}.model", 400)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_training_refuses_a_vocabulary_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot train a tokenizer of 100 pieces"):
        train_sentencepiece(["abc"], tmp_path / "t.model", 100)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture()
def tiktoken_path(tmp_path: Path) -> Path:
    pytest.importorskip("tiktoken")
    tokens = [bytes([i]) for i in range(256)] + [b"us", b"er", b"user"]
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens)))
    return path


def test_tiktoken_specials_follow_the_ranks_in_qwens_order(tiktoken_path: Path) -> None:
    tokenizer = load_tokenizer(tiktoken_path)
    shift = 151643 - 259
    assert tokenizer.added == ()
    assert tokenizer.vocab_size + shift == 151860
    ids = [tokenizer.eos_id, tokenizer.ids["<|im_start|>"], tokenizer.ids["<|im_end|>"]]
    assert [i + shift for i in ids] == [151643, 151644, 151645]
    ids = [tokenizer.ids["<img>"], tokenizer.ids["</img>"], tokenizer.imgpad_id]
    assert [i + shift for i in ids] == [151857, 151858, 151859]
    assert tokenizer.encode("<ref>")[0] + shift == 151851 and len(QWEN_SPECIALS) == 217
    assert tokenizer.encode("<|im_start|>user\n") == [tokenizer.ids["<|im_start|>"], 258, 10]
    for text in ["héllo  你好\n\n12", "<box>(1,2)</box> \U0001f389"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "no.model")
    with pytest.raises(ValueError, match="must end in"):
        load_tokenizer(tmp_path / "tokenizer.txt")
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "x.tiktoken").write_bytes(b"aGk= 0\n???\n")
    with pytest.raises(ValueError, match="line 2"):
        load_tokenizer(tmp_path / "x.tiktoken")


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, megavlm.data.tokenizer, megavlm.data.chat, megavlm.data.schema, megavlm.data.packing,"
        " megavlm.commands.prepare; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
