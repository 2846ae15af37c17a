"""The script and the notebook as their users run them."""

import ast
import inspect
import json
import math
import re
import runpy
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

from cells import CELLS, CODE, DEFINING, DEMONSTRATING, PROSE, SOURCE
from data.run import parse_options
from make_notebook import (ALT, GALLERY, GUARD, MOST_BYTES, NOTEBOOK, ROOT, SCRIPT, execute,
                           names_of_pictures, pictures, to_notebook)
from processes import run_python

MOST_CELLS, MOST_LINES = 210, 36                                 # in all; of a demonstrating cell


def files_of_the_project():
    """Each file, but those of git and of Python, with its size, unless somebody may just be editing it."""
    return {str(path.relative_to(ROOT)): path.stat().st_size if path.suffix not in (".py", ".md") else "text"
            for path in ROOT.rglob("*")
            if path.is_file() and not {".git", "__pycache__"} & {*path.relative_to(ROOT).parts}}


# ------------------------------------------------------------------ a run of the script


def run_both(folder):
    """Run script and notebook at the same time, each on one core, with --quick."""
    elsewhere, of_notebook = folder / "elsewhere", folder / "of the notebook"
    elsewhere.mkdir()
    before, notebook, failure = files_of_the_project(), to_notebook(SOURCE), None
    with mock.patch.dict("os.environ", {"OMP_NUM_THREADS": "1"}), ThreadPoolExecutor() as pool:
        script = pool.submit(
            run_python, "-W", "error::DeprecationWarning", SCRIPT, "--quick", "--offline",
            "--output-dir", "here", folder=elsewhere, timeout=600, CUDA_VISIBLE_DEVICES=None)
        try:
            execute(notebook, f'--quick --offline --output-dir "{of_notebook.as_posix()}"')
        except (CellExecutionError, ValueError) as error:
            failure = str(error)
    return SimpleNamespace(elsewhere=elsewhere, script=script.result(), notebook=notebook, failure=failure,
                           of_notebook=of_notebook, before=before, after=files_of_the_project())


@pytest.fixture(scope="module")
def both_runs(made_once):
    """The two runs."""
    return made_once("both_runs", run_both)


@pytest.fixture(scope="module")
def quick_run(both_runs):
    """The script's run: its folder, what it printed, as a whole and by headings, and its results."""
    done = both_runs.script
    assert done.returncode == 0, done.stderr
    results = (both_runs.elsewhere / "here" / "results.json").read_text(encoding="utf-8")
    return SimpleNamespace(folder=both_runs.elsewhere, output=done.stdout, errors=done.stderr,
                           sections=by_heading(done.stdout), written=json.loads(results))


def by_heading(output):
    """What was printed, as {heading: text below it}; a heading is underlined."""
    parts = re.split(r"\n(.+)\n([=-]+)\n", "\n" + output)
    for heading, line in zip(parts[1::3], parts[2::3]):
        assert set(line) in ({"="}, {"-"}) and len(line) == len(heading)
    assert not parts[0].strip()                                  # nothing before the first heading
    return dict(zip(parts[1::3], parts[3::3], strict=True))


def test_quick_run_warns_of_nothing_and_writes_only_its_folder(quick_run):
    assert "Warning" not in quick_run.errors
    assert [path.name for path in quick_run.folder.iterdir()] == ["here"]
    suffixes = {path.suffix for path in (quick_run.folder / "here").iterdir()}
    assert suffixes == {".png", ".json", ".pt", ".pt2"}          # pictures, results, and the network of 8.3


def test_runs_leave_the_project_as_it_was(both_runs):
    assert both_runs.after == both_runs.before and SCRIPT.name in both_runs.after


def test_results_are_well_formed(quick_run):
    assert set(quick_run.written) == {"settings", "versions", "results"}
    assert quick_run.written["settings"]["quick"] == quick_run.written["settings"]["offline"] == "True"
    assert set(quick_run.written["versions"]) == {"python", "torch", "torchvision"}
    rows = quick_run.written["results"]
    for row in rows:
        assert set(row) == {"section", "name", "data", "metric", "value", "seconds"}
        assert isinstance(row["value"], float) and math.isfinite(row["value"]) and row["seconds"] >= 0
        assert row["name"] and row["data"] and row["metric"]
        assert "accuracy" not in row["metric"] or 0 <= row["value"] <= 1
    names = [(row["section"], row["name"]) for row in rows]
    assert len(names) == len(set(names))
    sections = [row["section"] for row in rows]
    assert sections == sorted(sections)
    assert set(sections) == set(re.findall(r'results\.add(?:_seeds)?\("(\d\.\d)"', SOURCE))
    assert {"3.5", "4.8", "5.7", "6.5", "7.4", "8.1", "8.2"} <= set(sections)
    assert {("4.5", "SimpleCNN on 5,000 digits"), ("5.1", "LeNet-5 on 5,000 digits"),
            ("5.3", "SmallVGG on colour digits"), ("6.5", "from scratch, 200 labels"),
            ("6.5", "feature extraction, 200 labels"), ("6.5", "fine-tuning, 200 labels")} <= set(names)


def test_results_say_truthfully_what_they_were_measured_on(quick_run):
    named = {re.sub(r"^(the first [\d,]+ \+ [\d,]+ of )*", "", row["data"])
             for row in quick_run.written["results"]}
    assert named == {
        "5,000 bundled digits (4,000 to train, 1,000 to test)", "colour digits (4,000 to train, 1,000 to test)",
        "colour digits (1,000 to train, 500 to test), a stand-in for CIFAR-10", "20 simulated photos",
        "traced, not trained", "random numbers"}


def test_the_operations_of_famous_networks_support_the_text(quick_run):
    operations = {row["name"]: row["value"] for row in quick_run.written["results"] if row["section"] == "5.6"}
    assert operations["ResNet18"] == pytest.approx(3.628, rel=0.001)
    assert operations["ResNet50"] / operations["VGG16"] == pytest.approx(1 / 4, abs=0.03)
    assert operations["VGG16"] / operations["MobileNet_V2"] == pytest.approx(50, rel=0.1)


def test_only_kaiming_keeps_the_spread(quick_run):
    """The same draws, scaled: each of ten layers multiplies the spread by deviation / √(2 / 576)."""
    spread = {row["name"].split()[0]: row["value"] for row in quick_run.written["results"]
              if row["section"] == "8.2"}
    assert 0.5 < spread["Kaiming"] < 2
    assert spread["Xavier"] / spread["Kaiming"] == pytest.approx(2 ** -5, rel=1e-3)
    assert spread["normal,"] / spread["Kaiming"] == pytest.approx((0.01 / (2 / 576) ** 0.5) ** 10, rel=1e-3)


def test_every_picture_of_the_source_is_drawn_in_its_section(quick_run):
    named = names_of_pictures(SOURCE)
    assert len(named) == len(set(named)) == SOURCE.count("show_figure(")
    drawn = {path.stem: path.stat().st_size for path in (quick_run.folder / "here").glob("*.png")}
    assert set(drawn) == set(named)
    printed = []
    for heading, text in quick_run.sections.items():
        for name in re.findall(r"(?m)^\[picture\] here/(\w+)\.png$", text.replace("\\", "/")):
            printed.append(name)
            assert heading[0] == name[0], f"{name} is printed below {heading}"
    assert printed == named


def test_each_heading_comes_before_what_its_section_prints(quick_run):
    headings = [line.split(" ", 1)[1] for line in SOURCE.splitlines() if re.match("###? ", line)]
    assert list(quick_run.sections) == headings
    for heading, source in zip(headings, re.split(r"(?m)^###? ", SOURCE)[1:], strict=True):
        if GUARD in source:                                      # a demonstrating cell shows something
            assert quick_run.sections[heading].strip(), f"nothing is printed below {heading}"
    for row in quick_run.written["results"]:
        if row["section"] not in ("5.6", "7.4"):                 # these print tables of their own
            (text,) = [text for heading, text in quick_run.sections.items()
                       if heading.startswith(row["section"] + " ")]
            assert re.search(rf"(?m)^{re.escape(row['name'])} +{row['metric']} ", text)


def test_the_end_says_what_was_measured_where_everything_lies_and_how_long_it_took(quick_run):
    end = quick_run.sections["What this run measured"]
    table, times = end.split("\nseconds   section\n")
    data = dict(re.findall(r"(?m)^\[(\d+)\] (.+)$", table))
    for row in quick_run.written["results"]:
        listed = re.findall(rf"(?m)^{row['section']} +{re.escape(row['name'])} +\[(\d+)\] {row['metric']} ", table)
        if row["section"] in ("5.6", "7.4"):                     # these print tables of their own
            assert not listed
        else:
            assert [data[number] for number in listed] == [row["data"]]
    seconds = dict(reversed(line.split(maxsplit=1)) for line in times.split("\n\n")[0].splitlines())
    sections = [line[3:] for line in SOURCE.splitlines() if line.startswith("## ")]
    assert set(seconds) >= {name for name in sections if name[0] in "012345678"}
    assert all(float(value) >= 0 for value in seconds.values())
    last = quick_run.output.splitlines()[-1]
    count = len(names_of_pictures(SOURCE))
    assert last == f"{count} pictures and results.json are in {(quick_run.folder / 'here').resolve()}"


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(("arguments", "message"), [
    (["--fast"], "unrecognized arguments: --fast"),
    (["--qui"], "unrecognized arguments: --qui"),
    (["--device", "abacus"], "argument --device: 'abacus' cannot be used here"),
    (["--device", "meta"], "argument --device: 'meta' cannot be used here"),
    (["--precision", "float8"], "invalid choice: 'float8'"),
    (["--seed", "one"], "argument --seed: expected a whole number from 0 to 4294967295, got 'one'"),
    (["--seed", "4294967296"], "argument --seed: expected a whole number"),
    (["--data-dir", __file__], "argument --data-dir: expected a folder"),
    (["--output-dir", __file__], "argument --output-dir: expected a folder"),
    (["--output-dir", __file__ + "/inside"], "--output-dir: "),
    (["--show"], "--show: there is no display"),
])
def test_wrong_options_end_with_one_line_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_options(["--quick", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line


def test_quick_implies_offline(tmp_path):
    options = parse_options(["--quick", "--output-dir", str(tmp_path / "a" / "b")])
    assert options.offline and options.output_dir.is_dir()


STARTING = '''
import matplotlib.pyplot as plt
from data.run import start_run
## A heading
options, results, show_figure = start_run()
show_figure(plt.figure(), "empty")
'''


@pytest.fixture
def small_tutorial(tmp_path, monkeypatch):
    """A file that begins a run and shows one picture; what a run changes is put back."""
    monkeypatch.chdir(tmp_path)
    for name in ("stdout", "excepthook", "argv"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    file = tmp_path / "tutorial.py"
    file.write_text(STARTING, encoding="utf-8")
    with matplotlib.rc_context():
        yield file
    plt.close("all")


def test_a_script_honours_its_command_line(small_tutorial, monkeypatch, capsys):
    monkeypatch.setenv("CNN_TUTORIAL_ARGS", "--seed 7")          # is for notebooks
    sys.argv = [small_tutorial.name, "--quick", "--seed", "5", "--output-dir", "mine"]
    made = runpy.run_path(str(small_tutorial), run_name="__main__")
    assert made["options"].quick and made["options"].seed == 5
    assert (small_tutorial.parent / "mine" / "empty.png").is_file() and not plt.get_fignums()
    printed = capsys.readouterr().out
    assert printed.index("A heading") < printed.index("[picture] mine")


@pytest.fixture
def jupyter(tmp_path, monkeypatch):
    """What runs the cells of a notebook, in this process. Jupyter chooses where its figures go."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "of IPython"))
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(matplotlib, "use", lambda name: pytest.fail(f"Jupyter's figures go to {name}"))
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    yield shell
    shell.restore_sys_module_state()


def test_percent_run_honours_its_command_line_each_time(small_tutorial, jupyter, monkeypatch, capsys):
    monkeypatch.setenv("CNN_TUTORIAL_ARGS", "--seed 7")          # is for the notebook's own cells
    for seed in ("5", "6"):
        arguments = f'--quick --seed {seed} --output-dir "of {seed}"'
        jupyter.run_line_magic("run", f'"{small_tutorial.name}" {arguments}')
        assert jupyter.user_ns["options"].quick and jupyter.user_ns["options"].seed == int(seed)
        assert (small_tutorial.parent / f"of {seed}" / "empty.png").is_file() and not plt.get_fignums()
        printed = capsys.readouterr().out
        assert printed.count("A heading\n=========\n") == 1
        assert printed.index("A heading") < printed.index("[picture]")


def test_percent_run_says_in_one_line_what_is_wrong_and_leaves_the_notebook_as_it_was(
        small_tutorial, jupyter, capsys):
    jupyter.run_line_magic("run", f'"{small_tutorial.name}" --quick --seed one')
    printed = capsys.readouterr()
    assert printed.err.startswith("error: argument --seed: expected a whole number")
    jupyter.run_cell("print(1 + 1)")
    assert capsys.readouterr().out == "2\n"


def test_a_notebook_reads_the_environment_and_leaves_pictures_to_jupyter(small_tutorial, monkeypatch, capsys):
    monkeypatch.setenv("CNN_TUTORIAL_ARGS", '--quick --seed 7 --output-dir "of mine"')
    sys.argv = ["ipykernel_launcher.py", "-f", "kernel.json"]
    made = {"__name__": "__main__"}                              # a notebook has no __file__
    exec(STARTING, made)
    assert made["options"].quick and made["options"].seed == 7
    assert (small_tutorial.parent / "of mine").is_dir() and len(plt.get_fignums()) == 1
    assert not capsys.readouterr().out


# ------------------------------------------------------------------ cells


def test_cells_are_of_three_kinds():
    assert len(CELLS) == len(PROSE) + len(CODE) and "".join(CELLS) == SOURCE
    assert len(DEMONSTRATING) > 60 and len(DEFINING) > 20
    for cell in DEMONSTRATING:
        below = cell.removeprefix(GUARD).splitlines()
        assert below[0].strip() and all(line.startswith("    ") or not line for line in below), cell
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for cell in DEFINING:
        assert all(isinstance(node, kinds) for node in ast.parse(cell).body), cell
    for cell in PROSE:
        assert re.fullmatch(r'# %% \[markdown\]\n"""\n(?:(?!""").)+\n"""\n', cell, re.S), cell


def test_cells_do_not_change_when_they_lose_their_guard():
    for cell in DEMONSTRATING:
        (guarded,) = ast.parse(cell).body
        alone = ast.parse(textwrap.dedent(cell.removeprefix(GUARD)))
        for node in [*ast.walk(guarded), *ast.walk(alone)]:      # docstrings are dedented along with the rest
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = inspect.cleandoc(node.value.value)
        assert ast.dump(ast.Module(guarded.body, [])) == ast.dump(ast.Module(alone.body, [])), cell


def test_cells_are_few_and_short():
    assert len(CELLS) <= MOST_CELLS
    assert max(len(cell.splitlines()) for cell in DEMONSTRATING) <= MOST_LINES


def test_lines_are_short():
    too_long, prose = [], False
    for number, line in enumerate(SOURCE.splitlines(), 1):
        prose = "[markdown]" in line if line.startswith("# %%") else prose
        if len(line) > (120 if prose else 100):
            too_long.append(number)
    assert not too_long


def test_a_heading_stands_alone_on_its_line():
    headings = [line for line in SOURCE.splitlines() if re.match("#{2,3} ", line)]
    assert len(headings) > 50 and not [line for line in headings if len(line) > 72 or re.search(r"[.,:;]$|\*", line)]


def test_a_figure_is_shown_in_the_cell_that_makes_it():
    for cell in DEMONSTRATING:                                   # at its end Jupyter shows and closes it
        body = ast.parse(cell).body[0]
        made = {part.id for node in ast.walk(body) if isinstance(node, ast.Assign)
                for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        for node in ast.walk(body):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "show_figure":
                figure = node.args[0]
                assert not isinstance(figure, ast.Name) or figure.id in made, cell
        assert cell.count("plt.subplots(") <= cell.count("show_figure("), cell


# ------------------------------------------------------------------ the notebook


def test_every_picture_has_an_alternative_text():
    assert set(ALT) == set(names_of_pictures(SOURCE)) >= set(GALLERY.values())
    for text in ALT.values():
        assert text[0].isupper() and text.endswith(".") and 40 < len(text) <= 100
    for alternative, path in re.findall(r"!\[(.*?)\]\((.*?)\)", SOURCE, re.S):
        assert alternative and (ROOT / path).is_file()


def test_the_animation_is_small_and_loops():
    from PIL import Image

    file = ROOT / "data" / "figures" / "convolution.gif"
    with Image.open(file) as animation:
        assert animation.n_frames > 60 and animation.info["loop"] == 0 and 600 <= animation.width <= 800
    assert file.stat().st_size <= 500_000


def test_notebook_is_the_script_cell_by_cell():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    made = to_notebook(SOURCE)
    assert [(cell.cell_type, cell.source) for cell in committed.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells]
    outputs = [output for cell in committed.cells for output in cell.get("outputs", [])]
    assert "error" not in [output.output_type for output in outputs]
    assert "stderr" not in [output.get("name") for output in outputs]
    assert ALT == {name: output.metadata["image/png"]["alt"] for name, output in pictures(committed).items()}
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    executed = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in executed] == list(range(1, len(executed) + 1))


def test_notebook_runs_from_top_to_bottom(both_runs):
    assert both_runs.failure is None
    outputs = [output for cell in both_runs.notebook.cells for output in cell.get("outputs", [])]
    assert "stderr" not in [output.get("name") for output in outputs]
    assert list(pictures(both_runs.notebook)) == names_of_pictures(SOURCE)
    assert (both_runs.of_notebook / "results.json").is_file()
    assert not list(both_runs.of_notebook.glob("*.png"))         # they are in the notebook


def test_notebook_and_script_measure_the_same(both_runs, quick_run):
    written = json.loads((both_runs.of_notebook / "results.json").read_text(encoding="utf-8"))
    for ours, theirs in zip(quick_run.written["results"], written["results"], strict=True):
        assert (ours["section"], ours["name"]) == (theirs["section"], theirs["name"])
        if "accuracy" in ours["metric"]:
            close = 0.02 if written["settings"]["device"] == "cpu" else 0.1  # a GPU adds up in any order
            assert ours["value"] == pytest.approx(theirs["value"], abs=close), ours["name"]
