"""What the loaders deliver, and what they say when they cannot."""

import gzip
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
from data import ImageData, blend, colour_digits, load_bundled_digits, load_mnist


def image_data(**changes):
    parts = dict(train_images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8), train_labels=torch.arange(4),
                 test_images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8), test_labels=torch.arange(2),
                 classes=tuple("abcd"), name="nothing")
    return ImageData(**parts | changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"train_images": torch.zeros(4, 1, 8, 8)}, r"train_images: expected uint8 \[N, C, H, W\]"),
    ({"test_images": torch.zeros(2, 8, 8, dtype=torch.uint8)}, r"test_images: expected uint8"),
    ({"train_images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
      "train_labels": torch.zeros(0, dtype=torch.int64)}, "at least one image, got none"),
    ({"train_labels": torch.arange(3)}, r"train_labels: expected int64 \[4\]"),
    ({"train_labels": torch.arange(4).float()}, r"train_labels: expected int64 \[4\]"),
    ({"test_labels": torch.tensor([0, 4])}, r"test_labels: expected 0..3, got 0..4"),
    ({"test_labels": torch.tensor([-1, 0])}, r"test_labels: expected 0..3, got -1..0"),
    ({"test_masks": torch.zeros(2, 8, 9, dtype=torch.bool)}, r"test_masks: expected bool"),
])
def test_image_data_refuses_what_is_not_images(changes, message):
    image_data()
    with pytest.raises(ValueError, match=message):
        image_data(**changes)


def test_bundled_digits_are_5000_and_balanced(digits):
    assert digits.train_images.shape == (4000, 1, 28, 28) and digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    assert digits.train_labels[:20].tolist() == [*range(10)] * 2
    every = torch.cat([digits.train_images, digits.test_images]).flatten(1).numpy()
    assert len(np.unique(every, axis=0)) == 5000  # no image is in both parts
    assert "MNIST" not in digits.name


def with_pickle(path):
    np.savez(path, train_images=np.array([{"not": "an array"}], dtype=object))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:1000]),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    with_pickle,
    lambda path: path.unlink(),
], ids=["truncated", "wrong hash", "pickled", "missing"])
def test_damaged_bundled_digits_are_refused_with_the_remedy(damage, tmp_path, monkeypatch):
    copy = tmp_path / "mnist_5k.npz"
    shutil.copy(data.BUNDLED_DIGITS, copy)
    damage(copy)
    monkeypatch.setattr(data, "BUNDLED_DIGITS", copy)
    for load in (load_bundled_digits, lambda: load_mnist(tmp_path, offline=True)):
        with pytest.raises(OSError, match="git checkout data/mnist_5k.npz.*python -m data"):
            load()


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_on_disk_is_used_without_a_network(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "download", lambda *_, **__: pytest.fail("went to the network"))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0] = labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = bytes(4 + 4 * array.ndim) + array.tobytes()
            if packed:
                (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, 1))
            else:
                (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    mnist = load_mnist(tmp_path)
    assert len(mnist.train_images) == 60_000 and len(mnist.test_images) == 10_000
    assert torch.equal(mnist.test_images[:, 0, 0, 0].long(), mnist.test_labels)
    assert capsys.readouterr().out == "Digits: full MNIST, 60,000 + 10,000, from disk.\n"

    for path in raw.glob("t10k-labels*"):
        path.write_bytes(path.read_bytes()[:-5] if not packed else gzip.compress(b"short"))
    assert load_mnist(tmp_path, offline=True).name.startswith("5,000 bundled")
    assert "is damaged: expected 10,008 bytes" in capsys.readouterr().out


def test_without_mnist_the_bundled_digits_are_used_and_it_says_why(tmp_path, capsys):
    assert len(load_mnist(tmp_path / "none", offline=True).train_images) == 4000
    out = capsys.readouterr().out
    assert "5,000 bundled digits" in out and "--offline" in out and "python -m data" in out


def test_colour_digits_are_deterministic_masked_and_quick(digits):
    start = time.perf_counter()
    first = colour_digits(digits)
    assert time.perf_counter() - start < 2
    assert first.train_images.shape == (4000, 3, 32, 32) and first.train_images.dtype == torch.uint8
    again, other = colour_digits(digits), colour_digits(digits, seed=1)
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.train_images, other.train_images)
    ink = torch.nn.functional.pad(digits.test_images[:, 0], (2, 2, 2, 2)) > 127
    assert torch.equal(first.test_masks, ink) and 0.05 < ink.float().mean() < 0.2
    assert "stand-in for CIFAR-10" in first.name
    assert torch.equal(first.train_labels, digits.train_labels)


def test_blended_pixels_are_patch_minus_shape(digits):
    photo = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    shapes = torch.zeros(5, 32, 32, dtype=torch.uint8)
    shapes[:, 10:20] = 200
    images = blend(shapes, photo, np.random.default_rng(0)).int()
    patches = photo.int().unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    for image, shape in zip(images, shapes.int()):
        assert any(torch.equal(image, (patch - shape).abs()) for patch in patches)


def test_training_and_test_patches_come_from_disjoint_parts(digits, monkeypatch):
    photo = torch.zeros(3, 600, 512, dtype=torch.uint8)
    photo[:, :, :160] = 100
    monkeypatch.setattr(data, "load_photo", lambda: photo)
    blank = replace(digits.first(50, 50), train_images=torch.zeros(50, 1, 28, 28).byte(),
                    test_images=torch.zeros(50, 1, 28, 28).byte())
    coloured = colour_digits(blank)
    assert (coloured.train_images == 0).all() and (coloured.test_images == 100).all()


def test_first_keeps_the_name_truthful(digits):
    some = digits.first(10, 5)
    assert len(some.train_images) == 10 and len(some.test_labels) == 5
    assert some.name.startswith("the first 10 + 5 of 5,000 bundled digits")
    assert digits.first(10**6).name.startswith("the first 4,000 + 1,000 of")
    assert colour_digits(digits).first(3, 2).test_masks.shape == (2, 32, 32)


def test_only_takes_the_chosen_training_images_and_all_test_images(digits):
    some = digits.only(torch.tensor([7, 3]))
    assert torch.equal(some.train_images, digits.train_images[[7, 3]])
    assert torch.equal(some.train_labels, digits.train_labels[[7, 3]])
    assert some.test_images is digits.test_images and some.name.startswith("2 training images of 5,000")
