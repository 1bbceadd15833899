"""Write ``scores.json``: what public scorers say of the predictions below.

    pip download --no-deps lmms-eval==0.7.3 && unzip lmms_eval-0.7.3-py3-none-any.whl -d X
    python tests/evaluation/reference/make_scores.py X      # with pycocoevalcap 1.2, and Java for its tokenizer

lmms-eval (MIT) needs some hundred packages, so only the scoring functions are taken out of its files and run.
"""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

TASKS = Path(sys.argv[1]) / "lmms_eval" / "tasks"

VQA_TEXTS = [
    "The red car.",
    "a man, a plan",
    "two dogs",
    "none",
    "1,000",
    "3.14",
    "5.",
    "dont know",
    "couldntve",
    "youve got it",
    "t-shirt",
    "black-white",
    "black - white",
    "it's 5:30",
    "yes!",
    "what? no",
    "10 o'clock",
    "oclock",
    "U.S.A.",
    "red/blue",
    "an apple a day",
    "Ten",
    "$5,000.00",
    "(left)",
    "yall'd've",
    '"stop"',
    "who's",
    "whos",
    "\n new line ",
    "#1 fan",
    "50%",
    "a&b",
    "shedve",
    "howd",
    "mr. smith",
    "e.g. this",
    "thirty two",
    "zero",
    "ain't",
    "maam",
]
VQA_ANSWERS = [
    ("red", ["red"] * 10),
    ("red", ["red"] * 3 + ["blue"] * 7),
    ("Red.", ["red"] * 2 + ["blue"] * 8),
    ("blue", ["red"] * 9 + ["blue"]),
    ("two", ["2"] * 4 + ["three"] * 6),
    ("the dog", ["dog", "a dog", "Dog!"] + ["cat"] * 7),
    ("t shirt", ["t-shirt"] * 5 + ["shirt"] * 5),
    ("", ["no"] * 10),
    ("dont", ["don't"] * 3 + ["do"] * 7),
    ("pepsi", ["pepsi", "pepsi", "coke", "pepsi", "pepsi", "soda", "soda", "x", "y", "z"]),
]
ANLS = [
    ("May 8", ["may 8"]),
    ("May 8th", ["May 8", "8 May"]),
    ("12/3", ["12/30/1999"]),
    ("", ["x"]),
    ("abcd", ["abxy"]),
    ("abcde", ["abxyz"]),
    ("T.F.  Riehl", ["T.F. Riehl", "T.F. RIEHL"]),
    ("$1,20", ["$1.20"]),
    ("kitten", ["sitting"]),
]
RELAXED = [
    ("14", "14"),
    ("14.7", "14"),
    ("14.71", "14"),
    ("13.3", "14"),
    ("5%", "0.05"),
    ("5%", "5"),
    ("Yes", "yes"),
    ("0", "0"),
    ("0.01", "0"),
    ("about 14", "14"),
    ("-10", "-10.4"),
    ("10", "-10"),
    ("105", "100"),
    ("100", "105.3"),
    ("95.2", "100"),
    ("100", "95"),
    ("95", "100"),
    ("1e2", "100"),
    ("12%", "12.5%"),
    ("n/a", "N/A"),
]
YES_NO = [
    "Yes",
    "no",
    "Yes, it is.",
    "No.",
    "yes it",
    "There is",
    "N",
    "y",
    "not sure",
    "Is no",
    "Nothing",
    "I know",
    "",
    "YES!",
    "No, there is not",
    "yeah no",
]
OPEN = [
    ("8", ["8", "8.0"]),
    ("8.001", ["8"]),
    ("8.01", ["8"]),
    ("the answer is 8", ["8"]),
    ("$1,200", ["1200"]),
    ("Paris", ["paris"]),
    ("in Paris", ["Paris"]),
    ("London", ["Paris"]),
    ("b", ["b"]),
    ("3 or 4", ["4"]),
    ("0.33", ["0.333"]),
    ("-5", ["5"]),
    ("There are 5 cats and 3 dogs, so the answer is 8.", ["8"]),
    ("There are 5 cats and 3 dogs, so the answer is 8.", ["5"]),
    ("5 + 3 = 8", ["8"]),
    ("5 + 3 = 8\nin all", ["8"]),
    ("The city is Paris\nIt could be London", ["london", "rome"]),
    ("The city is Paris. It is London", ["paris"]),
    ("Therefore:\nthe result is .5", ["0.5"]),
    ("1,200.5", ["1200.5"]),
    ("about 1,200.5 m", ["1200.5"]),
    ("1.2e3 m", ["1200"]),
    ("it is blue", ["b"]),
    ("answer b", ["b"]),
    ("cab", ["b"]),
    ("so ?", ["?"]),
    ("the answer is ", ["is"]),
    ("", ["x"]),
    ("Final answer = -3.456", ["-3.46"]),
    ("3.456,7", ["7"]),
    ("10%", ["10"]),
    ("5 or 6\n\n7", ["7"]),
]
BOXES = [
    ((0, 0, 10, 10), (0, 0, 10, 10)),
    ((0, 0, 10, 10), (0, 5, 10, 10)),
    ((0, 0, 10, 10), (0, 5.1, 10, 10)),
    ((2, 3, 8, 9), (4, 1, 9, 7)),
    ((0, 0, 5, 5), (5, 5, 9, 9)),
    ((0, 0, 5, 5), (7, 7, 9, 9)),
    ((0.5, 0.25, 90.75, 33.3), (11.1, 0.0, 88.8, 44.4)),
]
CAPTIONS = [
    "A man's red-and-white T-shirt hangs on a line.",
    "The dog doesn't like the cat; it's barking, loudly!",
    "Two people (a man and a woman) are walking down the street...",
    '"Stop" sign at 5:30 p.m. on U.S. Highway 101',
    "There are 1,000 birds & 2 cats.",
    "I cannot see the 3/4 full glass",
    "The players' bench isn't empty -- it's full.",
    "A 20-year-old boy rides a skateboard/bike at 50% speed",
    "She'll go; they've been, we're here, I'd say, I'm fine",
    "cheese, onions,and tomatoes on a pizza.",
    "A man in a 'Yankees' cap",
    "A plate of food with a $5.99 tag #1",
    "A cafe and a naïve café on Main St. in Washington D.C.",
    "a close up of a sandwich with fries . ",
    "Mr. Smith and Dr. Jones stand",
    "A train with the numbers 1-2-3 on it",
    "A bus is parked at the corner,",
    "Someone's dog can't jump over the dogs' fence",
    "Sheep grazing @ the park w/ a dog_house",
    "A black/white cat. A dog runs!",
    "gonna wanna gotta lemme 'em",
    "A baseball player, #22, at bat in the 9th inning",
    'The "big" one [left] {right}',
    "the man won't go o'clock ma'am",
    "A TV, an iPod and a PC.",
    "Wow... nice -- really",
    "A 1970s car with 3D wheels, 50mm lens",
    "A sign: 'No Parking'",
    "A couple of people-- one happy",
    "he said \u201chello\u201d and it\u2019s",
    "a woman in her 20's",
    "It is a dog!!! Yes??",
    "50% off",
    "the cat's-eye",
    "AT&T sign",
    "B&b inn",
    "M&Ms and m&m's",
    "the letter P. is big",
    "slip 'n' slide",
    "rock'n'roll",
    "WWW.Foo.com site",
    "2x4 and 3X3",
    "5+5",
    "2nd 3rd 1990's 90s '90s",
    "John F. Kennedy",
    "Ph.D. man",
    "no. 5",
    "end.Another start",
    "user@mail.com",
    "#tag @home",
    "hot-dog--bun",
    "20x30-foot",
    "\u2026 and so",
    "caf\u00e9\u2014bar",
    "A fire hydrant is being paint as an U.S.A flag.",
    "the time of 5:54pm.",
    "Ft. Spokane and Woodfield Rd.",
]
CIDER = [
    ("A cat on a mat.", ["a cat sits on a mat", "The cat's on the mat.", "A cat lying on a red mat"]),
    ("Two dogs run fast", ["two dogs run", "Two dogs are running (fast) in a field."]),
    ("a blue boat", ["A red car.", "The car is red."]),
    ("A man doesn't ride a T-shirt", ["A man doesn't ride a horse.", "the man in a T-shirt can't ride"]),
]


def take(path: str, *names: str, **given: Any) -> dict[str, Any]:
    """Run only the named functions, classes and constants of a file."""
    tree = ast.parse((TASKS / path).read_text())
    kept = []
    for node in tree.body:
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        if name in names:
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
            kept.append(node)
    space = {"re": re, "defaultdict": defaultdict, "statistics": statistics, **given}
    exec(compile(ast.Module(kept, []), path, "exec"), space)
    return space


class Quiet:
    """Takes the place of a logger."""

    def info(self, *_: Any) -> None:
        """Say nothing."""


def captions() -> dict[str, Any]:
    """Tokens and CIDEr by the COCO evaluation's own tokenizer, a Java program."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(texts: dict[int, list[str]]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({key: [{"caption": one} for one in some] for key, some in texts.items()})

    said = tokens({i: [text] for i, (text, _) in enumerate(CIDER)})
    true = tokens(dict(enumerate(texts for _, texts in CIDER)))
    total, each = Cider().compute_score(true, said)
    found = tokens({i: [text] for i, text in enumerate(CAPTIONS)})
    return {
        "captions": [[text, found[i][0].rstrip()] for i, text in enumerate(CAPTIONS)],
        "cider": [CIDER, float(total), [float(one) for one in each]],
    }


def main() -> None:
    """Score and write."""
    processor = take("_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")["EvalAIAnswerProcessor"]
    vqa = take("vqav2/utils.py", "vqav2_process_results", EvalAIAnswerProcessor=processor)["vqav2_process_results"]
    anls = take("../api/metrics.py", "levenshtein_distance", "anls")["anls"]
    relaxed = take("chartqa/utils.py", "relaxed_correctness")["relaxed_correctness"]
    mme = take("mme/utils.py", "parse_pred_ans", "eval_type_dict", "mme_aggregate_results", eval_logger=Quiet())
    pope_names = [f"pope_aggregate_{name}" for name in ("accuracy", "precision", "recall", "f1_score")]
    pope = take("pope/utils.py", *pope_names)
    boxes = take("refcoco/utils_rec.py", "compute_iou", "compute_accuracy")
    opened = take(
        "mmmu/utils.py", "extract_numbers", "check_is_number", "normalize_str", "parse_open_response", "eval_open",
        math=math,
    )  # fmt: skip

    def processed(text: str) -> str:
        one = processor()
        clean = text.replace("\n", " ").replace("\t", " ").strip()
        return one.process_digit_article(one.process_punctuation(clean))

    def vqa_score(said: str, answers: list[str]) -> float:
        people = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
        return float(vqa({"answers": people, "question_id": 0}, [said])["exact_match"])

    mme_rows = [
        {"question_id": f"q{i // 2}", "category": "count" if i < 8 else "OCR", "score": float(i % 3 != 0)}
        for i in range(16)
    ]
    pope_rows = [{"prediction": p, "ground_truth": t} for p, t in zip("yynnynynyy", "ynnyynnyyn", strict=True)]
    full = {"y": "yes", "n": "no"}
    pope_rows = [{key: full[value] for key, value in row.items()} for row in pope_rows]
    for row in pope_rows:
        row["score"] = float(row["prediction"] == row["ground_truth"])
    result = {
        "scorer": "lmms-eval 0.7.3",
        "vqa_texts": [[text, processed(text)] for text in VQA_TEXTS],
        "vqa": [[said, answers, vqa_score(said, answers)] for said, answers in VQA_ANSWERS],
        "anls": [[said, answers, float(anls(answers, [said])["anls"])] for said, answers in ANLS],
        "relaxed": [[said, true, bool(relaxed(said, true))] for said, true in RELAXED],
        "mme_answer": [[said, mme["parse_pred_ans"](said)] for said in YES_NO],
        "mme": [mme_rows, mme["mme_aggregate_results"](mme_rows)],
        "pope": [pope_rows, {name.removeprefix("pope_aggregate_"): pope[name](pope_rows) for name in pope_names}],
        "open": [
            [said, answers, bool(opened["eval_open"](answers, opened["parse_open_response"](said)))]
            for said, answers in OPEN
        ],
    }
    result["boxes"] = [[a, b, boxes["compute_iou"](a, b), bool(boxes["compute_accuracy"](a, b))] for a, b in BOXES]
    result |= {"caption_scorer": "pycocoevalcap 1.2 with its PTBTokenizer", **captions()}
    path = Path(__file__).with_name("scores.json")
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
