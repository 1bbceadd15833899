"""Tiny benchmarks in the parquet files of Hugging Face's hub: two row groups, pictures in the cells."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from benchmark_files import COUNT, encoded

Row = dict[str, Any]


def cell(seed: int) -> Row:
    """A picture as the ``datasets`` library writes it."""
    return {"bytes": base64.b64decode(encoded(seed)), "path": None}


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


def asked(i: int, **more: Any) -> Row:
    return {"question_id": 400 + i, "question": f"What is {i}?", "image": cell(i), **more}


def vqav2(i: int) -> Row:
    people = [{"answer": "red", "answer_confidence": "yes", "answer_id": k} for k in range(10)]
    return asked(i, answers=people, image_id=i, answer_type="other", question_type="what", multiple_choice_answer="red")


def plain_vqa(i: int) -> Row:
    return asked(i, answers=["red"] * 10)


def docvqa(i: int) -> Row:
    row = asked(i, answers=["May 8", "8 May"], docId=3, data_split="val")
    return {"questionId": str(row.pop("question_id")), **row}


def chartqa(i: int) -> Row:
    return {
        "type": "human_test" if i % 2 else "augmented_test",
        "question": "How many?",
        "answer": "14",
        "image": cell(i),
    }


def ai2d(i: int) -> Row:
    return {"question": "What is B?", "options": ["ears", "nose", "face"], "answer": "2", "image": cell(i)}


def scienceqa(i: int) -> Row:
    return {"image": cell(i) if i else None, "question": "Which?", "choices": ["red", "blue"], "answer": 1, "hint": "",
            "subject": "natural science", "lecture": "", "solution": ""}  # fmt: skip


def mmbench(i: int) -> Row:
    return {"index": 240 + i, "question": "Which one?", "hint": "nan", "answer": "B", "A": "red", "B": "blue",
            "C": "green" if i % 2 else "nan", "D": "nan", "category": "c", "image": cell(i)}  # fmt: skip


def seed(i: int) -> Row:
    shown = [cell(i)] if i < COUNT - 1 else [cell(i), cell(i + 1)]
    return {"answer": "C", "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four",
            "data_id": f"v_{i}", "data_type": "image" if i < COUNT - 1 else "video", "question": "How many?",
            "question_id": f"10{i}", "question_type_id": 1 + i % 2, "image": shown, "segment": []}  # fmt: skip


def mmmu(i: int) -> Row:
    closed = i % 3 != 2
    pictures = {f"image_{k}": cell(10 * i + k) if k <= 1 + i % 2 else None for k in range(1, 8)}
    return {
        "id": f"validation_{'Accounting' if i < 3 else 'Art'}_{i}",
        "question": f"<image 1> How much is {i}?" + (" And <image 2>, or <image 1>?" if i % 2 else ""),
        "options": str(["$6", "$8"]) if closed else "[]", "explanation": "", **pictures, "img_type": "['Tables']",
        "answer": "AB"[i % 2] if closed else "['8', '8.0']", "topic_difficulty": "Easy", "subfield": "x",
        "question_type": "multiple-choice" if closed else "open",
    }  # fmt: skip


def mme(i: int) -> Row:
    kind = "artwork" if i < 2 else "code_reasoning"
    return {"question_id": f"{kind}/{i // 2}.png", "image": cell(i // 2), "question": "Is it red?",
            "answer": "Yes" if i % 2 else "No", "category": kind}  # fmt: skip


def pope(i: int) -> Row:
    kind = "adversarial" if i < 2 else "popular"
    return {"id": str(i), "question_id": str(1 + i % 2 if i < 4 else 9), "question": "Is there a dog in the image?",
            "answer": "yes" if i % 2 else "no", "image_source": "COCO_val2014_000000000001", "image": cell(i),
            "category": kind}  # fmt: skip


def flickr30k(i: int) -> Row:
    return {
        "image": cell(i),
        "caption": ["Two dogs.", "A dog."],
        "sentids": ["1"],
        "img_id": str(i),
        "filename": "a.jpg",
    }


def nocaps(i: int) -> Row:
    return {"image": cell(i), "image_id": i, "annotations_captions": ["A square."],
            "image_domain": "in-domain" if i % 2 else "out-domain"}  # fmt: skip


def coco_captions(i: int) -> Row:
    return {
        "question_id": f"COCO_val2014_{i:012d}.jpg",
        "image": cell(i),
        "question": "",
        "answer": ["A cat."],
        "id": i,
    }


ROWS: dict[str, Callable[[int], Row]] = {
    "vqav2": vqav2, "okvqa": plain_vqa, "textvqa": plain_vqa, "vizwiz": plain_vqa, "docvqa": docvqa,
    "chartqa": chartqa,
    "ai2d": ai2d, "scienceqa": scienceqa, "mmbench": mmbench, "mmbench-cn": mmbench, "seed": seed, "mmmu": mmmu,
    "mme": mme, "pope": pope, "flickr30k": flickr30k, "nocaps": nocaps, "coco-captions": coco_captions,
}  # fmt: skip
QUESTIONS = {"scienceqa": 4, "mmbench": 12, "mmbench-cn": 12, "seed": 4}


def make(name: str, path: Path, count: int = COUNT) -> Path:
    """Write a benchmark's parquet file."""
    return write(path, [ROWS[name](i) for i in range(count)])
