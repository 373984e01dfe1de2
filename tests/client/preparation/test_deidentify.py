"""What is done with findings, and how many there are on texts that nobody looked at."""

from __future__ import annotations

import importlib.util
import logging
import re
import socket
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.client.preparation.deidentify import (
    Cleaned,
    Deidentifier,
    Finding,
    merged,
    simplified,
)
from silotune.client.site.preparation_rules import KINDS, Action, Deidentify
from silotune.common.errors import DataError, UsageError
from silotune.simulations.benchmarks.deidentify import Tally, compare, measure, measure_clean
from silotune.simulations.benchmarks.labelled_texts import Label, Labelled, Set, texts

KEY = b"k" * 32
NOTE = "Patient John Smith, born 1958-03-04, card 4111 1111 1111 1111, j.smith@example.com."
CHINESE = "患者张伟，身份证11010519491231002X，手机13812345678，住址：浙江省杭州市文三路388号。"
SECRETS = ("John", "Smith", "1958", "4111", "j.smith", "张伟", "11010519", "1381234", "文三路")


def made(**settings: Any) -> Deidentifier:
    return Deidentifier(Deidentify.model_validate(settings), KEY)


@pytest.fixture(scope="module")
def redacting() -> Deidentifier:
    return made()


@pytest.fixture(scope="module")
def masking() -> Deidentifier:
    return made(action="mask")


@pytest.fixture(scope="module")
def naming() -> Deidentifier:
    return made(action="pseudonymise")


def test_redact(redacting: Deidentifier) -> None:
    assert redacting.clean(NOTE) == Cleaned(
        "Patient <PERSON>, born <DATE>, card <CARD>, <EMAIL>.",
        {"person": 1, "date": 1, "card": 1, "email": 1},
    )
    assert redacting.clean(CHINESE).text == (
        "患者<PERSON>，身份证<RESIDENT_ID>，手机<PHONE>，住址：<ADDRESS>。"
    )


def test_mask_leaves_the_shape(masking: Deidentifier) -> None:
    assert masking.clean(NOTE).text == (
        "Patient **** *****, born ****-**-**, card **** **** **** ****, *.*****@*******.***."
    )
    assert masking.clean("患者张伟，男").text == "患者**，男"


def test_pseudonyms_are_stable_for_a_key_and_differ_between_keys(naming: Deidentifier) -> None:
    one, again = naming.clean(NOTE).text, made(action="pseudonymise").clean(NOTE).text
    other = Deidentifier(Deidentify(action="pseudonymise"), b"o" * 32).clean(NOTE).text
    assert one == again
    tokens, others = (re.findall(r"[A-Z_]+_[a-p]{10}\b", text) for text in (one, other))
    assert len(tokens) == len(others) == 4
    assert not set(tokens) & set(others)


def test_one_value_in_two_spellings_has_one_pseudonym(naming: Deidentifier) -> None:
    for one, other in (
        ("card 4111 1111 1111 1111", "card ４１１１-1111-1111-1111"),
        ("Dr John Smith", "Dr JOHN  SMITH".replace("  ", " ")),
        ("IBAN DE89370400440532013000", "iban de89 3704 0044 0532 0130 00"),
    ):
        token = naming.clean(one).text.split()[-1]
        assert re.fullmatch(r"[A-Z]+_[a-p]{10}", token)
        assert naming.clean(other).text.endswith(token)
    # The same digits as another kind are another value.
    card, ssn = naming._pseudonym("card", "1234"), naming._pseudonym("ssn", "1234")
    assert card.removeprefix("CARD") != ssn.removeprefix("SSN")


def test_block_leaves_the_record_out() -> None:
    blocking = made(actions={"ssn": "block"})
    fine, bad = "John Smith called", "John Smith, ssn 219-09-9998"
    assert blocking.clean(bad) == Cleaned("", {"person": 1, "ssn": 1}, True)
    column = blocking.clean_many([fine, bad, "nothing", bad])
    assert column.texts == ["<PERSON> called", "", "nothing", ""]
    assert column.blocked == (1, 3)
    assert column.counts == {"person": 3, "ssn": 2}


def test_each_kind_has_its_own_action() -> None:
    mixed = made(action="mask", actions={"person": "redact", "email": "pseudonymise"})
    assert re.fullmatch(
        r"Patient <PERSON>, born \*{4}-\*\*-\*\*, card (\*{4} ?){4}, EMAIL_[a-p]{10}\.",
        mixed.clean(NOTE).text,
    )


def test_only_the_kinds_and_the_language_asked_for() -> None:
    assert made(kinds=["card"]).clean(NOTE).counts == {"card": 1}
    assert "person" not in made(language="zh").clean("Dr John Smith").counts
    assert "resident_id" not in made(language="en").clean(CHINESE).counts
    assert "<PHONE>" in made(language="zh").clean("call +1 415 555 2671").text


def test_a_higher_least_score_finds_less() -> None:
    sure, unsure = made(least_score=0.95), made(least_score=0.1)
    text = "Jennifer, 219-09-9998, 2125550123, card 4111111111111111"
    assert set(sure.clean(text).counts) < set(unsure.clean(text).counts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"action": "delete"},
        {"kinds": []},
        {"kinds": ["name"]},
        {"least_score": 0},
        {"language": "de"},
        {"key": "x"},
        {"kinds": ["card"], "actions": {"person": "mask"}},
        {"least_score": 1.5},
        {"actions": {"person": "hide"}},
        {"actions": {"plate": "mask"}},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Deidentify.model_validate(wrong)


def test_an_unknown_kind_is_refused_by_name_beside_those_there_are() -> None:
    for wrong in ({"kinds": ["licence_plate"]}, {"actions": {"licence_plate": "mask"}}):
        with pytest.raises(ValidationError) as caught:
            Deidentify.model_validate(wrong)
        assert "licence_plate" in str(caught.value)
        assert all(f"'{kind}'" in str(caught.value) for kind in KINDS)


def test_every_kind_is_looked_for_by_default_and_can_be_the_only_one() -> None:
    assert Deidentify().kinds == KINDS
    one = (
        "Ann Smith, a@example.com, tel 415-555-2671, 12 Elm St, Springfield, IL 62704, 5 May 2020, "
        "DE89 3704 0044 0532 0130 00, card 4111 1111 1111 1111, ssn 219-09-9998, MRN 1234567, "
        "11010519491231002X, passport 519231480, car reg AB51 ABC, WeChat: wxid_1, "
        "www.example.com, 192.168.10.254"
    )
    assert made().clean(one).counts == dict.fromkeys(KINDS, 1)
    for kind in KINDS:
        alone = made(kinds=[kind]).clean(one)
        assert alone.counts == {kind: 1}
        assert f"<{kind.upper()}>" in alone.text


def test_a_search_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing would be looked for"):
        made(kinds=["resident_id"], language="en")
    with pytest.raises(ValueError, match="16 bytes"):
        Deidentifier(Deidentify(), b"")


# ── Overlaps ──────────────────────────────────────────────────────────────────────────────────────

findings = st.builds(
    lambda start, size, kind, score: Finding(start, start + size, kind, score),
    st.integers(0, 40),
    st.integers(1, 15),
    st.sampled_from(KINDS),
    st.sampled_from([0.5, 0.8, 1]),
)


@given(st.lists(findings, max_size=12))
def test_overlaps_become_one_and_leave_no_piece(found: list[Finding]) -> None:
    done = merged(found)
    assert all(a.end <= b.start for a, b in pairwise(done))
    assert {i for f in done for i in range(f.start, f.end)} == {
        i for f in found for i in range(f.start, f.end)
    }


def test_the_surest_names_it_then_the_longest() -> None:
    a, b, c = Finding(0, 5, "date", 0.7), Finding(3, 9, "card", 1.0), Finding(20, 25, "phone", 0.7)
    d = Finding(21, 29, "address", 0.7)
    assert merged([a, b, c, d]) == [Finding(0, 9, "card", 1.0), Finding(20, 29, "address", 0.7)]
    assert merged([a, Finding(2, 3, "ssn", 0.5, True)])[0].blocks


def test_a_date_in_an_identity_number_is_not_cut_out_of_it(redacting: Deidentifier) -> None:
    assert redacting.clean("身份证110105 19491231 002X。").text == "身份证<RESIDENT_ID>。"


# ── Text of every sort ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("手机１３８１２３４５６７８。", "手机<PHONE>。"),
        ("card ４１１１　１１１１　１１１１　１１１１", "card <CARD>"),
        ("卡号4111\u200b1111\u200b1111\u200b1111！", "卡号<CARD>！"),
        ("tel 020\u00a07946\u20110958", "tel <PHONE>"),
        ("a.b＠example．com", "<EMAIL>"),
        ("٤١١١١١١١١١١١١١١١ card", "<CARD> card"),
        ("Mr O’Brien", "Mr <PERSON>"),
        ("姓名：陳志明，電話：13812345678", "姓名：<PERSON>，電話：<PHONE>"),
        ("IP：１９２．１６８．１．５", "IP：<IP_ADDRESS>"),
        ("", ""),
        (" \n", " \n"),
        ("“纯文本”", "“纯文本”"),
    ],
)
def test_unicode_forms(redacting: Deidentifier, text: str, cleaned: str) -> None:
    assert redacting.clean(text).text == cleaned


@settings(deadline=None)
@given(st.text())
def test_simplified_keeps_the_places(text: str) -> None:
    plain, places = simplified(text)
    assert len(plain) == len(places) <= len(text)
    assert list(places) == sorted(set(places))


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=80))
def test_any_text_is_cleaned_and_cleaning_twice_changes_nothing(text: str) -> None:
    for one in _ALL:
        once = one.clean(text).text
        assert one.clean(once).text == once


_ALL = (made(), made(action="mask"), made(action="pseudonymise"))


@pytest.mark.parametrize("action", ["redact", "mask", "pseudonymise"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_cleaning_cleaned_text_changes_nothing(
    action: Action, language: Literal["en", "zh"]
) -> None:
    one = made(action=action)
    for text in texts("development", language, 8, 5):
        once = one.clean(text.text).text
        assert one.clean(once).text == once


def test_what_a_pseudonym_stands_beside_does_not_change_it() -> None:
    one = made(action="pseudonymise")
    for text in ("at 12 DATE_jjeabmpnhl Road, Boston", "John DATE_jjeabmpnhl came"):
        assert "DATE_jjeabmpnhl" in one.clean(text).text


# ── Nothing gets out ──────────────────────────────────────────────────────────────────────────────


def test_no_value_in_reprs_and_logs(
    redacting: Deidentifier, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        column = redacting.clean_many([NOTE, CHINESE])
        shown = repr((redacting, column, redacting.clean(NOTE), redacting.find(NOTE)))
    captured = capfd.readouterr()
    everything = shown + caplog.text + captured.out + captured.err + repr(redacting.settings)
    assert KEY.decode() not in everything
    assert not [secret for secret in SECRETS if secret in everything]


def test_a_failure_names_no_value(redacting: Deidentifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(text: str) -> Any:
        raise ValueError(f"cannot search {text}")

    monkeypatch.setattr(redacting, "_analyse", fails)
    with pytest.raises(DataError) as caught:
        redacting.clean(NOTE)
    error: BaseException | None = caught.value
    assert "ValueError" in str(error)
    while error is not None:
        assert not [secret for secret in SECRETS if secret in repr(error)]
        error = error.__cause__ or error.__context__


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **named: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert made().clean(NOTE).counts


def test_a_fresh_process_needs_no_network_either() -> None:
    program = """
import socket, sys
def refused(*args, **named):
    raise SystemExit("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
from silotune.client.preparation.deidentify import Deidentifier, Deidentify
assert "presidio_analyzer" not in sys.modules  # only who cleans waits for it
print(Deidentifier(Deidentify(), bytes(32)).clean("Dr Smith, a@example.com").text)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "Dr <PERSON>, <EMAIL>", done.stderr[-2000:]


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import silotune.client.preparation.deidentify as module

    find = importlib.util.find_spec
    monkeypatch.setattr(
        module, "find_spec", lambda name: None if name == "presidio_analyzer" else find(name)
    )
    with pytest.raises(UsageError, match="extra 'deidentify'"):
        made()


# ── How much is found ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.nightly  # half a minute
def test_ten_thousand_short_texts(redacting: Deidentifier) -> None:
    began = time.perf_counter()
    column = redacting.clean_many([NOTE, CHINESE, "Thanks, see you at the clinic."] * 3334)
    assert len(column.texts) == 10_002
    assert time.perf_counter() - began < 120  # 10 to 15 s on one core that has nothing else to do


LEAST = 0.97  # recall and precision of every kind, on texts that the rules were not written by
# Of the independent templates, whose author has not seen the rules: the recall that was measured on
# all of them, less 0.01. Half of them stayed unseen; on those alone recall is lower.
LOOSE = ("record_number",)  # long numbers behind 检查号 are taken for one
INDEPENDENT_RECALL = {
    ("person", "en"): 0.90,
    ("person", "zh"): 0.89,
    ("record_number", "en"): 0.83,
    ("record_number", "zh"): 0.86,
    ("license_plate", "en"): 0.94,  # a plate directly behind a name is removed as part of it
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    "which",
    ["heldout", pytest.param("independent", marks=pytest.mark.nightly)],  # the second is long
)
def test_recall_and_precision_on_texts_that_the_rules_were_not_written_by(
    which: Set,
    language: Literal["en", "zh"],
) -> None:
    tallies = measure(which, language, each=25, seed=2)
    floors = INDEPENDENT_RECALL if which == "independent" else {}
    low = [
        (kind, tally)
        for kind in KINDS
        if (tally := tallies[kind]).labels
        and (
            tally.touched / tally.labels < floors.get((kind, language), LEAST)
            or tally.right / max(1, tally.findings) < (0.85 if floors and kind in LOOSE else LEAST)
        )
    ]
    assert not low


@pytest.mark.parametrize("language", ["en", "zh"])
def test_clinical_sentences_without_details_are_left_as_they_are(
    language: Literal["en", "zh"],
) -> None:
    result = measure_clean(language, seed=2)
    assert result.untouched >= 0.95 * result.sentences, result


def test_the_sets_share_no_template_and_their_labels_fit() -> None:
    for language in ("en", "zh"):
        one, other = texts("development", language, 1, 1), texts("heldout", language, 1, 1)
        assert not {t.text for t in one} & {t.text for t in other}
        assert texts("heldout", language, 1, 1) == other
        assert all(t.text[x.start : x.end].strip() for t in other for x in t.labels)


def test_the_tally_by_hand() -> None:
    from collections import defaultdict

    tallies: dict[str, Tally] = defaultdict(Tally)
    one = Labelled("Ann Lee, 1-2-2020 x", (Label(0, 7, "person", "p"), Label(9, 17, "date", "d")))
    compare(one, [Finding(0, 3, "person", 1), Finding(9, 17, "phone", 1)], tallies)
    assert tallies["person"] == Tally(labels=1, touched=1, exact=0, gone=0, findings=1, right=1)
    assert tallies["date"] == Tally(labels=1, touched=0, exact=0, gone=1)
    assert tallies["phone"].figures()["precision"] == 0
