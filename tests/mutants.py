"""Mutants of a file: what cosmic-ray's operators make of it, and what is left without a `raise`."""

from __future__ import annotations

import ast
import difflib
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """line: the changed lines, old → new, without the white space around them."""

    file: str
    line: str
    code: str


class RemoveRaise(Operator):  # type: ignore[misc]
    """`raise X` becomes `pass`: a refusal that is not made."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "raise_stmt":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return get_ast(f"{node.get_first_leaf().prefix}pass").children[0]

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("raise X", "pass"),)


def operators() -> Iterator[Operator]:
    """Without those whose mutants nearly always end in a TypeError, which any test sees."""
    yield RemoveRaise()
    left_out = (
        "Exception",
        "Decorator",
        "Variable",
        "NoOp",
        "Shift",
        "Bit",
        "Pow",
        "Mod",
        "FloorDiv",
        "Invert",
        "_Is",
    )
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if not kind.arguments() and not any(word in name for word in left_out):
            yield kind()


def places(file: str) -> list[tuple[Operator, int]]:
    """Each operator with each of its occurrences in a file."""
    tree = get_ast((ROOT / file).read_text(encoding="utf-8"))
    nodes = list(ast_nodes(tree))
    return [
        (operator, occurrence)
        for operator in operators()
        for occurrence in range(sum(len(list(operator.mutation_positions(n))) for n in nodes))
    ]


def sample(file: str, number: int, chance: random.Random) -> list[Mutant]:
    """Up to `number` mutants that are still Python and change a line of code."""
    source = (ROOT / file).read_text(encoding="utf-8")
    found: dict[str, Mutant] = {}
    every = places(file)
    for operator, occurrence in chance.sample(every, len(every)):
        if len(found) == number:
            break
        code = mutate_code(source, operator, occurrence)
        try:
            with warnings.catch_warnings(action="error"):  # `is` with a literal is no fault of ours
                changes = ast.dump(ast.parse(code or "(")) != ast.dump(ast.parse(source))
                compile(code or "(", file, "exec")
        except (SyntaxError, SyntaxWarning):
            continue
        if changes:
            found.setdefault(code, Mutant(file, _changed(source, code), code))
    return list(found.values())


def _changed(before: str, after: str) -> str:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    parts: dict[str, list[str]] = {"- ": [], "+ ": []}
    for line in lines:
        if line[:2] in parts:
            parts[line[:2]].append(line[2:].strip())
    return f"{' '.join(parts['- '])} → {' '.join(parts['+ '])}"
