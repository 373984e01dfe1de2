"""Numbers as people read them: the same words in the report's text and in its plots."""

from __future__ import annotations

import math
from typing import Any

from jinja2 import Undefined

DASH = "–"
MARKS = {"yes": "✓", "no": "✗", "cannot tell": "?"}  # of an item of the checklist


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` decimals; integers are grouped when digits is 0; nothing is a dash."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return DASH if value is None or isinstance(value, Undefined) else str(value)
    if not math.isfinite(value):
        return DASH if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:,.{digits}f}".replace("-", "−")


def small(value: Any) -> str:
    """A small probability as it is spoken: 1e-4, 2.5e-6."""
    if not isinstance(value, int | float) or not 0 < value < 1:
        return number(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def size(value: Any) -> str:
    """Bytes in decimal units with three significant figures, as networks are billed."""
    if not finite(value):
        return number(value)
    power = next((p for p in (4, 3, 2, 1) if abs(value) >= 1000**p), 0)
    return f"{value / 1000**power:.{3 if power else 6}g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(value: Any) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    if not finite(value):
        return number(value)
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s"


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
