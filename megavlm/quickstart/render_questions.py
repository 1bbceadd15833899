"""Questions and true answers about the quickstart's scenes.

Every function returns a :class:`QuestionAndAnswer`; the answer is derived from the scene alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from megavlm.quickstart.render_scene import COLOURS, SHAPES, WORDS, Scene, SceneObject

SCENE_TASKS: tuple[str, ...] = ("colour", "shape", "count", "caption", "box")
"""Tasks about one picture with objects."""
TASKS: tuple[str, ...] = (*SCENE_TASKS, "read", "multi", "text")
"""All tasks."""
MULTI_KINDS: tuple[str, ...] = ("which", "same_colour", "same_shape", "colour_of", "shape_of")
"""Kinds of questions about two pictures."""

_NUMBERS = range(1, 5)
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class QuestionAndAnswer:
    """A question, its answer and, for a closed question, all answers it could have."""

    task: str
    question: str
    answer: str
    choices: tuple[str, ...] | None = None


def with_article(noun: str) -> str:
    """``a red circle`` or ``an orange circle``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def box_text(item: SceneObject) -> str:
    """The object's place in Qwen-VL's notation."""
    x1, y1, x2, y2 = item.box
    return f"<ref>the {item.name}</ref><box>({x1},{y1}),({x2},{y2})</box>"


def caption_text(scene: Scene) -> str:
    """All objects in reading order, such as ``a red circle and a blue square``."""
    names = [with_article(item.name) for item in scene.items]
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def ask_scene(task: str, scene: Scene, item: SceneObject) -> QuestionAndAnswer:
    """A question of one of ``SCENE_TASKS``; ``item`` is the object asked for, if any is."""
    if task == "colour":
        return QuestionAndAnswer(task, f"What colour is the {item.shape}?", item.colour, tuple(COLOURS))
    if task == "shape":
        return QuestionAndAnswer(task, f"What shape is the {item.colour} object?", item.shape, SHAPES)
    if task == "count":
        return QuestionAndAnswer(task, "How many objects are there?", str(len(scene.items)), ("1", "2", "3"))
    if task == "caption":
        return QuestionAndAnswer(task, "Describe the image.", caption_text(scene))
    if task == "box":
        return QuestionAndAnswer(task, f"Where is the {item.name}?", box_text(item))
    raise ValueError(f"unknown task {task!r}; known: {', '.join(SCENE_TASKS)}")


def ask_read(scene: Scene) -> QuestionAndAnswer:
    """What the lettering says."""
    if scene.lettering is None:
        raise ValueError("the scene has no lettering to ask for")
    return QuestionAndAnswer("read", "What does the text say?", scene.lettering.word, WORDS)


def ask_multi(kind: str, first: SceneObject, second: SceneObject, target: int) -> QuestionAndAnswer:
    """A question about two pictures with one object each; ``target`` (0, 1) is the one meant.

    For ``which`` the two shapes must differ.
    """
    meant = (first, second)[target]
    if kind == "which":
        if first.shape == second.shape:
            raise ValueError(f"both pictures show a {first.shape}")
        question = f"Which picture has a {meant.shape}?"
        return QuestionAndAnswer("multi", question, str(target + 1), ("1", "2"))
    if kind == "same_colour":
        answer = _YES_NO[first.colour != second.colour]
        return QuestionAndAnswer("multi", "Are the two shapes the same colour?", answer, _YES_NO)
    if kind == "same_shape":
        answer = _YES_NO[first.shape != second.shape]
        return QuestionAndAnswer("multi", "Do both pictures show the same shape?", answer, _YES_NO)
    if kind == "colour_of":
        question = f"What colour is the object in picture {target + 1}?"
        return QuestionAndAnswer("multi", question, meant.colour, tuple(COLOURS))
    if kind == "shape_of":
        question = f"What shape is in picture {target + 1}?"
        return QuestionAndAnswer("multi", question, meant.shape, SHAPES)
    raise ValueError(f"unknown kind {kind!r}; known: {', '.join(MULTI_KINDS)}")


def text_facts() -> list[tuple[QuestionAndAnswer, QuestionAndAnswer]]:
    """All facts of the text task, each in two wordings."""
    facts = []
    sums = tuple(str(n) for n in range(2 * min(_NUMBERS), 2 * max(_NUMBERS) + 1))
    for a in _NUMBERS:
        for b in _NUMBERS:
            wordings = (f"What is {a} plus {b}?", f"Add {a} and {b}.")
            facts.append(_fact(wordings, str(a + b), sums))
    for shape, sides in (("triangle", "3"), ("square", "4"), ("circle", "0")):
        noun = with_article(shape)
        wordings = (f"How many sides does {noun} have?", f"Count the sides of {noun}.")
        facts.append(_fact(wordings, sides, ("0", "3", "4")))
    mixtures = (("red", "yellow", "orange"), ("blue", "yellow", "green"), ("red", "blue", "purple"))
    for one, other, result in mixtures:
        for left, right in ((one, other), (other, one)):
            wordings = (f"Which colour do {left} and {right} make?", f"Mix {left} and {right}.")
            facts.append(_fact(wordings, result, ("orange", "green", "purple")))
    return facts


def split_text_turns(rng: random.Random) -> tuple[list[QuestionAndAnswer], list[QuestionAndAnswer]]:
    """Training and held-out questions without a picture.

    A third of the facts is asked in one wording in training and in the other one held out: no
    held-out question is trained on, yet each can be answered from what was.
    """
    facts = text_facts()
    rng.shuffle(facts)
    train: list[QuestionAndAnswer] = []
    heldout: list[QuestionAndAnswer] = []
    for number, fact in enumerate(facts):
        if number % 3:
            train.extend(fact)
        else:
            seen = rng.randrange(2)
            train.append(fact[seen])
            heldout.append(fact[1 - seen])
    return train, heldout


def _fact(
    wordings: tuple[str, str], answer: str, choices: tuple[str, ...]
) -> tuple[QuestionAndAnswer, QuestionAndAnswer]:
    first, second = (QuestionAndAnswer("text", question, answer, choices) for question in wordings)
    return first, second
