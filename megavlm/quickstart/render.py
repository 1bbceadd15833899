"""Writes the quickstart's synthetic data set: pictures and conversations in Qwen-VL's format."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.quickstart.render_questions import (
    MULTI_KINDS,
    SCENE_TASKS,
    QuestionAndAnswer,
    ask_multi,
    ask_read,
    ask_scene,
    split_text_turns,
)
from megavlm.quickstart.render_scene import (
    COLOURS,
    GRID,
    SHAPES,
    WORDS,
    Scene,
    draw_items,
    draw_lettering,
    is_heldout_layout,
    paint,
)

log = logging.getLogger(__name__)

Record = dict[str, Any]

_READ_SHARE = 0.12
_PAIR_SHARE = 0.12
_TEXT_SHARE = 0.04
# Which questions come first, and so cannot be answered from the conversation alone. Colour is learned in no time, and
# a model that has learned it alone learns shapes late: it is asked for seldom.
_LEAD_WEIGHTS = {"colour": 1, "shape": 6, "count": 1, "caption": 3, "box": 1}
# Asked of pictures with one object: which colour goes with which shape is learned late in some minutes on a CPU.
_ONE_OBJECT = ("colour", "shape")
_OBJECTS = (1, 1, 1, 2, 3)
_MAX_TURNS = 5
_JPEG: dict[str, Any] = {"quality": 92, "subsampling": 0}


@dataclass(frozen=True)
class RenderedData:
    """Where the data set lies and how large it is."""

    images_dir: Path
    train_json: Path
    heldout_json: Path
    train_records: int
    heldout_records: int
    train_images: int
    heldout_images: int
    chance_accuracy: float
    seconds: float


def render_dataset(
    out: Path, *, train_images: int, heldout_images: int, image_size: int = 64, seed: int
) -> RenderedData:
    """Write ``images/{train,heldout}/*.jpg``, ``train.json`` and ``heldout.json`` under ``out``.

    Both files are lists of ``{"id", "task", "tasks", "conversations"}`` with picture paths relative
    to ``out/images``; ``task`` is that of the first turn, ``tasks`` has one per question. Training
    conversations have up to five turns. Held-out ones have a single question whose answers are
    balanced, and add ``"answer"`` and ``"choices"`` (null for an open question). Box coordinates
    are multiples of 125 from 125 to 875, exactly where the objects lie (see ``render_scene``).
    No layout occurs in both splits. The result depends on the arguments alone.
    """
    if image_size % GRID or image_size < 4 * GRID:
        raise UserError(f"image_size must be a multiple of {GRID} and at least {4 * GRID}, not {image_size}")
    if train_images < 2 or heldout_images < 2:
        raise UserError(f"both splits need two pictures or more, not {train_images} and {heldout_images}")
    started = time.monotonic()
    out = Path(out)
    images_dir = out / "images"
    text_train, text_heldout = split_text_turns(random.Random(f"{seed} text"))
    train = _Split(images_dir, "train", image_size, random.Random(f"{seed} train"))
    heldout = _Split(images_dir, "heldout", image_size, random.Random(f"{seed} heldout"))
    _fill_train(train, train_images, text_train)
    _fill_heldout(heldout, heldout_images, text_heldout)
    shared = train.layouts & heldout.layouts
    if shared:
        raise RuntimeError(f"layouts in both splits: {sorted(shared)[:3]}")
    for split in (train, heldout):
        path = out / f"{split.name}.json"
        path.write_text(json.dumps(split.records, indent=1) + "\n", encoding="utf-8")
    rendered = RenderedData(
        images_dir=images_dir,
        train_json=out / "train.json",
        heldout_json=out / "heldout.json",
        train_records=len(train.records),
        heldout_records=len(heldout.records),
        train_images=train.written,
        heldout_images=heldout.written,
        chance_accuracy=_chance(heldout.records),
        seconds=time.monotonic() - started,
    )
    log.info("rendered %s", rendered)
    return rendered


class _Split:
    """The pictures and records of one split while it is being made."""

    def __init__(self, images_dir: Path, name: str, image_size: int, rng: random.Random) -> None:
        self.name = name
        self.rng = rng
        self.records: list[Record] = []
        self.layouts: set[str] = set()
        self.written = 0
        self._images_dir = images_dir
        self._image_size = image_size
        (images_dir / name).mkdir(parents=True, exist_ok=True)

    def pick(self, draw: Callable[[], Scene]) -> Scene:
        """Draw until the layout belongs to this split; held-out ones are new while any are left."""
        heldout = self.name == "heldout"
        for attempt in count():
            scene = draw()
            key = scene.key
            if is_heldout_layout(scene) == heldout:
                if not heldout or key not in self.layouts or attempt > 300:
                    self.layouts.add(key)
                    return scene
            elif attempt > 10_000:
                raise RuntimeError(f"no {self.name} layout is like {key!r}")
        raise AssertionError("unreachable")

    def save(self, scene: Scene) -> str:
        """Write the picture; return its path relative to the pictures' folder."""
        self.written += 1
        name = f"{self.name}/{self.written:06d}.jpg"
        paint(scene, self._image_size, self.rng).save(self._images_dir / name, **_JPEG)
        return name

    def add(self, images: list[str], turns: list[QuestionAndAnswer]) -> None:
        """Append a record with these pictures and questions."""
        pictures = "".join(f"Picture {n}: <img>{p}</img>\n" for n, p in enumerate(images, 1))
        conversations = []
        for number, turn in enumerate(turns):
            question = turn.question if number else pictures + turn.question
            conversations.append({"from": "user", "value": question})
            conversations.append({"from": "assistant", "value": turn.answer})
        record: Record = {
            "id": f"{self.name}-{len(self.records):06d}",
            "task": turns[0].task,
            "tasks": [turn.task for turn in turns],
            "conversations": conversations,
        }
        if self.name == "heldout":
            (turn,) = turns
            record["answer"] = turn.answer
            record["choices"] = list(turn.choices) if turn.choices else None
        self.records.append(record)


def _fill_train(split: _Split, images: int, text_turns: list[QuestionAndAnswer]) -> None:
    """One conversation per picture, then some about pairs of pictures and some about none."""
    rng = split.rng
    singles: list[tuple[str, Scene]] = []
    for _ in range(images):
        if rng.random() < _READ_SHARE:
            scene = split.pick(partial(draw_lettering, rng))
            split.add([split.save(scene)], [ask_read(scene)])
            continue
        number = rng.choice(_OBJECTS)
        scene = split.pick(partial(draw_items, rng, number))
        path = split.save(scene)
        if number == 1:
            singles.append((path, scene))
        split.add([path], _scene_turns(scene, rng))
    if len(singles) > 1:
        for _ in range(round(images * _PAIR_SHARE)):
            (path_a, scene_a), (path_b, scene_b) = _pair(singles, rng)
            split.add([path_a, path_b], _pair_turns(scene_a, scene_b, rng))
    for _ in range(round(images * _TEXT_SHARE)):
        split.add([], rng.sample(text_turns, rng.randint(2, _MAX_TURNS)))
    rng.shuffle(split.records)


def _scene_turns(scene: Scene, rng: random.Random) -> list[QuestionAndAnswer]:
    """One to five different questions about the scene: one task for all of its objects, then others.

    What a question says about the scene can be copied in later answers, and then teaches nothing about pictures.
    Questions of the same task do not answer each other.
    """
    tasks = [task for task in SCENE_TASKS if len(scene.items) == 1 or task not in _ONE_OBJECT]
    lead = rng.choices(tasks, [_LEAD_WEIGHTS[task] for task in tasks])[0]
    rng.shuffle(tasks)
    tasks.sort(key=lambda task: task != lead)
    turns: list[QuestionAndAnswer] = []
    for task in tasks[: rng.randint(1, 3)]:
        asked = list(scene.items) if task == "box" else scene.items[:1]
        turns.extend(ask_scene(task, scene, item) for item in rng.sample(asked, len(asked)))
    return turns[:_MAX_TURNS]


def _pair(singles: list[tuple[str, Scene]], rng: random.Random) -> tuple[tuple[str, Scene], tuple[str, Scene]]:
    """Two pictures; in about half of the pairs they agree in colour or in shape."""
    first = rng.choice(singles)
    candidates = rng.sample(singles, min(len(singles), 12))
    candidates = [entry for entry in candidates if entry[0] != first[0]]
    item = first[1].items[0]
    wish = rng.choice(("none", "none", "colour", "shape"))
    for entry in candidates:
        other = entry[1].items[0]
        if wish == "none" or getattr(other, wish) == getattr(item, wish):
            return first, entry
    return first, candidates[0]


def _pair_turns(scene_a: Scene, scene_b: Scene, rng: random.Random) -> list[QuestionAndAnswer]:
    """Two to four questions about both pictures."""
    first, second = scene_a.items[0], scene_b.items[0]
    kinds = [kind for kind in MULTI_KINDS if kind != "which" or first.shape != second.shape]
    chosen = rng.sample(kinds, rng.randint(2, min(4, len(kinds))))
    return [ask_multi(kind, first, second, rng.randrange(2)) for kind in chosen]


def _fill_heldout(split: _Split, images: int, text_turns: list[QuestionAndAnswer]) -> None:
    """Single questions, the tasks in turn and within each task the answers in turn."""
    rng = split.rng
    cycle = (*SCENE_TASKS, "read", "multi")
    for number in count():
        left = images - split.written
        if not left:
            break
        task, index = cycle[number % len(cycle)], number // len(cycle)
        if task == "multi" and left < 2:
            continue
        if task == "multi":
            _add_heldout_pair(split, index)
        elif task == "read":
            word = WORDS[index % len(WORDS)]
            scene = split.pick(partial(draw_lettering, rng, word))
            split.add([split.save(scene)], [ask_read(scene)])
        else:
            _add_heldout_scene(split, task, index)
    for turn in text_turns[: max(1, images // 8)]:
        split.add([], [turn])


def _add_heldout_scene(split: _Split, task: str, index: int) -> None:
    rng = split.rng
    shape = SHAPES[index % len(SHAPES)] if task == "shape" else rng.choice(SHAPES)
    colours = tuple(COLOURS)
    colour = colours[index % len(colours)] if task == "colour" else rng.choice(colours)
    number = index % 3 + 1 if task == "count" else 1 if task in _ONE_OBJECT else rng.choice(_OBJECTS)
    scene = split.pick(partial(draw_items, rng, number, shape=shape, colour=colour))
    item = scene.find(shape)
    assert item is not None
    split.add([split.save(scene)], [ask_scene(task, scene, item)])


def _add_heldout_pair(split: _Split, index: int) -> None:
    """A question about two pictures; ``index`` runs through the kinds and then the answers."""
    rng = split.rng
    kind, index = MULTI_KINDS[index % len(MULTI_KINDS)], index // len(MULTI_KINDS)
    target = index % 2 if kind == "which" else rng.randrange(2)
    shapes = rng.sample(SHAPES, 2)
    colours = rng.sample(tuple(COLOURS), 2)
    if kind == "same_colour" and index % 2 == 0:
        colours[1] = colours[0]
    if kind == "same_shape" and index % 2 == 0:
        shapes[1] = shapes[0]
    if kind == "colour_of":
        colours[target] = tuple(COLOURS)[index % len(COLOURS)]
    if kind == "shape_of":
        shapes[target] = SHAPES[index % len(SHAPES)]
    scenes = [
        split.pick(partial(draw_items, rng, 1, shape=shape, colour=colour))
        for shape, colour in zip(shapes, colours, strict=True)
    ]
    turn = ask_multi(kind, scenes[0].items[0], scenes[1].items[0], target)
    split.add([split.save(scene) for scene in scenes], [turn])


def _chance(records: list[Record]) -> float:
    """Mean of 1 / number of choices over the closed questions."""
    shares = [1 / len(record["choices"]) for record in records if record["choices"]]
    return sum(shares) / len(shares)
