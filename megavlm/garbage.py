"""When Python looks for garbage: hardly while a command's libraries are imported, nor when its process ends.

Imports make a million objects that stay; looking through them again and again is a third of a command's start (2.5 s of
processor time instead of 3.7 s, torch 2.13 and Megatron-Core 0.16.1), and looking once more, as Python does at its end,
another half second.
"""

from __future__ import annotations

import atexit
import gc

_USUAL = gc.get_threshold()


def seldom() -> None:
    """Begin a command: to be called once, by what is a process of its own."""
    gc.set_threshold(50_000, *_USUAL[1:])
    atexit.register(gc.freeze)


def as_usual() -> None:
    """Go on as Python does: what is imported is there, and what comes may hold tensors."""
    gc.set_threshold(*_USUAL)
