"""Numbers as the page, the console and the comparison's tables write them. Knows nothing but numbers and words."""

import math
import re
from collections.abc import Sequence


def percent(part: float, whole: float = 1.0) -> str:
    """A share: 12 %, 3.4 %, 0.02 %; never 0 or 100 % unless it is exactly that, and a dash where it is undefined."""
    share = 100.0 * part / whole if whole else math.nan
    if math.isnan(share):
        return "–"
    if share in (0.0, 100.0) or 10 <= share <= 90 or share > 101:  # a part may exceed what it is compared with
        return f"{share:.0f} %"
    rest = min(share, abs(100.0 - share))
    digits = min(6, max(1, 1 - math.floor(math.log10(rest))))
    return f"{share:.{min(digits, 2) if rest > 0.01 else digits}f} %"


def interval(low: float, high: float) -> str:
    """Two bounds of a share: 30 % to 39 %; <0.01 % to 2.0 %."""
    return " to ".join(
        "<0.01 %" if 0 < bound < 1e-4 else ">99.99 %" if 1 - 1e-4 < bound < 1 else percent(bound)
        for bound in (low, high)
    )


def plural(count: float, noun: str, nouns: str | None = None) -> str:
    """1 image, 2 images, 10,000 images; ``nouns`` is the plural where it is not ``noun`` and an s."""
    return f"{count:,.0f} {noun if count == 1 else nouns or noun + 's'}"


def counted(count: int, things: str) -> str:
    """2 class folders of images, 1 class folder of images: the first word that ends in one s loses it for one thing."""
    return f"{count} {things}" if count != 1 else re.sub(r"(?<!s)s\b", "", f"1 {things}", count=1)


def probability(value: float | None) -> str:
    """A probability with two digits, above 0.98 with three, never rounded to 1 or 0; a dash for None, NaN, infinity."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 0.001:
        return "<0.001" if value > 0 else "0"
    if value > 0.98:
        return f"{value:.3f}" if value < 0.9995 else ">0.999"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def thresholds(span: tuple[float, float]) -> str:
    """The smallest and the largest probability that targets had to exceed."""
    least, most = span
    return f"{most:g}" if least == most else f"{least:.2f} to {most:.2f} (by class)"


def number(value: float | None) -> str:
    """Three significant digits: 0.0123, 12.3, 123, 12,345; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def listed(words: Sequence[str]) -> str:
    """Joins words: a; a and b; a, b and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def decimals(largest: float) -> int:
    """Digits after the point of numbers that are compared with each other, for the largest of them."""
    return 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 1 else 3


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Names of at most ``width`` letters that stay distinct: the middle is left out, else the end is a number."""
    head, tail = width // 2, (width - 1) // 2
    short = [name if len(name) <= width else f"{name[:head]}…{name[-tail:]}" for name in names]
    return [
        text if short.count(text) == 1 else f"{name[: width - 1 - len(str(i))]}…{i}"
        for i, (name, text) in enumerate(zip(names, short))
    ]
