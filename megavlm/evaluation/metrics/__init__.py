"""Scores of answers: of held-out records (``heldout``) and of the public benchmarks, one module per definition."""

from megavlm.evaluation.metrics.heldout import box_hit, box_iou, exact_match, score

__all__ = ["box_hit", "box_iou", "exact_match", "score"]
