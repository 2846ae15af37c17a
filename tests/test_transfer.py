"""Section 6: pretrained weights, extraction, fine-tuning, and one's own pictures."""

import copy
import functools
import hashlib
import http.server
import io
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

import convolutional_neural_networks as tutorial
import data
from convolutional_neural_networks import (load_picture, new_head, predict, read_folder, run_frozen,
                                           split_at, split_by_class, standardize, tail_accuracy,
                                           train_on_folder, train_tail)
from data import load_resnet18

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """The bundled network and its preprocessing."""
    model, preprocess, about = load_resnet18(tmp_path_factory.mktemp("empty"), offline=True)
    assert "trained on letters" in about and "python -m data" in about
    return model, preprocess


@pytest.fixture(scope="module")
def colour():
    """200 colour digits to train, 200 to test."""
    return data.colour_digits(data.load_bundled_digits().first(200, 200))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A file as torchvision's server has it, but with random weights; its network, its SHA-256."""
    torch.manual_seed(5)
    model = models.resnet18().eval()
    file = tmp_path_factory.mktemp("server") / "resnet18-f37072fd.pth"
    torch.save(model.state_dict(), file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return types.SimpleNamespace(model=model, file=file, sha256=sha256)


@pytest.fixture
def hub(monkeypatch):
    """Forget afterwards where `torch.hub.set_dir` was told to look."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


@pytest.fixture
def server(imagenet):
    """Serve that file on this machine; `seen` are the requests."""
    seen = []

    class Counting(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            """Print nothing."""

    handler = functools.partial(Counting, directory=str(imagenet.file.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(url=f"http://127.0.0.1:{running.server_port}/{imagenet.file.name}",
                                    seen=seen)
        running.shutdown()


# ------------------------------------------------------------------------- pretrained weights


def test_bundled_preprocessing_is_standardize(letters, colour):
    assert torch.allclose(letters[1](colour.test_images), standardize(colour.test_images), atol=1e-4)
    assert letters[1](torch.zeros(2, 3, 50, 80, dtype=torch.uint8)).shape == (2, 3, 32, 32)


def test_bundled_checkpoint_is_small_and_half_precision():
    assert data.LETTERS.stat().st_size < 23e6
    saved = torch.load(data.LETTERS, weights_only=True)
    for name, value in saved["state_dict"].items():
        if name.endswith(("running_mean", "running_var")):
            assert value.dtype == torch.float32, name
        elif value.is_floating_point():
            assert value.dtype == torch.float16, name
    assert len(saved["classes"]) == 37 and saved["accuracy"] > 0.8


def test_a_damaged_checkpoint_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "resnet18_letters.pth"
    damaged.write_bytes(data.LETTERS.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(data, "LETTERS", damaged)
    with pytest.raises(OSError, match="resnet18_letters.pth is missing or damaged: .*git checkout"):
        load_resnet18(tmp_path, offline=True)


def test_real_weights_are_downloaded_verified_kept_and_found_by_torchvision(tmp_path, imagenet, server, hub):
    model, preprocess, about = load_resnet18(tmp_path, url=server.url, sha256=imagenet.sha256)
    assert "ImageNet weights (IMAGENET1K_V1), downloaded" in about and not model.training
    kept = tmp_path / "checkpoints" / imagenet.file.name
    assert kept.read_bytes() == imagenet.file.read_bytes()
    assert not list(kept.parent.glob("*.part"))
    assert preprocess(torch.zeros(1, 3, 300, 400, dtype=torch.uint8)).shape == (1, 3, 224, 224)

    again, _, about = load_resnet18(tmp_path, offline=True, url=server.url, sha256=imagenet.sha256)
    assert "from disk" in about and again.fc.out_features == 1000 and len(server.seen) == 1
    torch.hub.set_dir(tmp_path)  # the usual line finds the same file: conftest allows no download
    usual = models.resnet18(weights=models.ResNet18_Weights.DEFAULT)
    for network in (model, again, usual):
        for name, value in imagenet.model.state_dict().items():
            assert torch.equal(network.state_dict()[name], value), name


def test_wrong_bytes_are_not_kept_and_letters_stand_in(tmp_path, server):
    model, preprocess, about = load_resnet18(tmp_path, url=server.url, sha256="0" * 64)
    assert "bytes are wrong" in about and "trained on letters" in about
    assert model.fc.out_features == 37 and not list(tmp_path.rglob("*.pth"))
    assert preprocess(torch.zeros(1, 3, 40, 40, dtype=torch.uint8)).shape == (1, 3, 32, 32)


def test_a_damaged_file_on_disk_is_not_used(tmp_path, imagenet, server):
    kept = tmp_path / "checkpoints" / imagenet.file.name
    kept.parent.mkdir()
    kept.write_bytes(imagenet.file.read_bytes()[:-1] + b"?")
    settings = {"url": server.url, "sha256": imagenet.sha256}
    assert "on letters. ImageNet's: " in load_resnet18(tmp_path, offline=True, **settings)[2]
    assert not server.seen
    model, _, about = load_resnet18(tmp_path, **settings)
    assert "downloaded" in about and torch.equal(model.fc.weight, imagenet.model.fc.weight)


def test_the_hash_in_torchvisions_file_name_is_what_is_checked(tmp_path, server):
    _, _, about = load_resnet18(tmp_path, url=server.url)  # f37072fd is not the hash of random weights
    assert "bytes are wrong" in about and len(server.seen) == 1
    assert models.ResNet18_Weights.DEFAULT.url.endswith("/resnet18-f37072fd.pth")


# ------------------------------------------------------------------- new_head, split_at, training


def test_a_new_head_is_fresh_and_follows_from_the_seed(letters):
    before, drawn = copy.deepcopy(letters[0].state_dict()), torch.get_rng_state()
    first, same, other = (new_head(letters[0], 5, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert first.fc.weight.shape == (5, 512) and first.fc.bias.shape == (5,)
    assert torch.equal(first.fc.weight, same.fc.weight) and not torch.equal(first.fc.weight, other.fc.weight)
    assert first.fc.weight.abs().max() <= 512 ** -0.5 and first.fc.weight.std() > 0.01  # as nn.Linear draws
    nn.init.zeros_(first.conv1.weight)  # a copy
    assert all(torch.equal(value, before[name]) for name, value in letters[0].state_dict().items())


@pytest.mark.parametrize("first", ["fc", "avgpool", "layer4", "layer2", "bn1", "conv1"])
def test_split_parts_make_the_whole(letters, colour, first):
    model, preprocess = copy.deepcopy(letters[0]).train(), letters[1]
    images = colour.test_images[:130]  # more than the 100 that run_frozen takes at a time
    with torch.no_grad():
        whole = letters[0](preprocess(images))
        split_at(model, "layer2")  # another cut before: extraction, then fine-tuning
        frozen, tail = split_at(model, first)
        features = run_frozen(frozen, images, preprocess)
        assert torch.allclose(tail(features), whole, atol=1e-3)
    assert not any(module.training for module in model.modules())
    if first == "fc":
        assert features.shape == (130, 512) and len(tail) == 1
    names = [name for name, _ in model.named_children()]
    for name, parameter in model.named_parameters():  # the parts share the model's parameters
        assert parameter.requires_grad == (names.index(name.split(".")[0]) >= names.index(first)), name
    assert not features.requires_grad


def test_split_at_names_what_it_knows(letters):
    with pytest.raises(ValueError, match="expected one of .*'layer4'.*got 'layer9'"):
        split_at(copy.deepcopy(letters[0]), "layer9")


@pytest.mark.parametrize("first", ["fc", "layer4", "layer3"])
def test_training_changes_the_tail_and_not_one_bit_of_the_rest(letters, colour, first):
    model = new_head(letters[0], 10).train()
    before = copy.deepcopy(model.state_dict())
    frozen, tail = split_at(model, first)
    features = run_frozen(frozen, colour.train_images[:40], letters[1])
    drawn = torch.get_rng_state()
    train_tail(tail, features, colour.train_labels[:40], epochs=2)
    assert torch.equal(torch.get_rng_state(), drawn)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {"fc": ("fc",), "layer4": ("layer4", "fc"), "layer3": ("layer3", "layer4", "fc")}[first]
    assert changed == {name for name, _ in model.named_parameters() if name.startswith(trained)}
    assert not any("running" in name or "tracked" in name for name in changed)


def test_training_the_tail_repeats_and_depends_on_the_seed(letters, colour):
    features, heads = torch.randn(70, 512), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))
        _, tail = split_at(new_head(letters[0], 10), "fc")
        train_tail(tail, features, colour.train_labels[:70], epochs=1, seed=seed)
        heads.append(tail[-1].weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_body_has_its_own_rate(letters, colour):
    frozen, tail = split_at(new_head(letters[0], 10), "layer4")
    features = run_frozen(frozen, colour.train_images[:20], letters[1])
    before = copy.deepcopy(tail)
    train_tail(tail, features, colour.train_labels[:20], epochs=1, head_rate=1e-2, body_rate=0.0)
    assert not torch.equal(tail[-1].weight, before[-1].weight)
    assert all(torch.equal(a, b) for a, b in zip(tail[:-1].parameters(), before[:-1].parameters()))
    _, tail = split_at(new_head(letters[0], 10), "layer4")
    train_tail(tail, features, colour.train_labels[:20], epochs=1, head_rate=1e-2, body_rate=1e-3)
    body = max((a - b).abs().max().item() for a, b in zip(tail[:-1].parameters(), before[:-1].parameters()))
    head = (tail[-1].weight - before[-1].weight).abs().max().item()
    assert body == pytest.approx(1e-3, rel=0.1) and head == pytest.approx(1e-2, rel=0.1)  # Adam's first step


class Counting(nn.Module):
    """Passes its input on, and notes how many images came each time."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def forward(self, x):
        self.counts.append(len(x))
        return x


def test_frozen_layers_take_100_images_at_a_time_and_the_last_ones_32():
    counting = Counting()
    features = run_frozen(counting, torch.zeros(130, 4, dtype=torch.uint8), torch.Tensor.float)
    assert counting.counts == [100, 30] and features.shape == (130, 4)
    counting.counts.clear()
    train_tail(nn.Sequential(counting, nn.Linear(4, 2)), features[:70], torch.arange(70) % 2, epochs=2)
    assert counting.counts == [32, 32, 6] * 2


def test_rates_fall_along_a_cosine():
    """Where a gradient keeps its sign, Adam moves each weight by the rate: 1, then (1 + cos 60°) / 2, …"""
    tail = nn.Sequential(nn.Linear(4, 2))
    before = tail[0].weight.detach().clone()
    train_tail(tail, torch.ones(8, 4), torch.zeros(8, dtype=torch.int64), epochs=3, head_rate=1e-3)
    moved = (tail[0].weight - before).abs()
    assert torch.allclose(moved, torch.full((2, 4), 1e-3 * (1 + 0.75 + 0.25)), rtol=0.02)


def test_keeping_the_features_equals_the_usual_way(letters, colour):
    images, labels = colour.train_images[:48], colour.train_labels[:48]
    frozen, head = split_at(new_head(letters[0], 10), "fc")
    whole = nn.Sequential(*frozen, *copy.deepcopy(head))
    train_tail(head, run_frozen(frozen, images, letters[1]), labels, epochs=2)
    train_tail(whole, letters[1](images), labels, epochs=2)
    assert torch.allclose(whole[-1].weight, head[-1].weight, atol=1e-4)


def test_extraction_beats_chance_by_far(letters, colour):
    frozen, head = split_at(new_head(letters[0], 10), "fc")
    train_tail(head, run_frozen(frozen, colour.train_images, letters[1]), colour.train_labels)
    features = run_frozen(frozen, colour.test_images, letters[1])
    accuracy = tail_accuracy(head, features, colour.test_labels)
    with torch.no_grad():
        right = [head(feature[None]).argmax().item() == label
                 for feature, label in zip(features, colour.test_labels.tolist())]
    assert accuracy == pytest.approx(sum(right) / 200) and 0.55 < accuracy < 1


def test_labels_that_the_head_does_not_have_are_refused(letters):
    _, head = split_at(new_head(letters[0], 3), "fc")
    with pytest.raises(IndexError, match="3 is out of bounds"):
        train_tail(head, torch.zeros(4, 512), torch.arange(4))


# ------------------------------------------------------------------------- reading pictures


def two_halves(width=60, height=30):
    """Red on the left, black on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :width // 2] = (250, 0, 0)
    return pixels


@pytest.mark.parametrize(("name", "mode", "red"), [
    ("grey.png", "L", 75), ("palette.png", "P", 250), ("cmyk.jpg", "CMYK", 250), ("bilevel.bmp", "1", None),
    ("ycbcr.jpg", "YCbCr", 250), ("alpha.webp", "RGBA", 250), ("grey-alpha.png", "LA", 75)])
def test_pictures_of_every_mode_are_read(tmp_path, name, mode, red):
    Image.fromarray(two_halves()).convert(mode).save(tmp_path / name)
    picture = load_picture(tmp_path / name, 16)
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8
    assert picture[:, :, 10:].max() < 20  # the middle square: red on its left, black on its right
    if red is not None:
        assert picture[0, :, :6].float().mean().item() == pytest.approx(red, abs=10)
        grey = red < 100
        assert picture[1, :, :6].float().mean().item() == pytest.approx(red if grey else 0, abs=12)


@pytest.mark.parametrize(("name", "kind"), [
    ("deep.png", "<u2"), ("deep.tif", "<u2"), ("real.tif", "<f4"), ("other byte order.tif", ">u2")])
def test_more_than_eight_bits_are_scaled_to_them(tmp_path, name, kind):
    ramp = np.linspace(1000, 9000, 32, dtype=kind)[None].repeat(32, axis=0)
    if kind == ">u2":
        Image.frombytes("I;16B", (32, 32), ramp.tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(ramp).save(tmp_path / name)
    picture = load_picture(tmp_path / name, 32)
    assert picture.float()[:, 5].sub(torch.linspace(0, 255, 32)).abs().max() <= 1.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_parts_become_white(tmp_path, mode):
    picture = Image.new("RGB", (20, 20), (0, 0, 0)).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(np.array([[0] * 10 + [255] * 10] * 20, np.uint8)))
        picture.save(tmp_path / "clear.png")
        read = load_picture(tmp_path / "clear.png", 20)
        assert (read[:, :, :9] == 255).all() and (read[:, :, 11:] == 0).all()
    else:
        picture.save(tmp_path / "clear.png", transparency=picture.getpixel((0, 0)))
        assert (load_picture(tmp_path / "clear.png", 20) == 255).all()


def test_half_transparent_parts_are_blended(tmp_path):
    Image.new("RGBA", (8, 8), (0, 100, 200, 51)).save(tmp_path / "glass.png")
    read = load_picture(tmp_path / "glass.png", 8)[:, 0, 0].tolist()
    assert read == pytest.approx([255 - 51, 255 - 31, 255 - 11], abs=1.5)  # a fifth of it, the rest white


@pytest.mark.parametrize(("orientation", "row", "column"), [
    (1, None, 0), (2, None, -1), (3, None, -1), (6, 0, None), (8, -1, None)])
def test_pictures_are_turned_as_their_exif_data_say(tmp_path, orientation, row, column):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(two_halves(40, 40)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    red = load_picture(tmp_path / "turned.jpg", 20)[0].float()
    side, other = (red[row], red[-1 - row]) if column is None else (red[:, column], red[:, -1 - column])
    assert side.mean() > 230 and other.mean() < 20


def test_the_middle_square_is_cut_and_nothing_is_squeezed(tmp_path):
    pixels = np.zeros((90, 30, 3), np.uint8)
    pixels[:30], pixels[30:60], pixels[60:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    Image.fromarray(pixels).save(tmp_path / "high.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "wide.png")
    for name in ("high.png", "wide.png"):
        picture = load_picture(tmp_path / name, 30)
        assert (picture[1] == 250).all() and (picture[[0, 2]] == 0).all()
    assert load_picture(tmp_path / "high.png").shape == (3, 256, 256)


def write_pictures(folder, counts=(6, 7), size=40):
    """Reddish pictures in one class, bluish in the other."""
    random = np.random.default_rng(0)
    for channel, (name, count) in enumerate(zip(("rötliche", "blue ones"), counts)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 80, (size + i, size, 3), dtype=np.uint8)
            pixels[:, :, 2 * channel] += 170
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_is_read_and_broken_files_are_skipped_named_and_counted(tmp_path, capsys):
    folder = write_pictures(tmp_path / "my pictures")
    (folder / "rötliche" / "broken.jpg").write_bytes(b"no picture")
    (folder / "blue ones" / "empty.png").write_bytes(b"")
    whole = (folder / "blue ones" / "0.png").read_bytes()
    (folder / "blue ones" / "cut.png").write_bytes(whole[:len(whole) // 2])
    (folder / "blue ones" / "notes.txt").write_text("not a picture")
    (folder / "blue ones" / ".hidden").write_bytes(b"as systems put into folders")
    images, labels, classes, files = read_folder(folder)
    out = capsys.readouterr().out
    assert "skipped 4 of 17 files" in out and len(out.splitlines()) == 5
    assert all(name in out for name in ("broken.jpg", "empty.png", "cut.png", "notes.txt"))
    assert images.shape == (13, 3, 256, 256) and images.dtype == torch.uint8
    assert classes == ["blue ones", "rötliche"] and labels.tolist() == [0] * 7 + [1] * 6
    assert labels.dtype == torch.int64 and len(files) == 13
    for image, label, file in zip(images, labels.tolist(), files):
        assert torch.equal(image, load_picture(file)) and classes[label] in file
        red, _, blue = image.float().mean(dim=(1, 2))
        assert (red > blue) == (classes[label] == "rötliche")


# ------------------------------------------------------------------------- splitting by class


@pytest.mark.parametrize(("counts", "share", "held_out"), [
    ((10, 20, 5), 0.2, (2, 4, 1)), ((2, 3, 50), 0.2, (1, 1, 10)), ((10, 10), 0.5, (5, 5))])
def test_a_share_of_each_class_is_put_aside(counts, share, held_out):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    drawn = torch.get_rng_state()
    train, validation = split_by_class(labels, share, seed=3)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(labels)))
    assert tuple(labels[validation].bincount().tolist()) == held_out
    again, other = split_by_class(labels, share, seed=3), split_by_class(labels, share, seed=4)
    assert torch.equal(again[1], validation) and not torch.equal(other[1], validation)


def test_which_pictures_are_put_aside_is_random_within_a_class():
    labels = torch.zeros(30, dtype=torch.int64)
    held_out = {index for seed in range(30) for index in split_by_class(labels, seed=seed)[1].tolist()}
    assert len(held_out) > 25  # not always the first, nor the last


# ------------------------------------------------------------------------- a folder, end to end


def test_a_folder_is_learnt_and_predicted(tmp_path, capsys, letters):
    folder = write_pictures(tmp_path / "my pictures")
    (folder / "rötliche" / "broken.jpg").write_bytes(b"no picture")
    before = copy.deepcopy(letters[0].state_dict())
    scores = train_on_folder(folder, tmp_path / "model.pt", *letters, epochs=6, device=CPU)
    out = capsys.readouterr().out
    assert "skipped 1 of 14 files" in out and "11 pictures to train, 2 to validate: blue ones, rötl" in out
    assert set(scores) == {"feature extraction", "fine-tuning"}
    assert all(f"{name}: {score:.1%} of 2 validation pictures" in out for name, score in scores.items())
    assert scores["fine-tuning"] == 1.0

    files = [folder / "rötliche" / "1.png", str(folder / "blue ones" / "1.png")]
    answers = predict(files, tmp_path / "model.pt", letters[1])
    assert [answer[0][0] for answer in answers] == ["rötliche", "blue ones"]
    for answer in answers:
        assert sum(p for _, p in answer) == pytest.approx(1) and answer[0][1] > answer[1][1]
    assert "1.png: rötliche (" in capsys.readouterr().out
    assert predict(files[1], tmp_path / "model.pt", letters[1]) == [answers[1]]  # a single file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "my pictures"]

    saved = torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    changed = {name.split(".")[0] for name in before
               if not name.startswith("fc.") and not torch.equal(saved[name], before[name])}
    assert changed == {"layer4"}  # fine-tuned, and nothing before it
    assert not any("running" in name and not torch.equal(saved[name], before[name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in letters[0].state_dict().items())


def test_predictions_are_those_of_the_saved_network(tmp_path, letters):
    folder = write_pictures(tmp_path / "pictures", (4, 4))
    for number in (2, 3):  # four classes, of which predict names three
        write_pictures(tmp_path / f"more{number}", (3, 3))
        (tmp_path / f"more{number}" / "rötliche").rename(folder / f"class {number}")
    train_on_folder(folder, tmp_path / "model.pt", *letters, epochs=1, device=CPU)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    model = models.resnet18(num_classes=4)
    model.load_state_dict(saved["state_dict"])
    file = folder / "class 2" / "0.png"
    with torch.no_grad():
        expected = model.eval()(letters[1](load_picture(file)[None])).softmax(dim=1)[0]
    (answer,) = predict([file], tmp_path / "model.pt", letters[1])
    best = expected.argsort(descending=True)[:3]
    assert [name for name, _ in answer] == [saved["classes"][index] for index in best]
    assert [p for _, p in answer] == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_train_and_val_folders_are_used_and_mistakes_are_named(tmp_path, capsys, letters):
    train, val = (write_pictures(tmp_path / "all" / part, counts)
                  for part, counts in (("train", (4, 5)), ("val", (2, 2))))
    wrong = val / "rötliche" / "wrong.png"
    (train / "blue ones" / "0.png").rename(wrong)  # a bluish one
    scores = train_on_folder(tmp_path / "all", tmp_path / "model.pt", *letters, epochs=6, device=CPU)
    out = capsys.readouterr().out
    assert "8 pictures to train, 5 to validate: blue ones, rötliche" in out
    assert scores["fine-tuning"] == pytest.approx(4 / 5)
    (mistake,) = [line for line in out.splitlines() if "mistake" in line]
    assert f"{wrong} taken for blue ones (" in mistake


def test_fine_tuning_has_a_tenth_of_the_rate_and_the_backbone_a_tenth_of_that(tmp_path, letters, monkeypatch):
    trained = []

    def note(tail, features, labels, **settings):
        trained.append((len(features), settings))

    monkeypatch.setattr(tutorial, "train_tail", note)
    folder = write_pictures(tmp_path / "pictures", (5, 5))
    train_on_folder(folder, tmp_path / "model.pt", *letters, seed=4, epochs=7, device=CPU)
    settings = {"epochs": 7, "seed": 4}
    assert trained == [(8, {"head_rate": 1e-2, "body_rate": 1e-3} | settings),
                       (8, {"head_rate": 1e-3, "body_rate": 1e-4} | settings)]


def test_the_five_surest_mistakes_are_named(tmp_path, letters, capsys):
    """All seven blue ones are called red in `val`, and the other way round."""
    write_pictures(tmp_path / "all" / "train", (4, 4))
    write_pictures(tmp_path / "made", (7, 7))
    (tmp_path / "all" / "val").mkdir()
    (tmp_path / "made" / "rötliche").rename(tmp_path / "all" / "val" / "blue ones")
    (tmp_path / "made" / "blue ones").rename(tmp_path / "all" / "val" / "rötliche")
    train_on_folder(tmp_path / "all", tmp_path / "model.pt", *letters, epochs=4, device=CPU)
    mistakes = [line for line in capsys.readouterr().out.splitlines() if "mistake" in line]
    images, labels, classes, files = read_folder(tmp_path / "all" / "val")
    answers = predict(files, tmp_path / "model.pt", letters[1])
    surest = sorted((answer[0][1] for answer, label in zip(answers, labels)
                     if answer[0][0] != classes[label]), reverse=True)
    assert len(surest) > 5 and surest[0] > surest[-1] + 0.01
    assert [line.split()[-1] for line in mistakes] == [f"({p:.0%})" for p in surest[:5]]


def test_without_a_backbone_torchvisions_imagenet_weights_are_used(tmp_path, monkeypatch, imagenet, hub):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    kept = tmp_path / "home" / "hub" / "checkpoints" / imagenet.file.name
    kept.parent.mkdir(parents=True)
    kept.hardlink_to(imagenet.file)
    folder = write_pictures(tmp_path / "pictures", (2, 2))
    train_on_folder(folder, tmp_path / "model.pt", epochs=1, device=CPU)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    theirs = imagenet.model.state_dict()
    same = {name for name in theirs if torch.equal(saved["state_dict"][name], theirs[name])}
    assert {name for name in theirs if not name.startswith(("layer4", "fc"))} <= same
    preprocess = models.ResNet18_Weights.DEFAULT.transforms()
    first = load_picture(folder / "blue ones" / "0.png")[None]
    assert torch.equal(saved["sample"], preprocess(first)) and saved["sample"].shape == (1, 3, 224, 224)
    (answer,) = predict([folder / "blue ones" / "1.png"], tmp_path / "model.pt")  # the default preprocess
    assert {name for name, _ in answer} == {"blue ones", "rötliche"}


# ------------------------------------------------------------------------- what is refused


def one_class(folder):
    write_pictures(folder)
    for path in (folder / "blue ones").iterdir():
        path.unlink()
    (folder / "blue ones").rmdir()


def broken_class(folder):
    write_pictures(folder, (3, 2))
    for path in (folder / "blue ones").iterdir():
        path.write_bytes(b"no picture")


def other_val_classes(folder):
    write_pictures(folder / "train", (2, 2))
    write_pictures(folder / "val", (1, 1))
    (folder / "val" / "rötliche").rename(folder / "val" / "red ones")


def only_val(folder):
    write_pictures(folder / "val", (2, 2))


@pytest.mark.parametrize(("make", "kind", "message"), [
    (lambda folder: folder.write_text("a file"), OSError, "Not a directory: .*pictures"),
    (lambda folder: None, OSError, "No such file or directory: .*pictures"),
    (lambda folder: folder.mkdir(), OSError, "find any class folder in .*pictures"),
    (one_class, ValueError, "pictures: expected at least two sub-folders with readable pictures"),
    (broken_class, ValueError, "pictures: expected at least two sub-folders with readable pictures"),
    (lambda folder: write_pictures(folder, (5, 1)), ValueError, "at least two pictures of each class"),
    (lambda folder: write_pictures(folder, (5, 0)), OSError, "no valid file for the classes blue ones"),
    (other_val_classes, ValueError, r"train has \['blue ones', 'rötl.* val has \['blue ones', 'red ones'"),
    (only_val, OSError, "train"),
])
def test_folders_that_cannot_be_learnt_are_refused_in_one_line(tmp_path, letters, make, kind, message):
    make(tmp_path / "pictures")
    with pytest.raises(kind, match=message) as error:
        train_on_folder(tmp_path / "pictures", tmp_path / "model.pt", *letters, epochs=1, device=CPU)
    assert len(str(error.value).splitlines()) == 1
    assert [path for path in tmp_path.iterdir() if path.name != "pictures"] == []


@pytest.mark.parametrize("where", ["missing/model.pt", "."])
def test_a_model_file_that_cannot_be_written_is_refused_before_training(tmp_path, where):
    def unused(images):
        raise AssertionError("it began to work")

    with pytest.raises(OSError, match="model_file: expected a file in a folder that exists"):
        train_on_folder(tmp_path / "no pictures either", tmp_path / where, nn.Identity(), unused)


def saved(contents):
    """The bytes of a file in PyTorch's format."""
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def nearly_ours(*classes):
    """A ResNet-18 for two classes, but not from `train_on_folder`."""
    return saved({"classes": classes, "state_dict": models.resnet18(num_classes=2).state_dict()})


FOREIGN = {
    "empty": lambda: b"",
    "text": lambda: b"no model",
    "zip": lambda: b"PK\x03\x04",
    "pickle": lambda: b"\x80\x02.",
    "cut off": lambda: nearly_ours("a", "b")[:300_000],
    "another dictionary": lambda: saved({"format": "another"}),
    "list": lambda: saved([1, 2]),
    "none": lambda: saved(None),
    "tensor": lambda: saved(torch.zeros(3)),
    "weights alone": lambda: saved(nn.Linear(2, 2).state_dict()),
    "no weights": lambda: saved({"classes": ["a", "b"], "state_dict": {}}),
    "number of classes": lambda: saved({"classes": 2, "state_dict": {}}),
    "other classes": lambda: nearly_ours("a", "b", "c"),
    "no sample": lambda: nearly_ours("a", "b"),
    "the bundled letters": lambda: data.LETTERS.read_bytes()}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_model_files_that_are_not_ours_are_refused(tmp_path, letters, make):
    path = tmp_path / "model.pt"
    path.write_bytes(make())
    with pytest.raises(ValueError, match="model.pt: expected a file written by train_on_folder"):
        predict([], path, letters[1])


def test_code_hidden_in_a_model_file_is_not_run(tmp_path, letters):
    class Hidden:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "it ran",)

    torch.save({"classes": ["a", "b"], "state_dict": Hidden()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: expected a file written by train_on_folder"):
        predict([], tmp_path / "model.pt", letters[1])
    assert not (tmp_path / "it ran").exists()


def test_a_missing_model_file_is_named(tmp_path, letters):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        predict([], tmp_path / "none.pt", letters[1])


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, letters):
    """Written by train_on_folder, with the letters' preprocessing."""
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "pictures", (2, 2))
    train_on_folder(folder / "pictures", folder / "model.pt", *letters, epochs=1, device=CPU)
    return folder / "model.pt"


def test_another_preprocess_than_that_of_training_is_refused(model_file, letters):
    resize, crop, scale, _ = letters[1]
    others = [None,  # torchvision's, for ImageNet
              nn.Sequential(resize, crop, scale),  # not normalised
              lambda images: letters[1](images).flip(1),  # blue, green, red
              lambda images: letters[1](images)[:, :, :, :-1]]
    for other in others:
        with pytest.raises(ValueError, match="expected the preprocess that this network was trained with"):
            predict([model_file.parent / "pictures" / "blue ones" / "0.png"], model_file, other)
    assert predict([], model_file, copy.deepcopy(letters[1])) == []


def test_a_file_that_is_no_picture_is_named(model_file, letters, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for name in ("broken.jpg", "missing.jpg"):
        with pytest.raises(OSError, match=name):
            predict([tmp_path / name], model_file, letters[1])


# ------------------------------------------------------------------------- how the letters were made


def test_letters_to_pretrain_with_are_drawn_and_deterministic():
    from data.pretrain_resnet18 import CLASSES
    from data.pretrain_resnet18 import letters as draw

    photo = torch.zeros(3, 40, 40, dtype=torch.uint8)
    images, labels = draw(60, photo, seed=3)
    again, _ = draw(60, photo, seed=3)
    assert images.shape == (60, 3, 32, 32) and torch.equal(images, again)
    assert len(CLASSES) == len({name.lower() + name for name in CLASSES}) == 37
    assert labels.min() >= 0 and labels.max() < 37
    assert (images.amax(dim=(1, 2, 3)) > 150).all()  # something is drawn in each
    ink = (images[:, 0] > 127).float().mean(dim=(1, 2))
    assert ((ink > 0.01) & (ink < 0.5)).all()
