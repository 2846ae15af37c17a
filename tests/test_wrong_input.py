"""What users get wrong, in one table: one line that says what was expected, and nothing left behind."""

import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from convolutional_neural_networks import (LeNet5, ResidualBlock, SimpleCNN, SmallVGG, conv2d_by_hand, evaluate,
                                           grad_cam, new_head, occlusion_map, predict, run_frozen, split_at, standardize,
                                           train_model, train_on_folder, train_tail)
from data import ImageData, load_bundled_digits, load_cifar10, load_mnist, load_resnet18
from data.fetch import download
from data.options import Results, parse_options, write_results
from data.pictures import save_model


@pytest.fixture(scope="module")
def few():
    return load_bundled_digits().first(100, 20)


def of(data, **changes):
    return replace(data, **changes)


def file_at(path):
    path.write_text("a file")
    return path


CASES = {
    # sizes, shapes, dtypes
    "LeNet5, 30×30": (lambda f, p: LeNet5()(torch.zeros(1, 1, 30, 30)), ValueError, "or [N, 1, 32, 32], got [1, 1, 30, 30]"),
    "LeNet5, one image without N": (lambda f, p: LeNet5()(torch.zeros(1, 28, 28)), ValueError, "LeNet5: expected [N, 1, 28, 28]"),
    "LeNet5, colour": (lambda f, p: LeNet5()(torch.zeros(1, 3, 28, 28)), ValueError, "LeNet5: expected"),
    "SimpleCNN, colour": (lambda f, p: SimpleCNN()(torch.zeros(2, 3, 28, 28)), ValueError, "SimpleCNN: expected [N, 1, 28, 28]"),
    "SimpleCNN, no size": (lambda f, p: SimpleCNN(image_size=0), ValueError, "image_size: expected a multiple of 4, got 0"),
    "SimpleCNN, odd size": (lambda f, p: SimpleCNN(image_size=29), ValueError, "multiple of 4, got 29"),
    "SmallVGG, 28×28": (lambda f, p: SmallVGG()(torch.zeros(1, 3, 28, 28)), ValueError, "SmallVGG: expected [N, 3, 32, 32]"),
    "standardize, floats": (lambda f, p: standardize(torch.zeros(1, 1, 4, 4)), ValueError, "standardize: expected uint8"),
    "standardize, two channels": (lambda f, p: standardize(torch.zeros(1, 2, 4, 4).byte()), ValueError, "got torch.uint8 [1, 2, 4, 4]"),
    "standardize, NaN": (lambda f, p: standardize(torch.full((1, 1, 4, 4), np.nan)), ValueError, "standardize: expected uint8"),
    "data, floats": (lambda f, p: of(f, train_images=f.train_images.float()), ValueError, "uint8"),
    "data, fewer labels": (lambda f, p: of(f, train_labels=f.train_labels[:-1]), ValueError, "labels"),
    "data, labels as floats": (lambda f, p: of(f, train_labels=f.train_labels.float()), ValueError, "int64"),
    "data, empty": (lambda f, p: of(f, train_images=f.train_images[:0], train_labels=f.train_labels[:0]), ValueError, "at least one"),
    # labels
    "train, label 10": (lambda f, p: train_model(LeNet5(), of(f, train_labels=f.train_labels + 1), epochs=1), ValueError, "labels: expected 0..9"),
    "train, label -1": (lambda f, p: train_model(LeNet5(), of(f, train_labels=f.train_labels - 1), epochs=1), ValueError, "got -1..8"),
    "evaluate, label 10": (lambda f, p: evaluate(LeNet5(), f.test_images, f.test_labels + 1), ValueError, "labels: expected 0..9"),
    "evaluate, nothing": (lambda f, p: evaluate(LeNet5(), f.test_images[:0], f.test_labels[:0]), ValueError, "at least one image"),
    "grad_cam, labels as floats": (lambda f, p: grad_cam(LeNet5(), torch.zeros(1, 1, 28, 28), torch.zeros(1)), ValueError, "labels: expected int64 [1]"),
    "grad_cam, NaN": (lambda f, p: grad_cam(LeNet5(), torch.full((1, 1, 28, 28), np.nan)), ValueError, "expected finite numbers"),
    "occlusion, patch too large": (lambda f, p: occlusion_map(LeNet5(), torch.zeros(1, 1, 28, 28), patch=29), ValueError, "patch: expected stride <= patch <= the image's size, got stride 4, patch 29"),
    "grad_cam, bytes": (lambda f, p: grad_cam(LeNet5(), f.test_images), ValueError, "standardised float32 [N, 1, H, W]"),
    "grad_cam, no such layer": (lambda f, p: grad_cam(LeNet5(), torch.zeros(1, 1, 28, 28), layer="conv9"), ValueError, "the model has no 'conv9'"),
    "tail, label 7 of 3": (lambda f, p: train_tail(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4), torch.tensor([0, 7])), ValueError, "labels: expected 0..2"),
    # settings
    "train, no epochs": (lambda f, p: train_model(LeNet5(), f, epochs=0), ValueError, "expected epochs and batch_size >= 1"),
    "train, no batch": (lambda f, p: train_model(LeNet5(), f, epochs=1, batch_size=0), ValueError, "expected epochs and batch_size >= 1"),
    "train, all validation": (lambda f, p: train_model(LeNet5(), f, epochs=1, validation=1.0), ValueError, "100 of 100"),
    "train, no validation": (lambda f, p: train_model(LeNet5(), f, epochs=1, validation=0), ValueError, "0 of 100"),
    "train, one image": (lambda f, p: train_model(LeNet5(), f.first(1), epochs=1), ValueError, "1 of 1"),
    "train, float8": (lambda f, p: train_model(LeNet5(), f, epochs=1, precision="float8"), ValueError, "precision in ('auto'"),
    "split, no such child": (lambda f, p: split_at(new_head(load_resnet18(p, offline=True)[0], 2), "layer9"), ValueError, "split_at: expected one of"),
    # a rate that is too high
    "train, rate 1e30": (lambda f, p: train_model(LeNet5(), f, epochs=20, batch_size=10, learning_rate=1e30, progress=False), FloatingPointError, "too high a rate"),
    # files and folders
    "checkpoint, a folder": (lambda f, p: train_model(LeNet5(), f, epochs=1, checkpoint=p), OSError, "expected a file in a folder that exists"),
    "checkpoint, no folder": (lambda f, p: train_model(LeNet5(), f, epochs=1, checkpoint=p / "a" / "b"), OSError, "expected a file in a folder that exists"),
    "checkpoint, another file": (lambda f, p: train_model(LeNet5(), f, epochs=1, checkpoint=file_at(p / "ü x")), ValueError, "none of train_model's"),
    "folder, a file": (lambda f, p: train_on_folder(file_at(p / "x"), p / "m.pt"), ValueError, "expected a folder"),
    "folder, empty": (lambda f, p: train_on_folder(p, p / "m.pt"), ValueError, "at least two sub-folders"),
    "folder, missing": (lambda f, p: train_on_folder(p / "no", p / "m.pt"), ValueError, "expected a folder"),
    "predict, no model": (lambda f, p: predict(["x.png"], p / "m.pt"), OSError, "no such model file"),
    "predict, another file": (lambda f, p: predict(["x.png"], file_at(p / "m.pt")), ValueError, "expected a model file"),
    "download, folder is a file": (lambda f, p: download(["http://127.0.0.1:9/x"], file_at(p / "x") / "y", sha256="0" * 8), OSError, "x"),
    "download, no server": (lambda f, p: download(["http://127.0.0.1:9/x"], p / "y", sha256="0" * 8), OSError, "http://127.0.0.1:9/x"),
    # results
    "a result that is not finite": (lambda f, p: write_results([dict(section="1", name="a", data="b", metric="c", value=float("nan"), seconds=0.0)], parse_options(["--output-dir", str(p / "o")]), torch.device("cpu")), ValueError, "not a finite number"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_gets_one_clear_line(name, few, tmp_path):
    call, kind, message = CASES[name]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(kind) as error:
        call(few, tmp_path)
    assert message in str(error.value), str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {path.name for path in before}
    assert left <= {"x", "ü x", "m.pt"}  # what the cases themselves have put there


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
@pytest.mark.parametrize("write", [
    lambda f, p: train_model(LeNet5(), f, epochs=2, checkpoint=p / "kept", progress=False),
    lambda f, p: save_model(p / "kept", LeNet5(), ["a", "b"], False, 32),
    lambda f, p: write_results(Results(), parse_options(["--output-dir", str(p)]), torch.device("cpu")),
], ids=["checkpoint", "model file", "results"])
def test_a_full_disk_leaves_nothing_half_written(write, few, tmp_path):
    import resource

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="kept cannot be written|File too large"):
            write(few, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
    write(few, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_data_of_other_places_are_told_from_the_real_ones(tmp_path):
    """Folders where files should be, and files where folders should be: the stand-ins are used and named."""
    (tmp_path / "MNIST").write_text("a file")
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert "bundled" in load_mnist(tmp_path, offline=True).name
    assert "stand-in" in load_cifar10(tmp_path, offline=True).name
    assert isinstance(load_bundled_digits(), ImageData) and isinstance(Results(), list)


def test_a_shape_that_changes_gets_its_own_shortcut():
    assert ResidualBlock(2, 4)(torch.zeros(1, 2, 4, 4)).shape == (1, 4, 4, 4)
    assert conv2d_by_hand(torch.zeros(0, 1, 4, 4), torch.zeros(1, 1, 3, 3)).shape == (0, 1, 2, 2)


def test_no_home_and_names_of_all_kinds(tmp_path, monkeypatch, few, capsys):
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "été und 日本 mit Leerzeichen"
    place.mkdir()
    train_model(LeNet5(), few, epochs=1, checkpoint=place / "prüfung.c", progress=False)
    results = Results()
    results.add("4.1", "größe", few, "ratio", 1.5)
    write_results(results, parse_options(["--output-dir", str(place / "ausgabe")]), torch.device("cpu"))
    assert (place / "ausgabe" / "results.json").exists() and (place / "prüfung.c").exists()
    assert run_frozen(nn.Sequential(nn.Conv2d(1, 2, 3)), few.test_images, standardize).shape == (20, 2, 26, 26)
