"""The registered chat templates, by the name that ``model.template`` calls them.

Another package adds its own with :func:`register`, from the function that its ``megavlm.presets`` entry point names.
"""

from __future__ import annotations

from pathlib import Path

from megavlm.config.errors import UserError
from megavlm.data import template_rows_chameleon, template_rows_cog
from megavlm.data.template import Template
from megavlm.data.template_rows import QWEN_VL, ROWS

__all__ = ["QWEN_VL", "find_template", "is_checkpoint", "names", "register", "template_of"]

_TEMPLATES: dict[str, Template] = {}


def register(template: Template) -> Template:
    """Add a template, and return it.

    Raises:
        ValueError: the name is taken.
    """
    if template.name in _TEMPLATES:
        raise ValueError(f"template {template.name!r} is registered twice")
    _TEMPLATES[template.name] = template
    return template


def names() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(_TEMPLATES)


def template_of(name: str, tokenizer: Path) -> Template:
    """Return what ``model.template`` names.

    Args:
        name: of a registered template; or ``checkpoint``, for the one beside the tokenizer.
        tokenizer: the tokenizer's file, with which the template goes.

    Raises:
        UserError: there is no such template, or it cannot be used.
    """
    if is_checkpoint(name):
        from megavlm.data.jinja_template import checkpoint_template  # noqa: PLC0415 - Jinja only where it is used

        return checkpoint_template(tokenizer, name)
    return find_template(name)


def is_checkpoint(name: str) -> bool:
    """Whether a name means the chat template that the model's own directory carries."""
    return name.partition(":")[0] == "checkpoint"


def find_template(name: str) -> Template:
    """Return a registered template.

    Raises:
        UserError: there is none of that name; the message lists those that exist.
    """
    if name not in _TEMPLATES:
        raise UserError(
            f"model.template: no template {name!r}; there are {', '.join(names())}, and checkpoint (the model's own "
            "chat_template)"
        )
    return _TEMPLATES[name]


for _row in (*ROWS, *template_rows_cog.ROWS, *template_rows_chameleon.ROWS):
    register(_row)
