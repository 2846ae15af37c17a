"""The script and the notebook as their users run them."""

import ast
import json
import re
import subprocess
import sys
import time

import nbformat
import pytest

from data.options import parse_options
from make_notebook import ALT, GUARD, NOTEBOOK, ROOT, SCRIPT, execute, pictures, to_notebook

SOURCE = SCRIPT.read_text(encoding="utf-8")
LINES, CODE_LINES = 1700, 900


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-W", "error::DeprecationWarning", str(SCRIPT), *arguments],
                          cwd=cwd, capture_output=True, text=True, timeout=300)


def git_status():
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout


def test_quick_run_from_elsewhere_writes_results_and_nothing_else(tmp_path):
    before = git_status()
    done = run("--quick", "--offline", "--output-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["here"] and git_status() == before
    written = json.loads((tmp_path / "here" / "results.json").read_text())
    assert set(written) == {"settings", "versions", "results"}
    for row in written["results"]:
        assert set(row) == {"section", "name", "data", "metric", "value", "seconds"}
        assert "accuracy" not in row["metric"] or 0 <= row["value"] <= 1
    names = [row["name"] for row in written["results"]]
    assert len(names) == len(set(names))
    drawn = {path.stem for path in (tmp_path / "here").glob("*.png")}
    assert drawn == set(re.findall(r'"(\d_\d\w+)"\)', SOURCE))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--fast"], "unrecognized arguments: --fast"),
    (["--device", "abacus"], "argument --device: 'abacus' cannot be used here"),
    (["--device", "meta"], "argument --device: 'meta' cannot be used here"),
    (["--precision", "float8"], "invalid choice: 'float8'"),
    (["--seed", "one"], "argument --seed: expected a whole number from 0 to 4294967295, got 'one'"),
    (["--seed", "4294967296"], "argument --seed: expected a whole number"),
    (["--data-dir", __file__], "argument --data-dir: expected a folder"),
])
def test_wrong_options_end_with_one_line_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_options(["--quick", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line


def test_an_output_folder_that_is_a_file_ends_with_one_line_and_code_2(tmp_path):
    (tmp_path / "taken").write_text("a file")
    done = run("--quick", "--offline", "--output-dir", "taken", cwd=tmp_path)
    assert done.returncode == 2 and "expected a folder, but 'taken' is a file" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and (tmp_path / "taken").read_text() == "a file"


def test_import_is_silent_and_cheap():
    code = ("import time, torch, torchvision, matplotlib.pyplot; start = time.perf_counter(); "
            "import convolutional_neural_networks; print(time.perf_counter() - start)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    (line,) = done.stdout.splitlines()  # nothing but our own print
    assert float(line) < 0.5


def test_notebook_is_the_script_cell_by_cell():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    made = to_notebook(SOURCE)
    assert [(c.cell_type, c.source) for c in committed.cells] == [(c.cell_type, c.source) for c in made.cells]
    outputs = [output for cell in committed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = pictures(committed)
    assert len(shown) == SOURCE.count("show_figure(") - 1  # all but its definition
    assert ALT == {name: output.metadata["image/png"]["alt"] for name, output in shown.items()}
    assert NOTEBOOK.stat().st_size < 3_000_000
    executed = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in executed] == list(range(1, len(executed) + 1))


def test_notebook_runs_from_top_to_bottom():
    before = git_status()
    notebook = to_notebook(SOURCE)
    start = time.perf_counter()
    execute(notebook, "--quick --offline")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "image/png" in str(outputs) and "stderr" not in [o.get("name") for o in outputs]
    assert git_status() == before
    print(f"notebook --quick: {time.perf_counter() - start:.0f} s")


def code_lines(source):
    """Lines that are neither empty, nor comments, nor strings that stand alone (prose, docstrings)."""
    prose = {line for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)
             and isinstance(node.value, ast.Constant) for line in range(node.lineno, node.end_lineno + 1)}
    return sum(bool(line.strip()) and not line.strip().startswith("#") and number not in prose
               for number, line in enumerate(source.splitlines(), 1))


def test_cells_are_of_three_kinds_and_within_the_budget():
    cells = to_notebook(SOURCE).cells
    assert len(cells) <= 90 and len(SOURCE.splitlines()) <= LINES
    assert SOURCE.count("show_figure(") - 1 <= 28 and code_lines(SOURCE) <= CODE_LINES
    for text in re.split(r"(?m)^# %%\n", SOURCE)[1:]:
        code = text.split("# %% [markdown]")[0]
        if "if __name__" in code:
            assert code.startswith(GUARD) and not re.search(r"(?m)^\S", code.removeprefix(GUARD))
        else:
            kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
            assert all(isinstance(node, kinds) for node in ast.parse(code).body)
    prose = False
    for number, line in enumerate(SOURCE.splitlines(), 1):
        prose = "[markdown]" in line if line.startswith("# %%") else prose
        assert len(line) <= (120 if prose else 100), f"line {number} is too long"
