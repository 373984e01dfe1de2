"""From Pydantic's path of a problem to the keys of the file, by the types of the models.

Pydantic puts into a problem's path which alternative of a union it took, and a mark for the key of
a table. Neither is a key that a user wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

KeyPath = tuple[str | int, ...]

TABLE_KEY = "[key]"  # what Pydantic adds to the path of a table's key that is not allowed


class _Setting(NamedTuple):
    """A type, and what Annotated or a model's field says of it."""

    type: Any
    metadata: tuple[Any, ...] = ()

    def plain(self) -> _Setting:
        """The same without Annotated, and without the None of a setting that may be absent."""
        if get_origin(self.type) is Annotated:
            found, *more = get_args(self.type)
            return _Setting(found, (*self.metadata, *more)).plain()
        if get_origin(self.type) in (Union, UnionType):
            others = [other for other in get_args(self.type) if other is not NoneType]
            if len(others) == 1:
                return _Setting(others[0], self.metadata).plain()
        return self


def keys_of(root: type[BaseModel], loc: KeyPath) -> tuple[KeyPath, set[str]]:
    """The keys in a problem's path, and what is allowed beside the last of them.

    Args:
        root: the model of the whole file.
        loc: Pydantic's path.

    Returns:
        The path in the file; the keys of the table that holds its last part, none if that is not a
        table with keys of its own.
    """
    setting, keys, allowed = _Setting(root), list[str | int](), set[str]()
    for part in loc:
        setting = setting.plain()
        alternatives = _alternatives(setting)
        if part == TABLE_KEY:
            continue
        if part in alternatives:
            setting = alternatives[str(part)]
            continue
        allowed = _allowed(setting.type)
        setting = _inside(setting.type, part)
        keys.append(part)
    return tuple(keys), allowed


def _alternatives(setting: _Setting) -> dict[str, _Setting]:
    """The alternatives of a union with a discriminator, by the values that choose them."""
    found: dict[str, _Setting] = {}
    for discriminator in filter(None, map(_discriminator, setting.metadata)):
        for alternative in map(_Setting, get_args(setting.type)):
            one = alternative.plain()
            if isinstance(discriminator, str):
                chosen = get_args(one.type.model_fields[discriminator].annotation)
            else:
                chosen = tuple(m.tag for m in one.metadata if isinstance(m, Tag))
            found |= dict.fromkeys(chosen, one)
    return found


def _discriminator(metadata: Any) -> Any:
    """The field's name or the function that tells alternatives apart; None if this is neither."""
    if isinstance(metadata, FieldInfo | Discriminator):
        found = metadata.discriminator
        return found.discriminator if isinstance(found, Discriminator) else found
    return None


def _allowed(found: Any) -> set[str]:
    return set(found.model_fields) if _is_model(found) else set()


def _inside(found: Any, part: str | int) -> _Setting:
    """What stands under a key of a table, or at a place of a list."""
    if _is_model(found):
        field = found.model_fields.get(part)
        return (
            _Setting(None)
            if field is None
            else _Setting(field.annotation, (*field.metadata, field))
        )
    origin, inside = get_origin(found), get_args(found)
    if not inside or not isinstance(origin, type):
        return _Setting(None)
    return _Setting(inside[1] if issubclass(origin, Mapping) else inside[0])


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, BaseModel)
