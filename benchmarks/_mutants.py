"""The changes that mutation.py makes: where Cosmic Ray's operators apply, and the changed source.

Left out, because they cannot change a number or always fail by type: annotations, ``raise``
statements, what is under TYPE_CHECKING, bitwise operators for arithmetic ones and ``is`` for
``==`` (and the reverse), ``~`` or ``+`` for ``-``, and random changes of variables.
"""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Place", "changed", "difference", "places"]

# Changes within one of these groups are made; those across them fail by type.
_GROUPS = (
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
)


class Place(NamedTuple):
    """Where an operator applies. The line's text and ``nth`` name it while other lines move."""

    path: str
    operator: str
    text: str
    nth: int
    occurrence: int
    line: int

    @property
    def key(self) -> str:
        """What stays the same while the rest of the file changes."""
        return f"{self.path} | {self.operator} | {self.text} | {self.nth}"


def places(tree: Path, path: Path) -> Iterator[Place]:
    """All places in the file ``path`` below ``tree``."""
    source = path.read_text(encoding="utf-8")
    lines, nodes = source.splitlines(), list(ast_nodes(get_ast(source)))
    for name in _operators():
        operator, count, seen = get_operator(name)(), itertools.count(), Counter[str]()
        for node in nodes:
            for (line, _), _ in operator.mutation_positions(node):
                occurrence, text = next(count), lines[line - 1].strip()
                if not _skipped(node):
                    where = str(path.relative_to(tree))
                    yield Place(where, name, text, seen[text], occurrence, line)
                seen[text] += 1


def changed(tree: Path, place: Place) -> str | None:
    """Source with the change; None if it does not compile, or is none."""
    source = (tree / place.path).read_text(encoding="utf-8")
    found = mutate_code(source, get_operator(place.operator)(), place.occurrence)
    with suppress(SyntaxError):
        compile(found, place.path, "exec")
        return found if found != source else None
    return None


def difference(before: str, after: str) -> dict[str, str]:
    """The first line that differs."""
    lines = itertools.zip_longest(before.splitlines(), after.splitlines(), fillvalue="")
    old, new = next((a, b) for a, b in lines if a != b)
    return {"before": old.strip(), "after": new.strip()}


def _operators() -> Iterator[str]:
    for name in operator_names():
        kind, *change = name.removeprefix("core/").split("_")
        if kind in ("ReplaceBinaryOperator", "ReplaceComparisonOperator"):
            if any(set(change) <= group for group in _GROUPS):
                yield name
        elif change[:1] == ["Delete"] or not kind.startswith(("ReplaceUnary", "Variable")):
            yield name


def _skipped(node: Any) -> bool:  # noqa: ANN401 (parso has no types)
    """Whether a node lies in an annotation, a ``raise``, or under TYPE_CHECKING."""
    while node.parent is not None:
        above = node.parent
        if node.type in ("raise_stmt", "tfpdef"):
            return True
        if node.type == "if_stmt" and "TYPE_CHECKING" in node.children[1].get_code():
            return True
        if above.type == "annassign" and node is above.children[1]:
            return True
        if above.type == "funcdef" and node is above.annotation:
            return True
        node = above
    return False
