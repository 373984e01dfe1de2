"""The one form of a value, however it is written: what fingerprints are made of.

What is one value (`value`): numbers by their value, not their digits; letter case, i with and
without its dot; white space; control characters, also as the escapes that workbooks have for them
(`_x000D_`), and invisible ones; Unicode's compatibility and composed forms; typographic quotes and
dashes; an ISO date and its midnight, a time's `T`, seconds and zeros, an instant in any zone; yes
and no (true and false) and 1 and 0; the usual words for a missing value and infinity, for which
JSON has no number (MISSING_WORDS). What is not: dates in another format, decimal commas, separators
of thousands, durations, lists that pandas wrote as "['a' 'b']", pseudonyms that are new at each
export.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Context, Decimal
from functools import lru_cache

from silotune.common.data.workbook import unescaped

MISSING_WORDS = frozenset(
    {
        "",
        "nan",
        "na",
        "n/a",
        "#n/a",
        "#n/a n/a",
        "#na",
        "<na>",
        "null",
        "none",
        "nil",
        "nat",
        "-1.#ind",
        "1.#ind",
        "-1.#qnan",
        "1.#qnan",
        "\\n",
        # What JSON has no number for: pandas writes null.
        "Infinity",
        "-Infinity",
    }
)
YES_NO = {"true": "1", "false": "0"}
MIDNIGHT = " 00:00:00"


def _any_of(codes: Iterable[int]) -> re.Pattern[str]:
    """Any one of these characters; in ranges, which are much faster to match beyond U+FFFF."""
    ranges: list[list[int]] = []
    for code in sorted(codes):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return re.compile(
        "["
        + "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges)
        + "]"
    )


# What nobody sees. Default_Ignorable_Code_Point in DerivedCoreProperties.txt of Unicode 16.0, those
# not assigned yet as well, ...
_IGNORABLE = [
    code
    for first, last in (
        (0xAD, 0xAD),
        (0x34F, 0x34F),
        (0x61C, 0x61C),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x200B, 0x200F),
        (0x202A, 0x202E),
        (0x2060, 0x206F),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFEFF, 0xFEFF),
        (0xFFA0, 0xFFA0),
        (0xFFF0, 0xFFF8),
        (0x1BCA0, 0x1BCA3),
        (0x1D173, 0x1D17A),
        (0xE0000, 0xE0FFF),
    )
    for code in range(first, last + 1)
]
# ... and the categories Cc and Cf but for white space (Unicode has none of them elsewhere).
_UNSEEN = _any_of(
    {
        code
        for code in range(0x20000)
        if unicodedata.category(chr(code)) in ("Cc", "Cf") and not chr(code).isspace()
    }
    | set(_IGNORABLE)
)
_PLAIN = {
    **dict.fromkeys("‘’‚‛‹›`´ʹʻʼʽˈˊˋ′‵❛❜ꞌ׳＇", "'"),
    **dict.fromkeys("“”„‟«»ʺˮ״″‶❝❞〝〞〟＂", '"'),
    **dict.fromkeys("‐‑‒–—―−⸺⸻﹘﹣－", "-"),
    "\u2800": " ",  # a blank cell of Braille: no white space to Unicode, but to the eye
    # What nobody sees although `str.isprintable` says so: letters and marks.
    **{chr(code): "" for code in _IGNORABLE if chr(code).isprintable()},
}
_MARKS = _any_of(map(ord, _PLAIN))
DATE = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[t ]([0-9]{2}:[0-9]{2})(?::([0-9]{2})(?:\.([0-9]+))?)?"
    r"(z|[+-][0-9]{2}:?[0-9]{2}(?::[0-9]{2})?)?"
)
_TIME = re.compile(r"([0-9]{1,2}:[0-9]{2})(?::([0-9]{2})(?:\.([0-9]+))?)?")


def canonical(name: str) -> str:
    """A name or text without its ways of writing (see above)."""
    if not name.isprintable():
        name = _UNSEEN.sub("", name)
    if name.isascii():
        text = name.lower().replace("`", "'")
    else:
        marked = _plain_marks(name)
        text = _normalised(marked)
        if text is not marked:
            text = _plain_marks(text)
        folded = text.casefold()
        if folded != text:
            text = _normalised(folded).replace("i\u0307", "i")
        text = text.replace("ı", "i")
    if "x00" in text or "_xfff" in text:
        text = _unescaped(text)
    return " ".join(text.split())


def _plain_marks(text: str) -> str:
    return _MARKS.sub(lambda found: _PLAIN[found[0]], text)


def _normalised(text: str) -> str:
    return text if unicodedata.is_normalized("NFKC", text) else unicodedata.normalize("NFKC", text)


def _unescaped(text: str) -> str:
    """Workbooks write a control character as _x000D_, and _x005F_x000D_ for that text itself.
    openpyxl takes x005F_ away wherever it stands."""
    before = ""
    while text != before:
        before = text
        text = _UNSEEN.sub("", unescaped(text.replace("x005f_", "")))
    return text


@lru_cache(maxsize=1 << 16)
def value(cell: str) -> str:
    """A cell's value: as `written`; yes and no as 1 and 0, and nothing for a word that stands for a
    missing value."""
    text = written(cell)
    return YES_NO.get(text, "" if text in MISSING_WORDS else text)


def written(cell: str) -> str:
    """A cell without its ways of writing: 5, '5.0 ' and 5e0 are one value, so are É and É."""
    text = canonical(cell)
    if text.lstrip("+-") == "nan":
        return ""
    if text[4:5] == "-" and (moment := DATE.fullmatch(text)):
        return moment_text(*moment.groups(""))
    if ":" in text[1:3] and (time := _TIME.fullmatch(text)):
        return _time(*time.groups(""))
    if " " in text:
        return text
    try:
        number = Decimal(text).normalize(Context(prec=max(28, len(text))))
    except ArithmeticError:  # no number, or one with an exponent beyond all measure
        return text
    return str(abs(number) if number.is_zero() else number)


def moment_text(day: str, minute: str, second: str, fraction: str, zone: str) -> str:
    """A date with a time as one text, in UTC if it has a zone; a date alone for its midnight."""
    time = _time(minute, second, fraction)
    if not re.fullmatch("z|[+-]00:?00|", zone):
        hours, minutes, *seconds = map(int, re.findall("[0-9]{2}", zone))
        ahead = timedelta(hours=hours, minutes=minutes, seconds=sum(seconds))
        ahead *= -1 if zone[0] == "-" else 1
        clock, point, rest = time.partition(".")
        try:
            at = datetime.fromisoformat(f"{day} {clock}") - ahead
        except (ValueError, OverflowError):  # there is no such day
            return f"{day} {time}{zone}"
        day, time = str(at.date()), f"{at.time()}{point}{rest}"
    return f"{day} {time}".removesuffix(MIDNIGHT)


def _time(minute: str, second: str, fraction: str) -> str:
    """A time of day: 8:00 is 08:00:00.000."""
    fraction = fraction.rstrip("0")
    return f"{minute:0>5}:{second or '00'}" + f".{fraction}" * bool(fraction)
