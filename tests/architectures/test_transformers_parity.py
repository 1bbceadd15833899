"""Decoders and towers compute what Transformers' models compute, forward and backward."""

from __future__ import annotations

import pytest
import transformers_cases
from transformers_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str) -> None:
    transformers_cases.compare(name)
