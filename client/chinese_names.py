"""People's names in Chinese text where no NER model is at hand: lists, labels, titles.

A family name of the list and one or two characters of given names count behind a label (患者,
姓名), before a title (先生, 医生), or standing by themselves between punctuation and a word that
goes on from a name. A word that begins like a name (高热, 安静) is none by itself, but does not
rule out a longer name that begins with it (王国强 begins like 王国). Names in transcription are
found by the dot inside them (迪丽热巴·迪力木拉提). The text's traditional characters have become
simplified ones before (`Deidentifier`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from silotune.client.person_names import Found, Names

_LABEL = (
    "姓名|患者|病人|病患|患儿|病员|产妇|个案|联系人|联络人|家属|家长|监护人|照护者|客户|用户|储户|持卡人|收款人|汇款人|付款人|"
    "转账[至给]|转给|户名|开户人|户主|申请人|投保人|被保险人|受益人|经办人|收件人|寄件人|证人|签名|签字|医生|医师|大夫|护士|护理师|"
    "主任|主治|主诊|管床|法人|车主|驾驶人|当事人|陪同人|其妻|其夫|其子|其女|其父|其母|丈夫|妻子|先生|太太|儿子|女儿|母亲|父亲|"
    "哥哥|姐姐|弟弟|妹妹|我是|我叫|名叫|叫做|本人|联系|联络|致电|通知|找|由|经"
)
_TITLE = (
    "先生|女士|小姐|太太|医生|医师|大夫|主任|教授|护士|护师|护理师|治疗师|药师|老师|同志|同学|阿姨|叔叔|伯伯|大爷|大妈|奶奶|爷爷|"
    "经理|院长|科长|律师|警官|师傅|博士|总(?![^,。;、\\s])|（男|（女|\\(男|\\(女|，男|，女|,男|,女|，性别|性别"
)
_H = "\u4e00-\u9fff"
_DOT = "·•・‧∙⋅･．"
_ENDS = "，。；：、！？（）()《》“”\"'<>|/,;:!?. \t\n"  # a name may end or begin beside these
_VERBS = (
    "于因在与和及或到来去被将已向对从为由等的说称有无未拟需要自今昨前后也是可能会请代"
    "电收诉述曾本表携偕陪办填签即至并及以一来去打致共同已"
)


_BEFORE = re.compile(  # words that may stand directly before a name
    "(?:上午|下午|中午|早上|晚上|今天|昨天|明天|今日|昨日|次日|当日|今晨|当天|随后|其后|另外|"
    "[和与及给向找请让对跟陪送叫问诉由])$"
)


class ChineseNames:
    """A family name of the list and one or two characters that given names are made of."""

    def __init__(self, names: Names) -> None:
        self.names = names
        compound = "|".join(sorted(names.zh_compound))
        single = "".join(sorted(names.zh_family))
        sounds = "".join(sorted(names.zh_transcription))
        self._family = re.compile(f"(?:{compound}|[{single}])")
        self._label = re.compile(rf"(?:{_LABEL})(?:姓名|名字|签名)?[:为是叫,]?\s*$")
        self._title = re.compile(f"(?:{_TITLE})")
        # A form's field says it by itself, whatever the family name.
        self._field = re.compile(
            rf"(?:{_LABEL})(?:姓名|名字)?:\s*(?!不详|未知|未填|本人|同上|无|以上)"
            rf"([{sounds}]{{3,10}}|[{_H}]{{2,4}})(?![{_H}])"
            rf"|(?:患者|病人|患儿|病患)([{sounds}]{{3,10}}|[{_H}]{{2,4}})(?=[,，(（][男女])"
        )
        part = rf"[{sounds}]{{1,10}}"
        self._transcribed = re.compile(
            rf"{part}(?:[{_DOT}]{part}){{1,4}}"
            rf"|(?:(?<=姓名:)|(?<=患者)|(?<=病人))[{_H}]{{1,10}}(?:[{_DOT}][{_H}]{{1,10}}){{1,4}}(?![{_H}])"
        )

    def find(self, text: str) -> Iterator[Found]:
        for named in self._field.finditer(text):
            yield Found(*named.span(named.lastindex or 1), 0.8)
        for named in self._transcribed.finditer(text):
            yield Found(*named.span(), 0.85)
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
        if text[start : start + 3] in self.names.zh_other:
            return None
        label = self._label.search(text, max(0, start - 10), start)
        sizes = [2, 1, 0]
        if text[start : start + 2] in self.names.zh_other:  # a word, or a longer name: 王国强
            known = len(text) > after + 1 and set(text[after : after + 2]) <= self.names.zh_given
            sizes = [2] if known else []
        found = [
            Found(start, after + size, score)
            for size in sizes
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
            alone = bordered or label or _BEFORE.search(text, max(0, start - 2), start)
            return 0.85 if alone and self._title.match(text, end) else 0
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
        elif text[start:end] in self.names.places:
            return 0
        elif known and goes_on and (bordered or _BEFORE.search(text, max(0, start - 2), start)):
            score = 0.6 if size == 2 or ended else 0.5
        return score


def _is_chinese(char: str) -> bool:
    return "\u4e00" <= char <= "\u9fff"
