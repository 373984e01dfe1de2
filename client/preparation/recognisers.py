"""What finds personal details in a text by their form: Presidio recognisers of our own.

Of Presidio's own recognisers the one of IP addresses is used. The others fetch a list of top-level
domains from the network (e-mail), take any two words around a full stop for an address ("No.It";
URL), miss an IBAN with words behind it, log the text they could not check, know passports and
plates by context that only a language model gives them, and have none for Chinese. These are
patterns, check digits (client/preparation/check_digits.py) and the words before a number;
client/preparation/person_names.py and client/preparation/chinese_names.py find people. The text
they see is one that `Deidentifier` has made plain: half-width digits, simple hyphens, simplified
characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import phonenumbers
from phonenumbers import PhoneNumberMatcher
from presidio_analyzer import (
    EntityRecognizer,
    LocalRecognizer,
    Pattern,
    PatternRecognizer,
    RecognizerResult,
)
from presidio_analyzer.predefined_recognizers import IpRecognizer

from silotune.client.preparation.check_digits import (
    IBAN_LENGTHS,
    is_card,
    is_day,
    is_hong_kong_id,
    is_iban,
    is_resident_id,
    is_ssn,
    is_taiwan_id,
)
from silotune.client.preparation.chinese_names import ChineseNames
from silotune.client.preparation.latin import bounded
from silotune.client.preparation.name_lists import Names
from silotune.client.preparation.person_names import EnglishNames, Found

LANGUAGE = "xx"  # Presidio wants one; the settings choose recognisers, so all of them share it
BEFORE = 40  # characters in which a word says what the number after it is

Rule = Callable[[str], bool]


class Shape(PatternRecognizer):
    """Patterns with a score each. `proof`: check digits, which settle it either way; `possible`:
    what a match must be at least; `near`: words just before that raise the score; `against`: words
    directly before that lower it.

    A pattern's match begins at \\K where it has one.
    """

    def __init__(
        self,
        kind: str,
        *patterns: tuple[str, float],
        proof: Rule | None = None,
        possible: Rule | None = None,
        near: str = "",
        against: str = "",
        ignore_case: bool = True,
    ) -> None:
        super().__init__(
            supported_entity=kind,
            supported_language=LANGUAGE,
            patterns=[Pattern(kind, bounded(pattern), score) for pattern, score in patterns],
            global_regex_flags=int(re.MULTILINE | (re.IGNORECASE if ignore_case else 0)),
        )
        self.proof, self.possible = proof, possible
        self.near = re.compile(bounded(near), re.IGNORECASE) if near else None
        self.against = (
            re.compile(bounded(rf"(?:{against})[^\w]{{0,3}}$"), re.IGNORECASE) if against else None
        )

    def validate_result(self, pattern_text: str) -> bool | None:
        return self.proof(plain(pattern_text)) if self.proof else None

    def invalidate_result(self, pattern_text: str) -> bool | None:
        return not self.possible(pattern_text) if self.possible else None

    def enhance_using_context(
        self,
        text: str,
        raw_recognizer_results: list[RecognizerResult],
        other_raw_recognizer_results: list[RecognizerResult],
        nlp_artifacts: Any,
        context: list[str] | None = None,
    ) -> list[RecognizerResult]:
        for found in raw_recognizer_results:
            if self.near and self.near.search(text, max(0, found.start - BEFORE), found.start):
                found.score = min(1.0, found.score + 0.4)
            before = text[max(0, found.start - BEFORE) : found.start]
            if self.against and self.against.search(before):
                found.score = max(0.0, found.score - 0.4)
        return raw_recognizer_results


class Finder(LocalRecognizer):
    """A recogniser made of a function from a text to what it found there."""

    def __init__(self, kind: str, find: Callable[[str], Iterator[Found]]) -> None:
        self.find = find
        super().__init__(supported_entities=[kind], supported_language=LANGUAGE, name=kind)

    def load(self) -> None:
        """Nothing to load: the lists came with the function."""

    def analyze(
        self, text: str, entities: list[str], nlp_artifacts: Any = None
    ) -> list[RecognizerResult]:
        kind = self.supported_entities[0]
        return [RecognizerResult(kind, start, end, score) for start, end, score in self.find(text)]


def plain(value: str) -> str:
    """Without spaces and hyphens."""
    return re.sub(r"[ -]", "", value)


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────

CARDS = (  # as they are printed, or in one piece; nothing of a longer number
    (r"(?<![\d.])\d{13,19}(?!\d)", 0.3),
    (r"(?<![\d.])(?<!\d[ -])\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?!\d|\1\d{4}(?!\d))", 0.3),
    (r"(?<![\d.])(?<!\d[ -])\d{4}([ -])\d{4}\1\d{4}\1\d{4}\1\d{1,3}(?!\d)", 0.3),
    (r"(?<![\d.])(?<!\d[ -])\d{4}([ -])\d{6}\1\d{4,5}(?!\d)", 0.3),
    (r"(?<![\d.])(?<!\d[ -])\d{6}([ -])\d{10,13}(?!\d)", 0.3),
)
_SSN_NEAR = r"\bssn\b|social\s+security|\bss\s?(?:#|no)"
_PHONE_NEAR = (
    r"\b(?:tel|tele?phone|phone|call(?:ed|back)?|mob(?:ile)?|cell|fax|ring|text|contact|number is"
    r"|reach(?:ed)?)\b|电话|手机|座机|传真|致电|联系"
)
MOBILES = (
    (r"(?<![\dA-Z.])(?<!\d-)(?:\+?86[ -]?)?1[3-9]\d([ -]?)\d{4}\1\d{4}(?!-?\d)", 0.8),
    (r"(?:tel|phone|mobile|mob|cell)[.:# ]*\K1[3-9]\d{9}(?!\d)", 0.9),
)
LANDLINES = (
    (
        r"(?<![\d.-])(?:\+?86[ -]?)?\(?0(?:10|2\d|[3-9]\d{2})(?:\)|[ -]|\) ?)[2-9]\d{6,7}"
        r"(?:-\d{1,5})?(?!\d)",
        0.75,
    ),
    (r"(?<![\d.-])0(?:10|2\d|[3-9]\d{2})[2-9]\d{6,7}(?!\d)", 0.4),
    (r"(?<![\d.-])[48]00-?\d{3,4}-?\d{3,4}(?!\d)", 0.3),
    (r"(?<![\d.-])09\d{2}([- ]?)\d{3}\1\d{3}(?!\d)", 0.6),  # Taiwan
    (r"(?<![\d.-])\(?0[2-8]\d?(?:\)|-|\) )\d{3,4}-?\d{4}(?![\d-])", 0.6),
    (r"(?<![\d.-])[235679]\d{3}[ -]?\d{4}(?![\d-])", 0.2),  # Hong Kong
)
# Beside the plans of phonenumbers: ranges that are newer than it, and those kept for examples.
ENGLISH_PHONES = (
    (r"(?<![\w.,/-])(?:\+44 ?(?:\(0\) ?)?|0)7\d{3}[ -]?\d{3}[ -]?\d{3}(?![\d-])", 0.7),
    (
        r"(?<![\w.,/-])(?:\+44 ?(?:\(0\) ?)?|\(?0)(?:2\d\)? ?\d{4} \d{4}|1\d{2}\)? ?\d{3} \d{4}"
        r"|1\d{3}\)? ?\d{6})(?![\d-])",
        0.6,
    ),
    (
        r"(?<![\w.,/-])(?:\+?1[-. ])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}([-. ]))"
        r"[2-9]\d{2}[-. ]\d{4}(?![\d-])",
        0.6,
    ),
)
_CODE_NUMBER = r"(?:\d{3} \d{3} \d{4}|[A-Z]{0,4}-?\d[\dA-Z]*(?:[-/][\dA-Z]+)*)(?![\dA-Z])"
_SEPARATOR = r"[ \t,;|]+"
RECORDS = (
    # A row of a list: name, date of birth, number, and nothing or another number.
    (
        rf"^[^\d\n]{{3,60}}\d{{1,4}}([/.-])\d{{1,2}}\1\d{{2,4}}{_SEPARATOR}\K"
        rf"(?:[A-Z]{{0,2}}\d{{6,9}}|\d{{2,4}}-\d{{4,6}})(?={_SEPARATOR}[(+\d]|\s*$)",
        0.6,
    ),
    (
        r"\b(?:MRN?|EMR|EHR|UR|CRN|CHI|NHI|medical\s+rec(?:ord)?|health\s+record|patient|pt|hosp(?:ital)?|"
        r"chart|record|case\s+note|file|folder|episode|encounter|admission|clinic|accession|unit|NHS|PAS)"
        r"\.?\s*(?:(?:number|num|no\b|nr\b|id\b|identifier|#)\.?\s*)+"
        rf"(?:is|was|[:=#])*\s*\K{_CODE_NUMBER}",
        0.85,
    ),
    (
        r"\b(?:MRN|MR\s?#|URN|medical\s+record|chart|NHS)\s*[:=#]*\s*(?:is\s+)?"
        rf"\K{_CODE_NUMBER}",
        0.85,
    ),
    # A number of a usual form directly behind whom or what it numbers.
    (
        r"\b(?:patient|pt|MR|chart|file|folder|record|hosp(?:ital)?|ID)\b *[:#.]? *"
        r"\K(?:[A-Z]\d{6,8}|\d{3}-\d{5,6}|\d{7,8})(?![\dA-Z-])",
        0.6,
    ),
    (
        r"(?:病历|病案|住院|门诊|急诊|就诊卡?|挂号|登记|病人|患者|病员|诊疗卡?|医保卡?|影像|检查|档案|"
        r"建档|随访|体检|透析|手术|案)(?:[编序流]?水?号码?|ID|卡号)"
        rf"[为是]?[:\s]*\K{_CODE_NUMBER}",
        0.85,
    ),
)


# A passport's number says itself only by its label; China's also by its form, near one.
_PASSPORT = r"[A-Z]{0,3}\d[A-Z0-9]{5,9}"
PASSPORTS = (
    (
        r"(?<![A-Z0-9])(?=[A-Z]{0,3}\d)(?<=(?i:passports?|travel documents?|护照|通行证)"
        r"[^\d\n]{0,30}?"
        rf"(?<![A-Z0-9])(?:{_PASSPORT}(?:, ?|、|，|/|;|；| and | or |[和与及])){{1,9}}){_PASSPORT}"
        r"(?![A-Z0-9-])",
        0.85,
    ),  # further ones of a list behind a label
    (
        r"(?i:passport|travel document|护照|通行证)[^\d\n]{0,30}?(?<![A-Z0-9])"
        r"\K(?:[A-Z]{1,3} ?)?\d[A-Z0-9]{5,9}(?![A-Z0-9-])",
        0.85,
    ),
    (r"(?<![A-Z0-9])E[A-HJ-NP-Z]?\d{7,8}(?![A-Z0-9-])", 0.4),
)
_PASSPORT_NEAR = "passport|travel document|护照|证件|通行证"
_PLATE_LABEL = (
    r"(?i:(?:licen[cs]e|number|registration) plates?|plate (?:number|no\b\.?)|"
    r"(?:car|vehicle)(?:'s)? reg(?:istration)?\b\.?|"
    r"\breg(?:istration)?\b\.? ?(?:no\b\.?|number|mark)|"
    r"车牌号?码?|牌照号?码?|车号)"
)
_PLATE = r"(?=[A-Z \-]{0,7}\d)(?=[\d \-]{0,7}[A-Z])[A-Z0-9]{1,5}(?:[ -]?[A-Z0-9]{1,5}){0,2}"
PLATES = (
    (
        r"[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼使领][A-HJ-NP-Z]"
        r"[·•・ -]?(?=[A-Z]{0,4}\d)[A-HJ-NP-Z0-9]{4}(?:[A-HJ-NP-Z0-9]{1,2}|[挂学警港澳])"
        r"(?![A-Z0-9])",
        0.9,
    ),
    (
        r"(?<![A-Z0-9])[A-HJ-PR-Y]{2}(?:0[2-9]|[12]\d|5[1-9]|[67]\d)[ -]?[A-HJ-PR-Z]{3}"
        r"(?![A-Z0-9])",
        0.6,
    ),  # the United Kingdom's since 2001
    (r"(?<![A-Z0-9-])[1-9][A-Z]{3}\d{3}(?![A-Z0-9-])", 0.5),  # California's
    (
        rf"{_PLATE_LABEL}[^A-Z0-9\n]{{0,4}}(?:(?i:is|was|number|no)\b[^A-Z0-9\n]{{0,3}}){{0,2}}"
        rf"\K{_PLATE}(?![A-Z0-9])",
        0.8,
    ),
)
# Other plates look like any code: only in a text about vehicles.
_VEHICLE = re.compile(
    bounded(
        r"\bplates?\b|\bvehicles?\b|\bparking\b|\bcar park\b|\bmotor(?:cycle)?\b|\bcollision\b|"
        r"\brear-ended\b|\btow(?:ed|ing)\b|\b(?:speeding|traffic)\b|\b(?:car|van|truck|lorry)\b"
    ),
    re.IGNORECASE,
)
_PLATE_ALONE = re.compile(
    r"(?<![A-Z0-9-])(?!MRN|ICD|CPT|USD|GBP|EUR|CNY|REF|TEL|FAX|PIN|VIN|SSN|DOB|ISO|COV|HIV|NHS|INV|TAX)"
    r"(?:[A-Z]{3}[ -]?\d{3,4}|\d{3,4}[ -][A-Z]{3})(?![A-Z0-9-])"
)
_ACCOUNT = r"[A-Za-z0-9][-_A-Za-z0-9]{4,19}(?![-_A-Za-z0-9])"
MESSENGERS = (  # behind a colon any name; elsewhere one with a digit or _, which no word has
    (rf"(?:微信号?|we ?chat(?: id)?|weixin|(?<![a-z])[vw]x)\s*[:=]\s*\K{_ACCOUNT}", 0.9),
    (
        r"(?:微信号?码?|we ?chat|weixin)(?:\s*(?:(?:id|account|name|user(?:name)?|number|no\.?|is|"
        rf"was|on file|on record)\b|为|是|号码?))*\s*(?:[为是])?\K(?=[-A-Za-z]*[\d_]){_ACCOUNT}",
        0.9,
    ),
    (
        r"(?<![A-Za-z])QQ\s*(?:(?:id|number|no\.?|account|is|号码?|为|是)\s*)*[:=]?\s*\K[1-9]\d{4,10}(?!\d)",
        0.9,
    ),
)
_NO_PATH = r"\s<>\"'()，。；、（）《》“”\u4e00-\u9fff"
_PATH = rf"[^{_NO_PATH}]*[^{_NO_PATH}.,;:!?]"
_DOMAINS = "com|org|net|edu|gov|info|io|cn|hk|tw|eu|de|fr|uk|us|ca|au|health"
URLS = (
    (rf"(?:https?|ftp)://{_PATH}", 0.95),
    (rf"(?<![a-z0-9.@/-])www\.{_PATH}", 0.9),
    (
        rf"(?<![a-z0-9._@/-])(?:[a-z0-9][a-z0-9-]{{1,62}}\.){{1,5}}(?:{_DOMAINS})"
        rf"(?![a-z0-9@-]|\.[a-z0-9])(?:[/?#]{_PATH})?",
        0.6,
    ),
)


def ip_addresses() -> IpRecognizer:
    """Presidio's, which tries every match with `ipaddress`. For it a Chinese character beside the
    address is a boundary, and the address is no phone number."""
    return IpRecognizer(
        patterns=[
            Pattern(p.name, f"(?a){p.regex}", 0.9) for p in IpRecognizer.PATTERNS if p.score > 0.5
        ],
        supported_language=LANGUAGE,
        supported_entity="ip_address",
    )


def ibans(text: str) -> Iterator[Found]:
    """By country, length and check digits, in groups or not, whatever follows."""
    for found in re.finditer(r"(?<![A-Za-z0-9])([A-Za-z]{2})\d{2}", text):
        size = IBAN_LENGTHS.get(found[1].upper(), 0)
        whole = re.compile(rf"(?:[A-Za-z0-9][ -]?){{{max(size - 1, 0)}}}[A-Za-z0-9](?![A-Za-z0-9])")
        if size and (match := whole.match(text, found.start())) and is_iban(plain(match[0])):
            yield Found(match.start(), match.end(), 1.0)


def plates(text: str) -> Iterator[Found]:
    """Three letters and three or four digits, in a text about vehicles."""
    if _VEHICLE.search(text):
        for plate in _PLATE_ALONE.finditer(text):
            yield Found(*plate.span(), 0.6)


def phones(regions: tuple[str, ...]) -> Callable[[str], Iterator[Found]]:
    """Numbers that exist in the plans of `regions`, or of any country when they begin with +."""
    near = re.compile(bounded(_PHONE_NEAR), re.IGNORECASE)

    def find(text: str) -> Iterator[Found]:
        if not re.search(r"\d(?:\D{0,3}\d){6}", text):  # the library's search takes its time
            return
        for region in regions:
            for match in PhoneNumberMatcher(text, region, phonenumbers.Leniency.VALID):
                score = 0.45
                if re.search(r"[ ().-]", match.raw_string):
                    score = 0.7
                if match.raw_string.startswith("+"):
                    score = 0.95
                elif near.search(text, max(0, match.start - BEFORE), match.start):
                    score = min(1.0, score + 0.4)
                yield Found(match.start, match.end, score)

    return find


# ── Dates ─────────────────────────────────────────────────────────────────────────────────────────

_MONTHS = """
    January February March April May June July August September October November December
"""
_MONTH = (
    "(?:"
    + "|".join(
        form
        for name in _MONTHS.split()
        for form in (name, name.upper(), name[:3] + r"\b\.?", name[:3].upper() + r"\b\.?")
    )
    + r"|Sept\b\.?)"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_ORDINAL = rf"{_DAY}(?:st|nd|rd|th)?"
_TIME = r"(?:[T ]\d{2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?:Z|[+-]\d{2}:?\d{2})?)?"  # ISO 8601
# No part of a longer number. A comma or a full stop without a space behind it may end a sentence.
_ALONE = (
    r"(?<!\d\.)(?<![\d/])(?:(?<!-)|(?<=\d[./]\d{4}-)|(?<=\d[./]\d{1,2}[./]\d{1,4}-)"
    r"|(?<=\d{4}-\d\d-\d\d-))"
)
_ENDS = r"(?![\d/]|\.\d|-(?!\d{1,4}[./-]\d))"  # a range goes on from it
NUMERIC_DATES = (
    (rf"{_ALONE}\d{{4}}([-/.])(?:0?[1-9]|1[0-2])\1{_DAY}(?!\d){_TIME}{_ENDS}", 0.8),
    (r"(?<!\d)(?:19|20)\d{6}T\d{4}(?:\d{2})?(?:Z|[+-]\d{4})?(?!\d)", 0.8),
    (rf"{_ALONE}\d{{1,2}}([-/])\d{{1,2}}\1(?:\d{{4}}|\d{{2}}){_ENDS}", 0.7),
    (rf"{_ALONE}\d{{1,2}}\.\d{{1,2}}\.\d{{4}}{_ENDS}", 0.7),
    (r"(?:出生|生日|生于|born|birth|dob)[^\d\n]{0,12}\K(?:19|20)\d{6}(?!\d)", 0.7),
)
# 07.03.24 is also how versions and sections are numbered.
DOTTED_DATES = (
    (rf"{_ALONE}\d{{2}}\.\d{{2}}\.\d{{2}}{_ENDS}", 0.6),
    (rf"{_ALONE}\d{{1,2}}\.\d{{1,2}}\.\d{{2}}{_ENDS}", 0.5),
)
_NUMBERED = (
    r"version|firmware|software|release|build|section|chapter|table|figure|protocol|template|"
    r"revision|\brev\.?|edition|patch|\bv|版本|版|节|章|软件|固件|模板|程序|系统|驱动"
)
_YEAR = r"(?:19|20)\d{2}"
MONTHS = (  # 3/2024, 03.2024, 2024-03
    (rf"{_ALONE}(?:0?[1-9]|1[0-2])/{_YEAR}{_ENDS}", 0.7),
    (rf"{_ALONE}(?:0[1-9]|1[0-2])[.-]{_YEAR}{_ENDS}", 0.6),
    (rf"{_ALONE}{_YEAR}[-/](?:0[1-9]|1[0-2]){_ENDS}", 0.6),
)
WRITTEN_DATES = (
    (
        rf"(?<![\w/-])(?<!\d[.,]){_ORDINAL}(?: of)?[ -]{_MONTH}"
        r"(?:,?[ -](?:\d{4}|'?\d{2})(?![\d:]))?",
        0.75,
    ),
    (rf"\b{_MONTH} {_ORDINAL}(?![\d.%]| ?(?:mg|ml|patients)\b)(?:,? \d{{4}}(?!\d))?", 0.75),
    (rf"\b{_MONTH},? (?:of )?(?:19|20)\d{{2}}(?!\d)", 0.65),
)
_ZH_NUMBER = "[〇零一二三四五六七八九十]"
_ZH_DAY = rf"(?:\d{{1,2}}|{_ZH_NUMBER}{{1,3}})"  # or a month
_REPUBLIC = "(?:中华)?民国"  # Taiwan counts its years from 1912
CHINESE_DATES = (
    (
        rf"{_REPUBLIC} ?(?:\d{{1,3}}|[百{_ZH_NUMBER[1:]}{{1,5}}) ?年(?: ?{_ZH_DAY} ?月"
        rf"(?: ?{_ZH_DAY} ?[日号])?)?",
        0.85,
    ),
    (rf"{_REPUBLIC} ?\d{{1,3}}([./-])\d{{1,2}}\1\d{{1,2}}(?!\d)", 0.85),
    (rf"{_ALONE}1[01]\d([./-])(?:0?[1-9]|1[0-2])\1{_DAY}{_ENDS}", 0.55),
    (
        rf"(?<!\d)(?:\d{{4}}|1[01]\d|\d{{2}}|{_ZH_NUMBER}{{4}}) ?年 ?{_ZH_DAY} ?月"
        rf"(?: ?{_ZH_DAY} ?[日号])?",
        0.8,
    ),
    (rf"(?<!\d){_ZH_DAY} ?月 ?{_ZH_DAY} ?[日号]", 0.7),
)


def is_numeric_date(value: str) -> bool:
    """Year first, or day and month in either order."""
    parts = re.findall(r"\d+", value)[:3]
    if len(parts[0]) == 8:
        parts = [value[:4], value[4:6], value[6:8]]
    if len(parts[0]) == 4:
        year, month, day = (int(part) for part in parts)
        return is_day(year, month, day)
    one, other, year = (int(part) for part in parts)
    year += 2000 * (year < 100)  # which century does not matter, save for 29 February
    return is_day(year, other, one) or is_day(year, one, other)


def is_chinese_date(value: str) -> bool:
    """The month and day that are written in digits can be."""
    found = re.search(r"(\d+) ?月(?: ?(\d+))?|\d[./-](\d+)[./-](\d+)$", value)
    if not found:
        return True
    month, day = int(found[1] or found[3]), int(found[2] or found[4] or 1)
    return 1 <= month <= 12 and 1 <= day <= 31


# ── Addresses ─────────────────────────────────────────────────────────────────────────────────────

_STATES = (
    "(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|"
    "T[NX]|UT|V[AIT]|W[AIVY]|A[AEPS]|GU|M[HP]|P[RW])"
)
_ZIP = rf"{_STATES} \d{{5}}(?:-\d{{4}})?(?!\d)"
_POSTCODE = r"\b[A-Z]{1,2}\d[A-Z\d]? ?\d[ABD-HJLNP-UW-Z]{2}\b"
_WAY = (
    "(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Square|Sq|"
    r"Terrace|Close|Crescent|Cres|Gardens|Gdns|Grove|Way|Parkway|Pkwy|Circle|Cir|Highway|Hwy|Row|"
    r"Mews|Hill|Walk|Trail|Broadway)\b\.?"
)
_ROOM = (
    r"(?:Flat|Studio|Apt|Apartment|Unit|Suite|Ste|Room|Rm|Floor|#)\.? ?#?"
    r"\d{0,4}[A-Za-z]?\d{0,4}\b"
)
_TOWN = r"[A-Z][\w'.-]+(?: (?:[A-Z][\w'.-]+|upon|on|of|the|under|le|de|la)){0,3}"
_PART = r"(?:[A-Z\d#][\w'#.-]*|upon|on|of|the|under|le|de|la)"
_WORDS = rf"{_PART}(?: {_PART}){{0,5}}"
STREETS = (
    (
        rf"(?:\b{_ROOM},?\s)?(?<![\d.,/:-])\b\d{{1,5}}[A-Za-z]?(?:[-/]\d{{1,4}})?,? "
        rf"(?:(?:[A-Z][\w'.]*|\d{{1,3}}(?:st|nd|rd|th)|of|the|de|la) ){{1,4}}?{_WAY}"
        rf"(?:,?\s{_ROOM})?"
        rf"(?:(?:,?\s{_TOWN}){{0,2}},?\s(?:{_ZIP}|{_POSTCODE})|,\s{_TOWN}, {_STATES}\b)?",
        0.9,
    ),
    # Whatever the street is called: from a house's number to a postcode within a few commas.
    (
        rf"(?:\b{_ROOM},?\s)?(?<![\d.,/:-])\b\d{{1,5}}[A-Za-z]?,? {_WORDS}"
        rf"(?:(?:,\s|\n){_WORDS}){{0,4}}?,?\s(?:{_ZIP}|{_POSTCODE})",
        0.8,
    ),
    (rf"\b{_ROOM}(?:(?:,\s|\n){_WORDS}){{1,4}}?,?\s(?:{_ZIP}|{_POSTCODE})", 0.8),
    (
        r"\b(?:P\.? ?O\.? ?|Post Office )Box \d{1,6}"
        rf"(?:(?:,?\s{_TOWN}){{0,2}},?\s(?:{_ZIP}|{_POSTCODE}))?",
        0.8,
    ),
    (rf"\b{_TOWN}, {_ZIP}", 0.7),
    (rf"(?:{_TOWN}, )?{_POSTCODE.replace(' ?', ' ')}", 0.6),
    (r"\b(?:[Zz]ip|ZIP)(?: [Cc]ode)?[: ]+\K\d{5}(?:-\d{4})?(?!\d)", 0.7),
)
_H = "[\u4e00-\u9fff]"
_DOOR = (
    rf"(?:{_H}{{0,8}}?(?:\d{{1,5}}|{_ZH_NUMBER}{{1,4}}|[A-Z甲乙丙丁])(?:-\d{{1,4}})*"
    r"(?:号楼|号院|号|弄|栋|幢|座|单元|室|楼|层|组|户))"
)
_ZH_WAY = "(?:大街|大道|路|街|巷|弄|胡同|里|道|村|庄|小区|社区|新村|花园|苑|公寓|广场)"


def chinese_streets(places: str) -> tuple[tuple[str, float], ...]:
    """Patterns of addresses that begin with one of `places` ('北京|上海|…'), or have a sign."""
    rest = (
        rf"(?:{_H}{{1,12}}?{_ZH_WAY})(?:{_H}{{1,8}}?{_ZH_WAY})?{_DOOR}{{0,5}}"
        r"(?:\d{3,4}(?!\d))?"
    )
    levels = (
        rf"(?:{_H}{{1,6}}?(?:市|州|盟|地区))?(?:{_H}{{1,6}}?(?:区|县|旗|市))?"
        rf"(?:{_H}{{1,6}}?(?:街道|镇|乡))?"
    )
    region = rf"(?:{places})(?:省|市|(?:壮族|回族|维吾尔)?自治区|特别行政区)?"
    return (
        (rf"{region}{levels}(?:{rest}|{_DOOR}{{1,5}})", 0.8),
        (
            r"(?:住址|地址|住所|家住|现住|居住地|户籍地?|籍贯|寄[到往至]|送[到至]|位于|家在)"
            rf"[为是在于:\s]*\K{levels}{rest}",
            0.8,
        ),
        (rf"{_H}{{2,4}}?(?:路|街|大道|巷|胡同)\d{{1,5}}号{_DOOR}{{0,4}}", 0.6),
    )


def recognisers(language: str, kinds: frozenset[str], names: Names) -> list[EntityRecognizer]:
    """Those of a language ("en", "zh", "both") that find `kinds`."""
    english, chinese = language != "zh", language != "en"
    host = r"(?:[A-Z0-9](?:[A-Z0-9-]{0,61}[A-Z0-9])?\.){1,8}[A-Z]{2,24}(?![A-Z0-9-])"
    found: list[EntityRecognizer] = [
        Shape("email", (rf"(?<![A-Z0-9._%+-])[A-Z0-9._%+'-]{{1,64}}@{host}", 0.95)),
        Finder("iban", ibans),
        Shape("card", *CARDS, proof=is_card),
        Shape("date", *NUMERIC_DATES, possible=is_numeric_date),
        Shape("date", *DOTTED_DATES, possible=is_numeric_date, against=_NUMBERED),
        Shape("date", *MONTHS),
        Shape("record_number", *RECORDS),
        Shape("passport", *PASSPORTS, near=_PASSPORT_NEAR, ignore_case=False),
        Shape("license_plate", *PLATES, ignore_case=False),
        Finder("license_plate", plates),
        Shape("messenger_id", *MESSENGERS),
        Shape("url", *URLS),
        ip_addresses(),
        # A call from abroad is one in any language; so is a number that begins with +.
        Finder("phone", phones(("US", "GB") if english else ("ZZ",))),
    ]
    if english:
        found += [
            Finder("person", EnglishNames(names).find),
            Shape(
                "ssn",
                (r"(?<![\d.-])\d{3}-\d{2}-\d{4}(?![\d-])", 0.65),
                (r"(?<![\d.-])\d{3} \d{2} \d{4}(?!\d)", 0.3),
                (r"(?<![\d.A-Z-])\d{9}(?!\d)", 0.2),
                possible=lambda value: is_ssn(plain(value)),
                near=_SSN_NEAR,
            ),
            Shape("phone", *ENGLISH_PHONES, near=_PHONE_NEAR),
            Shape("date", *WRITTEN_DATES, ignore_case=False),
            Shape("address", *STREETS, ignore_case=False),
        ]
    if chinese:
        found += [
            Finder("person", ChineseNames(names).find),
            Shape(
                "resident_id",
                (r"(?<!\d)\d{6}([ -]?)(?:18|19|20)\d{6}\1\d{3}[\dX](?![\dX])", 0.5),
                proof=is_resident_id,
            ),
            Shape(
                "resident_id",
                (r"(?<!\d)\d{15}(?!\d)", 0.2),
                possible=is_resident_id,
                near="身[份分]证|证件|resident id|identity",
            ),
            Shape("resident_id", (r"(?<![A-Z0-9])[A-Z][1289]\d{8}(?!\d)", 0.5), proof=is_taiwan_id),
            Shape(
                "resident_id",
                (r"(?<![A-Z0-9])[A-Z]{1,2}\d{6} ?\([\dA]\)", 0.5),
                proof=is_hong_kong_id,
            ),
            Shape(
                "resident_id",
                (r"(?<![A-Z0-9])[A-Z]{1,2}\d{6}[\dA](?![A-Z0-9])", 0.2),
                possible=is_hong_kong_id,
                near=r"身[份分]证|证件|HKID|identity|\bID\b",
            ),
            Shape("phone", *MOBILES, *LANDLINES, near=_PHONE_NEAR),
            Shape("date", *CHINESE_DATES, possible=is_chinese_date),
            Shape("address", *chinese_streets("|".join(names.places))),
        ]
    return [one for one in found if one.supported_entities[0] in kinds]
