"""The character encodings in which a data file may be written: a fixed, public list.

The list is closed for two reasons. Python knows codecs that are no encodings of tables (rot13,
idna, unicode_escape), and a record's identity is computed over every member of the list that
decodes its bytes (client/records/written_forms.py), so that a file declared in the wrong encoding
stays the same records.
"""

from __future__ import annotations

import codecs

# By the names that Python's codecs have. Each name of one encoding stands for the whole of it:
# GB 18030 contains GBK and GB 2312.
ENCODINGS: tuple[str, ...] = (
    "utf-8",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "iso8859-1",
    "cp1252",
    "iso8859-15",
    "iso8859-2",
    "cp1250",
    "cp1251",
    "koi8-r",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "mac-roman",
    "cp437",
    "cp850",
    "gb18030",
    "big5",
    "cp950",
    "shift_jis",
    "cp932",
    "euc_jp",
    "euc_kr",
    "cp949",
)
# Names of other codecs that a member of the list contains.
CONTAINED = {"gbk": "gb18030", "gb2312": "gb18030", "utf-8-sig": "utf-8"}
USUAL = {"iso8859-1": "latin-1"}  # the name that messages show

# In these, bytes 0x80 to 0x9F are control characters that nobody writes; in the Windows encoding
# beside each they are characters such as € and –.
WINDOWS_ENCODINGS = {"iso8859-1": "cp1252", "iso8859-15": "cp1252", "iso8859-2": "cp1250"}


def encoding_of(name: str) -> str:
    """The member of ENCODINGS that a user's name means: 'Latin1', 'windows-1252', 'GBK'.

    Args:
        name: any alias that Python knows of a member, in any case, with '-', '_' or spaces.

    Returns:
        The member of ENCODINGS.

    Raises:
        ValueError: for every other name; its text lists what is allowed.
    """
    try:
        found = codecs.lookup(name).name
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        found = ""
    found = CONTAINED.get(found, found)
    if found not in ENCODINGS:
        allowed = ", ".join(map(usual_name, ENCODINGS))
        raise ValueError(
            f"{name!r} is not an encoding that data files may have; use one of: {allowed}"
        )
    return found


def usual_name(encoding: str) -> str:
    """The name of a member of ENCODINGS by which people know it: 'latin-1' for 'iso8859-1'."""
    return USUAL.get(encoding, encoding.replace("_", "-"))
