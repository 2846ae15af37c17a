"""The mistakes that `python tests/mutants.py` makes: one at a time, and only where they matter."""

import ast
import random

import pytest

from mutants import MUTATED, ROOT, Finder, main


def mutants_of(code):
    """All mutants of a piece of code, as texts."""
    source = code.encode()
    return [mutant.applied(source).decode() for mutant in Finder("code.py", source).mutants]


@pytest.mark.parametrize(("line", "mutants"), [
    ("return a < b", ["return a <= b"]),
    ("return a not  in b", ["return a in b"]),
    ("return a is not b", ["return a is b"]),
    ("return (a) - (b)", ["return (a) + (b)"]),
    ("return '×' * a + b", ["return '×' * a - b"]),
    ("a //= b", ["a /= b"]),
    ("return 7", ["return 8"]),
    ("return 0.25", ["return 0.5"]),
    ("return f(g=True)", ["return f(g=False)"]),
    ("return a and b or c", ["return a or b or c", "return a and b and c"]),
    ("return not (a)", ["return (a)"]),
    ("return -a", ["return +a"]),
    ("f(a,  # why\n      b)", ["pass"]),
    ("return a if b else c", ["return a if not (b) else c"]),
    ("return a if b == c else d", ["return a if b != c else d"]),
    ("print(1, a < b)", ["pass"]),
    ("raise ValueError(f'{a - 1} < 2')", []),
    ("return f'{a - 1}'", []),
    ("return [a] + b", []),
    ("return f(figsize=(1, 2))", []),
    ("return f(a, 1e-9)", []),
    ("return a * 1j", []),
    ("\"\"\"One of 2 - 1.\"\"\"", [])])
def test_one_place_is_changed_and_nothing_else(line, mutants):
    head = "def f(a: Literal[1], b) -> Literal[2]:\n    "
    found = mutants_of(f"import x\n{head}{line}\n\nif __name__ == '__main__':\n    print(f(1 < 2))\n")
    tail = "\n\nif __name__ == '__main__':\n    print(f(1 < 2))\n"
    assert found == [f"import x\n{head}{mutant}{tail}" for mutant in mutants]


def test_statement_says_which_lines_must_run():
    code = b"class A:\n    b = 1\n\n    def c(self, d=2):\n        if d > 3:\n            return 4\nE = 5\n"
    lines = {mutant.new: mutant.lines for mutant in Finder("code.py", code).mutants}
    assert lines == {"2": (1, 6), "3": (5, 6), ">=": (5, 5), "4": (5, 5), "not (d > 3)": (5, 5),
                     "5": (6, 6), "6": (0, 0)}


def test_each_mutant_of_the_project_is_another_program():
    for file in MUTATED:
        source = (ROOT / file).read_bytes()
        found = Finder(file, source).mutants
        assert len(set(found)) == len(found) > 5
        for mutant in random.Random(0).sample(found, 6):
            changed = ast.dump(ast.parse(mutant.applied(source)))
            assert changed != ast.dump(ast.parse(source)), mutant


def test_a_seed_always_draws_the_same_mutants(capsys):
    listed = []
    for seed in ("3", "3", "4"):
        assert main(["--list", "--count", "5", "--seed", seed]) == 0
        listed.append(capsys.readouterr().out)
    assert listed[0] == listed[1] != listed[2] and len(listed[0].splitlines()) == 5
