"""Faults that are asked for wrongly: one that never fires would make a test that cannot fail."""

from __future__ import annotations

import pytest

from megavlm.parallel.faults import Fault, parse


def test_faults_are_read() -> None:
    assert parse("") == []
    assert parse("step.end:rank1:step3:kill,loss.value:nan") == [
        Fault("step.end", "kill", rank=1, step=3),
        Fault("loss.value", "nan"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("step.nowhere:kill", "names no fault"),
        ("step.end:explode", "names no fault"),
        ("step.end", "names no fault"),
        ("step.end:step3", "names no fault"),
        ("loss.value:kill", "cannot kill"),
        ("step.end:nan", "cannot nan"),
        ("step.end:rnak1:kill", "rankN and stepN"),
        ("step.end:rank:kill", "rankN and stepN"),
        ("step.end:step3:step4:kill", "at most once"),
    ],
)
def test_others_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text)
