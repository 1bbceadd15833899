"""``megavlm serve`` with a slow model and a made-up Internet, so that tests can watch it from outside.

The model, the checks of addresses and the HTTP client are the real ones. ``STEP_SECONDS`` is slept before each token.
With ``POISON``, the model's hidden states of that text's tokens are NaN, as where an activation overflows.
With ``WEB_PORT``, the names below have the addresses below, and 8.8.8.8 is the tests' own server on that port of this
machine; the log says where else a connection was tried.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from megavlm.cli import main
from megavlm.parallel.device import prepare_device

_NAMES = {
    "pictures.example": ["8.8.8.8"],
    "private.example": ["10.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "loopback.example": ["127.0.0.1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "both.example": ["8.8.8.8", "127.0.0.1"],
    "rebinding.example": ["8.8.8.8"],  # at first; see below
    "slow.example": ["8.8.8.8"],
}


def slow_down(seconds: float) -> None:
    """Sleep before each token."""
    prepare_device()
    from megavlm.inference.session import Session

    answers = Session.ask_all

    def slowly(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for pieces in answers(*args, **kwargs):
            time.sleep(seconds)
            yield pieces

    Session.ask_all = slowly  # type: ignore[method-assign]


def poison(text: str) -> None:
    """Give NaN where the prompt holds the tokens of ``text``."""
    prepare_device()
    import megavlm.inference.session as module
    from megavlm.models.build import unwrap

    load = module.loaded

    @contextlib.contextmanager
    def poisoned(recipe: Any, checkpoint: Any, tokenizer: Any) -> Iterator[list[Any]]:
        ids = torch.tensor(tokenizer.encode(text))

        def spoil(_: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            there = inputs[0].flatten()
            starts = (there.unfold(0, len(ids), 1) == ids).all(-1) if len(there) >= len(ids) else there[:0].bool()
            found = torch.zeros_like(there, dtype=torch.bool)
            for start in starts.nonzero().flatten().tolist():  # all of it: answers that are drawn have single tokens
                found[start : start + len(ids)] = True
            return output.masked_fill(found.reshape(*output.shape[:2], 1), float("nan"))

        with load(recipe, checkpoint, tokenizer) as chunks:
            for language in (unwrap(chunk).language for chunk in chunks):
                if language.pre_process:
                    language.embedding.word_embeddings.register_forward_hook(spoil)
            yield chunks

    module.loaded = poisoned  # type: ignore[assignment]


def make_up_names(port: int) -> None:
    """Answer for the names above."""
    lookup, connect = socket.getaddrinfo, socket.create_connection

    def made_up(host: Any, wanted: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in _NAMES:
            return lookup(host, wanted, *args, **kwargs)
        if host == "slow.example":
            time.sleep(30)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, wanted)) for address in _NAMES[host]]
        if host == "rebinding.example":
            _NAMES[host] = ["127.0.0.1"]
        return found

    def redirected(address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
        if address[0] != "8.8.8.8":
            sys.stderr.write(f"hooked: a connection to {address[0]} was tried\n")
            raise OSError("no such address here")
        return connect(("127.0.0.1", port), *args, **kwargs)

    socket.getaddrinfo = made_up
    socket.create_connection = redirected  # type: ignore[assignment]


if __name__ == "__main__":
    if "STEP_SECONDS" in os.environ:
        slow_down(float(os.environ["STEP_SECONDS"]))
    if "POISON" in os.environ:
        poison(os.environ["POISON"])
    if "WEB_PORT" in os.environ:
        make_up_names(int(os.environ["WEB_PORT"]))
    sys.exit(main())
