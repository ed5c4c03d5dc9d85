"""Frozen dataclasses to JSON and back.

Reading is strict: an unknown field, a missing one without default, a value of another type is an
error that names its place. Knows what our records hold: dataclasses, tuples, dicts by string,
unions, and the JSON scalars; `Any` passes through.
"""

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def to_plain(value: Any) -> Any:
    """What `json.dumps` takes; fields in the order of their definition."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[Record], value: Any, where: str = "") -> Record:
    """The record of `kind` that `to_plain` turned into `value`. Raises ValueError, naming `where`.

    A field that has a default may be missing: it was added since.
    """
    return _read(kind, value, where)


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    _expect(type(value) is kind, kind.__name__, value, where)
    return value


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _read(rest[0], value, where)
    names = " or ".join(kind.__name__ for kind in rest)
    _expect(type(value) in rest, names, value, where)
    return value


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(set(value) - set(known)):
        raise ValueError(f"{where or kind.__name__}: unknown field {', '.join(unknown)}")
    hints = get_type_hints(kind)
    read = {}
    for name, field in known.items():
        if name in value:
            read[name] = _read(hints[name], value[name], f"{where}.{name}" if where else name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where or kind.__name__}: field {name} is missing")
    return kind(**read)


def _read_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), "a list", value, where)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    _expect(len(value) == len(kinds), f"a list of {len(kinds)}", value, where)
    return tuple(
        _read(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _expect(condition: bool, expected: str, value: Any, where: str) -> None:
    if not condition:
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise ValueError(f"{where}: expected {expected}, found {found}")
