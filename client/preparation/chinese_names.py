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

from silotune.client.preparation.name_lists import Names
from silotune.client.preparation.person_names import Found

_LABEL = (
    "姓名|患者|病人|病患|患儿|病员|产妇|个案|联系人|联络人|家属|家长|监护人|照护者|客户|用户|储户|持卡人|收款人|汇款人|付款人|"
    "转账[至给]|转给|户名|开户人|户主|申请人|投保人|被保险人|受益人|经办人|收件人|寄件人|证人|签名|签字|医生|医师|大夫|护士|护理师|"
    "主任|主治|主诊|管床|法人|车主|驾驶人|当事人|陪同人|其妻|其夫|其子|其女|其父|其母|丈夫|妻子|先生|太太|儿子|女儿|母亲|父亲|"
    "哥哥|姐姐|弟弟|妹妹|我是|我叫|名叫|叫做|本人|联系|联络|致电|通知|找|由|经"
)
# Who somebody is in a matter: what stands behind it up to the next sign is a name, even if it is an
# ordinary word. Words that name anybody (患者, 人员) are not among them.
_ROLE = (
    "(?:[\u4e00-\u9fff]{1,4}(?:员|者|人)(?<!患者)(?<!病人)(?<!人员)(?<!老人)(?<!成员)(?<!或者)(?<!他人)(?<!别人)"
    "(?<!男人)(?<!女人)(?<!家人)(?<!亲人)(?<!前者)(?<!后者)(?<!使用者)(?<!本人)(?<!学者)(?<!成人)(?<!全员)(?<!感染者)"
    "(?<!携带者)(?<!工人)(?<!客人)(?<!生人)(?<!消费者)|司机|骑手|助手|领队|主刀|一助|二助|麻醉师|器械护士|巡回护士|"
    "责任护士|配偶|[其][妻夫子女父母兄弟姐妹]|[长次]子|[长次]女|妻子|丈夫|房东|租客|买家|卖家|乘客|旅客|访客|业主|住户|户主|"
    "户名|店主|群主|网友|导师|班主任|学生|股东|董事|监事|客户经理|理财经理|面试官|签收|代收|出纳|会计|保安|门卫|翻译|"
    "甲方|乙方|丙方|代表|见证|[我你他她][爸妈弟妹哥姐爷奶爹娘叔舅姨姑]|"
    "姓名|名字|名叫|自称|[我他她妈爸名儿人]叫|\\d床)"
)
_TITLE = (
    "护士长|干事|总监|总裁|董事长|校长|处长|局长|所长|队长|班长|组长|部长|站长|店长|老板|教练|法官|检察官|书记|工程师|设计师|"
    "技师|大哥|大姐|大叔|大婶|[哥姐嫂工](?![^,。;、\\s])|"
    "先生|女士|小姐|太太|医生|医师|大夫|主任|教授|护士|护师|护理师|治疗师|药师|老师|同志|同学|阿姨|叔叔|伯伯|大爷|大妈|奶奶|爷爷|"
    "经理|院长|科长|律师|警官|师傅|博士|总(?![^,。;、\\s])|（男|（女|\\(男|\\(女|，男|，女|,男|,女|，性别|性别"
)
_H = "\u4e00-\u9fff"
_DOT = "·•・‧∙⋅･．"
# A name may end or begin beside these.
_ENDS = "，。；：、！？（）()《》“”\"'<>|/,;:!?. \t\n@[]【】「」『』…—-_=+*#~"
_VERBS = (
    "于因在与和及或到来去被将已向对从为由等的说称有无未拟需要自今昨前后也是可能会请代"
    "电收诉述曾本表携偕陪办填签即至并及以一来去打致共同已称拒接要没不住突再先就给帮让叫找"
    "吧呢啊吗提反回发购买卖申领取存汇支付交寄送派查看试预约挂登注修改更换补完报投举催联确进出返离走服做"
)


_BEFORE = re.compile(  # words that may stand directly before a name
    "(?:上午|下午|中午|早上|晚上|今天|昨天|明天|今日|昨日|次日|当日|今晨|当天|随后|其后|另外|"
    "指出|表示|报告|告知|陪同|委托|助手|家属|同事|邻居|朋友|同学|室友|亲属|亲戚|女友|男友|"
    "[和与及给向找请让对跟陪送叫问诉由])$"
)
# Words that may stand directly before a family name and a title.
_BEFORE_TITLE = re.compile("[是有告找请让对跟陪送叫问诉由和与及给向卫人员者把被为经转的嘱]$")
_NOTHING = (  # in a field for a name
    "不详|未知|未填|本人|同上|无|以上|你好|您好|好的|谢谢|已|请|是|可以|没有|收到|在吗"
)
# Frequent family names that begin few words.
_SURE = frozenset(
    "王李张刘陈杨赵吴徐孙胡朱郭何罗梁宋郑谢韩唐冯邓曹彭蔡潘袁吕魏蒋卢苏贾丁薛闫余杜戴钟汪姜范谭廖邹熊陆郝崔邱秦顾侯邵"
    "孟尹黎沈姚龚庞樊施陶洪翟倪严芦俞章葛韦聂岳耿詹欧甄覃霍翁柯阮裴"
)
# Labels that are verbs or titles, too.
_WEAK = re.compile("(?:找|由|经|联系|联络|致电|通知|医生|主任|护士)[:为是叫,]?\\s*$")
_OFFICES = frozenset("科部处室局院所站厅")  # 由安全科 is no name
_FAMILIAR_FAMILY = _SURE | frozenset("马高林江金田夏史")
_FAMILIAR = re.compile(r"(?<!大)[老小](?=[\u4e00-\u9fff])")
_OBJECT = re.compile("[于属请给由向把被为是找让对跟陪叫问与和及]$")
_BED = re.compile(r"\d床$")
_AFTER_BED = re.compile("术|诉|拒|今|于|,|要求|血压|体温|血糖|发热|已|未|入院|出院|转|家属")
_LIST = re.compile("[、/]|[和与及,]")


class ChineseNames:
    """A family name of the list and one or two characters that given names are made of."""

    def __init__(self, names: Names) -> None:
        self.names = names
        compound = "|".join(sorted(names.zh_compound))
        single = "".join(sorted(names.zh_family | names.zh_rare))
        sounds = "".join(sorted(names.zh_transcription))
        self._family = re.compile(f"(?:{compound}|[{single}])")
        self._label = re.compile(rf"(?:{_LABEL}|\d床)(?:姓名|名字|签名)?[:为是叫,]?\s*$")
        self._role = re.compile(rf"{_ROLE}(?:姓名|名字|签名)?[:为是叫]?\s*$")
        self._title = re.compile(f"(?:{_TITLE})")
        # A form's field says it by itself, whatever the family name.
        self._field = re.compile(
            rf"(?:{_LABEL}|{_ROLE})(?:姓名|名字)?:\s*(?!{_NOTHING})"
            rf"([{sounds}]{{3,10}}|[{_H}]{{2,4}})(?![{_H}])"
            rf"|(?:患者|病人|患儿|病患)([{sounds}]{{3,10}}|[{_H}]{{2,4}})(?=[,，(（][男女])"
        )
        surname = f"(?:{compound}|[{single}])"
        # [群聊] 童谣:…; 张伟:… in a text where several lines begin like that
        self._speaker = re.compile(
            rf"^[ \t]*(\[[^\]\n]{{1,16}}\][ \t]*)?({surname}[{_H}]{{1,2}})[ \t]*:", re.MULTILINE
        )
        # Alone in one of the last lines of a text.
        self._signature = re.compile(
            rf"(?<=\n)[ \t-]*({surname}[{_H}]{{1,2}})[ \t]*(?=(?:\n[^\n]{{0,40}}){{0,2}}\s*\Z)"
        )
        self._called = re.compile(rf"(?<![同百异])姓({compound}|[{single}])(?![名氏{single}])")
        # Directly before a phone number, in a list.
        self._numbered = re.compile(
            rf"(?<![{_H}])({surname}[{_H}]{{0,1}}[^\W号话机码式卡线\d_A-Za-z])"
            r"(?=[ ,:(]{0,2}(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4})"
        )
        part = rf"[{sounds}]{{1,10}}"
        self._transcribed = re.compile(
            rf"{part}(?:[{_DOT}]{part}){{1,4}}"
            rf"|(?:(?<=姓名:)|(?<=患者)|(?<=病人))[{_H}]{{1,10}}(?:[{_DOT}][{_H}]{{1,10}}){{1,4}}(?![{_H}])"
        )

    def find(self, text: str) -> Iterator[Found]:
        found = [
            Found(*named.span(named.lastindex or 1), 0.8) for named in self._field.finditer(text)
        ]
        found += [Found(*named.span(), 0.85) for named in self._transcribed.finditer(text)]
        found += [Found(*named.span(1), 0.7) for named in self._called.finditer(text)]
        found += self._by_place(text)
        last = 0
        for family in self._family.finditer(text):
            if family.start() < last:
                continue
            one = self._judged(text, family)
            if one:
                last = one.end
                found.append(one)
        found += self._listed(text, found)
        yield from found
        yield from self._repeated(text, found)

    def _by_place(self, text: str) -> Iterator[Found]:
        """The speakers of a chat, and names directly before a phone number."""
        lines = list(self._speaker.finditer(text))
        for line in lines:
            name = line[2]
            known = len(lines) > 1 and set(name[1:]) <= self.names.zh_given
            if line[1] or (known and not self._is_word(name) and name[0] in self.names.zh_family):
                yield Found(*line.span(2), 0.6)
        for line in self._signature.finditer(text):
            if not self._is_word(line[1]):
                yield Found(*line.span(1), 0.6)
        for word in _FAMILIAR.finditer(text):  # 老刘, 小李
            end = word.end() + 1
            follows = text[end : end + 1]
            goes_on = not follows or not _is_chinese(follows) or follows in _VERBS
            if goes_on and text[word.end()] in _FAMILIAR_FAMILY:
                yield Found(word.start(), end, 0.6)
        for named in self._numbered.finditer(text):
            if not self._is_word(named[1]):
                yield Found(*named.span(1), 0.6)

    def _is_word(self, name: str) -> bool:
        return name[:2] in self.names.zh_other or name in self.names.places

    def _listed(self, text: str, found: list[Found]) -> Iterator[Found]:
        """What follows a name and 、 or 和, and begins with a family name."""
        ends = [one.end for one in found if one.score >= 0.5]
        starts = {one.start for one in found if one.score >= 0.5}
        for end in ends:  # which grows
            sign = _LIST.match(text, end)
            family = sign and self._family.match(text, sign.end())
            if not sign or not family or family.start() in starts:
                continue
            for size in (2, 1):
                given = text[family.end() : family.end() + size]
                follows = text[family.end() + size : family.end() + size + 1]
                if len(given) < size or not all(map(_is_chinese, given)):
                    continue
                ended = not follows or not _is_chinese(follows)
                known = set(given) <= self.names.zh_given
                goes_on = known and (ended or follows in _VERBS or follows in "夫等二三")
                if (goes_on and sign[0] != ",") or (ended and sign[0] in "、/"):
                    yield Found(family.start(), family.end() + size, 0.6)
                    ends.append(family.end() + size)
                    break

    def _repeated(self, text: str, found: list[Found]) -> Iterator[Found]:
        """Names found once, wherever else they stand; a word of two characters only by itself."""
        names = {text[one.start : one.end] for one in found if one.score >= 0.6}
        for name in names:
            if len(name) < 2 or not _is_chinese(name[0]):
                continue
            at = text.find(name)
            while at >= 0:
                end = at + len(name)
                before, follows = text[at - 1 : at] if at else "", text[end : end + 1]
                alone = not (before and _is_chinese(before)) and (
                    not follows or not _is_chinese(follows) or follows in _VERBS
                )
                if len(name) > 2 or alone:
                    yield Found(at, end, 0.6)
                at = text.find(name, end)

    def _judged(self, text: str, family: re.Match[str]) -> Found | None:
        start, after = family.span()
        if start + 3 <= len(text) and text[start : start + 3] in self.names.zh_other:
            return None
        label = self._label.search(text, max(0, start - 10), start)
        role = self._role.search(text, max(0, start - 10), start)
        sizes = [2, 1, 0]
        if text[start : start + 2] in self.names.zh_other:  # a word, or a longer name: 王国强
            known = len(text) > after + 1 and set(text[after : after + 2]) <= self.names.zh_given
            known = known and text[after + 1 : after + 2] not in _OFFICES
            sizes = [2] if known else []
            sizes += [1] if role and self._word_as_name(text, start) else []
        found = [
            Found(start, after + size, score)
            for size in sizes
            if (score := self._score(text, start, after, size, label, role))
        ]
        return max(found, key=lambda f: (f.score, f.end), default=None)

    def _word_as_name(self, text: str, start: int) -> bool:
        """Behind a role or a bed, an ordinary word that nothing goes on from: 签收人管理。"""
        end = start + 2
        if self._role.fullmatch(text, start, end):  # 甲方代表
            return False
        if _BED.search(text, max(0, start - 3), start):
            return text[end - 1] in self.names.zh_given and bool(_AFTER_BED.match(text, end))
        return end >= len(text) or not _is_chinese(text[end])

    def _score(
        self,
        text: str,
        start: int,
        after: int,
        size: int,
        label: re.Match[str] | None,
        role: re.Match[str] | None,
    ) -> float:
        """How sure it is that `size` characters after the family name are the given one; 0: not."""
        end = after + size
        given, follows = text[after:end], text[end : end + 1]
        if not size:
            return self._titled(text, start, after, bool(label or role))
        if len(given) < size or not all(map(_is_chinese, given)) or self._title.match(text, after):
            return 0
        known = set(given) <= self.names.zh_given
        ended = not follows or not _is_chinese(follows)
        goes_on = ended or follows in _VERBS
        rare = after - start == 1 and text[start] in self.names.zh_rare
        whole = known and goes_on
        if role and (ended or (goes_on and (known or not rare))):
            return 0.8 if known else 0.6
        named = bool(label) and not _WEAK.search(label[0] if label else "")
        if rare:
            return 0.6 * (named and whole and size == 2)
        sure = named and size == 2 and goes_on and text[start] in _SURE
        if known and (label or role or self._title.match(text, end)):
            return 0.85 if self._title.match(text, end) else 0.8 if goes_on else 0.65
        alone = self._unlabelled(text, start, end, whole, ended)
        return 0.6 if (label and ended) or sure else alone

    def _titled(self, text: str, start: int, end: int, labelled: bool) -> float:
        """A family name directly before a title."""
        title = self._title.match(text, end)
        if not title:
            return 0
        before = text[start - 1 : start] if start else ""
        if (
            not before
            or before in _ENDS
            or labelled
            or _BEFORE_TITLE.match(before)
            or _BEFORE.search(text, max(0, start - 2), start)
        ):
            return 0.85
        long = len(title[0]) > 1 or title[0] in "哥姐嫂工总"
        return 0.6 if long and text[start] in _SURE else 0

    def _unlabelled(self, text: str, start: int, end: int, whole: bool, ended: bool) -> float:
        """A name without a label. whole: of characters of the list, and it can end here."""
        before = text[start - 1 : start] if start else ""
        bordered = not before or before in _ENDS
        three = end - start > 2
        if three and bordered and self._title.match(text, end):
            return 0.7
        if text[start:end] in self.names.places:
            return 0
        if not whole:  # three characters by themselves
            return 0.5 * (three and bordered and ended and text[start] in _SURE)
        if bordered or _BEFORE.search(text, max(0, start - 2), start):
            return 0.6 if three or ended else 0.5
        sure = text[start] in _SURE
        inside = three and text[end : end + 1] not in {"等", "个"}
        return 0.5 if sure and (inside or (ended and _OBJECT.match(before))) else 0


def _is_chinese(char: str) -> bool:
    return "\u4e00" <= char <= "\u9fff"
