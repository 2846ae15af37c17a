"""Print what each public definition of the script drags along: `python tests/weights.py`.

Whoever copies a definition out of the script also needs the definitions and constants that it names,
those that they name, and so on. The fewer lines these are, the easier it is to copy.
"""

import ast
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "convolutional_neural_networks.py"
TREE = ast.parse(SCRIPT.read_text(encoding="utf-8"))
IMPORTS = [node for node in TREE.body if isinstance(node, ast.Import | ast.ImportFrom)]


def names_given_by(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top level defines; imports and cells define none."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


DEFINITIONS = {name: node for node in TREE.body for name in names_given_by(node)}
PUBLIC = [name for name, node in DEFINITIONS.items()
          if isinstance(node, ast.FunctionDef | ast.ClassDef) and not name.startswith("_")]


def needed_by(name: str) -> list[ast.stmt]:
    """Return the statements that define all that `name` needs, its own included, in the script's order."""
    needed, waiting = [], [DEFINITIONS[name]]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.append(node)
            waiting += [DEFINITIONS[part.id] for part in ast.walk(node)
                        if isinstance(part, ast.Name) and part.id in DEFINITIONS]
    return sorted(needed, key=lambda node: node.lineno)


def lines_of(node: ast.stmt) -> int:
    """Return how many lines of the script a statement takes; a decorator above it does not count."""
    return node.end_lineno - node.lineno + 1


def others(name: str) -> tuple[int, int]:
    """Return how many other definitions `name` needs, and how many lines they have."""
    dragged = [node for node in needed_by(name) if node is not DEFINITIONS[name]]
    return len(dragged), sum(map(lines_of, dragged))


def main() -> None:
    """Print the table, heaviest first."""
    rows = [(name, lines_of(DEFINITIONS[name]), *others(name)) for name in PUBLIC]
    print(f"{'definition':24} {'own lines':>9} {'others':>7} {'their lines':>12}")
    for name, own, count, lines in sorted(rows, key=lambda row: -row[3]):
        print(f"{name:24} {own:9} {count:7} {lines:12}")


if __name__ == "__main__":
    main()
