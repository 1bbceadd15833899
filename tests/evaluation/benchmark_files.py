"""Tiny benchmarks in the formats in which the real ones are published, with random pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNT = 5


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = np.kron(rng.integers(0, 256, (4, 5, 3)), np.ones((size[1] // 4, size[0] // 5, 1)))
    return Image.fromarray(pixels.astype(np.uint8))


def save(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path.name


def encoded(seed: int) -> str:
    file = io.BytesIO()
    picture(seed).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def vqa(root: Path, prefix: str = "v2_") -> list[str]:
    questions, annotations = [], []
    for i in range(COUNT):
        save(root / "val2014" / f"COCO_val2014_{i + 40:012d}.jpg", i)
        questions.append({"image_id": i + 40, "question": f"What colour is circle {i}?", "question_id": 400 + i})
        answers = [
            {"answer": "red" if k < 3 else "blue", "answer_confidence": "yes", "answer_id": k} for k in range(10)
        ]
        annotations.append({
            "question_type": "what color", "multiple_choice_answer": "blue", "answers": answers, "image_id": i + 40,
            "answer_type": "other" if i % 2 else "number", "question_id": 400 + i,
        })  # fmt: skip
    head = {"info": {}, "license": {}, "data_subtype": "val2014", "task_type": "Open-Ended", "data_type": "mscoco"}
    data = write(root / f"{prefix}OpenEnded_mscoco_val2014_questions.json", {**head, "questions": questions})
    write(root / f"{prefix}mscoco_val2014_annotations.json", {"annotations": annotations})
    return [f"--data={data}", f"--images={root}"]


def okvqa(root: Path) -> list[str]:
    return vqa(root, prefix="")


def textvqa(root: Path) -> list[str]:
    rows = [
        {"question": f"what is written on sign {i}?", "image_id": f"abc{i}", "question_id": 34602 + i,
         "answers": ["stop"] * 4 + ["Stop sign"] * 6, "set_name": "val", "image_width": 40, "image_height": 32}
        for i in range(COUNT)
    ]  # fmt: skip
    for i in range(COUNT):
        save(root / "train_images" / f"abc{i}.jpg", i)
    value = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": rows}
    return [f"--data={write(root / 'TextVQA_0.5.1_val.json', value)}", f"--images={root / 'train_images'}"]


def vizwiz(root: Path) -> list[str]:
    rows = []
    for i in range(COUNT):
        name = save(root / "val" / f"VizWiz_val_{i:08d}.jpg", i)
        answers = [{"answer_confidence": "yes", "answer": "unanswerable" if k % 2 else "soda"} for k in range(10)]
        rows.append({"image": name, "question": "What is this?", "answers": answers, "answer_type": "other",
                     "answerable": 1})  # fmt: skip
    return [f"--data={write(root / 'val.json', rows)}", f"--images={root / 'val'}"]


def gqa(root: Path) -> list[str]:
    rows = {}
    for i in range(COUNT):
        save(root / "images" / f"n{i}.jpg", i)
        rows[f"2021{i}"] = {"imageId": f"n{i}", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is.",
                            "isBalanced": True, "types": {"structural": "verify" if i % 2 else "query"}}  # fmt: skip
    return [f"--data={write(root / 'testdev_balanced_questions.json', rows)}", f"--images={root / 'images'}"]


def docvqa(root: Path) -> list[str]:
    rows = []
    for i in range(COUNT):
        name = save(root / "documents" / f"xnbl{i}_1.png", i)
        rows.append({"questionId": 49153 + i, "question": "What is the date?", "image": f"documents/{name}",
                     "docId": 14465, "answers": ["May 8", "8 May"], "data_split": "val"})  # fmt: skip
    value = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val", "data": rows}
    return [f"--data={write(root / 'val_v1.0.json', value)}"]


def chartqa(root: Path) -> list[str]:
    rows = [{"imgname": save(root / "png" / f"{i}.png", i), "query": "How many?", "label": "14"} for i in range(COUNT)]
    return [f"--data={write(root / 'test_human.json', rows)}"]


def ocrvqa(root: Path) -> list[str]:
    books = {}
    for i in range(COUNT):
        save(root / "images" / f"06981{i}.jpg", i)
        books[f"06981{i}"] = {
            "imageURL": "http://ecx.images-amazon.com/images/I/51.jpg", "title": "Walks", "authorName": "X",
            "genre": "Travel", "split": 1 if i == 0 else 3,
            "questions": ["Who wrote this book?", "Is this a travel book?"], "answers": ["X", "Yes"],
        }  # fmt: skip
    return [f"--data={write(root / 'dataset.json', books)}", f"--images={root / 'images'}"]


def ai2d(root: Path) -> list[str]:
    for i in range(COUNT):
        save(root / "images" / f"{i}.png", i)
        save(root / "abc_images" / f"{i}.png", i + 50)
        question = {"abcLabel": i % 2 == 0, "answerTexts": ["ears", "nose", "face"], "correctAnswer": 2,
                    "questionId": f"{i}.png-0"}  # fmt: skip
        questions = {"What is B?": question}
        write(root / "questions" / f"{i}.png.json", {"imageName": f"{i}.png", "questions": questions})
    write(root / "ai2d_test_ids.csv", "".join(f"{i}\n" for i in range(1, COUNT)))
    return [f"--data={root}"]


def scienceqa(root: Path) -> list[str]:
    problems = {}
    for i in range(COUNT + 2):
        problems[str(i)] = {
            "question": "Which is north?", "choices": ["red", "blue", "both"][: 2 + i % 2], "answer": i % 2,
            "hint": "Look at the map." if i % 2 else "", "image": "image.png" if i else None, "task": "closed choice",
            "grade": "grade2", "subject": "natural science" if i % 2 else "social science", "lecture": "",
            "split": "train" if i == COUNT + 1 else "test",
        }  # fmt: skip
        save(root / "test" / str(i) / "image.png", i)
    return [f"--data={write(root / 'problems.json', problems)}"]


def mmbench(root: Path, name: str = "mmbench_dev_20230712.tsv") -> list[str]:
    lines = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"]
    for i in range(COUNT):
        options = ["red", "blue", "green" if i % 2 else "", 'two"s' if i == 3 else ""]
        hint = "A plain hint." if i == 1 else "nan"
        row = [
            str(240 + i),
            f"Which one is {i}?",
            hint,
            *options,
            "AB"[i % 2],
            f"cat{i % 2}",
            encoded(i),
            "s",
            "l",
            "",
            "dev",
        ]
        lines.append("\t".join('"' + field.replace('"', '""') + '"' if '"' in field else field for field in row))
    return [f"--data={write(root / name, chr(10).join(lines) + chr(10))}"]


def mmbench_cn(root: Path) -> list[str]:
    return mmbench(root, "mmbench_dev_cn_20231003.tsv")


def seed(root: Path) -> list[str]:
    rows = []
    for i in range(COUNT):
        (root / "SEED-Bench-image").mkdir(parents=True, exist_ok=True)
        picture(i).save(root / "SEED-Bench-image" / f"1454426_{i}", "JPEG")  # as published: without an ending
        rows.append({"answer": "ABCD"[i % 4], "choice_a": "One", "choice_b": "Two", "choice_c": "Three",
                     "choice_d": "Four", "data_id": f"1454426_{i}", "data_type": "image", "question": "How many?",
                     "question_id": f"10166{i}", "question_type_id": 1 + i % 2, "segment": []})  # fmt: skip
    video = {**rows[0], "data_type": "video", "data_id": "v.mp4", "question_id": "9", "question_type_id": 10}
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    data = write(root / "SEED-Bench.json", {"questions": [*rows, video], "question_type": types})
    return [f"--data={data}", f"--images={root / 'SEED-Bench-image'}"]


def mmmu(root: Path) -> list[str]:
    rows = []
    for i in range(COUNT + 2):
        row: dict[str, Any] = {f"image_{k}": None for k in range(1, 8)}
        row["image_1"] = save(root / f"m{i}.png", i)
        row["image_2"] = {"bytes": encoded(i + 70), "path": "x.jpg"} if i % 2 else None
        closed = i % 3 != 2
        options = ["<image 2>", "$8", "$10"] if i % 2 else ["$6", "$8", "$10", "$12", "$14"]
        rows.append({
            **row, "id": f"validation_{'Accounting' if i < 3 else 'Art'}_{i}",
            "question": f"<image 1> How much is {i}?",
            "options": str(options) if closed else "[]", "answer": "ABC"[i % 3] if closed else "['8', '8.0']",
            "explanation": "", "question_type": "multiple-choice" if closed else "open",
            "topic_difficulty": "Easy", "subfield": "x",
        })  # fmt: skip
    return [f"--data={write_lines(root / 'validation.jsonl', rows)}"]


def mme(root: Path) -> list[str]:
    for i in range(2):
        nested, flat = root / "artwork", root / "code_reasoning"
        save(nested / "images" / "toy_dataset" / f"{i}.jpg", i)  # as published
        text = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
        write(nested / "questions_answers_YN" / f"{i}.txt", text)
        save(flat / f"00{i}.png", i + 9)
        write(flat / f"00{i}.txt", text)
    return [f"--data={root}"]


def pope(root: Path) -> list[str]:
    rows = []
    for i in range(COUNT):
        name = save(root / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
        rows.append({"question_id": i + 1, "image": name, "text": "Is there a dog in the image?",
                     "label": "yes" if i % 2 else "no"})  # fmt: skip
    return [f"--data={write_lines(root / 'coco_pope_adversarial.json', rows)}", f"--images={root / 'val2014'}"]


def refcoco(root: Path) -> list[str]:
    rows = []
    for i in range(COUNT):
        name = save(root / "train2014" / f"COCO_train2014_{i:012d}.jpg", i)
        rows.append({"image": f"data/refcoco/train2014/{name}", "sent": "left square", "bbox": [2.0, 3.5, 20.0, 30.0],
                     "height": 32, "width": 40})  # fmt: skip
    return [f"--data={write_lines(root / 'refcoco_testA.jsonl', rows)}", f"--images={root}"]


def nocaps(root: Path) -> list[str]:
    images = [
        {"id": i, "file_name": save(root / "val" / f"{i}ab.jpg", i), "width": 40, "height": 32,
         "domain": "in-domain" if i % 2 else "out-domain"} for i in range(COUNT)
    ]  # fmt: skip
    captions = [
        {"id": 10 * i + k, "image_id": i, "caption": f"A square number {k}."} for i in range(COUNT) for k in range(3)
    ]
    data = write(root / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    return [f"--data={data}", f"--images={root / 'val'}"]


def flickr30k(root: Path) -> list[str]:
    images = [
        {"filename": save(root / "flickr30k-images" / f"{i}.jpg", i), "imgid": i, "split": "test" if i else "train",
         "sentids": [i], "sentences": [{"raw": f"Two dogs {i}.", "tokens": ["two", "dogs"]}]} for i in range(COUNT)
    ]  # fmt: skip
    data = write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    return [f"--data={data}", f"--images={root / 'flickr30k-images'}"]


def coco_captions(root: Path) -> list[str]:
    return nocaps(root)


MAKERS: dict[str, Callable[[Path], list[str]]] = {
    "vqav2": vqa, "okvqa": okvqa, "textvqa": textvqa, "vizwiz": vizwiz, "gqa": gqa, "docvqa": docvqa,
    "chartqa": chartqa, "ocrvqa": ocrvqa, "ai2d": ai2d, "scienceqa": scienceqa, "mmbench": mmbench,
    "mmbench-cn": mmbench_cn, "seed": seed, "mmmu": mmmu, "mme": mme, "pope": pope, "refcoco": refcoco,
    "refcoco+": refcoco, "refcocog": refcoco, "flickr30k": flickr30k, "nocaps": nocaps, "coco-captions": coco_captions,
}  # fmt: skip
QUESTIONS = {"ocrvqa": 8, "ai2d": 4, "mmbench": 13, "mmbench-cn": 13, "mmmu": 7, "mme": 8, "flickr30k": 4}
"""How many there are where it is not COUNT. MMBench: rotations of 2, 3, 2, 4 and 2 options."""
