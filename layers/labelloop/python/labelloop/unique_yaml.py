"""YAML in which no key may stand twice in a mapping: by itself YAML lets the second win in silence."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from labelloop.errors import ConfigError


def read(text: str, *, where: str) -> Any:
    """`where` names the text in errors. Raises `ConfigError`."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - it is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(where, f"is not valid YAML: {error}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, Hashable):
                text = "a mapping or a list cannot be a key; what has braces or brackets wants quotes"
                raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
