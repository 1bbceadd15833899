"""The row of BLIP-2 on a decoder in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blip2_models import FILES, Blip2Source, blip2
from whole import Lack, WholeFamily


def blip2_rows(targets: Any, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: ``lora``, ``planner``."""
    return {
        "blip2": WholeFamily(
            checkpoints=("blip2",),
            template=Lack("no model of the class on such a language model is published with one"),
            image={"kind": "squash"},
            source=Blip2Source("blip2", blip2, files=FILES),
            uneven=Blip2Source(
                "blip2",
                lambda: blip2({"num_key_value_heads": 1}, {"num_attention_heads": 5, "intermediate_size": 75}),
                files=FILES,
            ),
            others=Lack("Salesforce's own stand on OPT and FLAN-T5, which are not built here"),
            answers=Lack("convert check is not tried on it: its processor puts pictures in front of all; see `source`"),
            lora=targets,
            presets=Lack("none is published on such a language model; MiniGPT-4 publishes its linear layer alone"),
            built=Lack("there are no presets, and so no sizes"),
            recipes=Lack("there are no presets; MiniGPT-4 comes later"),
            headers=Lack("there are no recipes of it yet"),
            planner=planner,
        ),
    }
