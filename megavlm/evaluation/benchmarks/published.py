"""Figures that papers and model cards publish, to stand beside a run's own on its report page."""

from __future__ import annotations

from collections.abc import Mapping

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "mmbench": {"circular_accuracy": {"LLaVA-1.5": 67.7, "Qwen-VL": 60.6, "CodeFuse-VLM-14B": 75.7}},
    "mmbench-cn": {"circular_accuracy": {"LLaVA-1.5": 63.6, "Qwen-VL": 56.7, "CodeFuse-VLM-14B": 69.8}},
    "vqav2": {"vqa_accuracy": {"LLaVA-1.5": 80.0, "Qwen-VL": 78.2, "CodeFuse-VLM-14B": 79.3}},
    "gqa": {"exact_match": {"LLaVA-1.5": 63.3, "Qwen-VL": 57.5, "CodeFuse-VLM-14B": 59.4}},
    "textvqa": {"vqa_accuracy": {"LLaVA-1.5": 61.3, "Qwen-VL": 63.8, "CodeFuse-VLM-14B": 63.9}},
    "vizwiz": {"vqa_accuracy": {"LLaVA-1.5": 53.6, "Qwen-VL": 38.9, "CodeFuse-VLM-14B": 45.3}},
    "mme": {
        "perception": {"Qwen-VL-Chat": 1487.57, "Belle-VL": 1595.34},
        "cognition": {"Qwen-VL-Chat": 360.71, "Belle-VL": 332.14},
    },
}
"""By benchmark, figure and model. Sources: CodeFuse-MFT-VLM's table; Belle-VL's model card; Qwen-VL's EVAL_MME.md."""

QUESTIONS: Mapping[str, tuple[int, ...]] = {
    "mmbench": (4329, 4377),
    "mmbench-cn": (4329, 4377),
    "vqav2": (214354,),
    "gqa": (12578,),
    "textvqa": (5000,),
    "vizwiz": (4319,),
    "mme": (2374,),
}
"""Questions of the published file of each (with MMBench's rotations: the dev parts of 2024 and of July 2023). Figures
of others are shown beside such a file's alone, not beside those of a part of it or of one's own file in its format.

Held against what others count of these files: MMBench of 2024 and VQAv2 in evalscope's documentation of its benchmarks;
GQA, TextVQA, MME and MMBench of 2023 in reports of runs on all of a part. VizWiz's number is unchecked."""


def published(benchmark: str, questions: int) -> Mapping[str, Mapping[str, float]]:
    """Return what others published of a benchmark, by figure and model; nothing for another number of questions."""
    return PUBLISHED.get(benchmark, {}) if questions in QUESTIONS.get(benchmark, ()) else {}
