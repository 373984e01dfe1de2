"""The other forms in which a row may have been written, by which it is known as the same record.

Decodings. Text that was decoded by a wrong encoding is another text. So a row with a character
beyond ASCII also has the fingerprints that it would have if its bytes were read in
each encoding in which a file may be declared (READ_AS); where the text came as Unicode, those of
the text before a tool took UTF-8 for Latin-1 or Windows-1252, or Windows-1252 for Latin-1. A wrong
declaration at either time, or at both, changes nothing. Characters that the declared encoding
lacks were escapes of JSON: they stay as they are. Where the bytes are UTF-8, so do those that
cannot be a part of it. A character can have several byte forms (396 in cp932, 14 in big5 and
cp950): all of a row are tried in their first form, then all in their second, and so on. Not
recognised: text that was decoded wrongly twice in turn; text in which bytes were replaced because
they could not be decoded; an escape of a character that the declared encoding has, in JSON that is
not UTF-8; an escape whose backslash became a part of another character; text with first and second
forms that was once declared as cp932, big5 or cp950, and the other time as another of these, or
was converted to Unicode from another encoding than UTF-8.

Rounding. Programs write a floating-point number with 17, 16 or 15 digits, and pandas' JSON with 10
decimals. So a row with a number of more than 12 significant digits or 10 decimals also has the
fingerprint with such numbers rounded to 12 digits, and one with them rounded to 10 decimals (below
10^-15: 11 digits). No whole number below 2^53 is changed by that: such are identifiers. Numbers
beyond are rounded to the nearest double. A number half-way is rounded both ways, the first FREE of
them in a row. Not recognised: whole numbers beyond 2^53 that JSON cut to 11 digits, as
1.23456789e+18.

32 bits. Programs write a 32-bit number with its shortest digits, 0.1, or with those of the 64-bit
number that it is, 0.10000000149011612. So a row with a number of the second kind also has the
fingerprints with the shortest digits: of all such numbers, and of all but one where their few
digits may be chance. Whole numbers only where there is no key. Not recognised: two or more other
numbers in a row whose digits are a 32-bit number's by chance; 16-bit numbers that pandas saved as
CSV.

Times. Workbooks round times to milliseconds, JSON cuts those of dates and may write dates as
milliseconds since 1970, and some databases keep an instant without its zone. So a row with finer
times, or with a zone, also has the fingerprints with its times written so, and a row with whole
numbers that may be dates those with dates in their place, of the first FREE in any combination.
Not recognised: seconds or nanoseconds since 1970, or dates beyond 1840 to 2099 as milliseconds;
instants that a program moved to another zone and then saved without one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import ROUND_FLOOR, Context, Decimal
from functools import cache, lru_cache
from itertools import groupby, product
from typing import NamedTuple

import numpy as np

from silotune.client.records.canonical_values import DATE, MIDNIGHT, canonical, moment_text, value
from silotune.common.formats.encodings import ENCODINGS

# UTF-16 is left out: its bytes have NULs in every column name, so they cannot be read as another.
READ_AS = tuple(name for name in ENCODINGS if not name.startswith("utf-16"))
# How a long number is rounded.
DIGITS, DECIMALS = 12, 10
LEAST = -15  # the power of ten from which decimals count; below, pandas' JSON has an exponent
LEAST_LONG = 8  # digits of a number that may be a 32-bit one with the digits of a 64-bit one
LEAST_SINGLE, MOST_SINGLE = 1e-37, 3e38
ROUNDED = 0.501  # of a number's last digit, how far it may be from what it was rounded from
NOISE = 1e-14  # of a number, what programs change in its last digits
DOUBTFUL = 8  # of a row's numbers that may be 32-bit ones, how many are each left as they are
# A row's times are written in UTC and in their own zone, each as they are, cut and rounded to
# milliseconds; dates nearer to 1970 than LEAST_EPOCH milliseconds are known as such, and
# whole numbers beyond as dates.
CUT = 1  # which of these is in UTC and cut
EPOCH, LEAST_EPOCH, MOST_EPOCH = datetime(1970, 1, 1), 10**11, 4_102_444_800_000
MILLISECOND = timedelta(milliseconds=1)
LAST_SECOND = datetime(9999, 12, 31, 23, 59, 59)
EXACT = 1 << 53  # up to here a double holds every whole number
HALF = Decimal("0.5")
HALF_WAY = Decimal("0.001")  # as much as two digits in the fifteenth place are in the twelfth
FREE = 4  # of a row's numbers that lie half-way, how many are rounded both ways
# UTF-8 as RFC 3629 has it, but for surrogates and what is longer than it need be.
_UTF8 = re.compile(
    rb"(?:[\x00-\x7F]|[\xC2-\xDF][\x80-\xBF]|\xE0[\xA0-\xBF][\x80-\xBF]"
    rb"|[\xE1-\xEC\xEE\xEF][\x80-\xBF]{2}|\xED[\x80-\x9F][\x80-\xBF]"
    rb"|\xF0[\x90-\xBF][\x80-\xBF]{2}|[\xF1-\xF3][\x80-\xBF]{3}|\xF4[\x80-\x8F][\x80-\xBF]{2})*"
)
_C1 = re.compile("[\x80-\x9f]")
_C1_IN_WINDOWS = {
    code: found for code in range(0x80, 0xA0) if (found := bytes([code]).decode("cp1252", "ignore"))
}
# Two bytes that can begin a character in UTF-8, as Latin-1 and Windows-1252 have them.
_LIKE_UTF8 = re.compile(f"[\xc2-\xf4][\x80-\xbf{''.join(_C1_IN_WINDOWS.values())}]")
# The encodings in which several byte sequences are one character, each with the form of its text: a
# codec takes longer to refuse what has not that form.
_BIG5 = re.compile(rb"(?:[\x00-\x80]|[\x81-\xFE][\x40-\x7E\xA1-\xFE])*+")
_MANY_TO_ONE = {
    "cp932": re.compile(
        rb"(?:[\x00-\x80\xA0-\xDF\xFD-\xFF]|[\x81-\x9F\xE0-\xFC][\x40-\x7E\x80-\xFC])*+"
    ),
    "big5": _BIG5,
    "cp950": _BIG5,
}


def forms_of(
    cells: Sequence[str], used: Collection[int], encoding: str, *, keyed: bool
) -> Iterator[Sequence[str]]:
    """What a row may be elsewhere: itself and its other decodings, each as programs write it.

    Args:
        used: the places of the cells that count.
        encoding: in which the cells were decoded; "utf-8" where they came as Unicode.
        keyed: whether the owner named the columns: then they may identify people.
    """
    if not "".join(cells).isascii():
        found = set(_other_decodings(cells, used, encoding))
        found.discard(tuple(cells))
        for form in found:
            yield from _written_forms(form, used, keyed=keyed)
    yield from _written_forms(cells, used, keyed=keyed)


def _written_forms(
    cells: Sequence[str], used: Collection[int], *, keyed: bool
) -> set[tuple[str, ...]]:
    """The row as programs write its values; itself where they have no other ways."""
    found: set[tuple[str, ...]] = set()
    for dated in _dated_forms(cells, used):
        for row in _single_forms(dated, used, keyed=keyed):
            found |= _rounded_forms(row, used) or {row}
    return found


def _dated_forms(cells: Sequence[str], used: Collection[int]) -> set[tuple[str, ...]]:
    """The row and its forms with times in another zone or precision, or since 1970."""
    found = {tuple(cells)}
    ways = _ways_in(cells, used)
    moments = {i: way.moments for i, way in ways.items() if way.moments}
    for texts in set(zip(*moments.values(), strict=True)):
        found.add(_with(cells, list(moments), texts))
    epochs = {i: way.epoch for i, way in ways.items() if way.epoch}
    if epochs:  # as JSON has them
        cut = _with(cells, list(moments), [texts[CUT] for texts in moments.values()])
        found.add(_with(cut, list(epochs), list(epochs.values())))
    dates = {i: way.date for i, way in ways.items() if way.date}
    free = list(dates)[:FREE]
    if dates:
        rest = _with(cells, list(dates), list(dates.values()))
        for chosen in product(*((cells[i], dates[i]) for i in free)):
            found.add(_with(rest, free, chosen))
    return found


def _ways_in(cells: Sequence[str], used: Collection[int]) -> dict[int, _Ways]:
    """Of the used cells those that have other ways, by their places."""
    return {i: ways for i in used if i < len(cells) and (ways := other_ways(cells[i]))}


def _single_forms(
    cells: tuple[str, ...], used: Collection[int], *, keyed: bool
) -> set[tuple[str, ...]]:
    """The row, and the row with its 32-bit numbers by their shortest digits: all of them,
    and all but one of which it is not certain that it is such a number."""
    ways = _ways_in(cells, used)
    singles = {i: way for i, way in ways.items() if way.single and not (keyed and way.whole)}
    if not singles:
        return {cells}
    short = _with(cells, list(singles), [way.single for way in singles.values()])
    doubtful = [i for i, way in singles.items() if not way.certain][:DOUBTFUL]
    return {cells, short} | {_with(short, [i], [cells[i]]) for i in doubtful}


def _rounded_forms(cells: Sequence[str], used: Collection[int]) -> set[tuple[str, ...]]:
    """The row with its long numbers rounded; nothing if it has none."""
    ways = _ways_in(cells, used)
    long = {i: own.rounded for i, own in ways.items() if own.rounded}
    found: set[tuple[str, ...]] = set()
    for way in (0, 1) if long else ():
        free = [i for i, rounded in long.items() if len(rounded[way]) > 1][:FREE]
        nearest = _with(cells, list(long), [rounded[way][0] for rounded in long.values()])
        for chosen in product(*(long[i][way] for i in free)):
            found.add(_with(nearest, free, chosen))
    return found


def _other_decodings(
    cells: Sequence[str], used: Collection[int], encoding: str
) -> Iterator[tuple[str, ...]]:
    """The row as it is if the bytes of the `used` cells, which were read in `encoding`, are read in
    another one."""
    foreign = [i for i in used if i < len(cells) and not cells[i].isascii()]
    if not encoding.startswith("utf"):
        yield from _read_again(cells, foreign, encoding, READ_AS)
        return
    if any(_LIKE_UTF8.search(cells[i]) for i in foreign):
        for taken_for in ("iso8859-1", "cp1252"):
            yield from _read_again(cells, foreign, taken_for, ("utf-8",))
    if any(not cells[i].isprintable() and _C1.search(cells[i]) for i in foreign):
        yield _with(cells, foreign, [cells[i].translate(_C1_IN_WINDOWS) for i in foreign])
    # Of these the way back is not certain, so the way there is gone as well.
    raw = [cells[i].encode() for i in foreign]
    if any(_doubtful_bytes().search(one) for one in raw):
        for declared, form in _MANY_TO_ONE.items():
            if not all(map(form.fullmatch, raw)):
                continue
            try:
                yield _with(cells, foreign, [one.decode(declared) for one in raw])
            except UnicodeDecodeError:
                continue


def _with(cells: Sequence[str], places: Sequence[int], texts: Sequence[str]) -> tuple[str, ...]:
    """The row with other texts at these places."""
    found = list(cells)
    for i, text in zip(places, texts, strict=True):
        found[i] = text
    return tuple(found)


def _read_again(
    cells: Sequence[str], places: Sequence[int], written_as: str, read_as: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """The row with the bytes that the cells at `places` have in one encoding, read in others."""
    text = "".join(cells[i] for i in places)
    for choice in _choices(text, written_as):
        runs = [_runs(cells[i], choice) for i in places]
        for other in read_as:
            try:
                texts = ["".join([run.read(other) for run in one]) for one in runs]
            except UnicodeDecodeError:
                continue
            yield _with(cells, places, texts)


class _Run(NamedTuple):
    """Characters of a cell, and the bytes of each: all have some, or none has any."""

    text: str
    parts: list[bytes]

    def read(self, encoding: str) -> str:
        """The bytes in another encoding; characters without bytes as they are.

        Raises:
            UnicodeDecodeError: the bytes are not in that encoding.
        """
        if not self.parts:
            return self.text
        raw = b"".join(self.parts)
        return self._read_utf8(raw) if encoding == "utf-8" else raw.decode(encoding)

    def _read_utf8(self, raw: bytes) -> str:
        """A character whose bytes do not go on as UTF-8 stays: in the file it was an escape."""
        found, read = "", 0  # bytes
        at, start = 0, 0  # a character, and where its bytes start
        while True:
            run = _UTF8.match(raw, read)
            assert run is not None  # it matches no bytes as well
            found += run[0].decode()
            read = run.end()
            if read == len(raw):
                return found
            while start < read:
                start += len(self.parts[at])
                at += 1
            if start > read:  # UTF-8 ends within a character
                raise UnicodeDecodeError("utf-8", raw, read, start, "not UTF-8")
            found += self.text[at]
            read += len(self.parts[at])


def _runs(cell: str, forms: Mapping[str, bytes]) -> list[_Run]:
    """The cell in runs. forms: the bytes of each of its characters that has some."""
    found: list[_Run] = []
    for has_bytes, characters in groupby(cell, forms.__contains__):
        text = "".join(characters)
        found.append(_Run(text, [forms[c] for c in text] if has_bytes else []))
    return found


def _choices(text: str, encoding: str) -> Iterator[dict[str, bytes]]:
    """The bytes that each character of a text may have had in an encoding. Nearly always there is
    one choice. A character that has none is left out."""
    byte_forms = _byte_forms(encoding)
    certain: dict[str, bytes] = {}
    doubtful: dict[str, tuple[bytes, ...]] = {}
    for character in set(text):
        options = byte_forms.get(character, ())
        if not options and encoding == "gb18030":
            # It has four bytes for all of Unicode; hardly anybody writes them.
            options = (b"", character.encode(encoding))
        if len(options) > 1:
            doubtful[character] = options
        elif options:
            certain[character] = options[0]
    for at in range(max(map(len, doubtful.values()), default=1)):
        chosen = {
            character: options[at:][:1] or options[-1:] for character, options in doubtful.items()
        }
        yield certain | {character: form for character, (form,) in chosen.items() if form}


@cache
def _byte_forms(encoding: str) -> dict[str, tuple[bytes, ...]]:
    """For each character of an encoding all byte sequences that decode to it, of gb18030 those
    of one or two bytes."""
    found: dict[str, tuple[bytes, ...]] = {}

    def add(raw: bytes) -> bool:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            return False
        if len(text) == 1:
            found[text] = (*found.get(text, ()), raw)
        return True

    single = [add(bytes([code])) for code in range(0x100)]
    leads = [code for code in range(0x80, 0x100) if not single[code]]
    if not encoding.startswith(("cp12", "iso8859")):
        for lead in leads:
            for trail in range(0x30, 0x100):
                add(bytes([lead, trail]))
    else:
        # Programs keep bytes that the encoding has no character for as control characters.
        for code in leads:
            found.setdefault(chr(code), (bytes([code]),))
    if encoding == "euc_jp":
        for lead, trail in product(range(0xA1, 0xFF), repeat=2):
            add(bytes([0x8F, lead, trail]))
    return found


@cache
def _doubtful_bytes() -> re.Pattern[bytes]:
    """The byte sequences of characters that have others as well, in some encoding."""
    trails: dict[int, set[bytes]] = {}
    for encoding in _MANY_TO_ONE:
        for forms in _byte_forms(encoding).values():
            for form in forms if len(forms) > 1 else ():
                trails.setdefault(form[0], set()).add(form[1:])
    return re.compile(
        b"|".join(
            re.escape(bytes([lead])) + b"[" + b"".join(map(re.escape, sorted(ends))) + b"]"
            for lead, ends in trails.items()
        )
    )


class _Ways(NamedTuple):
    """How programs write a value otherwise.

    rounded: a long number rounded to its digits, and then to its decimals, each time one text or
    both nearest ones; () for others. single: its shortest digits, where it may be a 32-bit number
    with the digits of a 64-bit one; certain: with so many that hardly another number has them.
    moments: a time by each way to write it; () where they are all the value. epoch: a date near
    1970 in milliseconds since then. date: a whole number that may be such milliseconds, as a date.
    """

    rounded: tuple[tuple[str, ...], ...] = ()
    whole: bool = False
    certain: bool = False
    single: str = ""
    moments: tuple[str, ...] = ()
    epoch: str = ""
    date: str = ""


@lru_cache(maxsize=1 << 16)
def other_ways(cell: str) -> _Ways | None:
    """None for a value that has no other ways."""
    text = value(cell)
    if text[2:3] == ":" or (text[4:5] == "-" and text[:4].isdigit()):
        found = _ways_of_moment(cell, text)
    elif (len(text) < LEAST_LONG and "E" not in text) or not text[-1].isdigit() or " " in text:
        return None
    else:
        try:
            found = _ways_of_number(Decimal(text))
        except ArithmeticError:  # no number, or one with an exponent beyond all measure
            return None
    return found if found.rounded or any(found[3:]) else None


def _ways_of_number(number: Decimal) -> _Ways:
    rounded: tuple[tuple[str, ...], ...]
    if not number.is_finite():
        return _Ways()
    if abs(number) > EXACT:
        double = float(number)
        is_new = math.isfinite(double) and Decimal(repr(double)) != number
        rounded = ((repr(double),),) * 2 if is_new else ()
        return _Ways(rounded, whole=True, single=_single(number))
    whole = number == number.to_integral_value()
    if whole:
        return _Ways(whole=True, single=_single(number), date=_date_of(int(number)))
    digits, decimals = len(number.as_tuple().digits), -int(number.as_tuple().exponent)
    rounded = ()
    if digits > DIGITS or decimals > DECIMALS:
        last = min(number.adjusted() - DIGITS + 1, 0)
        least = -DECIMALS + (number.adjusted() if number.adjusted() < LEAST else 0)
        of_digits = _nearest(number, last) if digits > DIGITS else (str(number),)
        rounded = of_digits, _nearest(number, max(least, -decimals))
    return _Ways(rounded, certain=digits > DIGITS, single=_single(number))


def _single(number: Decimal) -> str:
    """The shortest digits of the 32-bit number that this is, as far as its own digits tell; "" if
    it is none, or has these digits already."""
    digits, exponent = len(number.as_tuple().digits), int(number.as_tuple().exponent)
    double = float(number)
    if digits < LEAST_LONG or not LEAST_SINGLE < abs(double) < MOST_SINGLE:
        return ""
    single = np.float32(double)
    tolerance = max(ROUNDED * 10.0**exponent, NOISE * abs(double)) if exponent < 0 else 0.0
    if abs(float(single) - double) > tolerance:
        return ""
    short = str(single)
    return short if Decimal(short) != number else ""


def _ways_of_moment(cell: str, text: str) -> _Ways:
    """Without its zone; with milliseconds (of a date cut off, or rounded); since 1970."""
    local, epoch = text, ""
    if text[4:5] == "-":
        if ":" in cell and (found := DATE.fullmatch(canonical(cell))) and found[5]:
            day, minute, second, fraction, _ = found.groups("")
            local = moment_text(day, minute, second, fraction, "")
        if "1966" <= text[:4] <= "1973" and (at := _parsed(text)):
            since = (at - EPOCH) // MILLISECOND
            epoch = str(since) if abs(since) < LEAST_EPOCH else ""
    if local == text and "." not in text:
        return _Ways(epoch=epoch)
    moments = tuple(way(one) for one in (text, local) for way in (str, _cut, _near))
    return _Ways(moments=moments if len(set(moments)) > 1 else (), epoch=epoch)


def _parsed(text: str) -> datetime | None:
    """A date, or a date with a time to the microsecond; None where there is no such day."""
    try:
        found = datetime.fromisoformat(text[:26])
    except ValueError:
        return None
    return found if found.tzinfo is None else None


def _cut(text: str) -> str:
    """A date's time cut to milliseconds; a time alone as it is, as JSON has it."""
    before, point, fraction = text.partition(".")
    if not point or len(fraction) <= 3 or text[4:5] != "-":
        return text
    return _joined(before, fraction[:3])


def _near(text: str) -> str:
    """A time rounded to milliseconds, as workbooks have it."""
    before, point, fraction = text.partition(".")
    if not point or len(fraction) <= 3:
        return text
    thousandths = (int(fraction[:4]) + 5) // 10
    if thousandths < 1000:
        return _joined(before, f"{thousandths:03d}")
    alone = text[4:5] != "-"
    start = _parsed(f"2000-01-01 {before}" if alone else before)
    if start is None or start >= LAST_SECOND:
        return text
    after = str(start + timedelta(seconds=1))
    return after[-8:] if alone else _joined(after, "")


def _joined(before: str, fraction: str) -> str:
    """A time with its fraction; a date alone for its midnight."""
    fraction = fraction.rstrip("0")
    return f"{before}.{fraction}" if fraction else before.removesuffix(MIDNIGHT)


def _date_of(milliseconds: int) -> str:
    """What so many milliseconds since 1970 are, if that is a date of this time."""
    if not LEAST_EPOCH <= abs(milliseconds) < MOST_EPOCH:
        return ""
    at = EPOCH + milliseconds * MILLISECOND
    return _joined(str(at)[:19], f"{at.microsecond // 1000:03d}")


def _nearest(number: Decimal, exponent: int) -> tuple[str, ...]:
    """The multiple of 10^exponent that is nearest, or both if the number lies half-way."""
    unit, context = Decimal((0, (1,), exponent)), Context(prec=len(number.as_tuple().digits) + 2)
    below = number.quantize(unit, ROUND_FLOOR, context)
    beyond = context.subtract(number, below).scaleb(-exponent, context)
    both = str(below), str(context.add(below, unit))
    if abs(beyond - HALF) <= HALF_WAY:
        return both
    return both[beyond > HALF :][:1]
