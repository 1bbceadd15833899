"""The row of Chameleon in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping

from chameleon_models import CHAMELEON, ChameleonSource
from torch import nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from whole import Lack, Published, Stage, WholeFamily

from megavlm.config.schema import ModelConfig
from megavlm.families.known import FAMILIES


def _built(model: ModelConfig) -> tuple[nn.Module, list[nn.Module]]:
    """Return the class of a preset, and the first layer of a decoder that is nowhere."""
    theirs = ChameleonForConditionalGeneration(ChameleonConfig(**FAMILIES["chameleon"].config(model, {})))
    return theirs, [theirs.model.vqmodel.post_quant_conv]


_SFT = Stage(
    ("language",), 1e-5, 1000, 128, 4096, 1024, warmup=10, decay=0.1, adam=(0.9, 0.95, 1e-8, 1)
)  # fmt: skip


def chameleon_rows(
    targets: tuple[str, ...], header: str, planner: Mapping[str, float]
) -> dict[str, WholeFamily]:  # fmt: skip
    """Return the row; arguments are what rows share: ``lora``, ``headers``, ``planner``."""
    return {
        "chameleon": WholeFamily(
            checkpoints=tuple(CHAMELEON),
            template="chameleon",
            image={"kind": "crop", "resample": "lanczos"},
            source=ChameleonSource(),
            uneven=Lack("ranks share no key/value head, as each has a norm of its own: refused by name"),
            others={
                "norms behind (34B)": ChameleonSource(behind=True),
                "tokens in another order": ChameleonSource(mixed=True),
            },
            answers=Lack("convert check is not tried on it: no tokenizer of its kind here; answers are in `source`"),
            lora=targets,
            presets={"chameleon_7b": Published("7.04B"), "chameleon_34b": Published("34.32B")},
            built=_built,
            recipes={f"chameleon_{size}/sft": _SFT for size in ("7b", "34b")},
            headers=header,
            planner=planner,
        )
    }
