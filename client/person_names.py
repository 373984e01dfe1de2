"""People's names where no NER model is at hand: titles, labels and lists (names.toml).

A title or a label before a name counts most ("Dr", "Patient:", 患者), then a given name with a
family name, then a given name that is hardly ever another word. Words that are names only
sometimes (Will, May, Mark) need one of the others beside them, and a name before "disease" or
"sign" is none. Names that no list has, without title or label, are not found.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple


class Found(NamedTuple):
    """Characters `start` to `end`, and how sure: 0 to 1."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Names:
    """The lists of names.toml. English ones in lower case."""

    given: frozenset[str]
    ambiguous: frozenset[str]
    family: frozenset[str]
    other: frozenset[str]
    zh_family: frozenset[str]
    zh_compound: frozenset[str]
    zh_given: frozenset[str]
    zh_other: frozenset[str]
    places: tuple[str, ...]

    @classmethod
    def load(cls) -> Names:
        text = files("silotune.client").joinpath("names.toml").read_text(encoding="utf-8")
        lists = tomllib.loads(text)
        en, zh = lists["en"], lists["zh"]
        given, ambiguous, family, other = (
            frozenset(en[key].lower().split()) for key in ("given", "ambiguous", "family", "other")
        )
        return cls(
            given, ambiguous, family, other,
            zh_family=frozenset("".join(zh["family"].split())),
            zh_compound=frozenset(zh["compound"].split()),
            zh_given=frozenset("".join(zh["given"].split())),
            zh_other=frozenset(zh["other"].split()),
            places=tuple(zh["places"].split()),
        )


_CAPITAL = r"[A-Z\u00c0-\u00d6\u00d8-\u00de]"
_SMALL = r"[a-z\u00df-\u00f6\u00f8-\u00ff]"
_WORD = (  # Smith, O'Brien, McAllister, Lloyd-Jones, SMITH, or an initial
    rf"(?:(?:O'|D'|Mc|Mac|Le|La|De|Di|Van)?{_CAPITAL}{_SMALL}+(?:['-]{_CAPITAL}{_SMALL}+)*"
    rf"|{_CAPITAL}'?{_CAPITAL}+(?:['-]{_CAPITAL}+)*|{_CAPITAL}(?=\.? {_CAPITAL}))"
)
_RUN = re.compile(
    rf"(?<![\w@'-]){_WORD}(?:\.? (?:(?:van|von|de|der|den|del|bin|ibn|al|el|la) ){{0,2}}"
    rf"{_WORD}){{0,5}}(?![\w@])"
)
_SMALL_PAIR = re.compile(rf"(?<![\w@'.-])({_SMALL}{{3,}}) ({_SMALL}{{3,}})(?![\w@])")
_TITLE = re.compile(
    r"\b(?:Mr|Mrs|Ms|Miss|Mx|Messrs|Dr|Drs|Doctor|Prof|Professor|Sir|Dame|Lady|Lord|Nurse|Sister|"
    r"Rev|Reverend|Father|Judge|Justice|Captain|Capt|Sgt|Officer|Pastor|Rabbi|Imam|Midwife|RN|"
    r"MR|MRS|MS|MISS|DR|PROF)\.?,? $"
)
# What stands before a person. The first sort is a label and enough for any capitalised word.
_LABEL = re.compile(
    r"(?:\b(?:name|patient|pt|client|customer|beneficiary|payee|payer|"
    r"(?:card|account|policy) ?holder|next of kin|attending(?: physician)?|physician|surgeon|"
    r"provider|consultant|sender|recipient|signed|attn|attention|carer|guardian|witness|"
    r"applicant|employee|member|contact|author|"
    r"emergency contact)(?: name)?\s*[:=]\s*"
    r"|\bDear |\b(?:[Rr]egards|[Ss]incerely|[Tt]hanks|[Cc]heers|[Yy]ours),?\s+"
    r"|\b(?:[Mm]y name is|[Tt]his is|[Ss]igned by|[Nn]amed|[Cc]alled) )$",
    re.IGNORECASE,
)
# The second sort makes a word likelier to be a name.
_KIN = re.compile(
    r"\b(?:patient|husband|wife|son|daughter|mother|father|brother|sister|partner|spouse|friend|"
    r"neighbou?r|aunt|uncle|nephew|niece|carer|colleague|referring|seen by|reviewed by|spoke (?:to|"
    r"with)|discussed with|examined by|reported by|written by|paid to|transfer(?:red)? to|sent to|"
    r"holder|beneficiary|customer|client|nurse|physician|by|with|to|from|and),? $", re.IGNORECASE
)
_RELATIVE = re.compile(
    r"\b(?:husband|wife|son|daughter|mother|father|brother|sister|partner|spouse|aunt|uncle|nephew|"
    r"niece|grand(?:son|daughter|mother|father)|nurse|neighbou?r|"
    r"(?:spoke|speak|spoken|talked|met) (?:to|with)),? $", re.IGNORECASE
)
_DOES = re.compile(  # what people do, behind a name
    r",? (?:(?:was|is|has been|had been) (?:seen|admitted|referred|discharged|reviewed|born|"
    r"an? \d)|called|said|says|reports?|denies|denied|complains?|presents?|presented|attended|"
    r"asked|wrote|lives|works|states|requested|confirmed|who|aged|born|DOB|MD\b|RN\b|\()"
)
_NO_PERSON = re.compile(  # eponyms, organisations and places
    r"(?:'s)?[ -](?:and \w+ )?(?:[a-z]+ )?(?:disease|syndrome|lymphoma|palsy|sign|test|score|scale|"
    r"index|catheter|thyroiditis|carcinoma|sarcoma|tumou?r|criteria|classification|curve|reflex|"
    r"manoeuvre|maneuver|position|procedure|fracture|contracture|phenomenon|anaemia|anemia|chorea|"
    r"encephalopathy|esophagus|oesophagus|ulcer|stain|plot|branch|bank|clinic|hospital|office|road|"
    r"street|avenue|lane|drive|airport|university|county|airlines?|inc|ltd|llc|plc)\b",
    re.IGNORECASE,
)


class EnglishNames:
    def __init__(self, names: Names) -> None:
        self.names = names

    def find(self, text: str) -> Iterator[Found]:
        """Runs of capitalised words, cut at words that belong to no name, then judged."""
        for run in _RUN.finditer(text):
            for words in self._parts(run):
                yield from self._judged(text, words)
        for pair in _SMALL_PAIR.finditer(text):
            if self._sure(pair[1]) and self._family(pair[2]) and not self._sometimes(pair[2]):
                yield Found(pair.start(), pair.end(), 0.55)

    def _parts(self, run: re.Match[str]) -> Iterator[list[re.Match[str]]]:
        words: list[re.Match[str]] = []
        for word in re.finditer(r"[^\s.]+", run[0]):
            other = len(word[0]) > 1 and word[0].lower() in self.names.other
            if other or _is_title(word[0]):
                if words:
                    yield words
                words = []
            else:
                words.append(_at(run, word))
        if words:
            yield words

    def _judged(self, text: str, words: list[re.Match[str]]) -> Iterator[Found]:
        start, end = words[0].start(), words[-1].end()
        before = text[max(0, start - 40) : start]
        if _TITLE.search(before):
            yield Found(start, _end_of_name(words), 0.9)
        elif _LABEL.search(before) and (before.rstrip()[-1:] in ":=" or not _all_upper(words)):
            upper = re.match(r", ([A-Z][A-Za-z'-]+)", text[end:])  # Name: SMITH, JOHN
            yield Found(start, end + (upper.end() if upper else 0), 0.85)
        elif _NO_PERSON.match(text, end) or re.search(r"\b(?:St|Saint)\.? $", before):
            return
        else:
            yield from self._by_lists(text, before, words)

    def _by_lists(
        self, text: str, before: str, words: list[re.Match[str]]
    ) -> Iterator[Found]:
        end = words[-1].end()
        named = [w for w in words if len(w[0]) > 1]
        if not named:
            return
        # Words in front that are no name: "Spoke John Smith" is rare, "Metoprolol John" rarer.
        first = next((i for i, w in enumerate(words) if self._given(w[0])), None)
        after = re.match(rf",\s?({_WORD})(?![\w@])", text[end:])
        if len(words) == 1 and after and self._family(words[0][0]) and self._given(after[1]):
            yield Found(words[0].start(), end + after.end(), 0.8)  # Smith, John
        if first is not None:
            rest = [w for w in words[first + 1 :] if len(w[0]) > 1]
            start = words[first].start()
            sure = self._sure(words[first][0])
            if rest and any(self._family(w[0]) for w in rest):
                yield Found(start, end, 0.85 if sure else 0.7)
            elif rest and (sure or len(words) > len(named)):  # an initial makes it a name
                yield Found(start, end, 0.7)
            elif sure:
                yield Found(start, end, 0.6)
            elif rest and _KIN.search(before):
                yield Found(start, end, 0.55)
            elif start == words[0].start() and _RELATIVE.search(before):
                yield Found(start, end, 0.6)
        elif len(named) >= 2 and self._family(named[-1][0]):
            # An unlisted word and a listed family name: "Chidi Okafor", but also "Left Bell".
            yield Found(words[0].start(), end, 0.6 if _KIN.search(before) else 0.5)
        elif len(words) == 1 and self._family(words[0][0]) and not self._sometimes(words[0][0]):
            yield Found(*words[0].span(), 0.5 if _RELATIVE.search(before) else 0.4)
        elif _mixed_case(text) and (
            (len(named) >= 2 and (_KIN.search(before) or _DOES.match(text, end)))
            or (len(words) == 1 and _RELATIVE.search(before))
        ):
            yield Found(words[0].start(), end, 0.5)

    def _given(self, word: str) -> bool:
        return self._sure(word) or word.lower() in self.names.ambiguous

    def _sure(self, word: str) -> bool:
        return word.lower().split("-")[0] in self.names.given

    def _family(self, word: str) -> bool:
        return any(part in self.names.family for part in (word.lower(), *word.lower().split("-")))

    def _sometimes(self, word: str) -> bool:
        return word.lower() in self.names.ambiguous


def _at(run: re.Match[str], word: re.Match[str]) -> re.Match[str]:
    """The same word, its places counted in the whole text."""
    found = re.compile(re.escape(word[0])).match(run.string, run.start() + word.start())
    assert found is not None
    return found


def _is_title(word: str) -> bool:
    return bool(_TITLE.search(f"{word} "))


def _end_of_name(words: list[re.Match[str]]) -> int:
    """After a title at most three words are the name."""
    return words[: 3 if len(words) > 3 else len(words)][-1].end()


def _all_upper(words: list[re.Match[str]]) -> bool:
    """An abbreviation, or somebody who shouts."""
    return all(word[0].isupper() for word in words)


def _mixed_case(text: str) -> bool:
    """Not a heading or a text in capitals, where each word looks like a name."""
    return sum(map(str.islower, text)) > 3 * sum(map(str.isupper, text))


_ZH_LABEL = (
    "姓名|患者|病人|患儿|病员|产妇|联系人|家属|家长|监护人|客户|用户|储户|持卡人|收款人|汇款人|付款人|转账[至给]|转给|户名|开户人|"
    "户主|申请人|投保人|被保险人|受益人|经办人|收件人|寄件人|证人|签名|签字|医生|医师|大夫|护士|主任|主治|主诊|管床|法人|"
    "其妻|其夫|其子|其女|其父|其母|丈夫|妻子|儿子|女儿|母亲|父亲|哥哥|姐姐|弟弟|妹妹|我是|我叫|名叫|叫做|本人|联系|找|由"
)
_ZH_TITLE = (
    "先生|女士|小姐|太太|医生|医师|大夫|主任|教授|护士|护师|老师|同志|阿姨|叔叔|大爷|大妈|奶奶|爷爷|经理|院长|律师|师傅|总|"
    "（男|（女|\\(男|\\(女|，男|，女|,男|,女|，性别|性别"
)
_H = "\u4e00-\u9fff"
_ENDS = "，。；：、！？（）()《》“”\"'<>|/,;:!?. \t\n"  # a name may end or begin beside these
_VERBS = "于因在与和及或到来去被将已向对从为由等的说称有无未拟需要自今昨前后也是可能会请代电收今"


class ChineseNames:
    """A family name of the list and one or two characters that given names are made of."""

    def __init__(self, names: Names) -> None:
        self.names = names
        compound = "|".join(sorted(names.zh_compound))
        single = "".join(sorted(names.zh_family))
        self._family = re.compile(f"(?:{compound}|[{single}])")
        self._label = re.compile(rf"(?:{_ZH_LABEL})(?:姓名|名字|签名)?[:为是叫,]?\s*$")
        self._title = re.compile(f"(?:{_ZH_TITLE})")
        # A form's field says it by itself, whatever the family name.
        self._field = re.compile(
            rf"(?:{_ZH_LABEL})(?:姓名|名字)?:\s*(?!不详|未知|未填|本人|同上|无)([{_H}]{{2,4}})(?![{_H}])"
            rf"|(?:患者|病人|患儿|病员)([{_H}]{{2,4}})(?=[,，][男女])"
        )

    def find(self, text: str) -> Iterator[Found]:
        for named in self._field.finditer(text):
            yield Found(*named.span(named.lastindex or 1), 0.8)
        last = 0
        for family in self._family.finditer(text):
            if family.start() < last:
                continue
            found = self._judged(text, family)
            if found:
                last = found.end
                yield found

    def _judged(self, text: str, family: re.Match[str]) -> Found | None:
        start, after = family.span()
        if text[start : start + 2] in self.names.zh_other:
            return None
        label = self._label.search(text, max(0, start - 10), start)
        found = [
            Found(start, after + size, score)
            for size in (2, 1, 0)
            if (score := self._score(text, start, after, size, label))
        ]
        return max(found, key=lambda f: (f.score, f.end), default=None)

    def _score(
        self, text: str, start: int, after: int, size: int, label: re.Match[str] | None
    ) -> float:
        """How sure it is that `size` characters after the family name are the given one; 0: not."""
        end = after + size
        given, follows = text[after:end], text[end : end + 1]
        if len(given) < size or not all(map(_is_chinese, given)):
            return 0
        known = all(c in self.names.zh_given for c in given)
        before = text[start - 1 : start] if start else ""
        bordered = not before or before in _ENDS
        if not size:
            return 0.85 if self._title.match(text, end) and (bordered or label) else 0
        if self._title.match(text, after):
            return 0
        ended = not follows or not _is_chinese(follows)
        goes_on = ended or follows in _VERBS
        score = 0.0
        if known and self._title.match(text, end):
            score = 0.85
        elif label and known:
            score = 0.8 if goes_on else 0.65
        elif label and ended:
            score = 0.6
        elif known and goes_on and (bordered or before in "和与及给向找"):
            score = 0.6 if size == 2 or ended else 0.5
        return score


def _is_chinese(char: str) -> bool:
    return "\u4e00" <= char <= "\u9fff"
