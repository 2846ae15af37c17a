"""Would the tests notice a mistake? This makes some, one at a time, and counts those noticed.

    python -m pip install coverage                       # is needed in addition
    python tests/mutants.py --count 100 --seed 0         # 100 mutants, and what survived
    python tests/mutants.py --list                       # which mutants these are; runs nothing
    python tests/mutants.py --only data/fetch.py:104     # all mutants of one line, say a survivor's

A mutant is the project with one place changed, in a throw-away copy: a comparison (`<` to `<=`), a
sign (`+` to `-`), a number (an integer plus 1, another number doubled), `True` or `False`, `and` or
`or`, a `not`, the condition of an `if`, or a call whose result nobody uses, which is dropped. They
are drawn evenly from all places. Then tests that execute the changed statement run until one fails:
the mutant is noticed. One that makes the tests take three times as long, and a minute, is noticed
too (an endless loop). What survived is printed, and the share that was noticed.

Which test executes which line is measured first. That takes minutes, and is kept in the folder for
temporary files until the project changes. Of the tests that execute the statement, those that name
its definition come first, then the fast ones, until they would take `--seconds` together. Tests
that only read the source do not count: they would notice any change. A test that fails without a
mutant is not used.

Left out, since no test should notice it: the demonstrating cells of the script, type hints, texts,
error messages, what is printed and how, progress bars, and the looks of pictures (LOOKS, STYLE).
Left out, since the changed program does the same: numbers of at most 1e-9, which keep a division
from failing; and `n * 1j`, a number of steps for numpy.mgrid, which ignores the sign of `n / 1j`.
Left out, since it takes long: data/pretrain_resnet18.py, and tests that run the whole tutorial.

No tool at hand fits: mutmut 3 changes only functions, and rewrites the file that test_snippets.py
takes apart; cosmic-ray also changes the demonstrating cells, and runs all tests for each mutant.
This needs Linux. The file is also the pytest plugin that watches and chooses the tests.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "convolutional_neural_networks.py"
MUTATED = {  # each file, and tests for what none is seen to execute
    SCRIPT: "test_training.py", "data/__init__.py": "test_data.py",
    "data/fetch.py": "test_download.py", "data/run.py": "test_script.py",
    "data/__main__.py": "test_download.py"}
COPIED = ("*.py", "*.ipynb", "*.md", "*.toml", "*.ini", "*.txt", "LICENSE", ".ci/*",
          ".github/workflows/*", "tests/*.py", "data/*.py", "data/*.md", "data/*.npz", "data/*.pth",
          "data/figures/*")
FOLDER, CONTEXT = "CNN_MUTANTS_FOLDER", "CNN_MUTANTS_CONTEXT"    # environment variables
MOST_MEMORY = 32 << 30                                           # bytes of a process

COMPARISONS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
               ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"),
               ast.NotIn: (r"not\s+in", "in"), ast.Is: ("is", "is not"),
               ast.IsNot: (r"is\s+not", "is")}
OPERATORS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"),
             ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"), ast.Mod: ("%", "*"),
             ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
             ast.LShift: ("<<", ">>"), ast.MatMult: ("@", "*")}
LOOKS = {"alpha", "arrowprops", "dpi", "figsize", "fontsize", "labelpad", "linewidth", "lw", "pad",
         "rotation", "zorder"}                                   # arguments to be left alone
TALK = {"print", "tqdm", "bar.update", "self.exit", "parser.error"}  # calls with such arguments


# ------------------------------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes `begin` to `end` of the file become `new`.

    `definition` is the function, class or constant of the file in which it lies. `lines` are the
    first and the last line of what is executed if the change matters; (0, 0) for constants.
    """

    file: str
    begin: int
    end: int
    new: str
    operator: str
    definition: str
    lines: tuple[int, int]

    def applied(self, source: bytes) -> bytes:
        """Return the changed file."""
        return source[:self.begin] + self.new.encode() + source[self.end:]

    def described(self, source: bytes) -> dict:
        """Return where it is, and the line before and after."""
        number = source.count(b"\n", 0, self.begin)
        before, after = (text.decode().split("\n")[number].strip()
                         for text in (source, self.applied(source)))
        return {"place": f"{self.file}:{number + 1}", "old": before, "new": after,
                "operator": self.operator}


class Finder:
    """Finds all mutants of a file."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source, self.mutants = file, source, []
        self.starts = [0]                                        # of the lines, in bytes
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        for node in ast.parse(source).body:
            match node:                                          # not: imports, cells, docstrings
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    self.definition = name
                    self.visit(node, self.lines_of(node, node))
                case (ast.Assign([ast.Name(name) | ast.Tuple([ast.Name(name), *_])])
                      | ast.AnnAssign(ast.Name(name))) if name != "STYLE":
                    self.definition = name
                    self.visit(node, (0, 0))
        self.mutants.sort(key=lambda mutant: (mutant.begin, mutant.end, mutant.new))

    def place(self, node: ast.AST) -> tuple[int, int]:
        """Return where the node begins and ends, in bytes from the start of the file."""
        return (self.starts[node.lineno - 1] + node.col_offset,
                self.starts[node.end_lineno - 1] + node.end_col_offset)

    def add(self, begin: int, end: int, new: str, operator: str) -> None:
        """Keep a mutant."""
        self.mutants.append(
            Mutant(self.file, begin, end, new, operator, self.definition, self.lines))

    def add_between(self, left: ast.AST, right: ast.AST, old: str, new: str, operator: str) -> None:
        """Keep a mutant that changes the sign or word between two nodes."""
        begin, end = self.place(left)[1], self.place(right)[0]
        between = re.sub(rb"#[^\n]*", lambda found: b" " * len(found[0]), self.source[begin:end])
        found = re.search(old.encode(), between)
        self.add(begin + found.start(), begin + found.end(), new, operator)

    def visit(self, node: ast.AST, lines: tuple[int, int]) -> None:
        """Find the mutants in a node; `lines` belong to the statement around it."""
        self.lines = lines
        self.find(node)
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.JoinedStr | ast.Raise) or called in TALK or (
                isinstance(node, ast.keyword) and node.arg in LOOKS):
            return
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                    self.visit(child, self.lines_of(child, node) or lines)

    def lines_of(self, node: ast.AST, parent: ast.AST) -> tuple[int, int] | None:
        """Return a statement's lines without those of the statements in it; None if it is none."""
        if isinstance(node, ast.FunctionDef):                    # the head runs at import
            return node.body[0].lineno, node.end_lineno
        if isinstance(parent, ast.ClassDef):                     # so does what stands in a class
            return parent.lineno, parent.end_lineno
        if not isinstance(node, ast.stmt):
            return None
        body = getattr(node, "body", None)
        return node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno

    def find(self, node: ast.AST) -> None:
        """Keep the mutants of this node itself."""
        match node:
            case ast.Compare():
                for left, kind, right in zip([node.left, *node.comparators], node.ops,
                                             node.comparators):
                    self.add_between(left, right, *COMPARISONS[type(kind)], "comparison")
            case ast.BinOp(right=ast.Constant(value=complex())):  # steps for numpy.mgrid
                pass
            case ast.BinOp() if not (joins(node.left) or joins(node.right)):
                old, new = OPERATORS[type(node.op)]
                self.add_between(node.left, node.right, re.escape(old), new, "sign")
            case ast.AugAssign():
                old, new = OPERATORS[type(node.op)]
                self.add_between(node.target, node.value, re.escape(old), new, "sign")
            case ast.UnaryOp(op=ast.USub()):
                begin, _ = self.place(node)
                self.add(begin, begin + 1, "+", "sign")
            case ast.UnaryOp(op=ast.Not()):
                begin, end = self.place(node)
                length = re.match(rb"not\s*", self.source[begin:end]).end()
                self.add(begin, begin + length, "", "not")
            case ast.BoolOp():
                old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:]):
                    self.add_between(left, right, rf"\b{old}\b", new, "and/or")
            case ast.Constant(value=bool(value)):
                self.add(*self.place(node), str(not value), "flag")
            case ast.Constant(value=int(value)):
                self.add(*self.place(node), str(value + 1), "number")
            case ast.Constant(value=float(value)) if not 0 < value <= 1e-9:
                self.add(*self.place(node), str(2 * value or 1.0), "number")
            case ast.Expr(value=ast.Call(func=function)) if ast.unparse(function) != "bar.update":
                self.add(*self.place(node), "pass", "call")
        if isinstance(node, ast.If | ast.IfExp) and not negated_otherwise(node.test):
            begin, end = self.place(node.test)
            self.add(begin, end, f"not ({self.source[begin:end].decode()})", "condition")


def joins(node: ast.expr) -> bool:
    """Say whether `+` or `|` would join this with another: any other sign would always crash."""
    return (isinstance(node, ast.JoinedStr | ast.List | ast.ListComp | ast.Tuple | ast.Dict)
            or isinstance(node, ast.Constant) and isinstance(node.value, str))


def negated_otherwise(test: ast.expr) -> bool:
    """Say whether another mutant already negates this condition."""
    match test:
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Compare(ops=[kind]):
            return isinstance(kind, ast.Eq | ast.NotEq | ast.In | ast.NotIn | ast.Is | ast.IsNot)
    return False


# ---------------------------------------------------------------- the plugin, in the tests' process

RECORD = {"tests": {}, "fixtures": {}, "failed": []}             # seconds of each, and names


def enter(context: str) -> None:
    """From here on, what is executed is ascribed to this test or fixture, in new processes too."""
    os.environ[CONTEXT] = context
    if "COVERAGE_PROCESS_START" in os.environ:
        import coverage

        coverage.Coverage.current().switch_context(context)


def pytest_configure() -> None:
    """Stand in for packages that only the notebook needs; let no mutant eat all memory."""
    for package in ("jupytext", "nbformat", "nbclient"):
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = sys.modules[f"{package}.exceptions"] = mock.MagicMock()
    import resource                                              # which Windows lacks

    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def pytest_collection_modifyitems(items: "list[pytest.Item]") -> None:
    """Keep the chosen tests, in their order; or all but those that run the whole tutorial."""
    chosen = Path(os.environ[FOLDER]) / "chosen.json"
    if chosen.exists():
        order = {name: place for place, name in enumerate(json.loads(chosen.read_text()))}
        items[:] = sorted((item for item in items if item.nodeid in order),
                          key=lambda item: order[item.nodeid])
    else:
        items[:] = [item for item in items if "both_runs" not in item.fixturenames]
    for item in items:
        RECORD["tests"][item.nodeid] = {"seconds": 0.0, "fixtures": list(item.fixturenames)}


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    enter(nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef: "pytest.FixtureDef") -> Iterator[None]:
    """Ascribe what a fixture of several tests does to all of them."""
    if fixturedef.scope == "function":
        yield
        return
    test, start = os.environ[CONTEXT], time.perf_counter()
    enter(f"fixture {fixturedef.argname}")
    yield
    seconds = RECORD["fixtures"][fixturedef.argname] = time.perf_counter() - start
    RECORD["tests"][test]["seconds"] -= seconds
    enter(test)


def pytest_runtest_logreport(report: "pytest.TestReport") -> None:
    """Note how long it took, and a failure."""
    RECORD["tests"][report.nodeid]["seconds"] += report.duration
    if report.failed:
        RECORD["failed"].append(report.nodeid)


def pytest_sessionfinish() -> None:
    """Write down what was noted."""
    (Path(os.environ[FOLDER]) / "record.json").write_text(json.dumps(RECORD))


# ----------------------------------------------------------------------------------- running tests


@contextmanager
def throw_away_copy(root: Path) -> Iterator[Path]:
    """Within this block there is a folder with a copy of what the tests need, in `project`."""
    folder = Path(tempfile.mkdtemp(prefix="cnn-mutants-")).resolve()
    try:
        for pattern in COPIED:
            for file in root.glob(pattern):
                target = folder / "project" / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        (folder / "tmp").mkdir()
        yield folder
    finally:
        for _ in range(50):                                      # a process may still be ending
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


def run_tests(folder: Path, files: Sequence[str], limit: float, *options: str,
              **environment: str) -> tuple[int | None, dict]:
    """Run test files in the copy; return pytest's code (None: too slow), and the plugin's notes."""
    project, temporary = folder / "project", folder / "tmp"
    environment |= {
        FOLDER: str(folder), CONTEXT: "", "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(project), str(project / "tests")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mutants", "-p", "no:randomly",
               "-p", "no:cacheprovider", f"--basetemp={temporary / 'pytest'}", *options, *files]
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            command, cwd=project, env=os.environ | environment, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)                   # so that torchrun ends its own
        time.sleep(5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None, {}
    record = folder / "record.json"
    return code, json.loads(record.read_text()) if record.exists() else {}


# ----------------------------------------------------------------- which tests execute which line

SETTINGS = """[run]
data_file = {folder}/coverage
parallel = true
sigterm = true
context = ${{{context}-}}
include =
    {folder}/project/convolutional_neural_networks.py
    {folder}/project/data/*.py
disable_warnings = no-data-collected, include-ignored
"""


def watch(file: str, root: Path) -> dict:
    """Run one file of tests; return its tests, and the tests that executed each line."""
    import coverage

    with throw_away_copy(root) as folder:
        project = folder / "project"
        (folder / "rc").write_text(SETTINGS.format(folder=folder, context=CONTEXT))
        (project / "sitecustomize.py").write_text("import coverage\ncoverage.process_startup()\n")
        code, record = run_tests(folder, [file], 600, COVERAGE_CORE="ctrace",
                                 COVERAGE_PROCESS_START=str(folder / "rc"))
        if code not in (0, 1):
            print(f"{file} is left out, since pytest ended with {code}:", file=sys.stderr)
            print(*(folder / "output.txt").read_text().splitlines()[-5:], sep="\n", file=sys.stderr)
            return {"tests": {}, "lines": {}, "failed": []}
        lines = {}
        for data_file in folder.glob("coverage.*"):
            data = coverage.CoverageData(str(data_file))
            data.read()
            for measured in data.measured_files():
                of_file = lines.setdefault(str(Path(measured).relative_to(project)), {})
                for line, contexts in data.contexts_by_lineno(measured).items():
                    of_file.setdefault(str(line), set()).update(contexts)
    tests, fixtures = record["tests"], record["fixtures"]
    for test in tests.values():
        test["fixtures"] = {name: fixtures[name] for name in test["fixtures"] if name in fixtures}
    users = {f"fixture {name}": {key for key, test in tests.items() if name in test["fixtures"]}
             for name in fixtures} | {key: {key} for key in tests}
    return {"tests": tests, "failed": record["failed"], "lines": {
        measured: {line: sorted(set().union(*(users.get(context, ()) for context in contexts)))
                   for line, contexts in of_file.items()} for measured, of_file in lines.items()}}


def watch_all(root: Path, jobs: int) -> dict:
    """Return what `watch` says of all tests; from an earlier run if nothing has changed since."""
    files = sorted(root.glob("tests/test_*.py"), key=lambda file: -file.stat().st_size)
    digest = hashlib.sha256(sys.version.encode())
    for file in [*files, *sorted(root.glob("*.py")), *sorted(root.glob("data/*.py"))]:
        digest.update(file.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"cnn-mutants-{digest.hexdigest()[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    print("Which tests execute which line? This takes minutes, but only once.", file=sys.stderr)
    known = {"tests": {}, "lines": {file: {} for file in MUTATED}, "failed": []}
    with ThreadPoolExecutor(jobs) as pool:
        for seen in pool.map(partial(watch, root=root), [f"tests/{file.name}" for file in files]):
            known["tests"] |= seen["tests"]
            known["failed"] += seen["failed"]
            for file, lines in seen["lines"].items():
                for line, names in lines.items():
                    known["lines"].setdefault(file, {}).setdefault(line, []).extend(names)
    if {name.split("::")[0] for name in known["tests"]} == {f"tests/{file.name}" for file in files}:
        beside = kept.with_suffix(f".{os.getpid()}")             # none was left out
        beside.write_text(json.dumps(known))
        beside.replace(kept)
    return known


@lru_cache(None)
def bodies(root: Path) -> dict[str, str]:
    """Return the source of each test, by file and name."""
    return {f"tests/{file.name}::{node.name}": ast.get_source_segment(text, node)
            for file in root.glob("tests/test_*.py") for text in [file.read_text(encoding="utf-8")]
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}


def functions_that_use(constant: str, root: Path) -> Iterator[tuple[str, int, int]]:
    """Yield file, first and last line of each function of the project that names a constant."""
    for file in MUTATED:
        for node in ast.walk(ast.parse((root / file).read_bytes())):
            if isinstance(node, ast.FunctionDef) and any(
                    isinstance(part, ast.Name) and part.id == constant for part in ast.walk(node)):
                yield file, node.body[0].lineno, node.end_lineno


def choose_tests(mutant: Mutant, root: Path, known: dict, most: float) -> tuple[list[str], float]:
    """Return tests that concern the mutant, of about `most` seconds, and how long they take."""
    def names_it(test: str) -> bool:
        text = test + bodies(root).get(re.sub(r"\[.*|::\w+(?=::)", "", test), "")
        return re.search(rf"\b{mutant.definition}\b", text) is not None

    tests = {name: test for name, test in known["tests"].items() if name not in known["failed"]}
    naming = {name for name in tests if names_it(name)}
    constant = mutant.lines == (0, 0)
    places = [(mutant.file, *mutant.lines)]
    if constant:
        places = functions_that_use(mutant.definition, root)
    concerned = {name for file, begin, end in places for line in range(begin, end + 1)
                 for name in known["lines"][file].get(str(line), [])}
    concerned |= {name for name in naming if constant or name.endswith(f"[{mutant.definition}]")}
    concerned = concerned & tests.keys() or naming or {
        name for name in tests if name.startswith(f"tests/{MUTATED[mutant.file]}::")}

    def rank(name: str) -> tuple[bool, float, str]:
        return name not in naming, tests[name]["seconds"], name

    chosen, paid, total = {}, set(), 0.0
    for name in sorted(concerned, key=rank):
        file, fixtures = name.split("::")[0], tests[name]["fixtures"]
        new = {(file, fixture) for fixture in fixtures} - paid
        seconds = tests[name]["seconds"] + sum(fixtures[fixture] for _, fixture in new)
        if not chosen or total + seconds <= most:
            chosen.setdefault(file, []).append(name)
            paid |= new
            total += seconds
    first = sorted(chosen, key=lambda file: (not naming & set(chosen[file]),
                                             sum(tests[name]["seconds"] for name in chosen[file])))
    return [name for file in first for name in chosen[file]], total


# --------------------------------------------------------------------------------------- the check


def try_mutant(mutant: Mutant, root: Path, known: dict, most: float) -> dict:
    """Run the tests that concern a mutant; return what became of it."""
    source = (root / mutant.file).read_bytes()
    changed, start = mutant.applied(source), time.perf_counter()
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant
    names, seconds = choose_tests(mutant, root, known, most)
    with throw_away_copy(root) as folder:
        (folder / "project" / mutant.file).write_bytes(changed)
        (folder / "chosen.json").write_text(json.dumps(names))
        files = list(dict.fromkeys(name.split("::")[0] for name in names))
        code, record = run_tests(folder, files, 3 * seconds + 60, "-x") if names else (5, {})
        last = (folder / "output.txt").read_text().splitlines()[-1:] if names else ["no tests"]
    noticed = code not in (0, 3, 4, 5)                           # 3, 4: pytest itself failed
    failed = record.get("failed") or [f"pytest's exit code {code}", *last]
    return {"file": mutant.file, "definition": mutant.definition} | mutant.described(source) | {
        "noticed": noticed, "by": "time" if code is None else failed[0] if noticed else None,
        "tests": len(names), "code": code, "seconds": round(time.perf_counter() - start, 1)}


def shown(row: dict) -> str:
    """Return the line that describes a mutant."""
    return f"{row['place']}  {row['old']}  →  {row['new']}  ({row['operator']})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw mutants, try them, and print the survivors and the share that was noticed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--count", type=int, default=100, help="how many mutants (default: 100)")
    add("--seed", type=int, default=0, help="which ones are drawn (default: 0)")
    add("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2),
        help="mutants at a time (default: half the cores)")
    add("--seconds", type=float, default=90, help="of tests for each mutant (default: 90)")
    add("--only", metavar="FILE:LINE", help="all mutants of this line instead")
    add("--list", action="store_true", help="print the mutants, and run nothing")
    add("--json", type=Path, help="a file for all results")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.jobs < 1:
        parser.error("--count and --jobs: expected at least 1")

    with throw_away_copy(ROOT) as folder:                        # the project may change meanwhile
        return check(folder / "project", options, parser)


def check(root: Path, options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Do in a copy of the project what the options say."""
    sources = {file: (root / file).read_bytes() for file in MUTATED}
    mutants = [mutant for file in MUTATED for mutant in Finder(file, sources[file]).mutants]
    print(f"{len(mutants):,} mutants are possible.", file=sys.stderr)
    if options.only:
        drawn = [mutant for mutant in mutants
                 if mutant.described(sources[mutant.file])["place"] == options.only]
    else:
        drawn = random.Random(options.seed).sample(mutants, min(options.count, len(mutants)))
    if not drawn:
        parser.error(f"--only: nothing can be changed in {options.only}")
    if options.list:
        print(*(shown(mutant.described(sources[mutant.file])) for mutant in drawn), sep="\n")
        return 0
    if importlib.util.find_spec("coverage") is None:
        parser.exit(2, "coverage is missing: python -m pip install coverage\n")

    known, rows = watch_all(root, options.jobs), []
    for name in known["failed"]:
        print(f"fails without any mutant, and is not used: {name}", file=sys.stderr)
    with ThreadPoolExecutor(options.jobs) as pool:
        attempt = partial(try_mutant, root=root, known=known, most=options.seconds)
        for row in pool.map(attempt, drawn):
            rows.append(row)
            outcome = (f"noticed by {row['by']}" if row["noticed"] else
                       f"SURVIVED {row['tests']} tests (exit code {row['code']})")
            print(f"[{len(rows)}/{len(drawn)}] {row['seconds']:.0f} s  {row['place']}  {outcome}",
                  file=sys.stderr)
    if options.json:
        text = json.dumps(rows, indent=2, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    print("Survivors:", *(shown(row) for row in rows if not row["noticed"]), "", sep="\n")
    for file in [*MUTATED, ""]:
        outcomes = [row["noticed"] for row in rows if row["file"].startswith(file)]
        if outcomes:
            print(f"{file or 'all':36} {sum(outcomes):4} of {len(outcomes):4} noticed: "
                  f"{sum(outcomes) / len(outcomes):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
