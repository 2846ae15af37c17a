"""data/run.py: options, the beginning of a run, headings between what is printed, the table of results."""

import argparse
import inspect
import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
from data import run
from data.run import (STYLE, Headings, Results, end_quietly_on_ctrl_c, folder_name, load_data,
                      parse_options, seed_number, usable_device)

# ------------------------------------------------------------------------------------ options


def test_options_that_are_left_out_are_those_that_the_help_states(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vars(parse_options([])) == {
        "quick": False, "offline": False, "data_dir": data.HERE, "output_dir": Path("outputs"),
        "device": None, "seed": 0, "precision": "auto", "show": False}
    assert (tmp_path / "outputs").is_dir()


def test_options_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "get_backend", lambda: "QtAgg")     # there is a display
    folder = tmp_path / "a" / "b"
    given = ["--offline", "--data-dir", str(tmp_path), "--output-dir", str(folder), "--device", "cpu",
             "--seed", "7", "--precision", "bfloat16", "--show"]
    assert vars(parse_options(given)) == {
        "quick": False, "offline": True, "data_dir": tmp_path, "output_dir": folder,
        "device": torch.device("cpu"), "seed": 7, "precision": "bfloat16", "show": True}
    assert folder.is_dir()
    assert parse_options(["--quick", *given[1:]]).offline, "--quick never downloads"
    parse_options(given)                                         # the folder may be there already


@pytest.mark.parametrize("arguments", [["--qui"], ["--show"], ["--precision", "float16"]])
def test_options_that_cannot_be_used_end_the_run(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_options(arguments)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_a_seed_is_a_whole_number_that_every_library_takes():
    assert (seed_number("0"), seed_number("4294967295")) == (0, 2**32 - 1)
    for text in ("4294967296", "-1", "1.5", "one", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 4294967295, got"):
            seed_number(text)


def test_a_folder_need_not_exist_but_is_no_file(tmp_path):
    assert folder_name(str(tmp_path)) == tmp_path
    assert folder_name(str(tmp_path / "new")) == tmp_path / "new"
    assert folder_name("~") == Path.home()
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="file' is a file"):
        folder_name(str(tmp_path / "file"))


def test_a_device_that_cannot_be_used_is_named_with_the_reason():
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(argparse.ArgumentTypeError, match=r"'abacus' cannot be used here \(.*cpu, cuda"):
        usable_device("abacus")


# --------------------------------------------------------------------------------- a run begins


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that runs a file as a script; what a run changes is put back."""
    plt.close("all")
    monkeypatch.chdir(tmp_path)
    for name in ("stdout", "excepthook", "argv"):
        monkeypatch.setattr(sys, name, getattr(sys, name))

    def run_as_script(source, *arguments, **names):
        (tmp_path / "tutorial.py").write_text(source, encoding="utf-8")
        sys.argv = ["tutorial.py", *arguments]
        return runpy.run_path(str(tmp_path / "tutorial.py"), names, "__main__")

    with matplotlib.rc_context():
        matplotlib.rcParams["font.size"] = 3
        yield run_as_script
    plt.close("all")


BEGIN = "from data.run import start_run\noptions, results, show_figure = start_run()\n"


@pytest.mark.parametrize(("arguments", "in_jupyter", "chosen"), [
    ([], False, ["Agg"]), ([], True, []), (["--show"], False, [])])
def test_a_script_needs_no_display_unless_it_is_to_show_something(
        start, arguments, in_jupyter, chosen, monkeypatch):
    backends = []
    monkeypatch.setattr(matplotlib, "use", backends.append)
    monkeypatch.setattr(plt, "get_backend", lambda: "QtAgg")
    if in_jupyter:                                               # by %run
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    start(BEGIN, *arguments)
    assert backends == chosen
    assert sys.excepthook is end_quietly_on_ctrl_c and plt.rcParams["font.size"] == STYLE["font.size"]


@pytest.mark.parametrize("show", [True, False])
def test_a_script_saves_its_pictures_and_opens_windows_if_asked_to(start, show, monkeypatch, capsys):
    windows = []
    monkeypatch.setattr(matplotlib, "use", lambda _: None)
    monkeypatch.setattr(plt, "get_backend", lambda: "QtAgg")
    monkeypatch.setattr(plt, "show", lambda: windows.append(plt.get_fignums()))
    start(BEGIN + "import matplotlib.pyplot as plt\nshow_figure(plt.figure(), 'name')\n", *["--show"] * show)
    assert Path("outputs/name.png").is_file() and windows == [[1]] * show and not plt.get_fignums()
    assert capsys.readouterr().out == f"[picture] {Path('outputs/name.png')}\n"


def test_a_notebook_gets_the_style_and_prints_its_own_headings(start, monkeypatch):
    monkeypatch.setenv("CNN_TUTORIAL_ARGS", "--seed 5")
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py"])
    before, names = sys.stdout, {}
    exec(BEGIN, names)                                           # a notebook has no __file__
    assert names["options"].seed == 5 and names["results"].headings is None
    assert plt.rcParams["font.size"] == STYLE["font.size"] and sys.stdout is before


def test_ctrl_c_ends_with_one_line_and_any_other_error_with_its_traceback(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        end_quietly_on_ctrl_c(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ended.value.code == 130 and "stopped; the pictures so far are" in capsys.readouterr().err
    end_quietly_on_ctrl_c(ValueError, ValueError("what went wrong"), None)
    assert "ValueError: what went wrong" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- headings


SECTIONS = BEGIN + """
clock.now += 2; print("before the first heading")
## 1 One
clock.now += 3; print("a")
## 2 Two
### 2.1 Part
def from_a_function():
    print("b")
clock.now += 4; from_a_function()
## 3 Three
"""
PRINTED = """before the first heading


1 One
=====
a


2 Two
=====

2.1 Part
--------
b
"""


def test_headings_are_printed_when_something_is_printed_below_them(start, monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    names = start(SECTIONS, clock=clock)
    assert capsys.readouterr().out == PRINTED
    assert names["results"].headings.durations() == {"": 2, "1 One": 3, "2 Two": 4}


def test_headings_stand_in_for_the_stream_behind_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    (tmp_path / "file").write_text("## One\n", encoding="utf-8")
    console = io.BytesIO()
    stream = io.TextIOWrapper(console, "ascii")
    again = Headings(Headings(stream, tmp_path / "file"), tmp_path / "file")  # after an interrupted %run
    assert sys.stdout is again and again.stream is stream and not again.isatty()
    assert again.write("naïve") == 5                             # a letter that the console lacks
    assert not console.getvalue()
    again.flush()
    assert console.getvalue() == b"na?ve"
    plain = io.StringIO()
    plain.isatty = lambda: True
    assert Headings(plain, tmp_path / "file").isatty()


# ----------------------------------------------------------------------------------------- data


def test_quick_takes_small_parts_of_what_is_bundled_and_says_so(digits, capsys):
    everything, few, colour = load_data(SimpleNamespace(quick=True))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--quick: some of the bundled digits in place of MNIST, colour digits in place")
    assert torch.equal(everything.train_images, digits.train_images) and not everything.stand_in
    assert (len(few.train_images), len(few.test_images)) == (1500, 500) and few.stand_in
    assert (len(colour.train_images), len(colour.test_images)) == (1000, 500) and colour.stand_in
    assert colour.train_images.shape[1:] == (3, 32, 32) and colour.name.endswith("a stand-in for CIFAR-10")


def test_otherwise_the_real_data_are_asked_for(digits, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_mnist", lambda *given: ("MNIST", *given))
    monkeypatch.setattr(run, "load_cifar10", lambda *given: ("CIFAR-10", *given))
    _, mnist, colour = load_data(SimpleNamespace(quick=False, data_dir="here", offline=True))
    assert mnist == ("MNIST", "here", True) and colour == ("CIFAR-10", "here", True)
    assert not capsys.readouterr().out


# -------------------------------------------------------------------------------- expected time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_yardstick_is_always_the_same_work(dtype, monkeypatch):
    """The best of five steps. With other work, the numbers of steps below have to be measured again."""
    now, formats, kinds = iter([0, 9, 10, 12, 20, 27, 30, 38, 40, 46]), [], []
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: next(now)))

    class Watched(torch.nn.Sequential):
        def to(self, device, memory_format):
            formats.append(memory_format)
            self.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))

    monkeypatch.setattr(torch.nn, "Sequential", Watched)
    with FlopCounterMode(display=False) as counter:
        assert run.seconds_of_a_step(torch.device("cpu"), dtype) == 2
    first, others = 32 * 32 * 32 * 27, 16 * 16 * 64 * 288 + 4096 * 10  # multiplications for an image
    assert counter.get_total_flops() == 5 * 2 * 128 * (2 * first + 3 * others)  # forward and backward
    assert formats == [torch.channels_last] and kinds == 5 * [dtype]


@pytest.mark.parametrize(("quick", "stands_in", "minutes"), [
    (True, True, round((15 + 500 * 0.09) / 60)), (False, True, round((30 + 3000 * 0.09) / 60)),
    (False, False, round((30 + 3000 * 0.09 + (1400 + 10000) * 0.03) / 60))])
def test_the_expected_time_follows_from_a_step(quick, stands_in, minutes, digits, monkeypatch, capsys):
    """Whoever makes runs longer or shorter measures them again, and puts the numbers of steps here."""
    seconds = {torch.float32: 0.09, torch.bfloat16: 0.03}
    monkeypatch.setattr(run, "seconds_of_a_step", lambda device, dtype: seconds[dtype])
    some = replace(digits, stand_in=stands_in)
    run.print_expected_time(SimpleNamespace(quick=quick), torch.device("cpu"), some, some)
    assert capsys.readouterr().out == (
        f"Judging by a few training steps here (30 ms), a whole run takes about {minutes} min.\n")


# -------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("name", ["add", "add_seeds", "Results"])
def test_rows_need_no_seconds_and_are_printed_by_default(name):
    defaults = {"add": {"seconds": 0.0, "n": None, "quiet": False}, "add_seeds": {"seconds": 0.0},
                "Results": {"headings": None}}[name]
    parameters = inspect.signature(getattr(Results, name, Results)).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


@pytest.mark.parametrize(("row", "line"), [
    (("test accuracy", 0.9), "it test accuracy 90.00% ± 3.00%"),
    (("accuracy", 0.9, 2.04), "it accuracy 90.00% ± 3.00% (2.0 s)"),
    (("loss", 0.12345), "it loss 0.123"),
    (("images per second", 123_456), "it images per second 123,456"),
    (("images per second", -123_456), "it images per second -123,456")])
def test_a_row_is_printed_with_its_error_and_its_seconds(digits, row, line, capsys):
    Results().add("1.1", "it", digits.first(10, 100), *row)
    assert " ".join(capsys.readouterr().out.split()) == line


def test_rows_of_several_seeds_are_printed_without_seconds_if_none_were_measured(digits, capsys):
    Results().add_seeds("1.1", "it", digits, "loss", [1.0, 2.0])
    assert " ".join(capsys.readouterr().out.split()) == "it loss 1.50 ± 0.71 over 2 seeds"


def test_the_table_is_printed_and_written(tmp_path, capsys):
    options = parse_options(["--output-dir", str(tmp_path / "new"), "--quick"])
    durations = {"": 1.04, "1 Section": 62.06}
    results = Results(SimpleNamespace(durations=lambda: durations))
    results.add("1.1", "network", "images", "test accuracy", 0.98765, 2.04, n=10)
    results.add("1.2", "not shown", "other images", "loss", 0.5, 3.06, quiet=True)
    results.add("2.2", "speed", "photos", "images per second", 1234.5)
    results.add_seeds("2.3", "tip", "photos", "points gained", [1.0, 3.0])
    capsys.readouterr()
    (options.output_dir / "picture.png").touch()
    results.write(options, torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    data, rows, times = lines[:2], lines[2:5], lines[5:]
    assert data == ["[1] images", "[2] photos"]
    assert [" ".join(row.split()) for row in rows] == [
        "1.1 network [1] test accuracy 98.77% ± 3.49% 2.0 s", "2.2 speed [2] images per second 1,234",
        "2.3 tip [2] points gained 2.00 ± 1.41 over 2 seeds"]
    assert rows[0].index("98.77%") == rows[1].index("1,234") == rows[2].index("2.00"), "columns not in line"
    assert times == ["", "seconds   section", "    1.0   start", "   62.1   1 Section", "",
                     f"1 pictures and results.json are in {options.output_dir.resolve()}"]
    text = (tmp_path / "new" / "results.json").read_text(encoding="utf-8")
    written = json.loads(text)
    assert text.startswith('{\n  "settings"') and text.endswith("}\n")
    settings = {key: str(value) for key, value in vars(options).items()}
    assert written["settings"] == settings | {"device": "cpu"}
    assert written["versions"]["python"] == sys.version.split()[0]
    assert written["versions"]["torch"] == torch.__version__
    assert [(row["value"], row["seconds"]) for row in written["results"]] == [
        (0.98765, 2.0), (0.5, 3.1), (1234.5, 0.0), (2.0, 0.0)]


def test_without_headings_only_the_rows_are_printed_and_the_folder_is_made(tmp_path, capsys):
    results = Results()
    results.add("1.1", "network", "images", "loss", 0.5)
    capsys.readouterr()
    folder = tmp_path / "a" / "b"
    for _ in range(2):                                           # it may be there already
        results.write(argparse.Namespace(output_dir=folder), torch.device("cpu"))
    assert len(capsys.readouterr().out.splitlines()) == 4 and (folder / "results.json").is_file()


def test_a_result_that_is_no_finite_number_is_an_error(tmp_path, capsys):
    results = Results()
    results.add("1.1", "network", "images", "loss", float("nan"))
    capsys.readouterr()
    with pytest.raises(ValueError, match="a result is not a finite number"):
        results.write(argparse.Namespace(output_dir=tmp_path), torch.device("cpu"))
    assert "network" in capsys.readouterr().out and not list(tmp_path.iterdir())
