"""The house, measured: rooms of `megatron_let/`, and what they take of one another and upstream.

    .venv/bin/python -m tests.unit.house

A room is a folder of the package, or a file beside them; an arrow is an import, wherever in a file
it stands.
"""

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_let"
Sources = Mapping[str, str]
"""Python files' texts by their path from the root."""


def sources(*places: str) -> dict[str, str]:
    """The files of some folders, or files."""
    found: dict[str, str] = {}
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found[str(file.relative_to(ROOT))] = file.read_text()
    return found


@functools.cache
def nodes(text: str) -> list[ast.AST]:
    """Of a file, of which many rules look at the same."""
    return list(ast.walk(ast.parse(text)))


def room(path: str) -> str:
    """Of a file of the package."""
    return path.split("/")[1].removesuffix(".py")


def arrows(files: Sources) -> dict[tuple[str, str], list[str]]:
    """The files that import, by the two rooms."""
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files
    }
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, text in files.items():
        for name in imported(text):
            target = modules.get(name) or modules.get(name.rpartition(".")[0])
            if target and target != f"{PACKAGE}/__init__.py" and room(target) != room(path):
                found[room(path), room(target)].append(path)
    return found


def imported(text: str) -> Iterator[str]:
    """Dotted names of all imports of a file, local ones too."""
    for node in nodes(text):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circle(files: Sources) -> list[str]:
    """The rooms of which each reaches itself by arrows; none in a house that stands."""
    after: dict[str, set[str]] = defaultdict(set)
    for start, end in arrows(files):
        after[start].add(end)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = after[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    return sorted(start for start in list(after) if start in reached(start))


def private_names(files: Sources) -> list[str]:
    """Where files outside `upstream/` name what Megatron keeps to itself, or set what is its."""
    found = []
    for path, text in files.items():
        if path.startswith(f"{PACKAGE}/upstream/"):
            continue
        theirs = {
            (alias.asname or alias.name).partition(".")[0]
            for node in nodes(text)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).startswith("megatron.")
        }
        for node in nodes(text):
            if _is_private(node, theirs) or _sets(node, theirs):
                found.append(f"{path}:{node.lineno}")
    return found


def _is_private(node: ast.AST, theirs: set[str]) -> bool:
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
        return any(alias.name.startswith("_") for alias in node.names)
    if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
        # `module._name`, `get_it()._name`: of Megatron's, or of what it returns.
        return _root(node.value) in theirs and not node.attr.startswith("__")
    return False


def _sets(node: ast.AST, theirs: set[str]) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    named = [target for target in targets if isinstance(target, ast.Attribute)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
        return _root(node.args[0]) in theirs
    return any(_root(target.value) in theirs for target in named)


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def named_methods(files: Sources, names: set[str]) -> list[str]:
    """Where texts that are a method's name and nothing else stand, but in the one table."""
    return [
        f"{path}:{node.lineno} {node.value!r}"
        for path, text in files.items()
        if path != f"{PACKAGE}/methods/table.py"
        for node in nodes(text)
        if isinstance(node, ast.Constant) and node.value in names
    ]


def main() -> None:
    """Print the rooms with their lines, and what each imports."""
    files = sources(PACKAGE)
    found, lines = arrows(files), defaultdict(int)
    for path, text in files.items():
        lines[room(path)] += len(text.splitlines())
    print(
        f"{len(lines)} rooms, {len(found)} arrows, {sum(lines.values()):,} lines; "
        f"circle: {circle(files) or 'none'}"
    )
    for name in sorted(lines):
        targets = [end for start, end in sorted(found) if start == name]
        print(f"{name:13} {lines[name]:6,}  -> {', '.join(targets)}")


if __name__ == "__main__":
    main()
