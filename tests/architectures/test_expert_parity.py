"""Layers with experts compute what Transformers' models compute, forward and backward."""

from __future__ import annotations

import expert_cases
import pytest


@pytest.mark.parametrize("name", expert_cases.CASES)
def test_equals_transformers(name: str) -> None:
    expert_cases.compare(name)
