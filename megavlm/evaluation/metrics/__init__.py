"""Scores of answers: of held-out records (``heldout``) and of the public benchmarks, one module per definition."""

from megavlm.evaluation.metrics.heldout import Box, box_hit, box_iou, exact_match, parse_boxes, score

__all__ = ["Box", "box_hit", "box_iou", "exact_match", "parse_boxes", "score"]
