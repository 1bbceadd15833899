"""Small JSON files beside weights and tokenizers, each of which holds one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        MissingFileError: there is no such file.
        UserError: it holds none.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value
