"""What users get wrong, in one table: one line that says what was expected, and nothing left behind."""

import signal
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import UnidentifiedImageError
from torch import nn

from convolutional_neural_networks import (LeNet5, SimpleCNN, SmallVGG, class_activation_map,
                                           digit_from_photo, evaluate, feature_maps, grad_cam, new_head,
                                           predict, random_shift, read_folder,
                                           run_frozen, saliency_map, save_checkpoint, save_whole,
                                           split_at, standardize, train_distributed, train_epoch,
                                           train_model, train_on_folder, train_tail)
from data import (ImageData, load_bundled_digits, load_cifar10, load_mnist, load_resnet18,
                  write_as_files)
from data.fetch import download
from data.run import Results, parse_options

DIGITS = load_bundled_digits().first(100, 20)
IMAGES, LABELS = DIGITS.train_images, DIGITS.train_labels
ONE = torch.zeros(1, 1, 28, 28)                                  # what a network for digits takes


def file_at(path, text="a file"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def pictures_at(folder, count=20):
    write_as_files(DIGITS.first(count), folder)
    return folder


def train(images=IMAGES, labels=LABELS, model=LeNet5, **settings):
    return train_model(model(), images, labels, **({"epochs": 1, "on_epoch": None} | settings))


def train_pictures(folder, model_file, **settings):
    """Train on a folder, with the bundled backbone."""
    backbone, preprocess, _ = load_resnet18(offline=True)
    settings = {"backbone": backbone, "preprocess": preprocess, "epochs": 1,
                "device": torch.device("cpu")} | settings
    return train_on_folder(folder, model_file, **settings)


def with_another_class_in_val(folder):
    pictures_at(folder / "train")
    pictures_at(folder / "val", 3)
    return folder


def predict_with_other_weights(path):
    torch.save(LeNet5().state_dict(), path / "m.pt")
    predict(["x.png"], path / "m.pt")


def resumed_with_another_rate(path):
    train(checkpoint=path / "m.pt")
    train(checkpoint=path / "m.pt", learning_rate=0.5)


CASES = {  # what is called with an empty folder `p`, and what it must say (one of several things)
    # shapes and dtypes
    "LeNet5, 30×30":
        (lambda p: LeNet5()(torch.zeros(1, 1, 30, 30)), ValueError,
         "LeNet5: expected [N, C, 28, 28] or [N, C, 32, 32], got [1, 1, 30, 30]"),
    "LeNet5, one image without N":
        (lambda p: LeNet5()(torch.zeros(1, 28, 28)), ValueError, "LeNet5: expected [N, C, 28, 28]"),
    "LeNet5, colour":
        (lambda p: LeNet5()(torch.zeros(1, 3, 28, 28)), RuntimeError,
         "to have 1 channels, but got 3 channels"),
    "SimpleCNN, colour":
        (lambda p: SimpleCNN()(torch.zeros(2, 3, 28, 28)), ValueError,
         "SimpleCNN: expected [N, 1, 28, 28], got [2, 3, 28, 28]"),
    "SimpleCNN, no size":
        (lambda p: SimpleCNN(image_size=0), ValueError, "image_size: expected a multiple of 4, got 0"),
    "SimpleCNN, odd size":
        (lambda p: SimpleCNN(image_size=29), ValueError, "image_size: expected a multiple of 4, got 29"),
    "SmallVGG, grey":
        (lambda p: SmallVGG()(torch.zeros(1, 1, 32, 32)), RuntimeError,
         "to have 3 channels, but got 1 channels"),
    "standardize, floats":
        (lambda p: standardize(torch.zeros(1, 1, 4, 4)), ValueError, "expected uint8 [N, 1 or 3, H, W]"),
    "standardize, two channels":
        (lambda p: standardize(torch.zeros(1, 2, 4, 4).byte()), ValueError, "torch.uint8 [1, 2, 4, 4]"),
    "random_shift, further than the image can be mirrored":
        (lambda p: random_shift(IMAGES[:, :, :2, :2], 4, "reflect"), RuntimeError,
         "Padding size should be less than the corresponding input dimension"),
    "data, floats":
        (lambda p: replace(DIGITS, train_images=IMAGES.float()), ValueError,
         "train_images: expected uint8 [N, C, H, W], got torch.float32 [100, 1, 28, 28]"),
    "data, fewer labels":
        (lambda p: replace(DIGITS, train_labels=LABELS[:-1]), ValueError,
         "train_labels: expected int64 [100]"),
    "data, labels as floats":
        (lambda p: replace(DIGITS, train_labels=LABELS.float()), ValueError, "got torch.float32 [100]"),
    "data, label 10":
        (lambda p: replace(DIGITS, test_labels=DIGITS.test_labels + 1), ValueError,
         "test_labels: expected 0..9, got 1..10"),
    "data, empty":
        (lambda p: replace(DIGITS, train_images=IMAGES[:0], train_labels=LABELS[:0]), ValueError,
         "train_images: expected at least one image, got none"),
    # training: data
    "train, images as floats":
        (lambda p: train(IMAGES.float()), ValueError, "expected uint8 [N, 1 or 3, H, W]"),
    "train, images without channels":
        (lambda p: train(IMAGES[:, 0]), ValueError, "expected uint8 [N, 1 or 3, H, W]"),
    "train, images of another size":
        (lambda p: train(IMAGES[:, :, 4:], model=SimpleCNN), ValueError,
         "SimpleCNN: expected [N, 1, 28, 28], got [1, 1, 24, 28]"),
    "train, grey images in a network for colours":
        (lambda p: train(model=SmallVGG), RuntimeError, "to have 3 channels, but got 1 channels"),
    "train, label 10":
        (lambda p: train(labels=LABELS + 1), IndexError, "Target 10 is out of bounds"),
    "train, label -1":
        (lambda p: train(labels=LABELS - 1), IndexError, "Target -1 is out of bounds"),
    "train, fewer labels":
        (lambda p: train(labels=LABELS[:-1]), ValueError,
         "Expected input batch_size (100) to match target batch_size (99)"),
    "train, labels as floats":                                   # as PyTorch 2.14 says it, or before
        (lambda p: train(labels=LABELS.float()), RuntimeError,
         ("expected target dtype to be Long or Byte, but got Float",
          "expected scalar type Long but found Float")),
    "train, labels in a column":
        (lambda p: train(labels=LABELS[:, None]), RuntimeError, "0D or 1D target tensor expected"),
    "train, no images":
        (lambda p: train(IMAGES[:0], LABELS[:0]), ValueError, "train_model: expected"),
    "train, the whole data set in place of images and labels":
        (lambda p: train_model(LeNet5(), DIGITS, epochs=1), TypeError,
         "missing 1 required positional argument: 'labels'"),
    "evaluate, label 10":
        (lambda p: evaluate(LeNet5(), IMAGES, LABELS + 1), IndexError, "Target 10 is out of bounds"),
    "evaluate, fewer labels":
        (lambda p: evaluate(LeNet5(), IMAGES, LABELS[:-1]), RuntimeError,
     "The size of tensor a (100) must match the size of tensor b (99)"),
    # training: settings
    "train, no epochs":
        (lambda p: train(epochs=0), ValueError, "train_model: expected"),
    "train, no batch":
        (lambda p: train(batch_size=0), ValueError, "train_model: expected"),
    "train, all validation":
        (lambda p: train(validation=1.0), ValueError, "train_model: expected"),
    "train, more than all validation":
        (lambda p: train(validation=20), ValueError, "train_model: expected"),
    "train, negative validation":
        (lambda p: train(validation=-0.1), ValueError, "train_model: expected"),
    "train, negative seed":
        (lambda p: train(seed=-1), ValueError, "expected non-negative integer"),
    "train, negative rate":
        (lambda p: train(learning_rate=-0.1), ValueError, "Invalid learning rate: -0.1"),
    "train, precision auto":
        (lambda p: train(precision="auto"), ValueError,
         "precision: expected 'float32' or 'bfloat16', got 'auto'"),
    "train, float8":
        (lambda p: train(precision="float8"), ValueError,
         "precision: expected 'float32' or 'bfloat16', got 'float8'"),
    "train, an augmentation that returns floats":
        (lambda p: train(augment=lambda images: images / 255), ValueError,
         "expected uint8 [N, 1 or 3, H, W]"),
    "train, a rate of 1e30":
        (lambda p: train(epochs=9, batch_size=10, learning_rate=1e30), FloatingPointError,
         "the loss is infinite or not a number: try a tenth of the rate"),
    "train, several processes without torchrun":
        (lambda p: train_distributed(LeNet5(), IMAGES, LABELS, epochs=1), RuntimeError,
         "torchrun --nproc-per-node=2 FILE"),
    # maps
    "grad_cam, labels as floats":
        (lambda p: grad_cam(LeNet5(), ONE, torch.zeros(1)), IndexError,
         "tensors used as indices must be long"),
    "grad_cam, label 10":
        (lambda p: grad_cam(LeNet5(), ONE, torch.tensor([10])), IndexError, "index 10 is out of bounds"),
    "saliency_map, label 10":
        (lambda p: saliency_map(LeNet5(), ONE, torch.tensor([10])), IndexError, "index 10 is out of bounds"),
    "grad_cam, bytes":
        (lambda p: grad_cam(LeNet5(), IMAGES), RuntimeError,
         "only Tensors of floating point dtype can require gradients"),
    "grad_cam, no such layer":
        (lambda p: grad_cam(LeNet5(), ONE, layer="conv9"), AttributeError, "LeNet5 has no attribute `conv9`"),
    "grad_cam, a layer without maps":
        (lambda p: grad_cam(LeNet5(), ONE, layer="classifier"), ValueError,
         "grad_cam: expected a layer with outputs [N, channels, h, w]"),
    "feature_maps, no such layer":
        (lambda p: feature_maps(LeNet5(), ONE, ["conv9"]), AttributeError, "LeNet5 has no attribute `conv9`"),
    "class_activation_map, another kind of network":
        (lambda p: class_activation_map(LeNet5(), ONE), ValueError,
         "expected a model that ends in global average pooling and one linear layer"),
    # transfer learning
    "train_tail, label 7 of 3":
        (lambda p: train_tail(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4), torch.tensor([0, 7])),
         IndexError, "Target 7 is out of bounds"),
    "split_at, no such child":
        (lambda p: split_at(new_head(load_resnet18(p, offline=True)[0], 2), "layer9"), ValueError,
         "split_at: expected one of ['conv1',"),
    # files and folders
    "checkpoint, no name":
        (lambda p: train(checkpoint=""), OSError, "checkpoint: expected a file in a folder that exists"),
    "checkpoint, a folder":
        (lambda p: train(checkpoint=p), OSError, "checkpoint: expected a file in a folder that exists"),
    "checkpoint, no folder":
        (lambda p: train(checkpoint=p / "a" / "b"), OSError,
         "checkpoint: expected a file in a folder that exists"),
    "checkpoint, another file":
        (lambda p: train(checkpoint=file_at(p / "ü x")), ValueError, "ü x is damaged, or is none; delete it"),
    "checkpoint, another rate":
        (resumed_with_another_rate, ValueError, "has another learning_rate: '0.003'"),
    "pictures, a file":
        (lambda p: train_pictures(file_at(p / "x"), p / "m.pt"), NotADirectoryError, "x'"),
    "pictures, an empty folder":
        (lambda p: train_pictures(p, p / "m.pt"), OSError, "Couldn't find any class folder in"),
    "pictures, no folder":
        (lambda p: train_pictures(p / "nowhere", p / "m.pt"), FileNotFoundError, "nowhere'"),
    "pictures, one class":
        (lambda p: read_folder(pictures_at(p / "pictures", 1)), ValueError,
         "at least two sub-folders with readable pictures"),
    "pictures, one of each class":
        (lambda p: train_pictures(pictures_at(p / "pictures", 10), p / "m.pt"), ValueError,
         "expected at least two pictures of each class"),
    "pictures, none that can be read":
        (lambda p: train_pictures(file_at(p / "pictures" / "a" / "x.png").parents[1], p / "m.pt"), ValueError,
         "expected at least two sub-folders with readable pictures"),
    "pictures, other classes in val":
        (lambda p: train_pictures(with_another_class_in_val(p / "pictures"), p / "m.pt"), ValueError,
         "but val has ['0', '1', '2']"),
    "pictures, a backbone without its preprocessing":
        (lambda p: train_pictures(pictures_at(p / "pictures"), p / "m.pt", preprocess=None), ValueError,
         "preprocess"),
    "pictures, the model file is a folder":
        (lambda p: train_pictures(pictures_at(p / "pictures"), p), OSError,
         "model_file: expected a file in a folder that exists"),
    "pictures, no folder for the model file":
        (lambda p: train_pictures(pictures_at(p / "pictures"), p / "no" / "m.pt"), OSError,
         "model_file: expected a file in a folder that exists"),
    "predict, no model file":
        (lambda p: predict(["x.png"], p / "m.pt"), FileNotFoundError, "m.pt'"),
    "predict, a text file":
        (lambda p: predict(["x.png"], file_at(p / "m.pt")), ValueError,
         "m.pt: expected a file written by train_on_folder"),
    "predict, an empty file":
        (lambda p: predict(["x.png"], file_at(p / "m.pt", "")), ValueError,
         "m.pt: expected a file written by train_on_folder"),
    "predict, weights of something else":
        (predict_with_other_weights, ValueError, "m.pt: expected a file written by train_on_folder"),
    "photo, no file":
        (lambda p: digit_from_photo(p / "nowhere.jpg"), FileNotFoundError, "nowhere.jpg'"),
    "photo, no picture":
        (lambda p: digit_from_photo(file_at(p / "x")), UnidentifiedImageError, "cannot identify image file"),
    "photo, nothing on it":
        (lambda p: digit_from_photo(np.zeros((99, 99), np.uint8)), ValueError,
         "digit_from_photo: nothing stands out"),
    "download, the folder is a file":
        (lambda p: download(["http://127.0.0.1:9/x"], file_at(p / "x") / "y", sha256="0" * 8),
         FileExistsError, "x'"),
    "download, no server":
        (lambda p: download(["http://127.0.0.1:9/x"], p / "y", sha256="0" * 8), OSError,
         "could not fetch y (http://127.0.0.1:9/x: ["),          # Errno, or WinError on Windows
    "download, no hash":
        (lambda p: download(["http://127.0.0.1:9/x"], p / "y"), ValueError, "expected md5 or sha256"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_gets_one_clear_line(name, tmp_path):
    call, kind, message = CASES[name]
    with pytest.raises(kind) as error:
        call(tmp_path)
    assert any(text in str(error.value) for text in ([message] if isinstance(message, str) else message))
    assert len(str(error.value).splitlines()) == 1
    left = {path.name for path in tmp_path.iterdir()}            # nothing but what the cases put there
    assert left <= {"x", "ü x", "pictures", "m.pt", "y.lock"}
    if "train_pictures" in call.__code__.co_names:
        assert "m.pt" not in left, "a model file that nobody can use"


def test_a_refused_training_has_not_changed_the_network():
    for settings in ({"labels": LABELS + 1}, {"labels": LABELS[:-1]}, {"epochs": 0}, {"validation": 1.0},
                     {"precision": "auto"}, {"checkpoint": ""}, {"learning_rate": -1.0}):
        model = LeNet5()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises((ValueError, IndexError, OSError)):
            train(model=lambda model=model: model, **settings)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())), settings


def test_a_training_epoch_without_batches_is_an_error():
    model = LeNet5()
    with pytest.raises(RuntimeError, match="non-empty TensorList"):
        train_epoch(model, [], IMAGES, LABELS, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--seed", "-1"], "argument --seed: expected a whole number from 0 to 4294967295, got '-1'"),
    (["--seed", "1e3"], "argument --seed: expected a whole number from 0 to 4294967295, got '1e3'"),
    (["--device", "gpu9"], "argument --device: 'gpu9' cannot be used here"),
    (["--precision", "float8"], "argument --precision: invalid choice: 'float8'"),
    (["--quik"], "unrecognized arguments: --quik"),
    (["--qui"], "unrecognized arguments: --qui"),
    (["more"], "unrecognized arguments: more"),
    (["--output-dir", "x"], "argument --output-dir: expected a folder, but 'x' is a file"),
    (["--output-dir", "x/y"], "--output-dir: x"),
    (["--data-dir", "x"], "argument --data-dir: expected a folder, but 'x' is a file"),
    (["--show"], "--show: there is no display to open windows on")])
def test_wrong_options_get_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file_at(tmp_path / "x")
    with pytest.raises(SystemExit) as stopped:
        parse_options(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "a folder was made for nothing"


# --------------------------------------------------------------------------------- a full disk


@contextmanager
def full_disk():
    """Within this block no file can grow beyond 100 bytes."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def write_results(folder):
    Results().write(parse_options(["--output-dir", str(folder)]), torch.device("cpu"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
@pytest.mark.parametrize("write", [
    lambda folder: train(checkpoint=folder / "kept"),
    lambda folder: train_pictures(folder.parent / "pictures", folder / "kept"), write_results,
], ids=["checkpoint", "model file", "results"])
def test_a_full_disk_leaves_nothing_half_written(write, tmp_path):
    pictures_at(tmp_path / "pictures")
    folder = tmp_path / "folder"
    folder.mkdir()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(folder)
    assert not list(folder.iterdir())
    write(folder)                                                # when there is room again
    assert len(list(folder.iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
@pytest.mark.parametrize("write", [
    lambda folder: save_checkpoint(folder / "kept", {"rate": 1}, [], model=LeNet5()),
    lambda folder: save_whole({"weights": torch.rand(99)}, folder / "kept"), write_results,
], ids=["checkpoint", "model file", "results"])
def test_a_full_disk_spares_what_was_there(write, tmp_path):
    write(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
def test_a_training_goes_on_from_its_last_checkpoint_when_there_is_room_again(tmp_path):
    file = tmp_path / "kept"
    first = train(epochs=3, checkpoint=file, on_epoch=lambda row: True)  # stops after one epoch
    with full_disk(), pytest.raises(OSError, match="File too large"):
        train(epochs=3, checkpoint=file)
    resumed = train(epochs=3, checkpoint=file)
    assert resumed[0] == first[0] and [row["epoch"] for row in resumed] == [1, 2, 3]


# ------------------------------------------------------------------------------ places and names


def test_data_of_other_places_are_told_from_the_real_ones(tmp_path):
    """Folders where files should be, and files where folders should be: the stand-ins are used and named."""
    file_at(tmp_path / "MNIST")
    (tmp_path / "cifar-10-batches-py").mkdir()
    digits, colour = load_mnist(tmp_path, offline=True), load_cifar10(tmp_path, offline=True)
    assert isinstance(digits, ImageData) and "bundled" in digits.name and digits.stand_in
    assert "stand-in" in colour.name and colour.stand_in


def test_no_home_and_names_of_all_kinds(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "été und 日本 mit Leerzeichen"
    place.mkdir()
    train(checkpoint=place / "prüfung.c")
    results = Results()
    results.add("4.1", "größe", DIGITS, "ratio", 1.5)
    results.write(parse_options(["--output-dir", str(place / "ausgabe")]), torch.device("cpu"))
    train_pictures(pictures_at(place / "bilder 図"), place / "modell ß.pt")
    preprocess = load_resnet18(offline=True)[1]
    (answer,) = predict(place / "bilder 図" / "7" / "7.png", place / "modell ß.pt", preprocess)
    assert len(answer) == 3 and sum(probability for _, probability in answer) <= 1.0001
    left = sorted(path.name for path in place.iterdir())
    assert left == ["ausgabe", "bilder 図", "modell ß.pt", "prüfung.c"]


def test_an_empty_batch_goes_through_frozen_layers():
    frozen = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert run_frozen(frozen, DIGITS.test_images, standardize).shape == (20, 2, 26, 26)
    assert run_frozen(frozen, DIGITS.test_images[:0], standardize).shape == (0, 2, 26, 26)
