"""Grounding benchmarks as models of other notations than Qwen-VL's are asked them: in the words they were taught."""

from __future__ import annotations

from dataclasses import replace

from megavlm.data.box_space import BoxSpace
from megavlm.evaluation.benchmarks.scores import box_accuracy_in
from megavlm.evaluation.benchmarks.spec import Benchmark

LONGEST = 100
"""Longest answer in tokens, for JSON and named boxes too: ours. Who answers with a box alone ends before."""


def as_taught(benchmark: Benchmark, question: str | None, space: BoxSpace) -> Benchmark:
    """Return a benchmark as it is asked of a model and scored.

    Args:
        benchmark: any; one that asks for no boxes stays as it is.
        question: with ``{thing}``, of :func:`megavlm.inference.boxes.own_question`; None to ask as the benchmark says.
        space: what the model's numbers count.
    """
    if not benchmark.finds:
        return benchmark
    scored = replace(benchmark, metric=box_accuracy_in(space))
    if question is None:
        return scored
    prompt = "Picture 1: {pictures}\n" + question.format(thing="{question}")  # shown as the template has it
    return replace(scored, prompt=prompt, chat=True, max_new_tokens=LONGEST)
