"""Films in ``megavlm eval`` on own records: shown as ``prepare`` reads them, answered as ``generate`` answers."""

from __future__ import annotations

import io
import json
import tarfile
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen2_vl_models
import ranks
from film_maker import film, film_recipe
from PIL import Image
from run_data import RunData
from test_family_films import only_words

from megavlm.cli import main
from megavlm.config.errors import MissingFileError
from megavlm.data.chat import encode_prompt
from megavlm.data.films.film import Film
from megavlm.data.media import plan_of
from megavlm.data.schema import FILM_PLACEHOLDER, Turn
from megavlm.data.tokenizer import Tokenizer, load_tokenizer
from megavlm.evaluation.benchmarks.spec import shown_data
from megavlm.evaluation.records import HeldOutRecord, asked, make_questions, read_records


@pytest.fixture
def tokenizer(run_data: RunData) -> Tokenizer:
    return load_tokenizer(Path(run_data.recipe(run_data.root).data.tokenizer))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.mp4").write_bytes(film(12))
    (folder / "b.mp4").write_bytes(film(20, size=(32, 64)))
    (folder / "broken.mp4").write_bytes(film(30)[:-700])
    (folder / "walk").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "walk" / f"{number}.png")
    Image.new("RGB", (40, 30), "red").save(folder / "p.png")
    return folder


def llava(**more: Any) -> dict[str, Any]:
    said = {"from": "gpt", "value": "x"}
    return {"conversations": [{"from": "human", "value": "<video>\nWhat is it?"}, said], **more}


def messages(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}], **more}


def forms(media: Path) -> dict[str, list[dict[str, Any]]]:
    """Lists of one form each, whose questions all show ``a.mp4``, or the frames of ``walk``."""
    url = f"data:video/mp4;base64,{b64encode((media / 'a.mp4').read_bytes()).decode()}"
    frames = [f"walk/{number}.png" for number in range(5)]
    return {
        "llava": [llava(video="a.mp4"), llava(videos=[url]), llava(video="walk"), llava(video=frames)],
        "messages": [
            messages([{"type": "video", "video": str(media / "a.mp4")}, {"type": "text", "text": "What is it?"}]),
            messages([{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What is it?"}]),
            messages("<video>What is it?", videos=["walk"]),
            messages("What is it?", videos=[{"frames": frames, "fps": 2}]),
        ],
        "qwen-vl": [
            {"conversations": [{"from": "user", "value": f"Video 1: {FILM_PLACEHOLDER}\nWhat is it?"},
                               {"from": "assistant", "value": "x"}], "films": [one]}
            for one in ("a.mp4", "a.mp4", "walk", {"frames": frames})
        ],
        "alpaca": [
            {"instruction": "<video>What is it?", "output": "x", "videos": [one]}
            for one in ("a.mp4", url, "walk", frames)
        ],
    }  # fmt: skip


def test_every_form_shows_the_same_film(media: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = film_recipe()
    whole = Film((media / "a.mp4").read_bytes())
    tar = tmp_path / "d.tar"
    with tarfile.open(tar, "w") as out:
        for key in "ab":
            for kind, data in (("json", json.dumps(messages("What is it?")).encode()), ("mp4", whole.data)):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    found = {"tar": read_records(tar)}
    for name, entries in forms(media).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
        found[name] = read_records(tmp_path / f"{name}.json", media)
    for name, records in found.items():
        shapes = [one.shape() for record in records for one in map(shown_data, record.images)]
        assert shapes[:2] == [whole.shape()] * 2 and len({one.sampled for one in shapes[:2]}) == 1, name
        assert all((one.frames, one.rate, one.sampled) == (5, 2.0, True) for one in shapes[2:]), name
        questions = make_questions(records, tokenizer, recipe, None)
        assert not any(one.problem for one in questions) and questions[0].text == "Video 1: <video>\nWhat is it?", name
        layout = plan_of(recipe.model).of(whole.shape())
        turns = [Turn("user", f"Video 1: {FILM_PLACEHOLDER}\nWhat is it?")]
        expected = encode_prompt(turns, tokenizer, [layout.runs], recipe.data.system_message).tolist()
        assert [one.tokens.tolist() for one in questions[:2]] == [expected] * 2, name
        assert questions[0].grids and (int((questions[0].tokens == tokenizer.imgpad_id).sum()) == layout.tokens)


def test_what_cannot_be_shown_is_a_problem_of_its_own_question(
    media: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([llava(video="broken.mp4"), llava(video="a.mp4"), llava(video="p.png")]))
    records = read_records(path, media)
    problems = [one.problem for one in make_questions(records, tokenizer, film_recipe(), None)]
    assert problems[1] == "" and problems[0] and "not a film" in problems[2]
    none = film_recipe(kind="none", min_pixels=None, max_pixels=None, max_frames=None, tokens_per_second=None)
    assert all("model.video.kind is none" in one.problem for one in make_questions(records, tokenizer, none, None))
    for wrong in (llava(video="no.mp4"), llava(video=["walk/0.png", "walk/9.png"])):
        path.write_text(json.dumps([wrong]))
        with pytest.raises(MissingFileError, match=r"record 0: no (film 'no\.mp4'|frame 'walk/9\.png') in "):
            read_records(path, media)


def test_places_of_films_in_a_prompt_of_ones_own() -> None:
    text = f"Picture 1: <img></img>\nVideo 1: {FILM_PLACEHOLDER}\nWhat?"
    record = HeldOutRecord("r", "all", (Turn("user", text),), ("x",), [], [])
    assert asked(record, "{pictures}Q: {question}")[0].text == f"<img></img>{FILM_PLACEHOLDER}Q: What?"
    assert asked(record, "{question} Be brief.")[0].text == f"{text} Be brief."


@pytest.mark.family("qwen2_5_vl")
def test_answers_are_those_of_generate(media: Path, tmp_path: Path) -> None:
    """Scores, report and panel; a film that breaks is counted, and what was answered is not asked again."""
    source = qwen2_vl_models.publish(tmp_path / "hf", qwen2_vl_models.qwen2_5_vl)
    only_words(source)
    run = tmp_path / "m"
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(run)]) == 0
    both = llava(video="b.mp4", image="p.png")
    both["conversations"][0]["value"] = "<image>\n<video>\nWhat is it?"
    records = [llava(video="a.mp4"), llava(video="walk"), both, llava(video="broken.mp4")]
    (tmp_path / "d.json").write_text(json.dumps(records))
    keys = ["model.video.max_frames=6", "model.video.max_pixels=512", "model.video.min_pixels=64"]
    keys += ["training.precision=fp32", "data.sequence_length=512"]
    out = tmp_path / "out"
    words = ["eval", str(run), *keys, "--data", str(tmp_path / "d.json"), "--images", str(media), "--out", str(out)]
    ranks.megavlm([*words, "--max-new-tokens=6"], world=1)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [bool(line.get("problem")) for line in lines] == [False, False, False, True]
    assert lines[0]["question"] == "Video 1: <video>\nWhat is it?"
    for number, shown, prompt in (
        (0, ["--video", media / "a.mp4"], "Video 1: <video>\nWhat is it?"),
        (2, ["--image", media / "p.png", "--video", media / "b.mp4"],
         "Picture 1: <img>\nVideo 1: <video>\nWhat is it?"),
    ):  # fmt: skip
        told = ["generate", str(run), *keys, *map(str, shown), "--prompt", prompt, "--max-new-tokens=6"]
        answer = ranks.megavlm(told, apart=True).stdout.strip()
        assert lines[number]["prediction"] == answer != ""
    page = (out / "report.html").read_text()
    assert page.count('<div class="strip">') >= 3 and "film 1 at 0.00 s" in page and (out / "panel.png").is_file()
    assert json.loads((out / "scores.json").read_text())["films"].startswith("Qwen2FilmPlan(")
