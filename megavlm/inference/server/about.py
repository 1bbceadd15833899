"""What the page tells of the model: its name, its parts, what it can do, and what may be asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.schema import ModelConfig
from megavlm.data.schema import Turn
from megavlm.data.seen import token_range
from megavlm.data.template import TemplateError
from megavlm.families.family import Family
from megavlm.inference.boxes import family_of, own_question
from megavlm.inference.server.app import Service
from megavlm.inference.server.examples import Example, examples

_OWN_QUESTION = "Where is {thing}?"
_BOX_TOKENS = ("<box>", "<|box_start|>")


@dataclass(frozen=True)
class About:
    """What is known of a served checkpoint beside the service."""

    family: str | None
    """For people; None where the checkpoint was made by training alone."""
    finds: str | None
    """A question that is answered with boxes, with ``{thing}``; None where the model was not taught to."""
    told_by: Family | None = None
    """Its family here, which says what its boxes count."""


def about_checkpoint(checkpoint: Path, model: ModelConfig, box_tokens: bool) -> About:
    """Return what a checkpoint's record and its template say.

    Args:
        checkpoint: its directory.
        model: its shape, with the template.
        box_tokens: whether its tokenizer has tokens for boxes, as those have that were taught to write them.
    """
    family = family_of(checkpoint)
    finds = own_question(family, model) or (family and family.finds) or (_OWN_QUESTION if box_tokens else None)
    return About(None if family is None else family.title, finds, family)


def has_box_tokens(service: Service) -> bool:
    """Whether the tokenizer writes the borders of a box as tokens of their own."""
    tokenizer = service.model.tokenizer
    names = service.model.control_names | {tokenizer.decode([one]) for one in _last(tokenizer.vocab_size)}
    return any(name in names for name in _BOX_TOKENS)


def _last(size: int) -> range:
    """Return the ids among which added tokens are."""
    return range(max(0, size - 2000), size)


def described(service: Service, about: About) -> dict[str, Any]:
    """Return all that the page shows before anything is asked."""
    model, limits, recipe = service.model, service.limits, service.model.recipe
    template, parts = model.tokenizer.template, recipe.model
    longest = max(1, min(limits.new_tokens, model.context // 2))
    return {
        "name": service.name,
        "family": about.family,
        "parts": [
            {"part": "Tower", "text": parts.vision.preset},
            {"part": "Connector", "text": parts.connector.preset},
            {"part": "Language model", "text": parts.language.preset},
            {"part": "Template", "text": template.title or template.name},
        ],
        "abilities": _abilities(service, about),
        "context": model.context,
        "limits": {"images": limits.images, "pixels": limits.pixels, "bytes": limits.bytes},
        "defaults": {
            "temperature": service.defaults.temperature,
            "top_p": service.defaults.top_p,
            "length": longest,
            "system": recipe.data.system_message or template.default_system or "",
        },
        "system": _takes_system(service),
        "exchanges": template.most_exchanges,
        "examples": [one.told for one in offered(service, about)],
    }


def offered(service: Service, about: About) -> tuple[Example, ...]:
    """Return the example questions that this model and these limits can have."""
    found = [one for one in examples() if len(one.pictures) <= service.limits.images]
    found = [one for one in found if sum(len(data) for _, data in one.pictures) * 1.4 < service.limits.bytes]
    found = [one for one in found if all(w * h <= service.limits.pixels for w, h in one.sizes)]
    asked = [one for one in found if one.thing is None or about.finds is not None]
    return tuple(one.asking((about.finds or "").format(thing=one.thing)) if one.thing else one for one in asked)


def _abilities(service: Service, about: About) -> list[dict[str, str]]:
    plan, limits = service.model.plan, service.limits
    least, most, views = token_range(plan)
    tokens = f"{least:,} tokens each" if least == most else f"{least:,} to {most:,} tokens each"
    found = [{"name": "Pictures", "text": tokens}]
    if limits.images > 1:
        found.append({"name": "Several at once", "text": f"up to {limits.images} in a conversation"})
    if plan.packed:
        found.append({"name": "Own size", "text": "proportions are kept, nothing is cropped"})
    elif views > 1:
        found.append({"name": "Tiles", "text": f"large pictures in up to {views} views of {plan.side} pixels"})
    if about.finds is not None:
        found.append({"name": "Boxes", "text": "shows where things are"})
    found.append({"name": "Context", "text": f"{service.model.context:,} tokens"})
    return found


def _takes_system(service: Service) -> bool:
    """Whether the template has a form for a system message."""
    try:
        service.model.tokenizer.template.spans([Turn("system", "a"), Turn("user", "b")], prompt=True)
    except TemplateError:
        return False
    return True
