"""The row of Chameleon in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping

from chameleon_models import CHAMELEON, ChameleonSource
from torch import nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from whole import Lack, Published, WholeFamily

from megavlm.config.schema import ModelConfig
from megavlm.families.known import FAMILIES


def _built(model: ModelConfig) -> tuple[nn.Module, list[nn.Module]]:
    """Return the class of a preset, and the first layer of a decoder that is nowhere."""
    theirs = ChameleonForConditionalGeneration(ChameleonConfig(**FAMILIES["chameleon"].config(model, {})))
    return theirs, [theirs.model.vqmodel.post_quant_conv]


def chameleon_rows(targets: tuple[str, ...], planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: ``lora``, ``planner``."""
    return {
        "chameleon": WholeFamily(
            checkpoints=tuple(CHAMELEON),
            template="chameleon",
            image={"kind": "crop", "resample": "lanczos"},
            source=ChameleonSource(),
            uneven=Lack("ranks share no key/value head, as each has a norm of its own: refused by name"),
            others={"norms behind (34B)": ChameleonSource(behind=True)},
            answers=Lack("convert check is not tried on it: no tokenizer of its kind here; answers are in `source`"),
            lora=targets,
            presets={"chameleon_7b": Published("7.04B"), "chameleon_34b": Published("34.32B")},
            built=_built,
            recipes=Lack("its authors published no scripts; any/sft trains it, with modules.vision frozen or not"),
            headers=Lack("its authors published no training script, so there are no recipes"),
            planner=planner,
        )
    }
