"""Each published format becomes the records that it should; what cannot is counted by its cause."""

import json
import logging
from pathlib import Path

import pytest
from data_helpers import encode_image
from PIL import Image

from megavlm import cli
from megavlm.data.formats import Broken, BrokenError, Source, choose
from megavlm.data.formats.vg_regions import to_box
from megavlm.data.schema import parse_conversation

GIRAFFE = "\u4e00\u53ea\u957f\u9888\u9e7f\u3002"


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_image(Image.new("RGB", size, (9, 99, 199))))


def read(path: Path, content: object, images: Path, name: str | None = None, **options: object) -> tuple[list, list]:
    """The (user, assistant) texts of each record's turns, with its task; and (id, cause) of what is broken."""
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, content)) if path.suffix == ".jsonl" else json.dumps(content))
    source = Source(path, images, **options)
    records, broken = [], []
    for entry in choose(source, name).load().read(source):
        if isinstance(entry, Broken):
            broken.append((entry.id, entry.cause))
            continue
        parse_conversation(entry)  # what a reader makes is a sound record
        texts = [turn["value"] for turn in entry["conversations"]]
        records.append((entry.get("id"), entry.get("task"), *texts))
    return records, broken


def test_llava(tmp_path: Path) -> None:
    def record(number: int, image: object, *texts: str) -> dict:
        speakers = ("human", "gpt") * len(texts)
        turns = [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=False)]
        return {"id": str(number), "conversations": turns} | ({} if image is None else {"image": image})

    content = [
        record(0, "coco/1.jpg", "<image>\nWhat is it?", "A cat.", "Sure?", "Yes."),
        record(1, "coco/2.jpg", "Describe it.\n<image>", "A dog."),
        record(2, ["a.jpg", "b.jpg"], "<image> <image>\nWhich is red?", "The first."),
        record(3, None, "Who are you?", "A model."),
        record(4, "c.jpg", "<image>\n<image>\nBoth?", "No."),
        record(5, "c.jpg", "No picture?", "No."),
        record(6, "c.jpg", "What is it?", "<image>"),
        record(7, "c.jpg", "<image>\n<img>d.jpg</img>", "No."),
        record(8, 5, "<image>", "No."),
        {"id": "9", "image": "c.jpg"},
        "?",
    ]
    records, broken = read(tmp_path / "llava.json", content, tmp_path, "llava")
    assert read(tmp_path / "llava.json", content[:4], tmp_path) == (records, [])
    assert records == [
        ("0", None, "Picture 1: <img>coco/1.jpg</img>\nWhat is it?", "A cat.", "Sure?", "Yes."),
        ("1", None, "Describe it.\nPicture 1: <img>coco/2.jpg</img>", "A dog."),
        ("2", None, "Picture 1: <img>a.jpg</img>\nPicture 2: <img>b.jpg</img>\nWhich is red?", "The first."),
        ("3", None, "Who are you?", "A model."),
    ]
    mismatch = "pictures do not match"
    assert broken == [("4", mismatch), ("5", mismatch), ("6", mismatch), ("7", "markup in text"), ("8", "bad record"),
                      ("9", "bad record"), (None, "bad record")]  # fmt: skip


def test_llava_leaves_out_what_its_own_trainer_does(tmp_path: Path) -> None:
    def record(*speakers: str) -> dict:
        return {"conversations": [{"from": who, "value": f"{who} {i}"} for i, who in enumerate(speakers)]}

    content = [
        record("gpt", "human", "gpt", "human"),
        record("human", "gpt", "human"),
        record("gpt", "human"),
        record("human"),
    ]
    path = tmp_path / "llava.jsonl"
    path.write_text("\n".join(map(json.dumps, content)))
    records = list(choose(Source(path, tmp_path), "llava").load().read(Source(path, tmp_path)))
    assert [[turn["value"] for turn in entry["conversations"]] for entry in records] == [
        ["human 1", "gpt 2"],
        ["human 0", "gpt 1"],
        ["gpt 0", "human 1"],  # nothing to learn: the schema refuses it
        ["human 0"],
    ]


@pytest.mark.parametrize("name", ["mix.json", "mix.jsonl"])
def test_pictures_far_behind_text_tell_the_format_too(tmp_path: Path, name: str) -> None:
    text = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}]
    shown = [{"from": "human", "value": "<image>\nHi."}, {"from": "gpt", "value": "Ho."}]
    content = [{"conversations": text}] * 500 + [{"id": "p", "image": "a.jpg", "conversations": shown}]
    records, broken = read(tmp_path / name, content, tmp_path)
    assert (len(records), broken) == (501, [])
    assert records[-1][2] == "Picture 1: <img>a.jpg</img>\nHi."
    # Named as Qwen-VL's, it would lose its picture: refused, not trained on without.
    records, broken = read(tmp_path / name, None, tmp_path, "qwen-vl")
    assert (len(records), broken) == (500, [("p", "pictures do not match")])


def test_codefuse_takes_the_task_from_the_file_or_folder(tmp_path: Path) -> None:
    def task(path: str, answer: str) -> None:
        turns = [{"from": "human", "value": "<image>\nRead."}, {"from": "gpt", "value": answer}]
        file = tmp_path / "tasks" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = {"id": 1, "image": "a.jpg", "conversations": turns}
        file.write_text(json.dumps(lines) + "\n{" if file.suffix == ".jsonl" else json.dumps([lines]))

    for path, answer in (("ocr.json", "one"), ("vqa/2.jsonl", "three"), ("vqa/1.json", "two"), (".hidden.json", "no")):
        task(path, answer)
    (tmp_path / "tasks" / "README.md").write_text("no task")
    records, broken = read(tmp_path / "tasks", None, tmp_path)
    assert [(record[1], record[3]) for record in records] == [("ocr", "one"), ("vqa", "two"), ("vqa", "three")]
    assert broken == [(None, "bad JSON")]


def test_coco_captions(tmp_path: Path) -> None:
    picture(tmp_path / "train2017" / "000000000009.jpg")
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "A plate of food. \n"},
            {"id": 2, "image_id": 25, "caption": GIRAFFE},
            {"id": 3, "image_id": 7, "caption": "Not there."},
            {"id": 4, "image_id": 9, "caption": " "},
            {"id": 5, "image_id": 9, "caption": "a <img>../secret.jpg</img>"},
        ],
    }
    records, broken = read(tmp_path / "captions_train2017.json", content, tmp_path)
    assert records == [
        (1, "caption", "<img>train2017/000000000009.jpg</img>Generate the caption in English:", "A plate of food."),
        (2, "caption", "<img>000000000025.jpg</img>Generate the caption in Chinese:", GIRAFFE),
    ]  # fmt: skip
    assert broken == [(3, "image missing"), (4, "empty text"), (5, "markup in text")]


def test_vqav2_questions_with_their_annotations(tmp_path: Path) -> None:
    picture(tmp_path / "train2014" / "COCO_train2014_000000458752.jpg")
    ids = (458752000, 458752001, 458752002)
    questions = [{"image_id": 458752, "question": f"What is {i}?", "question_id": i} for i in ids]
    answers = [{"answer": text, "answer_id": 1} for text in ("red", "blue", "blue")]
    annotations = [
        {"question_id": ids[0], "multiple_choice_answer": "net", "answers": answers},
        {"question_id": ids[1], "answers": answers},  # as OK-VQA has it
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"annotations": annotations}))
    content = {"questions": questions, "data_subtype": "train2014"}
    records, broken = read(tmp_path / "questions.json", content, tmp_path, annotations=path)
    image = "<img>train2014/COCO_train2014_000000458752.jpg</img>"
    assert records == [
        (ids[0], "vqa", f"{image}What is {ids[0]}? Answer:", "net"),
        (ids[1], "vqa", f"{image}What is {ids[1]}? Answer:", "blue"),
    ]
    assert broken == [(ids[2], "no answer")]
    with pytest.raises(ValueError, match="--annotations FILE"):
        read(tmp_path / "questions.json", None, tmp_path)


@pytest.mark.parametrize(
    ("content", "image", "answers"),
    [
        ([{"image": "v.jpg", "question": "Q?", "answers": [{"answer": a} for a in "bab"]}], "v.jpg", ["b"]),
        ({"data": [{"question_id": 1, "image_id": "t", "question": "Q?", "answers": ["a", "b", "b"]}]}, "t.jpg", ["b"]),
        ({"data": [{"questionId": 1, "image": "documents/d_1.png", "question": "Q?", "answers": ["first", "b", "b"]}]},
         "documents/d_1.png", ["first"]),
        ({"0": {"imageId": "g", "question": "Q?", "answer": "yes", "fullAnswer": "Yes."}}, "g.jpg", ["yes"]),
        ({"0761": {"imageURL": "http://x/51.gif", "questions": ["Q?", "Q?"], "answers": ["one", "two"]}}, "0761.gif",
         ["one", "two"]),
        ([{"id": 5, "qas": [{"qa_id": 1, "question": "Q?", "answer": "a"}]}], "VG_100K/5.jpg", ["a"]),
    ],
    ids=["vizwiz", "textvqa", "docvqa", "gqa", "ocrvqa", "visual-genome"],
)  # fmt: skip
def test_other_question_files(tmp_path: Path, content: object, image: str, answers: list[str]) -> None:
    records, broken = read(tmp_path / "q.json", content, tmp_path)
    assert [record[2:] for record in records] == [(f"<img>{image}</img>Q? Answer:", answer) for answer in answers]
    assert broken == []


def test_ocr_vqa_keeps_its_held_out_books_out(tmp_path: Path) -> None:
    books = {str(n): {"imageURL": "x.jpg", "questions": ["Q?"], "answers": ["a"], "split": n} for n in (1, 2, 3)}
    records, broken = read(tmp_path / "dataset.json", books, tmp_path)
    assert [record[0] for record in records] == ["1-0"]
    assert broken == [("2", "held out"), ("3", "held out")]


def test_visual_genome_regions_become_boxes_in_thousandths(tmp_path: Path) -> None:
    picture(tmp_path / "VG_100K_2" / "1.jpg", (800, 600))
    picture(tmp_path / "VG_100K" / "2.jpg", (400, 200))

    def region(number: int, x: int, y: int, width: int, height: int, phrase: str = "a clock") -> dict:
        return {"region_id": number, "x": x, "y": y, "width": width, "height": height, "phrase": phrase}

    content = [
        {"id": 1, "regions": [region(1, 400, 300, 80, 60), region(2, 0, 0, 800, 600, "the whole"),
                              region(3, 900, 0, 5, 5), region(4, 1, 1, 0, 5), region(5, 0, 0, 9, 9, "<ref>x</ref>")]},
        {"image_id": 2, "regions": [region(6, 100, 50, 100, 50, "a dog")]},
        {"id": 3, "regions": [region(7, 0, 0, 1, 1)]},
        {"id": "../../1", "regions": [region(8, 0, 0, 1, 1)]},
    ]  # fmt: skip
    records, broken = read(tmp_path / "region_descriptions.json", content, tmp_path, per_sample=1)
    assert records == [
        ("1-0", "grounding", "<img>VG_100K_2/1.jpg</img><ref>a clock</ref>", "<box>(500,500),(600,600)</box>"),
        ("1-1", "grounded caption", "<img>VG_100K_2/1.jpg</img><ref>This</ref><box>(0,0),(999,999)</box>",
         "is the whole"),
        ("2-0", "grounded caption", "<img>VG_100K/2.jpg</img><ref>This</ref><box>(250,250),(500,500)</box>",
         "is a dog"),
    ]  # fmt: skip
    assert broken == [(3, "bad box"), (4, "bad box"), (5, "markup in text"), (3, "image missing"),
                      ("../../1", "image missing")]  # fmt: skip
    # By default a conversation has several; the picture is shown once, and its size may come from image_data.json.
    info = tmp_path / "image_data.json"
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    info.write_text(json.dumps([{"image_id": 1, "width": 1600, "height": 1200, "url": url}]))
    (record, *_), _ = read(tmp_path / "region_descriptions.json", content, tmp_path, image_info=info)
    assert record[2:] == ("<img>VG_100K_2/1.jpg</img><ref>a clock</ref>", "<box>(250,250),(300,300)</box>",
                          "<ref>the whole</ref>", "<box>(0,0),(500,500)</box>",
                          "<ref>a clock</ref>", "<box>(562,0),(565,4)</box>")  # fmt: skip
    # In the words of other families; a picture stands where their templates have it.
    shown = "Picture 1: <img>VG_100K_2/1.jpg</img>\n"
    for boxes, first, second in (
        ("minigpt_v2", ("[refer] give me the location of a clock", "{<50><50><60><60>}"),
         ("[identify] what object is in this location {<0><0><100><100>}", "the whole")),
        ("cogvlm", ("Where is a clock? answer in [[x0,y0,x1,y1]] format.", "[[500,500,600,600]]"),
         ("Can you give me a description of the region [[000,000,999,999]] in image?", "the whole")),
    ):  # fmt: skip
        records, _ = read(tmp_path / "region_descriptions.json", content, tmp_path, per_sample=1, boxes=boxes)
        for record, (question, answer) in zip(records, (first, second), strict=False):
            assert record[2:] == (shown + question, answer)
    # A phrase that holds the notation itself is refused in that one alone.
    marked = {
        "minigpt_v2": ["a {<1><2><3><4>}", "[refer] x", "<p>x</p>", "a<delim>b"],
        "cogvlm": ["a [[000,001,002,003]]", "[[001,002,003,004;005,006,007,008]]"],
    }
    phrases = [phrase for of in marked.values() for phrase in of] + ["a sign [sic] {1} <3 [[x]]"]
    content = [{"id": 1, "regions": [region(at, 1, 1, 9, 9, phrase) for at, phrase in enumerate(phrases)]}]
    for boxes, of in marked.items():
        _, broken = read(tmp_path / "region_descriptions.json", content, tmp_path, per_sample=1, boxes=boxes)
        assert broken == [(phrases.index(phrase), "markup in text") for phrase in of]


@pytest.mark.parametrize(
    ("box", "text"),
    [
        ((-5, -5, 10, 10), "<box>(0,0),(100,100)</box>"),
        ((0, 0, float("inf"), 50), "<box>(0,0),(999,500)</box>"),
        ((0, 0, 33.4, 66.69), "<box>(0,0),(334,666)</box>"),
        ((float("nan"), 0, 10, 10), None),
        ((0, 0, 10**400, 10), None),
        ((50, 50, 50, 60), None),
        ((100, 0, 120, 10), None),
    ],
)
def test_boxes_are_cut_at_the_picture(box: tuple, text: str | None) -> None:
    if text is not None:
        assert to_box(*box, 100, 100) == text
        return
    with pytest.raises(BrokenError):
        to_box(*box, 100, 100)


def test_synthdog(tmp_path: Path) -> None:
    def line(name: str, truth: object) -> dict:
        return {"file_name": name, "ground_truth": truth if isinstance(truth, str) else json.dumps(truth)}

    quad = [[10, 20], [110, 25], [109, 45], [9, 40]]
    content = [
        line("image_0.jpg", {"gt_parse": {"text_sequence": "Some text. "}}),
        line("image_1.jpg", {"gt_parse": {"text_sequence": "one two"}, "size": [200, 100],
                             "lines": [{"text": "one", "quad": quad}, {"text": "two", "quad": quad}]}),
        line("image_2.jpg", "{"),
        line("image_3.jpg", {"gt_parse": {}}),
        line("image_4.jpg", {"size": [200, 100], "lines": [{"text": "one", "quad": quad[:3]}]}),
    ]  # fmt: skip
    picture(tmp_path / "pages" / "train" / "image_0.jpg")
    records, broken = read(tmp_path / "pages" / "train" / "metadata.jsonl", content, tmp_path / "pages")
    corners = "<quad>(50,200),(550,250),(545,450),(45,400)</quad>"
    assert records == [
        ("image_0.jpg", "ocr", "<img>train/image_0.jpg</img>OCR:", "Some text."),
        ("image_1.jpg", "ocr with grounding", "<img>train/image_1.jpg</img>OCR with grounding:",
         f"<ref>one</ref>{corners}<ref>two</ref>{corners}"),
    ]  # fmt: skip
    assert broken == [("image_2.jpg", "bad JSON"), ("image_3.jpg", "bad record"), ("image_4.jpg", "bad box")]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = cli.main(["prepare", *map(str, words)])
    return code, capsys.readouterr().err


def test_what_a_file_is_must_be_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "user", "value": "<img>a.jpg</img> <image>"}, {"from": "assistant", "value": "ok"}]
    both, neither = tmp_path / "both.json", tmp_path / "neither.json"
    both.write_text(json.dumps([{"conversations": turns}]))
    neither.write_text(json.dumps({"images": [], "annotations": [{"bbox": [0, 0, 1, 1]}]}))
    common = ("--images", tmp_path, "--out", tmp_path / "out")
    code, err = run(capsys, both, *common)
    assert (code, err) == (2, f"megavlm: error: {both} could be qwen-vl or llava; say which with --format\n")
    code, err = run(capsys, neither, *common)
    assert code == 2
    assert err.startswith(f"megavlm: error: {neither} looks like none of qwen-vl, llava, ")
    assert len(err.splitlines()) == 1
    code, err = run(capsys, both, *common, "--format", "lava")
    assert code == 2
    assert "no such format; there are qwen-vl, llava" in err
    code, err = run(capsys, both, *common, "--format", "qwen-vl", "--per-sample", "3")
    assert (code, err) == (2, "megavlm: error: --per-sample has no meaning for the format qwen-vl; leave it out\n")
    (tmp_path / "pages").mkdir()
    code, err = run(capsys, tmp_path / "pages", *common)
    assert code == 2
    assert err.startswith(f"megavlm: error: {tmp_path / 'pages'} is a folder, and not one of CodeFuse's")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_hostile_paths_and_urls_are_counted_by_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "images" / "good.jpg")
    picture(tmp_path / "secret.jpg")
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "images" / "html.jpg").write_text("<html>404</html>")
    names = ["good.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "https://example.org/a.jpg",
             "file:///etc/passwd", "no.jpg", "html.jpg", "a</img><img>good.jpg"]  # fmt: skip
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is blue."}]
    records = [{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(names)]
    source = tmp_path / "llava.json"
    source.write_text(json.dumps(records))
    caplog.set_level(logging.INFO)
    out = tmp_path / "out"
    assert cli.main(["prepare", str(source), "--images", str(tmp_path / "images"), "--out", str(out)]) == 0
    assert "1 samples with 1 images in 1 shards; 8 rejected" in caplog.text
    assert "rejected by cause: 6 unsafe image path, 1 image missing, 1 bad image (not an image)" in caplog.text
    listed = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["id"] for line in listed] == list("12345678")
    assert "none is fetched" in listed[3]["reason"]
