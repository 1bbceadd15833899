"""Say how far our caption tokenizer is from the COCO evaluation's: PTBTokenizer, a Java program in pycocoevalcap.

    python tests/evaluation/reference/compare_tokenizer.py captions_val2017.json

Prints the captions that get other tokens, and CIDEr of each picture's first caption against its others by both.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from megavlm.evaluation.metrics.captions import tokenize


def main(path: str) -> None:
    """Compare on a file of captions in COCO's form."""
    groups = defaultdict(list)
    with open(path, encoding="utf-8") as file:
        for one in json.load(file)["annotations"]:
            groups[one["image_id"]].append(one["caption"])
    texts = [text for group in groups.values() for text in group]
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    theirs, ours = [found[i][0] for i in range(len(texts))], [tokenize(text) for text in texts]
    differ = [pair for pair in zip(theirs, ours, strict=True) if pair[0].split() != pair[1].split()]
    for pair in differ:
        print("theirs: {}\n  ours: {}".format(*pair))
    print(f"{len(differ)} of {len(texts)} captions differ")
    for name, tokens in (("theirs", theirs), ("ours", ours)):
        rest = iter(tokens)
        said, true = {}, {}
        for key, group in groups.items():
            words = [next(rest) for _ in group]
            if len(words) > 1:
                said[key], true[key] = words[:1], words[1:]
        print(f"CIDEr by {name}: {Cider().compute_score(true, said)[0]:.7f}")


if __name__ == "__main__":
    main(sys.argv[1])
