"""Model parts on two tensor-parallel ranks equal their single-device references (one job for all of them)."""

from __future__ import annotations

from pathlib import Path

import pytest
from connector_cases import CASES
from convolution_cases import CASES as CONVOLUTIONS
from packed_cases import PACKED
from ranks import script
from reducer_cases import CASES as REDUCERS
from tower_cases import CASES as TOWERS
from transformers_cases import CASES as TRANSFORMERS_CASES


@pytest.mark.dist
def test_two_tensor_parallel_ranks() -> None:
    output = script(Path(__file__).with_name("tensor_parallel_worker.py"), world=2, timeout=600).output
    for name in (*CASES, *REDUCERS, *TRANSFORMERS_CASES, *TOWERS, *CONVOLUTIONS, *PACKED, "pictures", "vocabulary"):
        assert output.count(f"<{name}>") == 2, name
