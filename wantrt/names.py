"""Names that people write: a wrong one is refused with the nearest right one."""

import difflib
from collections.abc import Iterable

from wantrt.errors import SettingsError


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises SettingsError, with the nearest known name, unless `name` is one of `known`."""
    names = list(known)
    if name in names:
        return
    close = difflib.get_close_matches(name.lower(), names, n=1)
    close = close or [other for other in names if other.startswith(name.lower())]
    hint = f"did you mean {close[0]}? There" if close else "there"
    raise SettingsError(f"unknown {kind} {name!r}; {hint} are: {', '.join(names)}")
