"""The synthetic data set: true answers, tight boxes, disjoint splits, Qwen-VL's format."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megavlm.data.box_notations import find_boxes
from megavlm.quickstart import render
from megavlm.quickstart.render import RenderedData, render_dataset
from megavlm.quickstart.render_questions import (
    TASKS,
    ask_multi,
    ask_scene,
    box_text,
    caption_text,
    split_text_turns,
)
from megavlm.quickstart.render_scene import (
    COLOURS,
    GRID,
    SHAPES,
    WORDS,
    Scene,
    SceneObject,
    draw_items,
    draw_lettering,
    is_heldout_layout,
    paint,
)

SIZE = 64
PINNED = [
    "purple triangle 4 1 3; red circle 1 4 3; green square 4 4 3",
    "green triangle 1 1 4",
    "word CAT purple 0 3",
]
IMAGE = re.compile(r"Picture (\d+): <img>([^<]+)</img>\n")


@dataclass(frozen=True)
class Rendered:
    """A data set, its records and which scene was painted into which file."""

    data: RenderedData
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    scenes: dict[str, Scene]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    scenes: dict[str, Scene] = {}
    save = render._Split.save

    def spy(self: render._Split, scene: Scene) -> str:
        name = save(self, scene)
        scenes[name] = scene
        return name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render._Split, "save", spy)
        data = render_dataset(tmp_path_factory.mktemp("data"), train_images=500, heldout_images=240, seed=7)
    train = json.loads(data.train_json.read_text())
    return Rendered(data, train, json.loads(data.heldout_json.read_text()), scenes)


def names_of_images(record: dict[str, Any]) -> list[str]:
    return [name for _, name in IMAGE.findall(record["conversations"][0]["value"])]


def turns_of(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """``(task, question without pictures, answer)`` per turn."""
    values = [IMAGE.sub("", turn["value"]) for turn in record["conversations"]]
    return list(zip(record["tasks"], values[::2], values[1::2], strict=True))


def pixels(data: RenderedData, name: str) -> np.ndarray:
    with Image.open(data.images_dir / name) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def colour_at(image: np.ndarray, x: float, y: float) -> str:
    pixel = image[int(y * SIZE), int(x * SIZE)]
    return min(COLOURS, key=lambda name: int(np.abs(pixel - COLOURS[name]).sum()))


def centre(item: SceneObject) -> tuple[float, float]:
    return (item.column + item.cells / 2) / GRID, (item.row + item.cells / 2) / GRID


def test_format_is_qwen_vl_s(rendered: Rendered) -> None:
    for split, records in (("train", rendered.train), ("heldout", rendered.heldout)):
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            conversations = record["conversations"]
            assert [t["from"] for t in conversations] == ["user", "assistant"] * (len(conversations) // 2)
            assert len(record["tasks"]) * 2 == len(conversations)
            assert record["task"] == record["tasks"][0] and record["task"] in TASKS
            names = names_of_images(record)
            assert len(names) == {"text": 0, "multi": 2}.get(record["task"], 1)
            numbers = [int(n) for n, _ in IMAGE.findall(conversations[0]["value"])]
            assert numbers == list(range(1, len(names) + 1))
            assert all(name.startswith(f"{split}/") for name in names)
            assert all((rendered.data.images_dir / name).is_file() for name in names)
            assert not any("<img>" in turn["value"] for turn in conversations[1:])
            assert not any("<img>" in IMAGE.sub("", turn["value"]) for turn in conversations)


def test_sizes_and_counts(rendered: Rendered) -> None:
    data = rendered.data
    assert (data.train_images, data.heldout_images) == (500, 240)
    assert (data.train_records, data.heldout_records) == (
        len(rendered.train),
        len(rendered.heldout),
    )
    for split, number in (("train", 500), ("heldout", 240)):
        assert len(list((data.images_dir / split).glob("*.jpg"))) == number
    assert pixels(data, "train/000001.jpg").shape == (SIZE, SIZE, 3)
    assert {record["task"] for record in rendered.train} == set(TASKS)
    assert {record["task"] for record in rendered.heldout} == set(TASKS)
    single = sum(len(scene.items) == 1 for scene in rendered.scenes.values())
    objects = sum(bool(scene.items) for scene in rendered.scenes.values())
    assert 0.5 < single / objects < 0.75
    turns = [len(r["tasks"]) for r in rendered.train if r["task"] != "read"]
    assert min(turns) == 1 and max(turns) == 5


def test_splits_share_no_layout_picture_or_text_question(rendered: Rendered) -> None:
    layouts: dict[str, set[str]] = {"train": set(), "heldout": set()}
    hashes: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for name, scene in rendered.scenes.items():
        split = name.split("/")[0]
        layouts[split].add(scene.key)
        content = (rendered.data.images_dir / name).read_bytes()
        hashes[split].add(hashlib.sha256(content).hexdigest())
    assert len(layouts["train"]) > 100 and len(layouts["heldout"]) > 100
    assert not layouts["train"] & layouts["heldout"]
    assert not hashes["train"] & hashes["heldout"]
    asked = [
        {question for r in records for task, question, _ in turns_of(r) if task == "text"}
        for records in (rendered.train, rendered.heldout)
    ]
    assert asked[0] and asked[1] and not asked[0] & asked[1]


def test_a_layout_in_both_splits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render._Split, "pick", lambda self, draw: _picked(self, draw()))
    with pytest.raises(RuntimeError, match="both splits"):
        render_dataset(tmp_path, train_images=200, heldout_images=100, seed=1)


def _picked(split: render._Split, scene: Scene) -> Scene:
    split.layouts.add(scene.key)
    return scene


def test_colour_answers_agree_with_the_pixels(rendered: Rendered) -> None:
    checked = 0
    for record in rendered.train + rendered.heldout:
        for task, question, answer in turns_of(record):
            if task != "colour":
                continue
            (name,) = names_of_images(record)
            match = re.fullmatch(r"What colour is the (\w+)\?", question)
            assert match is not None
            item = rendered.scenes[name].find(match[1])
            assert item is not None
            assert colour_at(pixels(rendered.data, name), *centre(item)) == answer
            checked += 1
    assert checked > 80


def test_pair_answers_agree_with_the_pixels(rendered: Rendered) -> None:
    seen: Counter[str] = Counter()
    for record in rendered.train + rendered.heldout:
        if record["task"] != "multi":
            continue
        names = names_of_images(record)
        items = [rendered.scenes[name].items[0] for name in names]
        colours = [
            colour_at(pixels(rendered.data, name), *centre(item)) for name, item in zip(names, items, strict=True)
        ]
        shapes = [item.shape for item in items]
        for _, question, answer in turns_of(record):
            number = int(m[1]) - 1 if (m := re.search(r"picture (\d)", question)) else 0
            if question.startswith("Which"):
                shape = question.removesuffix("?").split()[-1]
                assert shapes.count(shape) == 1 and shapes[int(answer) - 1] == shape
            elif "same colour" in question:
                assert answer == ("yes" if colours[0] == colours[1] else "no")
            elif "same shape" in question:
                assert answer == ("yes" if shapes[0] == shapes[1] else "no")
            elif "What colour" in question:
                assert answer == colours[number]
            else:
                assert "What shape" in question and answer == shapes[number]
            seen[answer] += 1
    assert {"yes", "no", "1", "2", *COLOURS, *SHAPES} == set(seen)


def test_boxes_hold_the_object_tightly(rendered: Rendered) -> None:
    checked = 0
    for record in rendered.train + rendered.heldout:
        for task, question, answer in turns_of(record):
            if task != "box":
                continue
            ((ref, sides),) = find_boxes(answer)
            x1, y1, x2, y2 = (1000 * side for side in sides)
            assert question == f"Where is {ref}?"
            assert all(value % 125 == 0 and 125 <= value <= 875 for value in (x1, y1, x2, y2))
            (name,) = names_of_images(record)
            image = pixels(rendered.data, name)
            distance = np.abs(image - COLOURS[str(ref).split()[1]]).sum(axis=2)
            rows, columns = np.nonzero(distance < 60)
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            wanted = [value * SIZE / 1000 for value in (x1, y1, x2, y2)]
            # The apex of a triangle is under two pixels wide: JPEG blurs it into the background.
            assert np.abs(np.subtract(found, wanted)).max() <= 3
            assert found[0] >= wanted[0] - 1 and found[2] <= wanted[2] + 1
            checked += 1
    assert checked > 80


def test_count_shape_and_caption_agree_with_the_scene(rendered: Rendered) -> None:
    for record in rendered.train + rendered.heldout:
        for task, question, answer in turns_of(record):
            if task not in ("count", "shape", "caption", "read"):
                continue
            scene = rendered.scenes[names_of_images(record)[0]]
            if task == "read":
                assert scene.lettering is not None and answer == scene.lettering.word
            elif task == "count":
                assert int(answer) == len(scene.items)
            elif task == "caption":
                parts = re.split(r", | and ", answer)
                assert [re.sub(r"^an? ", "", part) for part in parts] == [
                    f"{item.colour} {item.shape}" for item in scene.items
                ]
            else:
                colour = question.split()[4]
                assert [i.shape for i in scene.items if i.colour == colour] == [answer]


def test_objects_are_distinct_and_do_not_overlap(rendered: Rendered) -> None:
    for scene in rendered.scenes.values():
        assert len({item.shape for item in scene.items}) == len(scene.items)
        assert len({item.colour for item in scene.items}) == len(scene.items)
        cells = Counter(
            (x, y)
            for item in scene.items
            for x in range(item.column, item.column + item.cells)
            for y in range(item.row, item.row + item.cells)
        )
        assert all(number == 1 for number in cells.values())
        places = [(item.row, item.column) for item in scene.items]
        assert places == sorted(places)


def test_heldout_questions_are_single_closed_and_balanced(rendered: Rendered) -> None:
    answers: dict[str, Counter[str]] = {}
    for record in rendered.heldout:
        ((task, _, answer),) = turns_of(record)
        assert record["answer"] == answer
        assert (record["choices"] is None) == (task in ("caption", "box"))
        if record["choices"] is not None:
            assert answer in record["choices"]
            assert len(set(record["choices"])) == len(record["choices"]) > 1
        answers.setdefault(task, Counter())[answer] += 1
    for task, options in (("colour", COLOURS), ("shape", SHAPES), ("read", WORDS)):
        assert set(answers[task]) == set(options)
    for task in ("colour", "shape", "count", "read"):
        numbers = answers[task].values()
        assert max(numbers) - min(numbers) <= 1
    assert abs(answers["multi"]["yes"] - answers["multi"]["no"]) <= 2
    shares = [1 / len(r["choices"]) for r in rendered.heldout if r["choices"]]
    assert rendered.data.chance_accuracy == pytest.approx(sum(shares) / len(shares))
    assert "answer" not in rendered.train[0]


def test_deterministic_in_the_seed(tmp_path: Path) -> None:
    def digest(folder: str, seed: int) -> dict[str, str]:
        out = tmp_path / folder
        render_dataset(out, train_images=40, heldout_images=20, seed=seed)
        files = sorted(path for path in out.rglob("*") if path.is_file())
        return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first = digest("a", 3)
    assert len(first) == 62
    assert first == digest("b", 3)
    other = digest("c", 4)
    for name in ("train.json", "heldout.json", "images/train/000001.jpg"):
        assert first[name] != other[name]


def test_scenes_are_the_same_on_every_machine() -> None:
    rng = random.Random("pinned")
    keys = [draw_items(rng, 3).key, draw_items(rng, 1).key, draw_lettering(rng).key]
    assert keys == PINNED


@pytest.mark.parametrize("size", [32, 128])
def test_other_image_sizes(tmp_path: Path, size: int) -> None:
    data = render_dataset(tmp_path, train_images=12, heldout_images=8, image_size=size, seed=0)
    for path in data.images_dir.rglob("*.jpg"):
        with Image.open(path) as image:
            assert image.size == (size, size)


@pytest.mark.parametrize(("size", "train", "heldout"), [(60, 10, 10), (16, 10, 10), (64, 1, 10), (64, 10, 0)])
def test_unusable_arguments_are_refused(tmp_path: Path, size: int, train: int, heldout: int) -> None:
    with pytest.raises(ValueError):
        render_dataset(tmp_path, train_images=train, heldout_images=heldout, image_size=size, seed=0)
    assert not list(tmp_path.iterdir())


def test_exactly_as_many_heldout_pictures_as_asked_for(tmp_path: Path) -> None:
    for number in range(2, 12):
        out = tmp_path / str(number)
        data = render_dataset(out, train_images=2, heldout_images=number, seed=number)
        assert len(list((out / "images" / "heldout").iterdir())) == data.heldout_images == number


def test_words_fit_the_picture_and_differ() -> None:
    seen = set()
    for word in WORDS:
        for colour in range(4):
            scene = draw_lettering(random.Random(colour), word)
            image = np.asarray(paint(scene, SIZE, random.Random(0))).astype(int)
            ink = image.min(axis=2) < 190
            assert ink.sum() > 100
            edges = (ink[0], ink[-1], ink[:, 0], ink[:, -1])
            assert not any(edge.any() for edge in edges), word
        rows, columns = np.nonzero(ink)
        tight = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        seen.add((tight.shape, tight.tobytes()))
    assert len(seen) == len(WORDS)


def test_every_object_has_places_in_both_splits() -> None:
    for shape in SHAPES:
        for colour in COLOURS:
            for cells in (3, 4):
                held = [
                    is_heldout_layout(Scene((SceneObject(shape, colour, x, y, cells),)))
                    for x in range(1, GRID - cells)
                    for y in range(1, GRID - cells)
                ]
                assert 0 < sum(held) < len(held) / 3


def test_worked_scene() -> None:
    cross, circle = SceneObject("cross", "orange", 1, 1, 3), SceneObject("circle", "blue", 4, 4, 3)
    scene = Scene((cross, circle))
    assert caption_text(scene) == "an orange cross and a blue circle"
    assert box_text(circle) == "<ref>the blue circle</ref><box>(500,500),(875,875)</box>"
    assert ask_scene("colour", scene, cross).answer == "orange"
    assert ask_multi("which", cross, circle, 1).answer == "2"
    assert ask_multi("same_colour", cross, circle, 0).answer == "no"
    with pytest.raises(ValueError, match="both pictures"):
        ask_multi("which", circle, circle, 0)


def test_text_facts_are_true_and_every_heldout_fact_is_trained_in_other_words() -> None:
    train, heldout = split_text_turns(random.Random(0))
    assert not {t.question for t in train} & {t.question for t in heldout}

    def fact(question: str) -> tuple[str, ...]:
        return tuple(re.findall(r"\d|circle|square|triangle|red|yellow|blue", question))

    trained = {fact(turn.question): turn.answer for turn in train}
    for turn in heldout:
        assert trained[fact(turn.question)] == turn.answer
    for turn in train + heldout:
        numbers = [int(n) for n in re.findall(r"\d", turn.question)]
        if numbers:
            assert int(turn.answer) == sum(numbers)
        assert turn.choices is not None and turn.answer in turn.choices
