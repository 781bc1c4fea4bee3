"""Which numbers an option may be, and the sentence for one that it may not."""

import math
from dataclasses import dataclass

from dbdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from low to high; a bound that is open is not one of them."""

    low: float | int = -math.inf
    high: float | int = math.inf
    is_low_open: bool = False
    is_high_open: bool = False

    def check(self, key: str, value: float | int) -> None:
        """Raises ConfigError, naming the key, for a number outside; nan is outside."""
        is_high_enough = value > self.low if self.is_low_open else value >= self.low
        if not is_high_enough or math.isinf(value):
            raise ConfigError(f"{key} is {value}; it must {self._low_text()}")
        is_low_enough = value < self.high if self.is_high_open else value <= self.high
        if not is_low_enough:
            shown = value if abs(value) < 2**64 else "far too large"
            verb = "must lie below" if self.is_high_open else "may be at most"
            raise ConfigError(f"{key} is {shown}; it {verb} {self.high:.16g}")

    def _low_text(self) -> str:
        if self.high in (1, 30):
            return f"lie between {self.low:g} and {self.high:g}"
        return f"be {'greater than' if self.is_low_open else 'at least'} {self.low:g}"


def at_least(low: float | int, high: float | int = (1 << 63) - 1) -> Range:
    """Numbers from low; beyond high, memory would end before anything could be said."""
    return Range(low=low, high=high)


POSITIVE = Range(low=0, is_low_open=True)
FRACTION = Range(low=0, high=1)
FRACTION_BELOW_1 = Range(low=0, high=1, is_high_open=True)
