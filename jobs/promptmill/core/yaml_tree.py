"""The tree of a YAML text, in which each value has its place, and what such a text may not do."""

from __future__ import annotations

from typing import Any

import yaml

from promptmill.errors import TaskFileError

#: Most values of a task file: a thousand few-shot examples of a hundred fields.
MOST_VALUES = 100_000


def place_of(name: str, mark: yaml.Mark) -> str:
    """``name:line:column``, counted from 1."""
    return f"{name}:{mark.line + 1}:{mark.column + 1}"


def refuse_many_values(tree: yaml.Node, name: str) -> None:
    """Aliases within aliases are few bytes and may be any number of values: they are counted, and not written out."""
    sizes: dict[int, int] = {}
    waiting = [tree]
    while waiting:
        node = waiting[-1]
        below = _below(node)
        if id(node) not in sizes:
            # Begun: an alias to it from within is a circle, which PyYAML takes and nothing else does.
            sizes[id(node)] = 0
            waiting += [each for each in below if id(each) not in sizes]
            continue
        waiting.pop()
        sizes[id(node)] = 1 + sum(sizes[id(each)] for each in below)
        if sizes[id(node)] > MOST_VALUES:
            raise TaskFileError(
                f"{place_of(name, node.start_mark)}: more than {MOST_VALUES:,} values, with aliases written out",
                hint="Use fewer aliases (*name), or write examples into a file.",
            )


def refuse_repeated_keys(tree: yaml.Node, name: str) -> None:
    """PyYAML takes the last of them and says nothing. An alias's node is looked at once, however often it is used."""
    waiting, known = [tree], {id(tree)}
    while waiting:
        node = waiting.pop()
        seen: set[str] = set()
        for key in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key[0], yaml.ScalarNode) and key[0].value in seen:
                raise TaskFileError(f"{place_of(name, key[0].start_mark)}: the key '{key[0].value}' is there twice")
            seen.add(str(key[0].value))
        below = [part for part in _below(node) if id(part) not in known]
        known.update(map(id, below))
        waiting += below


def place_in(name: str, tree: yaml.Node, place: tuple[Any, ...], inside: int = 1) -> str:
    """``name:line:column`` of the deepest part of ``place`` that is in the file, counted from 1.

    ``inside``: the line within that part's text, for a text that is written line by line behind a ``|``.
    """
    node, mark = tree, tree.start_mark
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            mark, node = found[0][0].start_mark, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
    if isinstance(node, yaml.ScalarNode) and node.style == "|":
        return f"{name}:{node.start_mark.line + 1 + inside}"
    return place_of(name, mark)


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
