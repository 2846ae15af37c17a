"""Section 6: pretrained weights, extraction, fine-tuning, and one's own pictures."""

import copy
import hashlib
import http.server
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

import convolutional_neural_networks as tutorial
import data
from convolutional_neural_networks import (new_head, predict, run_frozen, split_at, standardize,
                                           train_on_folder, train_tail)
from data import load_resnet18
from data.pictures import load_model, load_picture


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """The bundled network and its preprocessing."""
    model, preprocess, about = load_resnet18(tmp_path_factory.mktemp("empty"), offline=True)
    assert "letters, not ImageNet" in about and "python -m data" in about
    return model, preprocess


@pytest.fixture(scope="module")
def colour():
    """300 colour digits to train, 200 to test."""
    return data.colour_digits(data.load_bundled_digits().first(300, 200))


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


def test_real_weights_are_downloaded_verified_and_kept(tmp_path):
    folder, root = tmp_path / "server", tmp_path / "root"
    folder.mkdir()
    torch.manual_seed(5)
    stand_in = resnet18()
    torch.save(stand_in.state_dict(), folder / "resnet18-standin.pth")
    sha256 = hashlib.sha256((folder / "resnet18-standin.pth").read_bytes()).hexdigest()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/resnet18-standin.pth"
        model, preprocess, about = load_resnet18(root, url=url, sha256=sha256)
        wrong = load_resnet18(tmp_path / "other", url=url, sha256="0" * 64)[2]
        server.shutdown()
    assert "ImageNet weights (IMAGENET1K_V1), downloaded" in about and not model.training
    assert torch.equal(model.fc.weight, stand_in.fc.weight)
    assert preprocess(torch.zeros(1, 3, 300, 400, dtype=torch.uint8)).shape == (1, 3, 224, 224)
    assert "bytes are wrong" in wrong and "letters" in wrong
    model, _, about = load_resnet18(root, offline=True, url=url, sha256=sha256)  # from disk now
    assert "from disk" in about and model.fc.out_features == 1000


def test_split_parts_make_the_whole(letters, colour):
    model, preprocess = letters
    x = preprocess(colour.test_images[:8])
    with torch.no_grad():
        whole = model(x)
        copied = copy.deepcopy(model)
        for first in ("fc", "layer4", "layer2", "conv1"):  # the same one: extraction, then fine-tuning
            frozen, tail = split_at(copied, first)
            assert torch.allclose(tail(run_frozen(frozen, colour.test_images[:8], preprocess)), whole, atol=1e-4)
            assert not any(p.requires_grad for p in frozen.parameters())
            assert all(p.requires_grad for p in tail.parameters())
    with pytest.raises(ValueError, match="expected one of .*'layer4'.*got 'layer9'"):
        split_at(model, "layer9")


@pytest.mark.parametrize("first", ["fc", "layer4"])
def test_training_changes_the_tail_and_not_one_bit_of_the_rest(letters, colour, first):
    model = new_head(letters[0], 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen, tail = split_at(model, first)
    features = run_frozen(frozen, colour.train_images[:100], letters[1])
    train_tail(tail, features, colour.train_labels[:100], epochs=2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in before if "running" in name or "tracked" in name}
    assert not changed & statistics
    trainable = {name for name, _ in model.named_parameters() if name.startswith(("fc", first))}
    assert changed == trainable


def test_extraction_beats_chance_by_far(letters, colour):
    frozen, head = split_at(new_head(letters[0], 10), "fc")
    train_tail(head, run_frozen(frozen, colour.train_images, letters[1]), colour.train_labels)
    with torch.no_grad():
        answers = head(run_frozen(frozen, colour.test_images, letters[1])).argmax(dim=1)
    assert (answers == colour.test_labels).float().mean() > 0.6


def test_labels_that_the_head_does_not_have_are_refused(letters):
    _, head = split_at(new_head(letters[0], 3), "fc")
    with pytest.raises(ValueError, match=r"labels: expected 0..2 .*got 0..3"):
        train_tail(head, torch.zeros(4, 512), torch.arange(4))


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


def test_every_kind_of_picture_is_read(tmp_path):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, :30] = (250, 0, 0)
    colour = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    kinds = {"grey.png": colour.convert("L"), "palette.gif": colour.convert("P"),
             "cmyk.jpg": colour.convert("CMYK"), "bilevel.bmp": colour.convert("1"),
             "deep.png": Image.fromarray((pixels[:, :, 0].astype(np.uint16) * 257)),
             "clear.png": colour.convert("RGBA")}
    kinds["clear.png"].putalpha(0)
    for name, picture in kinds.items():
        picture.save(tmp_path / name)
        tensor = load_picture(tmp_path / name, 16)
        assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.uint8, name
    assert (load_picture(tmp_path / "clear.png", 16) == 255).all()  # transparent is white
    assert load_picture(tmp_path / "deep.png", 16)[0].max() > 200
    colour.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = load_picture(tmp_path / "turned.jpg", 16)
    assert turned[0, 2].float().mean() > 200 and turned[0, -3].float().mean() < 50  # red is on top


def test_a_folder_is_learnt_and_predicted(tmp_path, capsys):
    folder = write_pictures(tmp_path / "my pictures")
    (folder / "rötliche" / "broken.jpg").write_bytes(b"no picture")
    whole = (folder / "blue ones" / "0.png").read_bytes()
    (folder / "blue ones" / "cut.png").write_bytes(whole[:len(whole) // 2])
    scores = train_on_folder(folder, tmp_path / "model.pt", offline=True, data_dir=tmp_path, epochs=15)
    out = capsys.readouterr().out
    assert "skipped 2 of 15 files" in out and "broken.jpg: is no picture" in out and "cut.png" in out
    assert set(scores) == {"feature extraction", "fine-tuning"} and "±" in out
    answers = predict([folder / "rötliche" / "1.png", str(folder / "blue ones" / "1.png")],
                      tmp_path / "model.pt")
    assert [answer[0][0] for answer in answers] == ["rötliche", "blue ones"]
    assert all(abs(sum(p for _, p in answer) - 1) < 1e-5 for answer in answers)
    assert "1.png: rötliche" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "my pictures"]
    before, after = (model.state_dict() for model in (load_resnet18(tmp_path, offline=True)[0],
                                                      load_model(tmp_path / "model.pt")[0]))
    changed = {name.partition(".")[0] for name in after
               if not name.startswith("fc.") and not torch.equal(after[name], before[name])}
    assert changed == {"layer4"}  # fine-tuned, and nothing before it


def test_train_and_val_folders_are_used(tmp_path, capsys):
    write_pictures(tmp_path / "all" / "train", (3, 3))
    write_pictures(tmp_path / "all" / "val", (2, 1))
    train_on_folder(tmp_path / "all", tmp_path / "model.pt", offline=True, data_dir=tmp_path, epochs=2)
    assert "6 pictures to train, 3 to validate" in capsys.readouterr().out


def one_class(folder):
    write_pictures(folder)
    for path in (folder / "blue ones").iterdir():
        path.unlink()
    (folder / "blue ones").rmdir()


@pytest.mark.parametrize(("make", "message"), [
    (lambda folder: folder.write_text("file"), "expected a folder with one sub-folder a class"),
    (lambda folder: None, "expected a folder with one sub-folder a class"),
    (lambda folder: folder.mkdir(), r"expected at least two sub-folders, one a class, got \[\]"),
    (one_class, r"expected at least two sub-folders, one a class, got \['rötliche'\]"),
    (lambda folder: write_pictures(folder, (5, 1)), "at least 2 readable pictures a class"),
    (lambda folder: write_pictures(folder, (5, 0)), "at least 2 readable pictures a class"),
])
def test_folders_that_cannot_be_learnt_are_refused(tmp_path, make, message):
    make(tmp_path / "pictures")
    with pytest.raises(ValueError, match=message):
        train_on_folder(tmp_path / "pictures", tmp_path / "model.pt", offline=True, data_dir=tmp_path)
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("content", [b"", b"no model", "truncated", {"format": "another"}, [1, 2]])
def test_model_files_that_are_not_ours_are_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"a": torch.zeros(100)} if content == "truncated" else content, path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="expected a model file written by train_on_folder"):
        predict([], path)
    with pytest.raises(FileNotFoundError, match="no such model file"):
        predict([], tmp_path / "none.pt")


def test_replaced_heads_are_in_the_lesson():
    source = open(tutorial.__file__, encoding="utf-8").read()
    assert "pretrained=True" not in source.replace("`pretrained=True`", "")


def test_letters_to_pretrain_with_are_drawn_and_deterministic():
    from data.pretrain_resnet18 import CLASSES, letters

    photo = torch.zeros(3, 40, 40, dtype=torch.uint8)
    images, labels = letters(60, photo, seed=3)
    again, _ = letters(60, photo, seed=3)
    assert images.shape == (60, 3, 32, 32) and torch.equal(images, again)
    assert len(CLASSES) == len({name.lower() + name for name in CLASSES}) == 37
    assert labels.min() >= 0 and labels.max() < 37
    assert (images.amax(dim=(1, 2, 3)) > 150).all()  # something is drawn in each
    ink = (images[:, 0] > 127).float().mean(dim=(1, 2))
    assert ((ink > 0.01) & (ink < 0.5)).all()
