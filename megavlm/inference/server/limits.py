"""How much a client may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.errors import UserError
from megavlm.data.images import MAX_PIXELS

_LONGEST = 86_400


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Raises:
        UserError: a limit is below 1, or larger than can be kept.
    """

    batch: int = 8
    """Requests that are answered together."""
    queue: int = 32
    """Requests that may wait beside them."""
    body_mib: int = 20
    """Size of a request, MiB; also of its remote images together."""
    images: int = 16
    """Pictures of one request."""
    pixels: int = MAX_PIXELS
    """Pixels of one picture."""
    seconds: int = 30
    """In which a request must have arrived, and its remote images; a client must read what waits for it."""
    connections: int = 256
    """Connections at once, also those on which nothing is asked."""
    drain: int = 15
    """Seconds that answers have when the server is told to stop; torchrun kills after 30."""
    new_tokens: int = 512
    """Longest answer where the request names no limit."""

    def __post_init__(self) -> None:
        """Check them."""
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.seconds > _LONGEST:
            raise UserError(f"--seconds must be at most {_LONGEST}, which is a day, not {self.seconds}")
        if self.pixels > MAX_PIXELS:
            raise UserError(f"--pixels must be at most {MAX_PIXELS}, which the decoder takes, not {self.pixels}")

    @property
    def slots(self) -> int:
        """Requests that the server holds at once."""
        return self.batch + self.queue

    @property
    def bytes(self) -> int:
        """Largest request in bytes."""
        return self.body_mib << 20
