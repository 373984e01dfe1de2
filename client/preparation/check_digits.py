"""The rules by which a number shows that it is one: check digits, prefixes, real dates.

Each function takes digits and letters without separators, and says whether the number can exist.
"""

from __future__ import annotations

import re
from datetime import date

# Network → first digits, and how many digits in all (ISO/IEC 7812; the networks' public ranges).
NETWORKS: tuple[tuple[str, str, frozenset[int]], ...] = (
    ("Visa", r"4", frozenset({13, 16, 19})),
    ("Mastercard", r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", frozenset({16})),
    ("American Express", r"3[47]", frozenset({15})),
    ("Discover", r"6011|64[4-9]|65", frozenset({16, 17, 18, 19})),
    ("Diners Club", r"30[0-5]|3[689]", frozenset({14, 15, 16, 17, 18, 19})),
    ("JCB", r"352[89]|35[3-8]", frozenset({16, 17, 18, 19})),
    ("UnionPay", r"62", frozenset({16, 17, 18, 19})),
    ("ICBC", r"9558", frozenset({19})),  # older than UnionPay's range, still in wallets
    ("Maestro", r"50|5[6-8]|63|67", frozenset({16, 17, 18, 19})),
    ("Mir", r"220[0-4]", frozenset({16})),
)
_NETWORKS = [(re.compile(start), sizes) for _, start, sizes in NETWORKS]

# Country → length of its IBANs (SWIFT's IBAN registry).
_LENGTHS = """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22
    DJ27 DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28
    HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25
    MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29
    RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29
    VA22 VG24 XK20 YE30
"""
IBAN_LENGTHS = {found[:2]: int(found[2:]) for found in _LENGTHS.split()}

# Codes of China's provinces (GB/T 2260), and 83 of the residence permits of Taiwan's.
_PROVINCES = """
    11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63
    64 65 71 81 82 83
"""
PROVINCES = frozenset(_PROVINCES.split())


def passes_luhn(number: str) -> bool:
    """ISO/IEC 7812-1, annex B: finds every single wrong digit."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def is_card(number: str) -> bool:
    """A payment card: digits of a network's range and length that pass Luhn's check."""
    return (
        any(len(number) in sizes and start.match(number) for start, sizes in _NETWORKS)
        and len(set(number)) > 1  # a row of noughts passes Luhn
        and passes_luhn(number)
    )


def is_iban(value: str) -> bool:
    """ISO 13616: the country's length, and 97 divides with remainder 1."""
    value = value.upper()
    if not re.fullmatch(r"[A-Z]{2}[0-9]{2}[A-Z0-9]+", value):
        return False
    if len(value) != IBAN_LENGTHS.get(value[:2]):
        return False
    return (
        2 <= int(value[2:4]) <= 98
        and int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1
    )


def is_ssn(number: str) -> bool:
    """A US social security number that can have been given out: area, group and serial (SSA)."""
    area, group, serial = number[:3], number[3:5], number[5:]
    return (
        len(number) == 9
        and area not in {"000", "666"}
        and area < "900"
        and group != "00"
        and serial != "0000"
        and len(set(number)) > 1
        and number not in {"123456789", "078051120", "219099999"}  # printed on samples
    )


def is_resident_id(value: str) -> bool:
    """A Chinese resident identity number (GB 11643-1999), or the old form of 15 digits: province,
    date of birth and, of 18, the check character (ISO 7064 MOD 11-2)."""
    value = value.upper()
    if re.fullmatch(r"\d{15}", value):
        birth = "19" + value[6:12]
    elif re.fullmatch(r"\d{17}[\dX]", value):
        total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(value[:17]))
        if "10X98765432"[total % 11] != value[17]:
            return False
        birth = value[6:14]
    else:
        return False
    return value[:2] in PROVINCES and is_day(int(birth[:4]), int(birth[4:6]), int(birth[6:]))


# The two digits that a letter stands for, from 10 on, in Taiwan's numbers.
_TAIWAN_LETTERS = "ABCDEFGHJKLMNPQRSTUVXYWZIO"


def is_taiwan_id(value: str) -> bool:
    """Taiwan's national identity number (second character 1 or 2) or that of a resident from
    elsewhere (8 or 9): a letter of a county, and the weighted sum is divided by 10."""
    if not re.fullmatch(r"[A-Z][1289]\d{8}", value := value.upper()):
        return False
    digits = f"{_TAIWAN_LETTERS.index(value[0]) + 10}{value[1:]}"
    weights = (1, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1)
    return sum(int(d) * weight for d, weight in zip(digits, weights, strict=True)) % 10 == 0


def is_hong_kong_id(value: str) -> bool:
    """A Hong Kong identity card's number: one or two letters, six digits and a check character,
    with or without brackets around it; a missing first letter counts as 36; modulus 11."""
    value = value.upper().replace("(", "").replace(")", "").replace(" ", "")
    if not re.fullmatch(r"[A-Z]{1,2}\d{6}[\dA]", value):
        return False
    values = [int(char, 36) for char in value]
    values = [36] * (9 - len(values)) + values  # A is 10, as the last character too
    return sum(v * weight for v, weight in zip(values, range(9, 0, -1), strict=True)) % 11 == 0


def is_day(year: int, month: int, day: int) -> bool:
    """A day of the calendar between 1850 and 2100."""
    try:
        return 1850 <= date(year, month, day).year <= 2100
    except ValueError:
        return False
