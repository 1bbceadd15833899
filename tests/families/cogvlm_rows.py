"""The rows of CogVLM and CogAgent in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cogagent_models import COGAGENT, AgentSource, CogAgent
from cogvlm_models import COGVLM, CogSource, CogVLM
from whole import Lack, Published, Stage, WholeFamily

_COUNT = 17_639_685_376
_TABLE = (35**2 - 16**2) * 1792
"""What the tower of 490 pixels has more than that of 224: rows of its table."""
_WIDE, _FFN = 1024, 2730
_LAYER = 4 * _WIDE**2 + 3 * _WIDE + 6 * _WIDE + 3 * _WIDE * _FFN + 2 * _FFN + _WIDE + 2 * _FFN
"""Of EVA02-CLIP-L: projections, their biases, norms, the MLP with its biases and its norm."""
_FINE = 3 * 14**2 * _WIDE + 2 * _WIDE + (6401 + 6400) * _WIDE + 23 * _LAYER
"""The second tower, with the table behind it."""
_CROSS = 32 * (4096 + 4 * _WIDE * 4096 - 2 * _WIDE * (4096 - _WIDE))
"""Attention to its features: a norm, queries and what comes of the heads 4096 wide, keys and values 1024."""
_AGENT_COUNT = _COUNT - (35**2 - 16**2) * 1792 + 16**2 * 1792 + _FINE + _CROSS
_AGENT_SFT = Stage(
    ("vision", "connector", "language"), 1e-5, 2000, 32, 400, 258, warmup=40, decay=0.05, tower=0.1,
    adam=(0.9, 0.95, 1e-8, 0.1),
)  # fmt: skip
_TRAINS = ("connector", "language")
_LAYERS = tuple(
    f"{kind}_{name}"
    for kind in ("language", "vision")
    for name in ("expert_query_key_value", "expert_dense", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)
"""Those for text, and those for image tokens."""


def _sft(length: int, tokens: int) -> Stage:
    return Stage(
        _TRAINS, 1e-5, 800, 256, length, tokens, warmup=16, decay=0.05, adam=(0.9, 0.95, 1e-8, 0.1)
    )  # fmt: skip


def _adapters(length: int, tokens: int) -> Stage:
    return replace(_sft(length, tokens), trains=("language",), batch=32, lora=(10, 1))


def cogvlm_rows(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: ``headers``, ``planner``."""
    return {
        "cogvlm": WholeFamily(
            checkpoints=tuple(COGVLM),
            template="cogvlm",
            image={"kind": "squash", "resample": "bicubic"},
            source=CogSource(CogVLM),
            uneven=CogSource(lambda: CogVLM(heads=3, inner=75)),
            others=Lack("it is published with one tower and one language model; other templates: test_cogvlm.py"),
            answers=Lack("Transformers has no class for it: answers are held against the written-out one, in `source`"),
            lora=_LAYERS,
            presets={
                "cogvlm_base_224": Published(_COUNT - _TABLE),
                "cogvlm_base_490": Published(_COUNT),
                "cogvlm_chat": Published(_COUNT),
                "cogvlm_grounding_generalist": Published(_COUNT),
            },
            built=Lack("no class to build: the counts are those of the published definition, at published sizes"),
            recipes={
                "cogvlm_base_490/sft": _sft(1288, 1227),
                "cogvlm_base_224/sft": _sft(320, 258),
                "cogvlm_base_490/lora": _adapters(1288, 1227),
                "cogvlm_base_224/lora": _adapters(320, 258),
            },
            headers=header,
            planner=planner,
        )
    }


def cogagent_row(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row of CogAgent; arguments likewise."""
    return {
        "cogagent": WholeFamily(
            checkpoints=tuple(COGAGENT),
            template="cogagent",
            image={"kind": "squash_pair", "resample": "bicubic"},
            source=AgentSource(CogAgent),
            uneven=AgentSource(lambda: CogAgent(heads=3, inner=75, fine=192)),
            others=Lack("it is published with one pair of towers and one language model; templates: test_cogagent.py"),
            answers=Lack("Transformers has no class for it: answers are held against the written-out one, in `source`"),
            lora=_LAYERS,
            presets={"cogagent_chat": Published(_AGENT_COUNT), "cogagent_vqa": Published(_AGENT_COUNT)},
            built=Lack("no class to build: the counts are those of the published definition, at published sizes"),
            recipes={"cogagent_chat/sft": _AGENT_SFT, "cogagent_chat/lora": replace(_AGENT_SFT, lora=(50, 1))},
            headers=header,
            # Every token is taken to see one picture; here some see none, some two.
            planner={**planner, "operations": 0.07},
        )
    }
