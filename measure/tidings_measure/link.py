"""Models: what a measured cost means on a real line, and at a site behind a shared cache.

Both are arithmetic over what was counted on loopback; nothing is slowed down for real.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tidings_chunkstore.errors import InputError

from .results import Cost

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKMG]?)(?:bit/?s?)?")
_DELAY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s)")
_FACTORS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True, slots=True)
class Link:
    """A line: bits a second each way, seconds for a round trip."""

    name: str
    rate: float
    delay: float

    @classmethod
    def parse(cls, text: str) -> Link:
        """``10M/50ms``: 10 Mbit/s, 50 ms. Raises InputError."""
        rate, _, delay = text.partition("/")
        one, two = _RATE.fullmatch(rate.strip()), _DELAY.fullmatch(delay.strip())
        if one is None or two is None or float(one[1]) == 0:
            raise InputError(
                f"not a link: {text[:40]!r}; write bits a second and round trip, as 10M/50ms",
                code="link",
            )
        seconds = float(two[1]) / (1000 if two[2] == "ms" else 1)
        return cls(text, float(one[1]) * _FACTORS[one[2]], seconds)

    def seconds(self, cost: Cost) -> float:
        """Round trips, one after another, then the bytes at full rate, then the measured CPU.

        TCP's slow start is left out: it adds less than two round trips to a download of 100 KB and
        about eight to one of 10 MB, so the model flatters large downloads.
        """
        bits = 8 * (cost.received + cost.sent)
        return self.delay * cost.round_trips + bits / self.rate + cost.cpu


def site_bytes(cost: Cost, clients: int) -> int:
    """Bytes on the line of a site whose *clients* all make this update behind one shared cache.

    What a cache holds (whole hash-named or fresh objects) crosses the line once, all else each
    time.
    """
    total = cost.received + cost.sent
    return cost.shared + clients * (total - cost.shared)
