"""What the names in a template mean, whatever the fields of a dataset are called.

A name alone is the field of that name: ``{{ input }}`` too, and ``{{ self }}``. Before a point or brackets ``input`` is
all fields, and ``meta`` is what is known about the line: ``{{ input.x }}`` is the field ``x``, whatever ``x`` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from promptmill.errors import RequestError

#: The answer key. No template reaches it, by whatever name.
HIDDEN = "expected"

#: Names that have all fields, or all of ``meta``, behind their point.
SPACES = ("input", "meta")

#: Jinja's own name for the blocks of a template, which no prompt needs. It is a field like any other.
TAKEN_BACK = "self"


class RenderError(RequestError):
    """A template cannot be filled with a line."""


class Fields(dict[str, Any]):
    """All fields under one name. Written as a whole by mistake it could tell anything, so it is refused."""

    name = ""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self)) or "none"
        raise RenderError(
            f"template: '{self.name}' is all fields of the line ({shown[:200]}): name one, such as "
            f"{self.name}.{next(iter(self), 'x')}"
        )


class _Input(Fields):
    name = "input"


class _Meta(Fields):
    name = "meta"


def names_of(fields: Mapping[str, Any], meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every name that a template sees of a line: its fields, ``input`` with the same fields, and ``meta``."""
    inside, about = _Input(fields), _Meta(meta or ())
    inside.pop(HIDDEN, None)
    about.pop(HIDDEN, None)
    return {"input": inside, "meta": about, **inside, _space("input"): inside, _space("meta"): about}


def _space(name: str) -> str:
    """The name under which a template finds all fields: one that no template can write."""
    return f"{name}."


class Names(NodeTransformer):
    """Rewrites a parsed template, so that names mean what they are said to mean above."""

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Node:
        return self._inside(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._inside(node)

    def _inside(self, node: Any) -> nodes.Node:
        name = node.node.name if isinstance(node.node, nodes.Name) else None
        if name in SPACES:
            node.node = _looked_up(_space(name), node.lineno)
        return self.generic_visit(node)

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        """No field can be called: ``{{ input.split() }}`` is what Python does with the value of ``{{ input }}``."""
        method = node.node if isinstance(node.node, nodes.Getattr) else None
        whole = method.node if method is not None else None
        called = self.generic_visit(node)
        if method is not None and isinstance(whole, nodes.Name) and whole.name in SPACES:
            method.node = whole
        return called

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        return _looked_up(node.name, node.lineno) if node.name == TAKEN_BACK and node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Each part as the text that it is by itself: ``~`` would write null as None."""
        node.nodes = [nodes.Filter(each, "string", [], [], None, None, lineno=node.lineno) for each in node.nodes]
        return self.generic_visit(node)


def _looked_up(name: str, line: int) -> nodes.Node:
    """The name by its text, as Jinja knows it: some texts are no names that it could write as Python."""
    return nodes.Getitem(nodes.ContextReference(lineno=line), nodes.Const(name, lineno=line), "load", lineno=line)


def assigned(tree: nodes.Template) -> tuple[str, int] | None:
    """The first of these names that a template gives a value of its own, and the line; None where it does not."""
    for node in tree.find_all(nodes.Name):
        if node.ctx != "load" and node.name in (*SPACES, TAKEN_BACK):
            return node.name, node.lineno
    return None
