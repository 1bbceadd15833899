"""The public benchmarks. One small file of readers per family; one line below registers a benchmark.

Prompts, longest answers and metrics are the Qwen-VL paper's (arXiv 2308.12966) and its ``eval_mm``; for POPE and
MMMU, which it does not have, they are ours. docs/evaluation.md has the table; ``own_words.py`` what becomes of it for
models that write boxes otherwise.
"""

from __future__ import annotations

from difflib import get_close_matches

from megavlm.config.errors import UserError
from megavlm.evaluation.benchmarks.choices import read_mmbench, read_mmmu, read_scienceqa, read_seed
from megavlm.evaluation.benchmarks.documents import read_ai2d, read_chartqa, read_docvqa, read_ocrvqa
from megavlm.evaluation.benchmarks.hub import ROWS
from megavlm.evaluation.benchmarks.parquet import is_parquet, read_rows
from megavlm.evaluation.benchmarks.pictures import read_captions, read_refcoco
from megavlm.evaluation.benchmarks.scores import (
    box_accuracy,
    caption_scores,
    choice_accuracy,
    circular_accuracy,
    mean_of,
    mme_scores,
    pope_scores,
)
from megavlm.evaluation.benchmarks.spec import Benchmark, BenchmarkFiles, Item
from megavlm.evaluation.benchmarks.vqa import read_gqa, read_textvqa, read_vizwiz, read_vqa
from megavlm.evaluation.benchmarks.yes_no import read_mme, read_pope
from megavlm.evaluation.metrics.text import anls, exact, relaxed
from megavlm.evaluation.metrics.vqa import vqa_accuracy

_ASK = "{pictures}{question} Answer:"
_CONTEXT = "{pictures}Context: {hint}\nQuestion: {question}\nOptions: {options}\nAnswer:"
_OPTIONS = "{pictures}\nQuestion: {question}\nOptions: {options}\nAnswer:"
_MMMU = "{question}\nOptions: {options}\nAnswer:"
_OPEN = "{question} Answer:"
_FIND = "{pictures}<ref>{question}</ref><box>"
_DESCRIBE = "{pictures}Describe the image in English:"
_TURN = "{pictures}\n{question}"
_PEOPLE = mean_of("vqa_accuracy", vqa_accuracy)
_EXACT = mean_of("exact_match", exact)
_CAPTIONS = "pycocoevalcap"

_ALL = (
    Benchmark("vqav2", read_vqa, _ASK, 10, _PEOPLE, "v2_OpenEnded_mscoco_val2014_questions.json"),
    Benchmark("okvqa", read_vqa, _ASK, 10, _PEOPLE, "OpenEnded_mscoco_val2014_questions.json"),
    Benchmark("textvqa", read_textvqa, _ASK, 10, _PEOPLE, "TextVQA_0.5.1_val.json"),
    Benchmark("vizwiz", read_vizwiz, _ASK, 10, _PEOPLE, "val.json"),
    Benchmark("gqa", read_gqa, _ASK, 10, _EXACT, "testdev_balanced_questions.json"),
    Benchmark("docvqa", read_docvqa, _ASK, 100, mean_of("anls", anls), "val_v1.0.json"),
    Benchmark("chartqa", read_chartqa, _ASK, 100, mean_of("relaxed_accuracy", relaxed), "test_human.json"),
    Benchmark("ocrvqa", read_ocrvqa, _ASK, 100, _EXACT, "dataset.json"),
    Benchmark("ai2d", read_ai2d, _ASK, 10, _EXACT, "the folder of ai2d-all.zip"),
    Benchmark("scienceqa", read_scienceqa, _CONTEXT, 0, choice_accuracy, "problems.json"),
    Benchmark("mmbench", read_mmbench, _CONTEXT, 0, circular_accuracy, "mmbench_dev_20230712.tsv"),
    Benchmark("mmbench-cn", read_mmbench, _CONTEXT, 0, circular_accuracy, "mmbench_dev_cn_20231003.tsv"),
    Benchmark("seed", read_seed, _OPTIONS, 0, choice_accuracy, "SEED-Bench.json"),
    Benchmark("mmmu", read_mmmu, _MMMU, 10, choice_accuracy, "validation-00000-of-00001.parquet", open_prompt=_OPEN),
    Benchmark("mme", read_mme, _TURN, 10, mme_scores, "the folder MME_Benchmark_release_version", chat=True),
    Benchmark("pope", read_pope, _ASK, 10, pope_scores, "coco_pope_adversarial.json"),
    Benchmark("refcoco", read_refcoco, _FIND, 28, box_accuracy, "refcoco_testA.jsonl", finds=True),
    Benchmark("refcoco+", read_refcoco, _FIND, 28, box_accuracy, "refcoco+_testA.jsonl", finds=True),
    Benchmark("refcocog", read_refcoco, _FIND, 28, box_accuracy, "refcocog_test.jsonl", finds=True),
    Benchmark("flickr30k", read_captions, _DESCRIBE, 30, caption_scores, "dataset_flickr30k.json", needs=_CAPTIONS),
    Benchmark("nocaps", read_captions, _DESCRIBE, 30, caption_scores, "nocaps_val_4500_captions.json", needs=_CAPTIONS),
    Benchmark("coco-captions", read_captions, _DESCRIBE, 30, caption_scores, "captions_val2014.json", needs=_CAPTIONS),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
"""By name."""


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark.

    Raises:
        UserError: there is none of this name; the message has the nearest ones and all others.
    """
    if name not in BENCHMARKS:
        near = get_close_matches(name.lower(), BENCHMARKS, cutoff=0.5)
        guess = f" did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--benchmark {name}: unknown;{guess} There are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read_items(benchmark: Benchmark, source: BenchmarkFiles) -> list[Item]:
    """Read a benchmark's own file, or its parquet files on Hugging Face's hub.

    Raises:
        MissingFileError: a file is missing.
        UserError: it is of another format, or the benchmark has none in parquet.
    """
    if not is_parquet(source.data):
        try:
            return benchmark.read(source)
        except UserError as error:
            raise UserError(f"{error}; {benchmark.name} reads {benchmark.file}, see docs/evaluation.md") from None
    if benchmark.name not in ROWS:
        raise UserError(f"{source.data}: {benchmark.name} reads {benchmark.file}, not parquet")
    return ROWS[benchmark.name](source, read_rows(source))
