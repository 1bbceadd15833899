"""``megavlm generate`` and ``megavlm chat`` on a checkpoint of a short run, as their users call them."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launch import ROOT
from PIL import Image
from ranks import megavlm
from run_data import RunData

from megavlm.cli import main
from megavlm.commands.chat import Chat, _lines, _read_line
from megavlm.config.errors import UserError
from megavlm.data.box_space import BoxSpace
from megavlm.data.plans_native import NativePlan
from megavlm.data.plans_single import PadPlan
from megavlm.data.schema import IMAGE_PLACEHOLDER, Turn
from megavlm.families.llava import LlavaFamily
from megavlm.families.qwen2_vl import Qwen25VLFamily
from megavlm.families.qwen3_vl import Qwen3VLFamily
from megavlm.inference.boxes import draw_boxes
from megavlm.inference.checkpoint import add_model_arguments, model_of, recipe_of
from megavlm.inference.sampling import Sampling
from megavlm.inference.session import Asked, Piece, session
from megavlm.inference.turns import user_turn, without_control_tokens, write_any_text


@pytest.fixture(scope="module")
def trained(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of three steps at TP 2, which one process can use all the same."""
    output = tmp_path_factory.mktemp("trained")
    words = run_data.words(output, "training.train_steps=3", "parallel.tensor_model_parallel_size=2")
    megavlm(words, world=2)
    return output


@pytest.fixture(scope="module")
def picture(run_data: RunData) -> Path:
    """One of the data set's images."""
    return next(path for path in sorted(run_data.images.rglob("*")) if path.suffix in (".png", ".jpg"))


def said(*words: str | Path, ranks: int = 1, typed: str = "", after: float = 0.0) -> str:
    """Run ``megavlm`` and return what it wrote to stdout; it is typed ``after`` so many seconds of silence."""
    if not after:
        return megavlm(words, world=None if ranks == 1 else ranks, stdin=typed, apart=True, timeout=600).stdout
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "megavlm", *map(str, words)]
    shell = f"(sleep {after}; printf %s {shlex.quote(typed)}) | {shlex.join(command)}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=600, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_layouts_say_the_same(trained: Path, picture: Path) -> None:
    words = ("generate", trained, "--image", picture, "--prompt", "What is <img> this?", "--max-new-tokens=8")
    alone = said(*words)
    assert alone.strip()
    assert said(*words[:2], "parallel.sequence_parallel=true", *words[2:], ranks=2) == alone  # at the run's TP 2


def test_a_chat_of_two_ranks_sees_pictures_and_survives_mistakes(trained: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:300])
    odd = tmp_path / "caf\udce9.png"
    odd.write_bytes(picture.read_bytes())
    typed = f"/image {picture}\nWhat is this?\n/image {tmp_path / 'no.png'}\nAnd <img> this?\n/clear\n"
    typed += "caf\udce9?\n\udcc4\udce3\udcba\udcc3\n"  # not UTF-8: Latin-1, and GBK
    typed += f"/image ~no-such-user/a.png\n/image {tmp_path}\n/image {odd}\nHello\n/quit\n"
    layout = ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2")
    words = ("chat", trained, *layout, "--max-new-tokens=4", "--out", tmp_path)
    text = said(*words, ranks=2, typed=typed)
    assert text.count("1 picture(s) wait") == 2 and "no.png: no such file" in text
    assert "the prompt is not valid Unicode text at character 4" in text and "at character 1;" in text
    assert "~no-such-user/a.png: " in text
    assert "the prompt has 1 <img>, and 0 picture(s) are given" in text


@pytest.mark.long
def test_silence_is_no_hang(trained: Path, tmp_path: Path) -> None:
    """The other rank waits in a collective for longer than that may last; the start itself takes some seconds."""
    words = ("chat", trained, "parallel.distributed_timeout_minutes=0.2", "--max-new-tokens=4", "--out", tmp_path)
    assert "Type a question" in said(*words, ranks=2, typed="Hello\n", after=35.0)


def test_what_a_later_prompt_would_refuse_is_left_out_of_the_history() -> None:
    assert without_control_tokens(" a<|im_end|>b <img>c</img> ") == "ab c"
    assert without_control_tokens("<|im_<|im_<img>end|>start|>a</s>", ["</s>"]) == "a"


def test_a_layout_that_is_named_holds_for_one_process_too(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(trained), "parallel.pipeline_model_parallel_size=2", "--prompt", "a"]) == 2
    assert "does not divide the 1 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--prompt", "<img> <img>"), "the prompt has 2 <img>, and 1 picture(s) are given"),
        (("--prompt", " "), "the prompt is empty"),
        (("--prompt", "a</img>"), "the prompt holds </img>"),
        (("--prompt", "a <|im_end|>"), "control token <|im_end|>"),
        (("--prompt", "a", "--context=40"), "prompt and answer (256 tokens) take"),
        (("--prompt", "caf\udce9"), "the prompt is not valid Unicode text at character 4"),
        (("--prompt", "a", "--system", "\udcff"), "--system is not valid Unicode text at character 1"),
        (("--prompt", "a", "--top-p=2"), "top_p: 2.0 must be from 0 to 1"),
        (("--prompt", "a", "--temperature=1e400"), "temperature: inf must be at most 1,000,000"),
        (("--prompt", "a", "--repetition-penalty=inf"), "repetition_penalty: inf must be above 0, and finite"),
        (("--prompt", "a", "--max-new-tokens=0"), "--max-new-tokens must be at least 1"),
        (("--prompt", "a", "--image", "nowhere.png"), "nowhere.png"),
        (("--prompt", "a", "--boxes=out.txt"), "--boxes out.txt: must end with one of .png, .jpg"),
    ],
)
def test_wrong_input_costs_a_line(
    words: tuple[str, ...], reason: str, trained: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(trained), "--image", str(picture), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("megavlm: error: ") and reason in error[0]


def test_boxes_need_a_picture(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(trained), "--prompt", "a", "--boxes", "out.png"]) == 2
    assert "--boxes: boxes are drawn on the first --image, and none is given" in capsys.readouterr().err


def test_a_broken_picture_is_named(trained: Path, picture: Path, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    assert main(["generate", str(trained), "--image", str(broken), "--prompt", "a"]) == 2
    assert "broken.png: no picture that can be read" in capsys.readouterr().err
    broken.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    assert main(["generate", str(trained), "--image", str(broken), "--prompt", "a"]) == 2
    assert "cannot be decoded" in capsys.readouterr().err


def test_a_damaged_checkpoint_gives_no_answers(
    trained: Path, run_data: RunData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training refuses it; a recipe that its user corrected, or a state that only training reads, is no damage."""
    whole = next((trained / "checkpoints").glob("step-*"))
    damaged = shutil.copytree(whole, tmp_path / whole.name)
    (damaged / "recipe.yaml").write_text((damaged / "recipe.yaml").read_text() + "# mine\n")
    recipe_of(damaged, [])
    shard = max(damaged.glob("*.distcp"), key=lambda path: path.stat().st_size)
    size = shard.stat().st_size
    os.truncate(shard, size - 10)
    said = f"megavlm: error: {shard}: has {size - 10} bytes instead of {size}; the checkpoint is damaged: take another"
    for words in (
        ["generate", str(damaged), "--prompt", "a"],
        ["chat", str(damaged)],
        ["serve", str(damaged)],
        ["eval", str(damaged), "--data", str(run_data.heldout_json), "--out", str(tmp_path / "out")],
    ):
        assert main(words) == 2, words
        assert [line for line in capsys.readouterr().err.splitlines() if "error" in line] == [said]
    shard.unlink()
    with pytest.raises(UserError, match=r"distcp: missing; the checkpoint is damaged"):
        recipe_of(damaged, [])


def test_a_long_conversation_loses_its_oldest_exchanges(trained: Path, picture: Path) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(trained)]))
    image = picture.read_bytes()
    turns = [Turn("system", "Be brief.")]
    for k in range(6):
        turns += [Turn("user", f"{IMAGE_PLACEHOLDER if k % 2 == 0 else ''}question {k}"), Turn("assistant", "yes")]
    with session(recipe, checkpoint, tokenizer, 90) as model:
        asked = Asked((*turns, Turn("user", "last?")), (image,) * 3)
        cut, tokens = model.cut(asked, 8)
        assert len(tokens) + 8 <= 90 < len(model.cut(asked, -1000)[1]) + 8
        assert cut.turns[0] == turns[0] and cut.turns[-1].text == "last?" and cut.turns[1].role == "user"
        assert len(cut.images) == sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in cut.turns) < 3
        # Pieces add up to the text of the whole answer, and the last says why it ended.
        pieces = list(model.ask(asked, max_new_tokens=8, sampling=Sampling()))
        assert pieces[-1].finish in ("stop", "length") and all(piece.finish is None for piece in pieces[:-1])
        again = list(model.ask(asked, max_new_tokens=8, sampling=Sampling()))
        assert again == pieces
        with pytest.raises(ValueError, match="the context has 90"):
            model.cut(Asked((Turn("user", "a b c d " * 60),)), 8)
        with pytest.raises(ValueError, match=r"shows 1 image\(s\), 0 are given"):
            Asked((Turn("user", IMAGE_PLACEHOLDER),))


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "gbk", "latin-1"])
def test_any_line_is_read(errors: str, encoding: str) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n\xff\xfe\n\xe4\xb8\xad\nlast"), encoding=encoding, errors=errors)
    lines = [_read_line(typed) for _ in range(5)]
    assert lines[3:] == ["last", ""] and lines[0].startswith("caf")
    if encoding == "utf-8":
        assert lines[:3] == ["caf\udce9\n", "\udcff\udcfe\n", "\u4e2d\n"]
    assert _read_line(io.StringIO("a\n")) == "a\n"


def test_an_input_that_fails_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def readline(self, *_: object) -> str:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stdin", Gone())
    assert list(_lines(print, SimpleNamespace(idle_seconds=5))) == []  # type: ignore[arg-type]
    monkeypatch.setattr("sys.stdin", None)
    assert list(_lines(print, SimpleNamespace(idle_seconds=5))) == []  # type: ignore[arg-type]


def test_an_answer_is_written_whatever_the_encoding_is() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    write_any_text(out)
    out.write("\u4e2d a\udce9")
    out.flush()
    assert out.buffer.getvalue() == b"? a?"  # type: ignore[attr-defined]


class _Scripted:
    """Answers what it was told to."""

    def ask(self, asked: Asked, **_: object) -> list[Piece]:
        self.asked = asked
        return [Piece("The <ref>dog</ref><box>(100,200),", 3), Piece("(500,900)</box>.", 6, "stop")]


def test_boxes_are_drawn_on_the_picture_shown_last(tmp_path: Path) -> None:
    shown = io.BytesIO()
    Image.new("RGB", (200, 100), "white").save(shown, "PNG")
    (tmp_path / "a.png").write_bytes(shown.getvalue())
    lines: list[str] = []
    model = _Scripted()
    chat = Chat(model, Sampling(), 9, tmp_path / "out", None, lines.append)  # type: ignore[arg-type]
    assert chat.take(f"/image {tmp_path / 'a.png'}") and chat.take("Where is it?\n") and chat.take("Sure?\n")
    assert not chat.take("/quit")
    assert len(model.asked.turns) == 3 and len(model.asked.images) == 1
    assert model.asked.turns[2].text == "Sure?"  # as megavlm generate asks it: without the line's end
    assert "".join(lines).count("answer-") == 2
    with Image.open(tmp_path / "out" / "answer-2.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    changed = np.argwhere((pixels != 255).any(-1))
    assert drawn.size == (200, 100) and changed[:, 1].min() <= 21 and 98 <= changed[:, 1].max() <= 101
    assert changed[:, 0].max() in (89, 90) and (pixels[50, 60] == 255).all()
    assert draw_boxes(shown.getvalue(), "no box here") is None
    # Qwen2.5-VL counts pixels of the picture as it is resized, here to 56 x 28.
    said = '[{"bbox_2d": [14, 7, 42, 21], "label": "it"}]'
    native = NativePlan(56, 4, min_pixels=28 * 28, max_pixels=56 * 28)
    drawn = draw_boxes(shown.getvalue(), said, BoxSpace(native, pixels=True))
    assert drawn is not None
    changed = np.argwhere((np.asarray(drawn).astype(int) != 255).any(-1))
    assert 49 <= changed[:, 1].min() <= 51 and changed[:, 0].max() in (74, 75, 76)
    # LLaVA-1.5 counts parts of the square that the picture is padded to: it lies from a quarter of its height on.
    drawn = draw_boxes(shown.getvalue(), "[0.25, 0.5, 0.75, 0.7]", BoxSpace(PadPlan(56, 4), plane=True))
    assert drawn is not None
    changed = np.argwhere((np.asarray(drawn).astype(int) != 255).any(-1))
    assert changed[:, 0].min() in (49, 50) and changed[:, 0].max() in (89, 90)
    assert LlavaFamily.box_plane and Qwen25VLFamily.box_pixels and not Qwen3VLFamily.box_pixels


def test_pictures_stand_where_they_are_marked() -> None:
    assert user_turn("a <img> b <img>", 2).text == f"a {IMAGE_PLACEHOLDER} b {IMAGE_PLACEHOLDER}"
    both = f"Picture 1: {IMAGE_PLACEHOLDER}\nPicture 2: {IMAGE_PLACEHOLDER}\na"
    assert user_turn("a", 2).text == both and user_turn("a", 0).text == "a"
