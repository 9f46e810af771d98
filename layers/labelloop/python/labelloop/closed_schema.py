"""Files with a closed schema: whatever is wrong with one is a `ConfigError` that names file, key and remedy."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from labelloop.errors import ConfigError


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of such a file. Docstrings and descriptions are what the JSON schema tells."""


def convert[T: Section](plain: Any, section: type[T], *, where: str, inside: str = "") -> T:
    """What YAML or JSON said as `section`. `where` names the file in errors, `inside` the key under which it stands there."""
    if plain is None:
        raise ConfigError(where, "is empty")
    try:
        return msgspec.convert(plain, section)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        key = ".".join(filter(None, (inside, path.strip("`."))))
        raise ConfigError(where, _with_remedy(message, section), key) from error


def _with_remedy(message: str, section: type[Section]) -> str:
    unknown = re.search(r"unknown field `([^`]+)`", message)
    if unknown:
        import difflib

        parts = msgspec.json.schema(section)["$defs"].values()
        known = {name for part in parts for name in part["properties"]}
        near = difflib.get_close_matches(unknown[1], sorted(known), n=1)
        return f"unknown key {unknown[1]!r}; " + (f"did you mean {near[0]!r}?" if near else "remove it")
    missing = re.search(r"missing required field `([^`]+)`", message)
    if missing:
        return f"the key {missing[1]!r} is missing; add it"
    if re.match(r"Expected `str( \| null)?`, got", message):
        return f"{message}; put it in quotes"
    return message
