"""The files that say how the project is installed, checked and tested agree with each other."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from make_notebook import ROOT, SCRIPT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
REQUIREMENTS = {}                                                # {"torch": "torch>=2.7", ...}
for requirement in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
    if requirement and not requirement.startswith("#"):
        line = requirement.split("#")[0].strip()
        REQUIREMENTS[line.split(">=")[0]] = line
PACKAGE_OF = {"PIL": "pillow"}                                   # where the names differ
RUNS_TUTORIAL, RUNS_TESTS = re.findall(r"(?m)^    (.* && python .*)$", README)
MATRIX = {name: re.findall(r"[\w.-]+", values)
          for name, values in re.findall(r"(?m)^        (os|python|versions): \[(.+?)\]", WORKFLOW)}
OLDEST = re.findall(r'(?m)^          - \{os: (\S+), python: "(\S+)", versions: oldest\}', WORKFLOW)


def run_lines():
    """The commands of the workflow, as a shell gets them; folded lines are one."""
    unfolded = re.sub(r">-\n +(\S.*)\n +(\S.*)", r"\1 \2", WORKFLOW)
    return re.findall(r"(?m)^        run: (.+)$", unfolded)


# ------------------------------------------------------------------ installation


def test_the_module_asks_for_what_it_imports_and_for_nothing_else():
    imported = set()
    for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    needed = {PACKAGE_OF.get(name, name) for name in imported - sys.stdlib_module_names}
    assert set(PYPROJECT["project"]["dependencies"]) == {REQUIREMENTS[name] for name in needed}


def test_only_the_module_is_installed():
    assert PYPROJECT["tool"]["setuptools"] == {"py-modules": [SCRIPT.stem], "packages": []}


def test_oldest_python_is_the_same_everywhere():
    (oldest,) = re.findall(r"with Python (3\.\d+) or newer", README)
    assert PYPROJECT["project"]["requires-python"] == f">={oldest}"
    assert MATRIX["python"][0] == oldest and {python for _, python in OLDEST} == {oldest}


# ------------------------------------------------------------------ checks


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_ruff_finds_a_slip_and_leaves_plain_cells_alone():
    def check(code):
        return subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise",
                               "--stdin-filename", str(ROOT / "data" / "new.py"), "-"], input=code, cwd=ROOT,
                              capture_output=True, encoding="utf-8")

    slip = check("def add(values=[]):\n    totl = 0\n    return total\n")
    assert slip.returncode == 1
    assert set(re.findall(r"new\.py:\d+:\d+: (\w+)", slip.stdout)) == {"B006", "F841", "F821"}
    plain = check("settings = dict(lr=0.1)\nfor epoch in range(3):\n    print(settings)\n")
    assert plain.returncode == 0, plain.stdout


def test_what_runs_before_a_change_lands_is_the_readmes_test_command_with_ruff():
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("--quiet ", "").splitlines()
    install, test = RUNS_TESTS.split(" && ")
    assert commands[-3:] == [install, "python -m ruff check .", test]


# ------------------------------------------------------------------ hosted machines


def test_workflow_covers_three_systems_and_the_pythons_that_the_readme_names():
    assert MATRIX["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert MATRIX["versions"] == ["newest"] and [system for system, _ in OLDEST] == MATRIX["os"]
    ((first, last),) = re.findall(r"on Python 3\.(\d+) to\s3\.(\d+)", README)
    assert MATRIX["python"] == [f"3.{minor}" for minor in range(int(first), int(last) + 1)]


def test_workflow_runs_the_commands_of_the_readme_and_ruff():
    make_oldest, tutorial, ruff, tests = run_lines()
    assert tutorial == RUNS_TUTORIAL + " --quick --offline" and tests == RUNS_TESTS
    assert ruff == "python -m ruff check ."
    assert "'oldest.txt'" in make_oldest


def test_workflow_makes_the_lower_bounds_exact(tmp_path):
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    code = re.fullmatch(r'python -c "(.+)"', run_lines()[0])[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    written = (tmp_path / "oldest.txt").read_text(encoding="utf-8")
    pinned = [line.split("#")[0].strip() for line in written.splitlines()]
    expected = [line.replace(">=", "==") for line in REQUIREMENTS.values()]
    assert [line for line in pinned if line] == expected and len(expected) >= 10
