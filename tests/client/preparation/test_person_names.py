"""A listed given name and family name are found whole, whatever stands around them and however they
are written."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from silotune.client.preparation.deidentify import Deidentifier, simplified
from silotune.client.preparation.name_lists import Names, folded
from silotune.client.preparation.person_names import EnglishNames
from silotune.client.site.preparation_rules import Deidentify

NAMES = Names.load()
GIVEN = sorted(NAMES.given | NAMES.given_words)
SURE = sorted(NAMES.given)
FAMILY = sorted(NAMES.family | NAMES.family_words)
OWN_FAMILY = sorted(NAMES.family)
ENGLISH = EnglishNames(NAMES)
ONE = Deidentifier(Deidentify(kinds=("person",)), bytes(32))

BEFORE = (
    "",
    "patient ",
    "Patient ",
    "Dr ",
    "dr. ",
    "mrs ",
    "MR ",
    "Seen: ",
    "I met ",
    "the ",
    "(",
    '"',
    "On Monday ",
    "St ",
    "near ",
    "1. ",
    "- ",
    "Name: ",
    "患者",
    "\n",
    "with Dr. ",
    "Ward 7: ",
    "re:",
)
AFTER = (
    "",
    " attended clinic",
    " left hospital",
    " failed test",
    " disease",
    "'s syndrome",
    " Hospital",
    " Road",
    " was seen",
    ", 64",
    ".",
    " ATTENDED CLINIC",
    " clinic",
    "'s sign",
    " and wife",
    "\n",
    " (DOB 1950)",
    "; stable",
    " index",
    " Bank",
    " may go home",
    " will need review",
    ", MD",
    "今日",
)
MARKS = {
    "a": "áàâäãåą",
    "e": "éèêëęě",
    "i": "íìîïı",
    "o": "óòôöõøő",
    "u": "úùûüů",
    "c": "çćč",
    "n": "ñńň",
    "s": "śšş",
    "z": "źżž",
    "l": "ł",
    "y": "ýÿ",
    "r": "ř",
    "g": "ğ",
    "d": "đď",
}


@st.composite
def marked(draw: st.DrawFn, names: list[str]) -> str:
    """A listed name, some of its letters with marks, in one form of Unicode or the other."""
    name = draw(st.sampled_from(names))
    letters = [
        draw(st.sampled_from(MARKS[c])) if c in MARKS and draw(st.integers(0, 3)) == 0 else c
        for c in name
    ]
    found = "".join(letters)
    return unicodedata.normalize("NFD", found) if draw(st.booleans()) else found


def title(name: str) -> str:
    return "-".join(part[:1].upper() + part[1:] for part in name.split("-"))


STYLES = (title, str.upper, str.lower)


def left_of(text: str, name: str) -> str:
    """The letters and digits of `name`, which begins at the mark |, that are not taken out."""
    start = text.index("|")
    text = text.replace("|", "")
    plain, places = simplified(text)
    covered = {
        places[at]
        for found in ENGLISH.find(plain)
        if found.score >= Deidentify().least_score
        for at in range(found.start, found.end)
    }
    return "".join(
        text[place]
        for place in range(start, start + len(name))
        if text[place].isalnum() and place not in covered
    )


@settings(max_examples=300, deadline=None)
@given(
    marked(GIVEN),
    marked(FAMILY),
    st.sampled_from(STYLES),
    st.sampled_from(BEFORE),
    st.sampled_from(AFTER),
    st.sampled_from([" ", " ", "  ", " Q. ", " J. R. ", " van der "]),
)
@example("john", "smith", title, "", " attended clinic on Monday, tel 555-867-5309", " ")
@example("mary", "jones", title, "", " left hospital, email mary@example.com", " ")
@example("will", "may", str.lower, "the ", " disease", " ")
@example("elizabeth", "west", title, "St ", " Hospital", " ")
@example("łukasz", "wójcik" if "wojcik" in FAMILY else "nowak", str.upper, "", "'s sign", " ")
def test_a_listed_given_and_family_name_are_taken_whole(
    one: str, other: str, style: object, before: str, after: str, between: str
) -> None:
    assert callable(style)
    middle = style(between) if style is not title else between
    name = f"{style(one)}{middle}{style(other)}"
    assert left_of(f"{before}|{name}{after}", name) == ""


@settings(max_examples=150, deadline=None)
@given(
    marked(FAMILY),
    marked(SURE),
    st.sampled_from(BEFORE),
    st.sampled_from(AFTER),
    st.sampled_from([", ", ","]),
    st.sampled_from(["", " A.", " Q"]),
)
@example("o'brien" if "obrien" in FAMILY else "smith", "mary", "", " attended clinic", ", ", "")
def test_family_comma_given_is_taken_whole(
    family: str, first: str, before: str, after: str, comma: str, middle: str
) -> None:
    name = f"{family.upper()}{comma}{title(first)}{middle}"
    assert left_of(f"{before}|{name}{after}", name) == ""


@settings(max_examples=100, deadline=None)
@given(
    marked(OWN_FAMILY),
    st.sampled_from(["J. ", "J.R. ", "J. R. ", "A.", "Z. "]),
    st.sampled_from([title, str.upper]),
    st.sampled_from(AFTER),
)
def test_initials_and_a_listed_family_name_are_taken_whole(
    family: str, initials: str, style: object, after: str
) -> None:
    assert callable(style)
    name = f"{initials}{style(family)}"
    assert left_of(f"Seen by |{name}{after}", name) == ""


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["dr ", "dr. ", "Dr. ", "mrs ", "Mrs. ", "MR ", "Prof ", "miss "]),
    st.lists(marked(SURE), max_size=3),
    marked(FAMILY),
    st.sampled_from(STYLES),
    st.sampled_from(AFTER),
)
@example("Dr ", ["mary", "anne", "elizabeth"], "smith", title, " came")
def test_all_names_behind_a_title_are_taken(
    title_of: str, firsts: list[str], family: str, style: object, after: str
) -> None:
    assert callable(style)
    # "dr may", "mrs day" in small letters can be words; with a given name they cannot.
    if style is str.lower and not firsts and folded(family) not in NAMES.family:
        return
    name = " ".join(style(word) for word in (*firsts, family))
    assert left_of(f"{title_of}|{name}{after}", name) == ""


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("John Smith attended clinic on Monday", "<PERSON> attended clinic on Monday"),
        (
            "Mary Jones left hospital, email mary@example.com",
            "<PERSON> left hospital, email <PERSON>@example.com",
        ),
        (
            "dr. patel called; mrs jones will return",
            "dr. <PERSON> called; mrs <PERSON> will return",
        ),
        ("JOHN SMITH FAILED TEST", "<PERSON> FAILED TEST"),
        ("patient john smith left hospital", "patient <PERSON> left hospital"),
        ("Dr Mary Anne Elizabeth Smith came", "Dr <PERSON> came"),
        ("John West and Mary Ward called", "<PERSON> and <PERSON> called"),
        ("SMITH, John and O'BRIEN, Mary", "<PERSON> and <PERSON>"),
        ("J. Smith and J.R. Patel were seen", "<PERSON> and <PERSON> were seen"),
        ("Drs Patel and Jones agreed", "Drs <PERSON> and <PERSON> agreed"),
        ("name: okonjo chidiebere dob: 5", "name: <PERSON> dob: 5"),
        ("Seen with Will F. Xyzzyk today.", "Seen with <PERSON> today."),
        ("letter to John\nSmith today", "letter to <PERSON> today"),
        ("scan_John_Smith_2.pdf", "scan_<PERSON>_2.pdf"),
        ("患者John Smith今日入院", "患者<PERSON>今日入院"),
        ("the clerk smiled; xanthe petrov left", "the clerk smiled; <PERSON> left"),
    ],
)
def test_names_in_their_sentences(text: str, cleaned: str) -> None:
    assert ONE.clean(text).text == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (
            "Handover to Grace at ten. Grace said so.",
            "Handover to <PERSON> at ten. <PERSON> said so.",
        ),
        ("Seen with Xanthe Ozturk; Ozturk agrees.", "Seen with <PERSON>; <PERSON> agrees."),
        (
            "Escort needed for Schmidt and Petrov from bay C",
            "Escort needed for <PERSON> and <PERSON> from bay C",
        ),
        ("Attendees: Farah, Piotr and L. Nakagawa.", "Attendees: <PERSON> and <PERSON>."),
        (
            "[chat] Marek: it crashes\n[chat] agent Sunny: which one?",
            "[chat] <PERSON>: it crashes\n[chat] agent <PERSON>: which one?",
        ),
        ("Hi team, Chase from the bank", "Hi team, <PERSON> from the bank"),
        ("i dont use mail. zhang weiqi", "i dont use mail. <PERSON>"),
        ("Kind regards\n\nSven-Erik Håkansson\nHead of IT", "Kind regards\n\n<PERSON>\nHead of IT"),
        ("landlord Þórður Ásgeirsson returned it", "landlord <PERSON> returned it"),
        ("failed for ABDULLAHI, Musa. Passport", "failed for <PERSON>. Passport"),
        ("Passengers: KIM/MINJUN MR", "Passengers: <PERSON>"),
        ("From: Eun-ji Baek <x@example.com>", "From: <PERSON> <x@example.com>"),
        ("Witness Summer gave a number", "Witness <PERSON> gave a number"),
        ("the nanny, Consuelo, left", "the nanny, <PERSON>, left"),
        ("外派名单:Nguyễn Hoàng Nam、Mehmet Öztürk", "外派名单:<PERSON>、<PERSON>"),
        ("我是Grace,朋友Hiroshi推荐", "我是<PERSON>,朋友<PERSON>推荐"),
        (
            "夜班:3床仇玉兰血压偏高,已报告单医生;5床高峰术后",
            "夜班:3床<PERSON>血压偏高,已报告<PERSON>医生;5床<PERSON>术后",
        ),
        ("病人自述姓万,不愿透露", "病人自述姓<PERSON>,不愿透露"),
        ("驾驶员路遥,签收人管理。门卫劳师傅", "驾驶员<PERSON>,签收人<PERSON>。门卫<PERSON>师傅"),
        ("[群聊] 童谣:谁有郝老师电话", "[群聊] <PERSON>:谁有<PERSON>老师电话"),
        ("助手甘草、黄芩,器械护士杜仲明。", "助手<PERSON>、<PERSON>,器械护士<PERSON>。"),
        ("收养人:李雷、韩梅梅夫妇,李雷签字", "收养人:<PERSON>、<PERSON>夫妇,<PERSON>签字"),
        ("审批人龚总。护士给老刘换药", "审批人<PERSON>总。护士给<PERSON>换药"),
    ],
)
def test_names_by_roles_lists_and_places_in_the_text(text: str, cleaned: str) -> None:
    assert ONE.clean(text).text == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "He travelled to Paris and Boston; a Nissen fundoplication, Child-Pugh B.",
        "Beneficiary IBAN: none. They aren't sure.",
        "于周一再次出现恶心,由安全科管理,全身情况可,治疗时间长。",
        "ANA positive, ALI excluded, MS clinic, MR angiography, DR TB",
        "Hepatitis B. Long term follow-up; Vitamin D low; plan B. Rest.",
        "All day the stool was brown, will repeat; pain since may, will review.",
        "He may have a long, hard cough and will rest. Mark the site. Bill us.",
        "Wilson disease, Graves' disease, Bell palsy, a Thomas splint",
        "I.V. Lasix, P.O. Metoprolol and E. coli; S. aureus grew.",
        "Drug name: Metoprolol. Test name: Troponin. Hospital name: General.",
        "May cause drowsiness. Will need review in May. Grace period. Rose petals.",
        "HISTORY OF PRESENT ILLNESS: PAIN ALL DAY, WILL REVIEW",
        "Dear Colleague, Dear Sir or Madam, thank you.",
        "the doctor said; the nurse will call; sister on the ward",
    ],
)
def test_words_that_look_like_names_are_left(text: str) -> None:
    assert ONE.clean(text).text == text
