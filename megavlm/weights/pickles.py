"""Weights that ``torch.save`` wrote, read without running anything of theirs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from megavlm.config.errors import UserError


def load_weights(file: Path, *, mmap: bool = False) -> Any:
    """Return what ``torch.save`` wrote to a file, without running anything from it.

    Args:
        file: the file.
        mmap: map the tensors of the file instead of reading them, where its format allows that.

    Raises:
        MissingFileError: there is none.
        UserError: it is damaged, or a pickle that names more than tensors and plain values.
    """
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except RuntimeError:  # a file of before torch 1.6 is no zip archive and cannot be mapped
            if not mmap:
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        line = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise UserError(
            f"{file}: damaged, or a pickle with more than tensors, which could run code"
            f"{f' ({line})' if line else ''}; it was not opened"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{file}: truncated, or no weight file: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
