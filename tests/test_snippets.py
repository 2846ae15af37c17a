"""The script is whole: each definition can be lifted out of it, and the file works alone.

`python tests/weights.py` prints what each definition drags along.
"""

import ast
import builtins
import contextlib
import dis
import json
import os
import re
import shutil
import socket
import sys
from types import CodeType
from unittest import mock

import matplotlib.pyplot as plt
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw

from processes import of_gloo, run_python
from weights import DEFINITIONS, IMPORTS, PUBLIC, SCRIPT, TREE, needed_by, others

LIMITS = {  # lines of other definitions that each may need
    "SimpleCNN": 0, "LeNet5": 0, "SmallVGG": 0,
    "InceptionBlock": 0, "ResidualBlock": 0, "DepthwiseSeparable": 0,
    "train_epoch": 45, "evaluate": 45, "saliency_map": 45, "feature_maps": 45, "grad_cam": 55,
    "train_model": 110, "train_distributed": 150}
LIMIT = 150                                                      # of all others

USES = {  # each is evaluated where the definition was pasted, and must be true
    "best_device": "torch.ones(1, device=best_device()).item() == 1",
    "seeded": "inside(seeded(1), lambda _: torch.rand(1)) == inside(seeded(1), lambda _: torch.rand(1))",
    "count_parameters": "count_parameters(nn.Linear(3, 4)) == 16",
    "receptive_field": "receptive_field([(3, 1), (3, 2), (3, 1)]) == 9",
    "draw_receptive_field": "draw_receptive_field(plt.gca(), [(3, 1), (3, 2)]) is None and plt.gca().patches",
    "plot_images": "drawn(plot_images([x[0], x[1]], ['one', 'two'])) == ['one', 'two']",
    "draw_numbers": "draw_numbers(plt.gca(), torch.ones(2, 3), frame=(0, 0, 1, 1)) is None",
    "conv_output_size": "conv_output_size(28, 5, stride=2, padding=1, dilation=2) == 11",
    "convolve_with_loops": "convolve_with_loops(torch.ones(2, 3, 4), torch.ones(2, 3, 3)).tolist() "
                           "== [[18, 18]]",
    "as_pair": "as_pair(2) == (2, 2) and as_pair((1, 2)) == (1, 2)",
    "conv2d_by_hand": "conv2d_by_hand(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item() == 9",
    "random_shift": "random_shift(images).shape == images.shape",
    "centre_of_mass": "centre_of_mass(torch.ones(2, 1, 3, 5)).tolist() == [[1, 2], [1, 2]]",
    "small_network": "small_network(outputs=3, batch_norm=True)(torch.zeros(2, 1, 28, 28)).shape == (2, 3)",
    "standardize": "standardize(images).dtype == torch.float32",
    "SimpleCNN": "SimpleCNN()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)",
    "recording": "inside(recording(small), lambda found: small(x) is not None and set(found) == set(small))",
    "evaluating": "not inside(evaluating(small), lambda _: small.training) and small.training",
    "layer_table": "layer_table(small, (1, 8, 8)).splitlines()[-1].split() == ['total', '70']",
    "plot_network": "drawn(plot_network(small, x[:1], {'conv': small[0]}, ''))[1] == 'conv\\n3×6×6'",
    "show_error": "show_error('no number', lambda: int('a'), 'a letter', lambda: int('1')) is None",
    "random_affine": "random_affine(images).dtype == torch.uint8",
    "shift_and_flip": "shift_and_flip(images).shape == images.shape",
    "train_epoch": "train_epoch(net, torch.arange(20).split(10), images, labels, "
                   "torch.optim.SGD(net.parameters(), 0.1)).shape == (2,)",
    "predict_logits": "predict_logits(net, images).shape == (20, 10)",
    "evaluate": "0 <= evaluate(net, images, labels)[1] <= 1",
    "print_epoch": "print_epoch({'epoch': 1, 'train_loss': 0.5}) is None",
    "train_model": "len(train_model(net, images, labels, epochs=2, checkpoint='net.checkpoint')) == 2",
    "choose_speed": "set(choose_speed(net, images, labels, rounds=1)) == {'precision', 'channels_last'}",
    "run": "0 <= run(lambda: net, digits.first(20, 10), epochs=1)[2] <= 1",
    "smooth": "smooth(torch.ones(40), 5).tolist() == [1] * 36",
    "plot_history": "len(plot_history(history).axes) == 2",
    "plot_confusion": "drawn(plot_confusion(torch.eye(10), torch.arange(10), digits.classes))",
    "plot_mistakes": "len(drawn(plot_mistakes(images, torch.eye(10)[labels], labels, digits.classes))) == 10",
    "slide": "slide(SimpleCNN(), torch.zeros(2, 1, 28, 56)).shape == (2, 10, 1, 8)",
    "open_picture": "open_picture(photo).mode == 'RGB'",
    "ink_on_paper": "ink_on_paper(photo).shape == (160, 120)",
    "pieces": "pieces(torch.tensor([0.0, 1, 1, 0, 0, 1])) == [(1, 3), (5, 6)]",
    "only_one_digit": "only_one_digit(ink).shape == (20, 4)",
    "frame_like_mnist": "frame_like_mnist(torch.ones(40, 8)).shape == (1, 28, 28)",
    "digit_from_photo": "digit_from_photo(photo).max() > 200",
    "LeNet5": "LeNet5()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)",
    "SmallVGG": "SmallVGG(in_channels=4)(torch.zeros(2, 4, 16, 16)).shape == (2, 10)",
    "InceptionBlock": "InceptionBlock(4, 1, 2, 3, 1, 2, 2)(torch.ones(1, 4, 5, 5)).shape == (1, 8, 5, 5)",
    "draw_flow": "draw_flow(plt.gca(), {'a': (0, 0), 'b': (1, 1)}, ['ab']) is None and plt.gca().texts",
    "ResidualBlock": "ResidualBlock(2, 4, stride=2)(torch.ones(1, 2, 8, 8)).shape == (1, 4, 4, 4)",
    "deep_network": "deep_network(2, residual=True)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)",
    "DepthwiseSeparable": "DepthwiseSeparable(4, 6)(torch.ones(1, 4, 8, 8)).shape == (1, 6, 8, 8)",
    "new_head": "new_head(resnet, 5).fc.out_features == 5",
    "split_at": "split_at(resnet, 'fc')[1](torch.zeros(2, 512)).shape == (2, 10)",
    "run_frozen": "run_frozen(net, images, lambda x: x / 255).shape == (20, 10)",
    "train_tail": "train_tail(net, torch.rand(20, 784), labels, epochs=1) is None",
    "tail_accuracy": "0 <= tail_accuracy(net, torch.rand(20, 784), labels) <= 1",
    "save_whole": "save_whole({'a': 1}, 'a.pt') is None and torch.load('a.pt') == {'a': 1}",
    "load_picture": "load_picture('pictures/0/0.png', size=64).shape == (3, 64, 64)",
    "read_folder": "read_folder('pictures')[0].shape == (12, 3, 256, 256)",
    "split_by_class": "[len(part) for part in split_by_class(labels, share=0.5)] == [10, 10]",
    "train_on_folder": "set(train_on_folder('pictures', 'own.pt', resnet, shrink, epochs=1)) "
                       "== {'feature extraction', 'fine-tuning'}",
    "predict": "len(predict(['pictures/0/0.png'], model_file, shrink)[0]) == 2",
    "plot_filters": "len(drawn(plot_filters(resnet.conv1.weight[:8], list('abcdefgh')))) == 8",
    "feature_maps": "feature_maps(small, x, ['0'])['0'].shape == (2, 3, 6, 6)",
    "class_scores": "class_scores(torch.tensor([[1.0, 3.0]]), None).item() == 3",
    "as_heat": "as_heat(torch.rand(2, 3, 3), (6, 6)).amax(dim=(1, 2)).tolist() == [1, 1]",
    "saliency_map": "saliency_map(small, x).shape == (2, 8, 8)",
    "grad_cam": "grad_cam(small, x).shape == (2, 8, 8)",
    "class_activation_map": "class_activation_map(small, x).shape == (2, 8, 8)",
    "overlay": "overlay(images[0], torch.rand(28, 28)).shape == (3, 28, 28)",
    "share_of_peaks_on": "share_of_peaks_on(torch.ones(2, 8, 8, dtype=torch.bool), torch.rand(2, 8, 8)) == 1",
    "share_of_peaks_on_others":
        "share_of_peaks_on_others(torch.ones(2, 8, 8, dtype=torch.bool), torch.rand(2, 8, 8)) == 1",
    "EarlyStopping": "not EarlyStopping(net, patience=2)({'epoch': 1, 'val_loss': 0.5})",
    "activation_bytes": "activation_bytes(small, x) >= x.numel() * 4",
    "save_checkpoint": "save_checkpoint('c.pt', {}, [], model=net) is None and 'model' in torch.load('c.pt')",
    "load_checkpoint": "load_checkpoint('not yet there', {}, model=net) == []",
    "train_distributed": "len(under_torchrun(lambda: train_distributed(net, images, labels, epochs=1))) == 1",
}

PAGE = """
import sys

import torch
import torchvision
from PIL import Image, ImageDraw

from convolutional_neural_networks import SimpleCNN, SmallVGG, digit_from_photo, grad_cam, train_model

images = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8)
labels = torch.arange(60) % 10


def fresh_network():
    torch.manual_seed(7)
    return SimpleCNN()


undisturbed, stopped, resumed = fresh_network(), fresh_network(), fresh_network()
train_model(undisturbed, images, labels, epochs=2)
train_model(stopped, images, labels, epochs=2, checkpoint="my.checkpoint",
            on_epoch=lambda row: row["epoch"] == 1)
history = train_model(resumed, images, labels, epochs=2, checkpoint="my.checkpoint")
assert [row["epoch"] for row in history] == [1, 2]
assert torch.equal(resumed.fc.weight, undisturbed.fc.weight)
assert not torch.equal(stopped.fc.weight, undisturbed.fc.weight)

heat = grad_cam(torchvision.models.resnet18(weights=None), torch.rand(2, 3, 64, 64))
assert heat.shape == (2, 64, 64)

four_channels = torch.randint(0, 256, (60, 4, 16, 16), dtype=torch.uint8)
train_model(SmallVGG(in_channels=4, channels=(8, 16)), four_channels, labels, epochs=1,
            prepare=lambda batch: batch.float() / 255 - 0.5)

photo = Image.new("RGB", (300, 400), "white")
ImageDraw.Draw(photo).line([(180, 80), (120, 320)], fill="navy", width=24)
digit = digit_from_photo(photo)
assert digit.shape == (1, 28, 28) and digit.dtype == torch.uint8
assert "data" not in sys.modules
"""


def inside(context, function):
    """What the function says to that which the context gives."""
    with context as given:
        return function(given)


def drawn(figure):
    """The titles of the panels."""
    return [ax.get_title() for ax in figure.axes]


def under_torchrun(function):
    """The function's answer in the only process of a `torchrun`."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = str(server.getsockname()[1])
    variables = {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | of_gloo()
    with mock.patch.dict(os.environ, variables):
        return function()


def shrink(images):
    """A preprocess that makes small inputs of `uint8 [N, 3, 256, 256]`."""
    return torch.nn.functional.interpolate(images.float() / 255, (64, 64))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """What takes a while to make: a ResNet-18, and a file as `train_on_folder` writes it."""
    file = tmp_path_factory.mktemp("model") / "two_classes.pt"
    picture = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    model = torchvision.models.resnet18(num_classes=2)
    torch.save({"classes": ["dark", "light"], "state_dict": model.state_dict(),
                "sample": shrink(picture), "sample_image": picture}, file)
    return {"resnet": torchvision.models.resnet18(num_classes=10), "model_file": file}


@pytest.fixture
def material(large, digits, tmp_path, monkeypatch):
    """What the expressions in USES name; the working folder has a folder `pictures`."""
    monkeypatch.chdir(tmp_path)
    for index, (image, label) in enumerate(zip(digits.train_images[:20], digits.train_labels)):
        if label < 6:                                            # two pictures of each class
            (tmp_path / "pictures" / str(label.item())).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(tmp_path / f"pictures/{label}/{index}.png")
    photo = Image.new("RGB", (300, 400), "white")
    ImageDraw.Draw(photo).line([(180, 80), (120, 320)], fill="navy", width=24)
    ink = torch.zeros(40, 30)
    ink[10:30, 10:14] = 1
    torch.manual_seed(0)
    return large | {
        "inside": inside, "drawn": drawn, "under_torchrun": under_torchrun, "shrink": shrink,
        "digits": digits, "images": digits.train_images[:20], "labels": digits.train_labels[:20],
        "photo": photo, "ink": ink, "x": torch.rand(2, 1, 8, 8),
        "history": [dict.fromkeys(["epoch", "train_loss", "val_loss", "val_accuracy"], 1)],
        "net": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)),
        "small": torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                     torch.nn.Flatten(), torch.nn.Linear(3, 10))}


# ------------------------------------------------------------------ each definition by itself


def test_every_definition_is_used_below():
    assert set(USES) == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_pasted_into_an_empty_file_it_works(name, material):
    pasted = [*IMPORTS, *needed_by(name)]
    file = {"__name__": "somewhere_else"}
    exec(compile("\n\n".join(map(ast.unparse, pasted)), f"<{name}>", "exec"), file)
    assert eval(USES[name], file | material)
    plt.close("all")


def test_no_definition_drags_along_much():
    lines = {name: others(name)[1] for name in PUBLIC}
    too_heavy = {name: count for name, count in lines.items() if count > LIMITS.get(name, LIMIT)}
    assert not too_heavy and set(LIMITS) <= set(PUBLIC)


def modules_imported_by(node):
    """The names of the packages that a piece of code imports, wherever in it."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (alias.name.split(".")[0] for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            yield (part.module or ".").split(".")[0]


def test_definitions_import_nothing_of_the_project():
    definitions = [node for node in TREE.body if not isinstance(node, ast.If)]
    packages = {name for node in definitions for name in modules_imported_by(node)}
    third_party = packages - set(sys.stdlib_module_names)
    assert third_party == {"matplotlib", "numpy", "torch", "torchvision", "PIL", "tqdm"}


def names_looked_up(code):
    """The names that compiled code looks for among its globals, in nested functions too."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_looked_up(constant)


def test_definitions_name_nothing_that_a_demonstrating_cell_makes():
    definitions = ast.Module([node for node in TREE.body if not isinstance(node, ast.If)], [])
    imported = {alias.asname or alias.name for node in IMPORTS for alias in node.names}
    unknown = set(names_looked_up(compile(definitions, "<definitions>", "exec")))
    unknown -= {*DEFINITIONS, *imported, *dir(builtins)}
    assert not [name for name in unknown if not name.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_definition_says_what_it_does(name):
    node = DEFINITIONS[name]
    assert ast.get_docstring(node)
    for part in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("__"):
            assert ast.get_docstring(part), part.name
    for function in ast.walk(node):
        if isinstance(function, ast.FunctionDef):
            arguments = [argument for argument in function.args.args + function.args.kwonlyargs
                         if argument.arg != "self"]
            assert function.returns is not None or function.name == "__init__", function.name
            assert all(argument.annotation for argument in arguments), function.name


# ------------------------------------------------------------------ the file by itself


# One process serves three tests, since importing PyTorch takes most of its time. It imports the file,
# then runs a page beside it, then the file as a script.
LONE = """
import contextlib, io, json, os, runpy, sys, traceback
import torch, torchvision, matplotlib.pyplot

found = {"touched": [], "calls": 0, "computed": []}
watching = True


class NoteComputations(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), settings=None):
        found["computed"].append(str(function))
        return function(*arguments, **(settings or {}))


def watch(event, arguments):
    if watching:
        where = os.path.abspath(arguments[0]) if event == "open" and isinstance(arguments[0], str) else ""
        if event.startswith(("socket.", "urllib.", "subprocess.")) or (
                where.startswith(os.getcwd()) and ".py" not in where):
            found["touched"].append(f"{event} {arguments[0]}")


def count(frame, event, argument):
    if event in ("call", "c_call") and "convolutional_neural_networks" in frame.f_code.co_filename:
        found["calls"] += 1


def run(name, **settings):
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(name, **settings)
        except Exception:
            traceback.print_exc()
    return printed.getvalue(), errors.getvalue()


sys.addaudithook(watch)
with contextlib.redirect_stdout(io.StringIO()) as printed, NoteComputations():
    sys.setprofile(count)
    import convolutional_neural_networks
    sys.setprofile(None)
watching = False
found["printed"], found["uses data"] = printed.getvalue(), "data" in sys.modules
found["page"] = run("page.py")
found["script"] = run("convolutional_neural_networks.py", run_name="__main__")
with open("found.json", "w", encoding="utf-8") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def alone(made_once):
    """What the process found out in a folder with a copy of the script, a page of code, and nothing else."""
    def find_out(folder):
        shutil.copy(SCRIPT, folder)
        (folder / "page.py").write_text(PAGE, encoding="utf-8")
        (folder / "lone.py").write_text(LONE, encoding="utf-8")
        done = run_python("lone.py", folder=folder, PYTHONPATH=None)  # it has never heard of this project
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "found.json").read_text(encoding="utf-8")) | {"errors": done.stderr}

    return made_once("alone", find_out)


def test_import_is_silent_cheap_and_touches_nothing(alone):
    """Cheap: it makes its classes and constants by a few dozen calls, and computes with no tensor."""
    assert not alone["printed"] and not alone["errors"] and not alone["touched"]
    assert not alone["uses data"] and not alone["computed"] and 10 < alone["calls"] < 100


def test_a_page_of_code_beside_the_lone_file_works_at_the_first_attempt(alone):
    printed, errors = alone["page"]
    assert not errors
    epochs = [line.split()[1] for line in printed.splitlines()]
    assert epochs == ["1", "2", "2", "1"]                        # undisturbed, resumed, four channels


def test_the_lone_file_run_as_a_script_says_what_is_missing(alone):
    printed, errors = alone["script"]
    assert not printed
    last = errors.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: The folder data/ of this project is missing")
    assert errors.count("Error") == 2                            # the line that raises it, and the message


# ------------------------------------------------------------------ techniques are where they are taught


def calls_in(section):
    """The functions that the code below a heading such as `### 4.1 …` calls, as they are written there."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    headings = [number for number, line in enumerate(lines, 1) if re.match("###? ", line)] + [len(lines) + 1]
    (begin,) = [number for number in headings[:-1] if lines[number - 1].startswith(f"### {section} ")]
    end = headings[headings.index(begin) + 1]
    return {ast.unparse(node.func) for node in ast.walk(TREE)
            if isinstance(node, ast.Call) and begin < node.lineno < end}


@pytest.mark.parametrize(("section", "technique"), [
    ("3.3", "module.register_forward_hook"), ("4.1", "F.affine_grid"), ("4.1", "F.grid_sample"),
    ("4.3", "torch.autocast"), ("4.3", "loss.backward"), ("4.3", "time.perf_counter"),
    ("5.6", "FlopCounterMode"), ("6.6", "os.fsync"), ("6.6", "torch.load"), ("7.1", "plot_images"),
    ("7.3", "torch.autograd.grad"), ("8.2", "torch.autograd.graph.saved_tensors_hooks"),
    ("8.3", "torch.load"), ("8.3", "part.load_state_dict"), ("8.3", "dist.init_process_group"),
    ("8.3", "DistributedDataParallel"),
    ("8.3", "torch.export.export")])
def test_a_technique_is_visible_where_it_is_taught(section, technique):
    assert technique in calls_in(section)
