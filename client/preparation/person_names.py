"""People's names in English text where no NER model is at hand: lists, titles and labels.

A given name and a family name of the lists (names.toml) side by side are a person whatever stands
before or behind them, in capitals, small letters, with marks on the letters (compared without
them), with initials and further names between them, and as "FAMILY, Given". No rule takes such a
pair back. Everything else needs a sign: a title, a label, a relative before it, what people do
behind it; only there may an eponym or a place ("Wilson disease", "Elizabeth Hospital") say no.

What was found is then extended over the words beside it that can belong to the same name, so that
no half is left. Names that no list has, without any sign, are not found, nor is a family name by
itself.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from silotune.client.preparation import name_contexts
from silotune.client.preparation.latin import LETTERS
from silotune.client.preparation.name_lists import Names, folded


class Found(NamedTuple):
    """Characters `start` to `end`, and how sure: 0 to 1."""

    start: int
    end: int
    score: float


_WORD = re.compile(rf"(?<![{LETTERS}])[{LETTERS}]+(?:['-][{LETTERS}]+)*")
# Between two words of a name. A full stop belongs to an initial or a title before it.
_SPACE, _LINE, _STOP, _COMMA, _BREAK = range(5)
_GAPS = (
    (re.compile(r"[ \t]{1,3}"), _SPACE),
    (re.compile(r"[ \t]*\r?\n[ \t]*"), _LINE),
    (re.compile(r"\.[ \t]{0,2}|_"), _STOP),
    (re.compile(r"[ \t]?,[ \t]{0,2}"), _COMMA),
)
_CHINESE = re.compile("[\u3001\u4e00-\u9fff]")
_MOST = 6  # words of one name


class Word(NamedTuple):
    start: int
    end: int
    text: str
    key: str  # folded
    code: bool  # beside a digit

    @property
    def capital(self) -> bool:
        return self.text[0].isupper()

    @property
    def upper(self) -> bool:
        return len(self.text) > 1 and self.text.isupper()

    @property
    def initial(self) -> bool:
        return len(self.key) == 1


class Span(NamedTuple):
    """Words `first` to `last`, both included."""

    first: int
    last: int
    score: float


class EnglishNames:
    def __init__(self, names: Names) -> None:
        self.names = names

    def find(self, text: str) -> Iterator[Found]:
        """Every name, extended over the words beside it that can belong to it; they may overlap."""
        one = _Text(text, self.names)
        listed = [
            *one.pairs(),
            *one.family_first(),
            *one.with_initials(),
            *one.with_middle_initial(),
        ]
        signed = [*one.titled(), *one.labelled(), *one.lists(), *one.fields()]
        spans = [one.extended(span) for span in (*listed, *signed)]
        taken = {at for span in spans for at in range(span.first, span.last + 1)}
        spans += [one.extended(span) for span in one.single(taken)]
        spans += [one.extended(span) for span in (*one.speakers(), *one.alone(), *one.signature())]
        spans += [one.extended(span) for span in one.coordinated(spans)]
        spans += one.repeated(spans)
        for ticket in name_contexts.TICKET.finditer(text):
            yield Found(*ticket.span(), 0.8)
        for first, last, score in spans:
            yield Found(one.words[first].start, one.words[last].end, score)


class _Text:
    """The words of one text, what is between them, and the names among them."""

    def __init__(self, text: str, names: Names) -> None:
        self.text, self.names = text, names
        self.words = [_word(match) for match in _WORD.finditer(text)]
        self.gaps = [
            _gap(text, one, other) for one, other in zip(self.words, self.words[1:], strict=False)
        ] + [_BREAK]
        self._mixed = self._mixed_lines()

    def _mixed_lines(self) -> list[bool]:
        """For each word: its line is not a heading or all in capitals, where each word looks like a
        name. A third of the line's words begin with a small letter."""
        found: list[bool] = []
        line: list[Word] = []  # without single letters
        count = 0
        for at, word in enumerate(self.words):
            count += 1
            line += [word] if not word.initial else []
            last = at + 1 == len(self.words)
            if last or "\n" in self.text[word.end : self.words[at + 1].start]:
                small = sum(not one.capital for one in line)
                chinese = _CHINESE.search(self.text, self.words[at - count + 1].start, word.end)
                found += [bool(chinese) or 3 * small >= len(line)] * count
                line, count = [], 0
        return found

    # What a word is ──────────────────────────────────────────────────────────────────────────────

    def given(self, at: int) -> bool:
        key = self.words[at].key.split("-")[0]
        return (
            self.sure(at)
            or key in self.names.given_words
            or (key in self.names.rare_given and self._capitalised(at))
        )

    def _capitalised(self, at: int) -> bool:
        """Written as a name is, where that says something."""
        return self.words[at].capital and self.mixed(at) and not self._starts(at)

    def _starts(self, at: int) -> bool:
        """The first word of a sentence or line, which has a capital letter anyway."""
        before = self.text[max(0, self.words[at].start - 3) : self.words[at].start].rstrip(" ")
        return not before or before[-1] in ".!?\n:;-"

    def sure(self, at: int) -> bool:
        """A given name that is hardly ever another word."""
        return self.words[at].key.split("-")[0] in self.names.given

    def family(self, at: int) -> bool:
        parts = self._parts(at)
        return (
            self.own_family(at)
            or any(part in self.names.family_words for part in parts)
            or (self._capitalised(at) and any(part in self.names.rare_family for part in parts))
        )

    def own_family(self, at: int) -> bool:
        """A family name that is no other word."""
        return any(part in self.names.family for part in self._parts(at))

    def _parts(self, at: int) -> list[str]:
        key = self.words[at].key
        return [key, *key.split("-")] if "-" in key else [key]

    def other(self, at: int) -> bool:
        """A word that belongs to no name, a title, or letters of a code."""
        word = self.words[at]
        if word.code or word.key in name_contexts.TITLES:
            return True
        return not word.initial and word.key in self.names.other

    def mixed(self, at: int) -> bool:
        """In the line of word `at`, a capital letter says something."""
        return self._mixed[at]

    def joined(self, at: int) -> bool:
        """Word `at` and the next can be of one name."""
        gap = self.gaps[at]
        return gap == _SPACE or (gap == _STOP and self.words[at].initial)

    def before(self, at: int) -> str:
        start = self.words[at].start
        return self.text[max(0, start - 40) : start]

    # Listed names ────────────────────────────────────────────────────────────────────────────────

    def pairs(self) -> Iterator[Span]:
        """A given name and a family name, with at most three words of the name between them."""
        for at in range(len(self.words)):
            if not self.given(at):
                continue
            last = at
            for to in range(at + 1, min(at + 5, len(self.words))):
                if not (self.joined(to - 1) or self._line_or_underscore(to - 1)):
                    break
                if self.family(to) and self._same_case(at, to):
                    last = to
                    break
                if not self._between(at, to):
                    break
            if last > at:
                yield Span(at, last, self._pair_score(at, last))

    def _line_or_underscore(self, at: int) -> bool:
        """A line may end inside a name, and file names have underscores."""
        if self.gaps[at] == _LINE:
            return self.words[at].capital and self.words[at + 1].capital
        return self.gaps[at] == _STOP and self.text[self.words[at].end] == "_"

    def _same_case(self, given: int, family: int) -> bool:
        """Not "John may come": a small word behind a capital one is a word if it can be one."""
        one, other = self.words[given], self.words[family]
        return not (one.capital and not other.capital) or self.own_family(family)

    def _between(self, given: int, at: int) -> bool:
        word = self.words[at]
        if word.initial or word.key in name_contexts.PARTICLES or self.given(at):
            return True
        return self.mixed(at) and self.sure(given) and word.capital and not self.other(at)

    def _pair_score(self, given: int, family: int) -> float:
        plain = self.sure(given) or self.own_family(family)
        if self.words[given].capital:
            return 0.85 if plain else 0.7
        return 0.6 if plain else 0.5

    def family_first(self) -> Iterator[Span]:
        """SMITH, John and SMITH, J.; SMITH JOHN."""
        for at in range(len(self.words) - 1):
            one, other = self.words[at], self.words[at + 1]
            if self.gaps[at] == _COMMA and one.capital == other.capital and not one.initial:
                if score := self._comma_score(at):
                    yield Span(at, at + 1, score)
            elif (
                self.gaps[at] == _SPACE
                and one.capital
                and other.capital
                and self.own_family(at)
                and self.sure(at + 1)
            ):
                yield Span(at, at + 1, 0.6)

    def _comma_score(self, at: int) -> float:
        one, other = self.words[at], self.words[at + 1]
        shouted = self.mixed(at) and one.upper and len(one.text) > 2
        if other.initial:
            dotted = self.text[other.end : other.end + 1] == "."
            return 0.6 if self.own_family(at) and one.capital and (dotted or shouted) else 0
        if self.family(at) and self.given(at + 1):
            if self.own_family(at) or self.sure(at + 1) or shouted:
                return 0.8
            # "the stool was brown, will repeat" is no name, "Brown, Will" is.
            starts = not self.before(at).strip() or self.before(at).rstrip(" ").endswith("\n")
            return 0.5 if one.capital and (self.mixed(at) or starts) else 0
        half = (
            (self.given(at + 1) and len(one.text) > 3)
            or self.family(at)
            or (len(one.text) > 3 and (self.given(at) or self.family(at + 1)))
        )
        names = not self.other(at) and not self.other(at + 1) and not other.upper
        return 0.6 if shouted and names and half else 0

    def with_initials(self) -> Iterator[Span]:
        """J. Smith, J.R. Smith and J Smith."""
        for at, word in enumerate(self.words[:-1]):
            if not word.initial or (at and self.words[at - 1].initial and self.joined(at - 1)):
                continue
            to = at
            while to < min(at + 3, len(self.words) - 1) and self.words[to].initial:
                if not self.joined(to):
                    break
                to += 1
            if to == at or self.words[to].initial or not self._initials(at, to):
                continue
            last = self.words[to]
            dotted = all(self.gaps[i] == _STOP for i in range(at, to))
            if last.capital and word.capital and self.family(to):
                if dotted or (self.own_family(to) and word.key not in "ai"):
                    yield Span(at, to, 0.6)
            elif (dotted and self.own_family(to)) or (
                dotted
                and self.mixed(at)
                and last.capital
                and word.capital
                and not self.other(to)
                and (
                    name_contexts.KIN.search(self.before(at))
                    or name_contexts.DOES.match(self.text, last.end)
                    or self._begins(at)
                )
            ):
                yield Span(at, to, 0.5)

    def _begins(self, at: int) -> bool:
        """Nothing or a comma, colon or bracket stands before: the letter ends no other phrase."""
        before = self.text[max(0, self.words[at].start - 3) : self.words[at].start].rstrip(" \t")
        return not before or before[-1] in ",:;(\n/&-"

    def with_middle_initial(self) -> Iterator[Span]:
        """Will F. Xu: the initial between two words of the same sort makes them a name."""
        for at in range(1, len(self.words) - 1):
            one, middle, other = self.words[at - 1 : at + 2]
            if not middle.initial or not middle.capital or one.initial or other.initial:
                continue
            if self.gaps[at - 1] != _SPACE or self.gaps[at] not in {_SPACE, _STOP}:
                continue
            alike = one.capital and other.capital and one.upper == other.upper
            if alike and not self.other(at + 1) and one.key not in name_contexts.CLASS:
                if self.given(at - 1):
                    yield Span(at - 1, at + 1, 0.7)
                elif self.gaps[at] == _STOP and not self.other(at - 1):
                    yield Span(at - 1, at + 1, 0.5)

    def _initials(self, first: int, to: int) -> bool:
        """Not hepatitis B, I.V. or a species (E. coli)."""
        letters = "".join(word.key for word in self.words[first:to])
        behind = (
            first
            and self.words[first - 1].key in name_contexts.CLASS
            and self.gaps[first - 1] == _SPACE
        )
        return not behind and letters not in name_contexts.NO_INITIALS

    # Names with a sign ───────────────────────────────────────────────────────────────────────────

    def titled(self) -> Iterator[Span]:
        """Dr Okonjo, mrs jones, MR SMITH; and Jones in "Drs Patel and Jones"."""
        for at, word in enumerate(self.words[:-1]):
            if word.key not in name_contexts.TITLES or self.gaps[at] not in {_SPACE, _STOP, _LINE}:
                continue
            to = at + 1
            if not self._after_title(at, to):
                continue
            last = self._to_the_end(to)
            yield Span(to, last, 0.9)
            if last + 2 < len(self.words) and self.words[last + 1].key == "and":
                both = self.gaps[last] == self.gaps[last + 1] == _SPACE
                if both and self.words[last + 2].capital and self.family(last + 2):
                    yield Span(last + 2, last + 2, 0.6)

    def _after_title(self, title: int, at: int) -> bool:
        word, key = self.words[at], self.words[title].key
        if word.key in name_contexts.TITLES or (word.initial and not word.capital):
            return False
        if key in name_contexts.LONG_TITLES:
            name = self.own_family(at) or not self.other(at)
            return word.capital and self.mixed(at) and name
        listed = self.family(at) or self.given(at)
        if word.capital:
            short = word.upper and len(word.text) < 4 and self.mixed(at)  # DR TB
            return listed or not (short or self.other(at))
        if len(word.key) < 2 or (
            self.other(at) and not (listed and key in name_contexts.SURE_TITLES)
        ):
            return False
        return listed or (key != "ms" and len(word.key) > 2)

    def _to_the_end(self, at: int) -> int:
        """The last word of the name that begins at `at`."""
        while at + 1 < len(self.words) and self.joined(at) and self.words[at].initial:
            if self.other(at + 1) and not self.family(at + 1):
                break
            at += 1  # J. R. Smith
        if self.words[at].capital and not self.mixed(at) and self.given(at) and self._plain(at + 1):
            at += 1  # MARY OKONJO CAME
        return at

    def _plain(self, at: int) -> bool:
        """Word `at` follows directly and is none of those that belong to no name."""
        return (
            at < len(self.words)
            and self.joined(at - 1)
            and not self.other(at)
            and len(self.words[at].key) > 2
            and self.words[at].capital == self.words[at - 1].capital
        )

    def labelled(self) -> Iterator[Span]:
        """Patient: Okonjo; Dear Okonjo."""
        for at, word in enumerate(self.words):
            if (
                not word.capital
                or self.other(at)
                or (
                    at
                    and self.joined(at - 1)
                    and self.words[at - 1].capital
                    and not self.other(at - 1)
                )
            ):
                continue
            before = self.before(at)
            if not name_contexts.LABEL.search(before):
                last = self._run(at)
                if name_contexts.ROLE_LABEL.search(before) and (
                    last > at or self._listed(at, at, rare=True)
                ):
                    yield Span(at, last, 0.7)
                continue
            if name_contexts.COLON.search(before) or not word.upper:
                initials = word.initial and self._run(at)
                yield Span(at, initials or self._past_comma(at), 0.85)

    def _past_comma(self, at: int) -> int:
        """Patient: SMITH, JOHN"""
        to = self.extended(Span(at, at, 0)).last
        following = to + 1 < len(self.words) and self.gaps[to] == _COMMA
        if following and self.words[to + 1].capital and not self.other(to + 1):
            return to + 1
        return to

    def lists(self) -> Iterator[Span]:
        """Attendees: Farah, Piotr and L. Nakagawa."""
        at = 0
        while at < len(self.words):
            if not self.words[at].capital or not name_contexts.PEOPLE.search(self.before(at)):
                at += 1
                continue
            spans = [Span(at, self._run(at), 0.6)]
            while (to := spans[-1].last + 1) < len(self.words):
                to += self.words[to].key in {"and", "or"}
                if to >= len(self.words) or not self.words[to].capital or self.other(to):
                    break
                if not self._and(spans[-1].last, to):
                    break
                spans.append(Span(to, self._run(to), 0.6))
            names = [s for s in spans if self._listed(s.first, s.last, rare=True)]
            if not self.other(at) and (names and 2 * len(names) >= len(spans)):
                yield from spans
            at = spans[-1].last + 1

    def fields(self) -> Iterator[Span]:
        """Name: okonjo chidi"""
        starts = {word.start: at for at, word in enumerate(self.words)}
        for field in name_contexts.FIELD.finditer(self.text):
            at = starts.get(field.end())
            if at is None or folded(field[1] or "") in name_contexts.NO_NAME_FIELD:
                continue
            last = None
            for to in range(at, min(at + _MOST, len(self.words))):
                after = self.text[self.words[to].end : self.words[to].end + 1]
                if (self.other(to) and not self.family(to)) or after in {":", "="}:
                    break
                last = to
                if not (self.joined(to) or self.gaps[to] in {_COMMA, _STOP}):
                    break
            if last is not None:
                yield Span(at, last, 0.85)

    # Names by themselves ─────────────────────────────────────────────────────────────────────────

    def single(self, taken: set[int]) -> Iterator[Span]:
        """What is not a whole listed name and has no title: single given names, names of which one
        half is listed, and unlisted ones beside a sign."""
        at = 0
        while at < len(self.words):
            if at in taken:
                at += 1
            elif self.words[at].capital and not self.other(at):
                if self.words[at].key in name_contexts.ROLE_WORDS and self._plain(at + 1):
                    at += 1  # Witness Grace
                    continue
                last = at
                while (
                    last - at < _MOST
                    and self.joined(last)
                    and last + 1 not in taken
                    and self.words[last + 1].capital
                    and not self.other(last + 1)
                ):
                    last += 1
                yield from self._judged(at, last)
                at = last + 1
            else:
                yield from self._small(at)
                at += 1

    def _small(self, at: int) -> Iterator[Span]:
        """A given name in small letters and what may be the family name behind it; a family name
        in small letters, and what may be the given name before it, beside a sign."""
        word = self.words[at]
        if (
            self.sure(at)
            and len(word.key) > 3
            and not name_contexts.NO_PERSON.match(self.text, word.end)
        ):
            following = self._plain(at + 1) and not name_contexts.DOES.match(self.text, word.end)
            yield Span(at, at + following, 0.5)
        elif self.given(at) and name_contexts.SPOKE.search(self.before(at)):  # spoke to april
            yield Span(at, at, 0.5)
        elif self._plain(at + 1) and self.own_family(at + 1) and not self.other(at):
            end = self.words[at + 1].end
            signed = name_contexts.KIN.search(self.before(at)) or name_contexts.DOES.match(
                self.text, end
            )
            if signed and len(word.key) > 2 and not name_contexts.NO_PERSON.match(self.text, end):
                yield Span(at, at + 1, 0.5)

    def _judged(self, first: int, last: int) -> Iterator[Span]:
        named = [at for at in range(first, last + 1) if not self.words[at].initial]
        if not named:
            return
        end, before = self.words[last].end, self.before(first)
        if name_contexts.NO_PERSON.match(self.text, end) or name_contexts.PLACE.search(before):
            return
        if any(re.fullmatch(name_contexts.NOUNS, self.words[at].key) for at in named):
            return
        listed = any(
            self.given(at)
            or self.family(at)
            or (self.words[at].capital and self.words[at].key in self.names.rare_given)
            for at in named
        )
        acts = listed and bool(name_contexts.ACTS.match(self.text, end)) and self.mixed(first)
        does = acts or bool(name_contexts.DOES.match(self.text, end))
        role = (listed or len(named) > 1) and bool(name_contexts.ROLE.search(before))
        kin, relative = (
            bool(name_contexts.KIN.search(before)),
            acts or role or bool(name_contexts.RELATIVE.search(before)),
        )
        if name_contexts.MAILBOX.match(self.text, end):
            yield Span(first, last, 0.7)
        elif score := self._score(first, last, named, kin or does, relative, does):
            yield Span(first, last, score)

    def _score(
        self, first: int, last: int, named: list[int], signed: bool, relative: bool, does: bool
    ) -> float:
        """How sure it is that the capitalised words `first` to `last` are a person."""
        given = next((at for at in named if self.given(at)), None)
        if given is not None:
            rest = [at for at in named if at > given]
            before = any(self.family(at) for at in named if at < given)
            if before and (signed or relative):  # Li Wei, as names are written in China
                return 0.6
            initials = last - first + 1 > len(named)
            return self._given_score(given, rest, initials, signed, relative and given == first)
        family = named[-1]
        if len(named) == 1 and self.family(family):
            return self._family_score(family, relative, does)
        if self.family(family):
            # An unlisted word and a listed family name: "Chidi Okafor", but also "Left Bell".
            sure = self.own_family(family) and self.mixed(family)
            return 0.6 if signed or relative else 0.5 * sure
        unlisted = (len(named) > 1 and signed) or relative
        return 0.5 if self.mixed(family) and unlisted else 0

    def _family_score(self, at: int, relative: bool, does: bool) -> float:
        """The same for a family name by itself."""
        upper, inside = self.words[at].upper, self._inside(at)
        if not relative and self._other_sense(at):
            return 0
        beside = self.mixed(at) and name_contexts.NEXT_TO.search(self.before(at))
        if not self.own_family(at):
            return 0.5 if not upper and (relative or (inside and beside)) else 0
        alone = inside and not name_contexts.INSIDE_PLACE.search(self.before(at))
        return 0.5 if relative or beside or alone or (does and not upper) else 0.4

    def _given_score(
        self, given: int, rest: list[int], initials: bool, signed: bool, relative: bool
    ) -> float:
        """The same where `given` is a listed given name and `rest` what follows, without a family
        name of the lists."""
        sure = self.sure(given)
        if rest:
            if initials or (sure and (self.mixed(given) or len(rest) == 1)):
                return 0.7
            return 0.55 if signed else 0
        word = self.words[given]
        abbreviation = self.mixed(given) and word.upper and len(word.key) < 5  # ANA, ALI
        if relative or (sure and not abbreviation):
            return 0.6
        return 0.5 if self._named_alone(given) else 0

    def _inside(self, at: int) -> bool:
        """A capital letter and small ones, in the middle of a sentence."""
        return not self.words[at].upper and self._capitalised(at)

    def _named_alone(self, at: int) -> bool:
        """A given name that is a word, too, in the middle of a sentence, behind "with" or "for"."""
        sign = name_contexts.KIN.search(self.before(at)) or name_contexts.VERB_AFTER.match(
            self.text, self.words[at].end
        )
        return (
            self._inside(at)
            and self.words[at].key not in name_contexts.MONTH_NAMES | self.names.en_places
            and bool(sign or not name_contexts.ARTICLE.search(self.before(at)))
            and not self._other_sense(at)
        )

    def _other_sense(self, at: int) -> bool:
        """A place behind "in" or "to", or a name in a term: Nissen."""
        if any(part in self.names.eponyms for part in self._parts(at)):
            return True
        places = self.names.en_places
        if self.words[at].key not in places:
            return False
        for other in (at - 2, at + 2):  # Paris and Charlotte
            if 0 <= other < len(self.words) and self.words[other].key in places:
                return True
        return bool(
            name_contexts.PLACE_WORDS.search(self.before(at))
            or name_contexts.AMONG_PLACES.search(self.before(at))
        )

    def _run(self, at: int, most: int = 4) -> int:
        """The last of the words from `at` on that follow each other and could be one name."""
        last = at
        while last - at < most - 1 and last + 1 < len(self.words) and self.joined(last):
            if not self.words[last + 1].capital or self.other(last + 1):
                break
            last += 1
        return last

    def _listed(self, first: int, last: int, *, rare: bool = False) -> bool:
        """One of the words is a listed name, a `rare` one too, and none rules a person out."""
        words = range(first, last + 1)
        return (
            any(
                self.given(at)
                or self.family(at)
                or (rare and self.words[at].key in self.names.rare_given)
                for at in words
            )
            and not any(
                self.other(at) or name_contexts.A_NOUN.fullmatch(self.words[at].key) for at in words
            )
            and not name_contexts.NO_PERSON.match(self.text, self.words[last].end)
        )

    def _covered(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last of the words in these characters."""
        first = bisect_left(self.words, start, key=lambda word: word.start)
        last = bisect_left(self.words, end, key=lambda word: word.start) - 1
        return (first, last) if first <= last else None

    def speakers(self) -> Iterator[Span]:
        """[chat] Marek: … and "Hi team, Chase from …"."""
        lines = list(name_contexts.SPEAKER.finditer(self.text))
        for line in lines:
            words = self._covered(*line.span("name"))
            if not words or any(self.other(at) for at in range(words[0], words[1] + 1)):
                continue
            signed = line["sign"] or line["role"]
            sure = any(self.sure(at) for at in range(words[0], words[1] + 1))
            if ((signed or sure or len(lines) > 2) and self._listed(*words, rare=bool(signed))) or (
                line["sign"] and line["sign"][0] == "[" and self.words[words[0]].capital
            ):
                yield Span(*words, 0.6)
        for greeting in name_contexts.GREETED.finditer(self.text):
            words = self._covered(*greeting.span("name"))
            if words and self._listed(*words, rare=True):
                yield Span(*words, 0.6)

    def alone(self) -> Iterator[Span]:
        """A name alone in a line of a text of several."""
        if "\n" not in self.text:
            return
        first = 0
        for last, word in enumerate(self.words):
            more = last + 1 < len(self.words)
            after = self.text[word.end : self.words[last + 1].start if more else None]
            if "\n" not in after and more:
                continue
            start = self.text.rfind("\n", 0, self.words[first].start) + 1
            lead = self.text[start : self.words[first].start].strip(" \t->*")
            rest = after.split("\n")[0].strip(" \t,.\r")
            if not lead and not rest and self._alone(first, last, self.text[:start]):
                yield Span(first, last, 0.6)
            first = last + 1

    def _alone(self, first: int, last: int, before: str) -> bool:
        words = range(first, last + 1)
        if last - first > 3 or not all(self.joined(at) for at in words[:-1]):
            return False
        if not all(self.words[at].capital and not self.other(at) for at in words):
            return False
        if name_contexts.CLOSING.search(before):
            return True
        if not self._listed(first, last):
            return len(words) > 1 and self.words[first].initial and len(self.words[last].key) > 3
        named = [at for at in words if not self.words[at].initial]
        own = any(self.sure(at) or self.own_family(at) for at in named)
        return own and (len(named) > 1 or self.sure(named[0]))

    def signature(self) -> Iterator[Span]:
        """At the very end, behind the last sentence: "… i dont use mail. zhang weiqi", "- maya"."""
        if not self.words or self.text[self.words[-1].end :].strip(" \t\r\n.!)x"):
            return
        last = first = len(self.words) - 1
        while first and last - first < 2 and self.joined(first - 1) and not self.other(first - 1):
            first -= 1
        before = self.text[: self.words[first].start].rstrip(" ")
        if not before or (before[-1] not in ".!?-\n" and not name_contexts.CLOSING.search(before)):
            return
        words = range(first, last + 1)
        own = any(self.sure(at) or self.own_family(at) for at in words)
        named = all(self.words[at].capital for at in words) and self.mixed(first)
        dash = before[-1] == "-" or bool(name_contexts.CLOSING.search(before))
        own = own and (len(words) > 1 or self.sure(first))
        if (own or dash) and self._listed(first, last, rare=dash):
            yield Span(first, last, 0.55)
        elif named and len(words) > 1 and not any(self.other(at) for at in words):
            yield Span(first, last, 0.5)

    def coordinated(self, spans: list[Span]) -> Iterator[Span]:
        """In "Schmidt and Petrov" or "A. Lee, Musa Obi and Grace" one name makes the next one."""
        taken = self._taken(spans)
        at = 0
        while at < len(self.words):
            if at in taken or not self.words[at].capital or self.other(at) or not self.mixed(at):
                at += 1
                continue
            last = self._run(at)
            joined = any(one in taken and self._and(one, at) for one in (at - 1, at - 2)) or any(
                one in taken and self._and(last, one) for one in (last + 1, last + 2)
            )
            place = at == last and self.words[at].key in self.names.en_places
            new = joined and not place and self._listed(at, last)
            if new and not taken & set(range(at, last + 1)):
                yield Span(at, last, 0.55)
                taken.update(range(at, last + 1))
            at = last + 1

    def _taken(self, spans: list[Span]) -> set[int]:
        """The words of names that are sure enough."""
        return {
            at for span in spans if span.score >= 0.5 for at in range(span.first, span.last + 1)
        }

    def _and(self, one: int, other: int) -> bool:
        between = self.text[self.words[one].end : self.words[other].start]
        return bool(name_contexts.AND.fullmatch(between))

    def repeated(self, spans: list[Span]) -> Iterator[Span]:
        """The parts of a name that was found once, wherever else they stand with a capital."""
        taken = self._taken(spans)
        parts = {
            self.words[at].key
            for span in spans
            if span.score >= 0.6
            for at in range(span.first, span.last + 1)
            if len(self.words[at].key) > 2
            and not self.other(at)
            and self.words[at].key not in name_contexts.PARTICLES
        }
        for at, word in enumerate(self.words):
            if at in taken or word.key not in parts or not word.capital or not self.mixed(at):
                continue
            before = self.before(at)
            place = name_contexts.PLACE.search(before) or name_contexts.NO_PERSON.match(
                self.text, word.end
            )
            own = self.sure(at) or self.own_family(at)
            own = own or any(
                sign.match(self.text, word.end)
                for sign in (name_contexts.ACTS, name_contexts.DOES, name_contexts.VERB_AFTER)
            )
            if word.key in self.names.en_places:
                own = False
            if not place and (
                own or not (name_contexts.PLACE_WORDS.search(before) or self._starts(at))
            ):
                yield Span(at, at, 0.55)

    # The whole name ──────────────────────────────────────────────────────────────────────────────

    def extended(self, span: Span) -> Span:
        """With the words on both sides that can belong to the same name."""
        first, last, score = span
        while first and last - first < _MOST and self.joined(first - 1):
            if not self._beside(first - 1, first):
                break
            first -= 1
        while last + 1 < len(self.words) and last - first < _MOST and self.joined(last):
            to = last + 1
            while (
                to < last + 3
                and to + 1 < len(self.words)
                and self.joined(to)
                and self.words[to].key in name_contexts.PARTICLES
                and not self.words[to].capital
            ):
                to += 1
            if not self._beside(to, last):
                break
            last = to
        return Span(first, last, score)

    def _beside(self, at: int, name: int) -> bool:
        """Word `at` beside the word `name` of a name belongs to it."""
        word = self.words[at]
        if word.code:
            return False
        if word.initial:
            dotted = self.text[word.end : word.end + 1] == "."
            return word.capital and (dotted or word.key not in "ai")
        if word.capital != self.words[name].capital:
            return False
        if not word.capital:
            return self.sure(at) or self.own_family(at)
        listed = self.given(at) or self.family(at)
        if self.other(at) or (word.key in name_contexts.ROLE_WORDS and not listed):
            return False
        return listed or (self.mixed(at) and not re.fullmatch(name_contexts.NOUNS, word.key))


def _word(match: re.Match[str]) -> Word:
    """Without the ending of a genitive."""
    text, end = match[0], match.end()
    if len(text) > 2 and text[-2:] in {"'s", "'S"}:
        text, end = text[:-2], end - 2
    start, string = match.start(), match.string
    code = string[end : end + 1].isdigit() or (start > 0 and string[start - 1].isdigit())
    return Word(start, end, text, folded(text), code)


def _gap(text: str, one: Word, other: Word) -> int:
    """What stands between two words."""
    for pattern, gap in _GAPS:
        if pattern.fullmatch(text, one.end, other.start):
            return gap
    return _BREAK
