"""Parses untrusted YAML within limits: a few hundred bytes of aliases and merges can expand beyond any memory.

Also rejects duplicate keys (one value would be lost) and values that Python can't always print: integers of more than
64 bits and lone surrogates.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_YAML_BYTES = 128 * 2**10
MAX_VALUES = 10_000  # keys and values with aliases expanded; a full config has a few hundred
_MAX_DIGITS = 80  # characters of an integer: 64 binary digits with separators
_MERGE = "tag:yaml.org,2002:merge"
# PyYAML also raises these, for invalid dates, numbers and tags and for deep nesting.
_MISHAPS = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def parse_yaml(text: str) -> Any:
    """Parses a YAML text. Raises ValueError if it is invalid or exceeds the limits."""
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it is longer than {MAX_YAML_BYTES >> 10} KiB")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _require_size(node)
        return loader.construct_document(node)
    except _MISHAPS as error:
        raise ValueError(str(error) or type(error).__name__) from None


class _Loader(yaml.SafeLoader):
    num_values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise ValueError(f"it contains more than {MAX_VALUES:,} values")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS or (value := super().construct_yaml_int(node)).bit_length() > 64:
            raise ValueError("an integer has more than 64 bits")
        return int(value)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        value: str = super().construct_yaml_str(node)
        value.encode()
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def _require_size(root: yaml.Node) -> None:
    """Raises ValueError for more than MAX_VALUES values with aliases expanded."""
    sizes: dict[int, int] = {}  # of finished nodes; an alias is the same object as its anchor
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, is_finished = stack.pop()
        if is_finished:
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in _children(node))
            open_nodes.discard(id(node))
            if sizes[id(node)] > MAX_VALUES:
                raise ValueError(f"it expands to more than {MAX_VALUES:,} values")
        elif id(node) in open_nodes:
            raise ValueError("an alias refers to its own parent")
        elif id(node) not in sizes:
            open_nodes.add(id(node))
            _require_distinct_keys(node)
            stack.append((node, True))
            stack.extend((child, False) for child in _children(node))


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _require_distinct_keys(node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    raise ValueError(f"duplicate key {key.value[:60]!r}{key.start_mark}")
                seen.add((key.tag, key.value))
