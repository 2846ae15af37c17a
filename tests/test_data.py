"""What the loaders deliver, and what they say when they cannot."""

import gzip
import inspect
import itertools
import shutil
from dataclasses import FrozenInstanceError, replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from torchvision import datasets
from torchvision.models import ResNet18_Weights

import data
from data import (
    ImageData, blend, colour_digits, download, fetch_cifar10, fetch_mnist, load_bundled_digits,
    load_cifar10, load_mnist, load_photo, load_resnet18, printed_letters, resnet18_preprocessing,
    simulated_photo, write_as_files)

LIMIT = {"time_limit": 180.0}
WEIGHTS = {"url": ResNet18_Weights.DEFAULT.url, "sha256": None}
DEFAULTS = {
    "ImageData": {"test_masks": None, "stand_in": False},
    "load_mnist": {"data_dir": None, "offline": False},
    "load_cifar10": {"data_dir": None, "offline": False},
    "load_resnet18": {"data_dir": None, "offline": False, "image_size": None} | WEIGHTS,
    "fetch_mnist": LIMIT, "fetch_cifar10": LIMIT, "fetch_resnet18": LIMIT | WEIGHTS,
    "download": {"md5": None, "sha256": None, "timeout": 10.0, "patience": 5.0} | LIMIT,
    "colour_digits": {"seed": 0}, "simulated_photo": {"seed": 0}}


@pytest.mark.parametrize("name", DEFAULTS)
def test_who_leaves_arguments_out_gets_what_was_promised(name):
    """`python -m data` and README rely on them. Whoever changes one says so there."""
    parameters = inspect.signature(getattr(data, name)).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == DEFAULTS[name]


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
    ({"test_masks": torch.zeros(2, 8, 8, dtype=torch.uint8)}, r"test_masks: expected bool \[2, 8, 8\]"),
])
def test_image_data_refuses_what_is_not_images(changes, message):
    image_data()
    with pytest.raises(ValueError, match=message):
        image_data(**changes)


def test_image_data_do_not_change():
    with pytest.raises(FrozenInstanceError):
        image_data().name = "something else"


def test_bundled_digits_are_5000_and_balanced(digits):
    assert digits.train_images.shape == (4000, 1, 28, 28) and digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    assert digits.train_labels[:20].tolist() == [*range(10)] * 2
    every = torch.cat([digits.train_images, digits.test_images]).flatten(1).numpy()
    assert len(np.unique(every, axis=0)) == 5000  # no image is in both parts
    assert "MNIST" not in digits.name and not digits.stand_in


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
    assert mnist.train_images.shape == (60_000, 1, 28, 28) and len(mnist.test_images) == 10_000
    assert mnist.name == "MNIST (60,000 to train, 10,000 to test)" and not mnist.stand_in
    assert torch.equal(mnist.test_images[:, 0, 0, 0].long(), mnist.test_labels)
    assert capsys.readouterr().out == "MNIST: full, 60,000 + 10,000, from disk.\n"

    for path in raw.glob("t10k-labels*"):
        path.write_bytes(path.read_bytes()[:-5] if not packed else gzip.compress(b"short"))
    stand_in = load_mnist(tmp_path, offline=True)
    assert stand_in.name.startswith("5,000 bundled") and stand_in.stand_in
    assert "is damaged: expected 10,008 bytes" in capsys.readouterr().out


def test_mnist_is_read_as_torchvision_reads_it(tmp_path):
    """The real layout: magic numbers, sizes, then bytes."""
    raw, random = tmp_path / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 3:5] = random.integers(0, 256, (count, 2, 28))
        labels = random.integers(0, 10, count).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = [0x800 + array.ndim, *array.shape]
            content = np.array(header, ">i4").tobytes() + array.tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    ours = load_mnist(tmp_path, offline=True)
    for train, images, labels in ((True, ours.train_images, ours.train_labels),
                                  (False, ours.test_images, ours.test_labels)):
        theirs = datasets.MNIST(tmp_path, train=train)
        assert torch.equal(theirs.data, images[:, 0]) and torch.equal(theirs.targets, labels)


def test_without_mnist_the_bundled_digits_are_used_and_it_says_why(tmp_path, capsys):
    digits = load_mnist(tmp_path / "none", offline=True)
    assert len(digits.train_images) == 4000 and digits.stand_in and "MNIST" not in digits.name
    out = capsys.readouterr().out
    assert "5,000 bundled digits" in out and "in place of full MNIST" in out and "--offline" in out
    assert f'python -m data --data-dir "{tmp_path / "none"}"' in out and len(out.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_colour_digits_are_deterministic_and_masked(digits):
    first = colour_digits(digits)
    assert first.train_images.shape == (4000, 3, 32, 32) and first.train_images.dtype == torch.uint8
    again, other = colour_digits(digits), colour_digits(digits, seed=1)
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.train_images, other.train_images)
    ink = torch.nn.functional.pad(digits.test_images[:, 0], (2, 2, 2, 2)) > 127
    assert torch.equal(first.test_masks, ink) and 0.05 < ink.float().mean() < 0.2
    assert first.name == "colour digits (4,000 to train, 1,000 to test)"
    assert not first.stand_in                                    # only in place of CIFAR-10 they are one
    assert torch.equal(first.train_labels, digits.train_labels) and first.classes == digits.classes


def test_blended_pixels_are_patch_minus_shape(digits):
    photo = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    shapes = torch.zeros(5, 32, 32, dtype=torch.uint8)
    shapes[:, 10:20] = 200
    images = blend(shapes, photo, np.random.default_rng(0)).int()
    patches = photo.int().unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    for image, shape in zip(images, shapes.int()):
        assert any(torch.equal(image, (patch - shape).abs()) for patch in patches)


def test_patches_are_cut_at_every_place_of_the_photo_and_at_no_other():
    photo = torch.zeros(3, 33, 34, dtype=torch.uint8)            # patches fit at 2×3 places
    photo[0], photo[1] = torch.arange(33)[:, None], torch.arange(34)
    images = blend(torch.zeros(100, 32, 32, dtype=torch.uint8), photo, np.random.default_rng(0))
    corners = {tuple(image[:2, 0, 0].tolist()) for image in images}
    assert corners == set(itertools.product(range(2), range(3)))


def test_the_left_160_columns_of_the_photo_are_for_test_images(digits, monkeypatch):
    parts = []

    def note(shapes, part, random):
        parts.append(part)
        return torch.zeros(len(shapes), 3, 32, 32, dtype=torch.uint8)

    monkeypatch.setattr(data, "blend", note)
    colour_digits(digits.first(2, 2))
    for_training, for_testing = parts
    assert for_testing.shape == (3, 600, 160)
    assert torch.equal(torch.cat([for_testing, for_training], dim=2), load_photo())


def test_training_and_test_patches_come_from_disjoint_parts(digits, monkeypatch):
    photo = torch.zeros(3, 600, 512, dtype=torch.uint8)
    photo[:, :, :160] = 100
    monkeypatch.setattr(data, "load_photo", lambda: photo)
    blank = replace(digits.first(50, 50), train_images=torch.zeros(50, 1, 28, 28).byte(),
                    test_images=torch.zeros(50, 1, 28, 28).byte())
    coloured = colour_digits(blank)
    assert (coloured.train_images == 0).all() and (coloured.test_images == 100).all()


def test_colour_digits_are_the_digits_in_a_frame_of_two_pixels(digits, monkeypatch):
    monkeypatch.setattr(data, "load_photo", lambda: torch.zeros(3, 600, 512, dtype=torch.uint8))
    coloured = colour_digits(digits.first(3, 2))
    for images, grey in ((coloured.train_images, digits.train_images[:3]),
                         (coloured.test_images, digits.test_images[:2])):
        assert torch.equal(images, torch.nn.functional.pad(grey, (2, 2, 2, 2)).repeat(1, 3, 1, 1))


def test_first_keeps_the_name_truthful(digits):
    some = digits.first(10, 5)
    for part, count in (("train", 10), ("test", 5)):
        for kind in (f"{part}_images", f"{part}_labels"):
            assert torch.equal(getattr(some, kind), getattr(digits, kind)[:count])
    assert some.name.startswith("the first 10 + 5 of 5,000 bundled digits")
    assert digits.first(10**6).name.startswith("the first 4,000 + 1,000 of")
    coloured = replace(colour_digits(digits), stand_in=True)
    few = coloured.first(3, 2)
    assert torch.equal(few.test_masks, coloured.test_masks[:2]) and few.stand_in


def test_only_takes_the_chosen_training_images_and_all_test_images(digits):
    some = digits.only(torch.tensor([7, 3]))
    assert torch.equal(some.train_images, digits.train_images[[7, 3]])
    assert torch.equal(some.train_labels, digits.train_labels[[7, 3]])
    assert some.test_images is digits.test_images and some.name.startswith("2 training images of 5,000")


# --------------------------------------------------------------------------------- copies of CIFAR-10


def copy_of_cifar10(path, save=np.savez, **changes):
    random = np.random.default_rng(0)                            # four greys, which can be compressed
    arrays = {"train_images": random.integers(0, 4, (50, 32, 32, 3), dtype=np.uint8),
              "train_labels": np.arange(50, dtype=np.uint8) % 10,
              "test_images": random.integers(0, 4, (20, 32, 32, 3), dtype=np.uint8),
              "test_labels": np.arange(20) % 10} | changes
    save(path, **{name: array for name, array in arrays.items() if array is not None})
    return arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_copy_of_cifar10_is_used_and_called_a_copy(save, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "download", lambda *_, **__: pytest.fail("went to the network"))
    arrays = copy_of_cifar10(tmp_path / "cifar10.npz", save)
    cifar = load_cifar10(tmp_path)
    assert cifar.name == "CIFAR-10, unverified copy (50 to train, 20 to test)" and not cifar.stand_in
    assert torch.equal(cifar.train_images[7, 2], torch.from_numpy(arrays["train_images"][7, :, :, 2]))
    assert cifar.test_images.shape == (20, 3, 32, 32) and cifar.test_images.is_contiguous()
    assert cifar.train_labels.tolist() == [i % 10 for i in range(50)]
    assert cifar.classes[3] == "cat" and cifar.classes[8] == "ship"
    out = capsys.readouterr().out
    assert "unverified copy" in out and "cifar10.npz" in out and len(out.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["cifar10.npz"]


@pytest.mark.parametrize(("changes", "reason"), [
    ({"test_labels": None}, "test_labels"),
    ({"train_images": np.zeros((50, 3, 32, 32), np.uint8)}, "train_images have the shape"),
    ({"train_images": np.zeros((50, 32, 32), np.uint8)}, ""),
    ({"train_images": np.zeros((50, 32, 32, 3))}, "expected uint8"),
    ({"train_labels": np.arange(49) % 10}, r"expected int64 [50]"),
    ({"train_labels": np.arange(50)}, "expected 0..9, got 0..49"),
    ({"train_labels": np.array([{}] * 50)}, "allow_pickle"),
    ({"train_images": np.array(["a"] * 50)}, ""),
])
def test_a_copy_with_wrong_arrays_gives_the_stand_in_and_says_why(changes, reason, tmp_path, capsys):
    copy_of_cifar10(tmp_path / "cifar10.npz", **changes)
    assert_stands_in(tmp_path, capsys, "cifar10.npz should hold", reason)


@pytest.mark.parametrize("damage", [
    lambda content: content[:-300], lambda content: b"", lambda content: b"no array",
    lambda content: content[:80] + bytes(x ^ 255 for x in content[80:2000]) + content[2000:],
    lambda content: content[:5000] + bytes(x ^ 255 for x in content[5000:6000]) + content[6000:]],
    ids=["truncated", "empty", "text", "flipped at the start", "flipped in the middle"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_copy_gives_the_stand_in_and_says_why(save, damage, tmp_path, capsys):
    copy_of_cifar10(tmp_path / "cifar10.npz", save)
    (tmp_path / "cifar10.npz").write_bytes(damage((tmp_path / "cifar10.npz").read_bytes()))
    assert_stands_in(tmp_path, capsys, "cifar10.npz should hold")


def assert_stands_in(folder, capsys, *reasons):
    stand_in = load_cifar10(folder, offline=True)
    assert stand_in.stand_in and stand_in.name.startswith("colour digits")
    assert stand_in.name.endswith("a stand-in for CIFAR-10") and len(stand_in.train_images) == 4000
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and stand_in.name in out and "python -m data" in out
    assert all(reason in out for reason in reasons)


def test_without_cifar10_the_stand_in_says_what_it_is(tmp_path, capsys):
    assert_stands_in(tmp_path, capsys, "not on disk", "--offline")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- pictures of things


def test_simulated_photos_are_repeatable_and_differ(digits):
    digit, other = digits.test_images[3:5]
    photo = simulated_photo(digit, seed=2)
    assert photo.mode == "RGB" and all(240 <= side <= 480 for side in photo.size)
    assert photo.tobytes() == simulated_photo(digit, seed=2).tobytes()
    assert photo.tobytes() != simulated_photo(other, seed=2).tobytes()
    assert photo.tobytes() != simulated_photo(digit, seed=3).tobytes()
    assert photo.tobytes() != simulated_photo(torch.zeros_like(digit), seed=2).tobytes()  # it shows the digit
    random_state = torch.get_rng_state()
    sizes = {simulated_photo(digit, seed).size for seed in range(5)}
    assert len(sizes) > 3 and torch.equal(torch.get_rng_state(), random_state)


PHOTOS = [  # height, width, mean and standard deviation of each colour, difference between rows
    (466, 390, [197.15, 213.78, 210.61], [38.92, 51.31, 58.22], 1.236),
    (448, 424, [221.41, 201.93, 203.08], [31.95, 28.90, 28.55], 0.699),
    (307, 306, [166.05, 171.85, 164.53], [40.48, 41.80, 37.75], 1.484),
    (414, 474, [203.96, 182.88, 191.20], [48.29, 67.17, 67.51], 0.967),
    (367, 289, [181.57, 200.46, 197.45], [26.44, 26.54, 12.77], 0.450),
    (374, 244, [191.28, 188.09, 190.60], [58.29, 47.94, 55.75], 3.389),
    (460, 356, [26.15, 41.74, 134.33], [39.44, 34.71, 21.74], 0.726),
    (255, 280, [205.31, 208.80, 207.27], [17.73, 20.76, 23.59], 0.771),
    (455, 411, [32.10, 49.63, 151.50], [46.79, 37.80, 16.68], 1.496),
    (450, 425, [162.83, 161.46, 170.03], [51.22, 44.67, 20.99], 0.983),]


@pytest.mark.parametrize("seed", range(len(PHOTOS)))
def test_simulated_photos_are_those_with_which_section_4_8_was_measured(seed, digits):
    """Whoever changes the simulation on purpose measures 4.8 again, and puts the new numbers here."""
    height, width, means, deviations, roughness = PHOTOS[seed]
    pixels = np.asarray(simulated_photo(digits.test_images[seed], seed), dtype=float)
    assert pixels.shape == (height, width, 3)
    assert pixels.mean(axis=(0, 1)).tolist() == pytest.approx(means, abs=0.02)
    assert pixels.std(axis=(0, 1)).tolist() == pytest.approx(deviations, abs=0.02)
    assert np.abs(np.diff(pixels, axis=0)).mean() == pytest.approx(roughness, abs=0.003)  # noise, blur, JPEG


def test_some_simulated_photos_are_light_on_dark(digits):
    """So a reader of photos has to find out which is ink."""
    means = [np.asarray(simulated_photo(digits.test_images[0], seed)).mean() for seed in range(20)]
    assert 2 <= sum(mean < 128 for mean in means) <= 10


def test_printed_letters_are_drawn_whole_and_differ():
    letters = printed_letters()
    assert letters.dtype == torch.uint8 and letters.shape == (18, 1, 28, 28)
    assert len({letter.numpy().tobytes() for letter in letters}) == 18
    assert ((letters > 127).flatten(1).sum(dim=1) > 60).all()
    assert not letters[:, :, [0, 1, -2, -1]].any()               # nothing is cut off
    assert not letters[:, :, :, [0, -1]].any()
    mean = letters.double().mean(dim=(0, 1))
    places = torch.arange(28).double()
    assert (mean.sum(dim=0) @ places / mean.sum()).item() == pytest.approx(13.16, abs=0.25)
    assert (mean.sum(dim=1) @ places / mean.sum()).item() == pytest.approx(13.27, abs=0.15)
    assert mean.mean().item() == pytest.approx(43.7, abs=0.8)    # the size and weight of the font


def test_the_photo_is_in_colour():
    photo = load_photo()
    pixels = plt.imread(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))  # [600, 512, 3]
    assert photo.shape == (3, 600, 512) and photo.dtype == torch.uint8
    assert np.array_equal(photo.permute(1, 2, 0).numpy(), pixels)


def test_images_written_as_files_are_read_back(digits, tmp_path):
    for name, some in (("grey", digits.first(12, 1)), ("colour", colour_digits(digits.first(12, 1)))):
        files = write_as_files(some, tmp_path / name)
        assert len(files) == 12
        for file, image, label in zip(files, some.train_images, some.train_labels):
            pixels = torch.from_numpy(np.array(Image.open(file)))
            assert torch.equal(pixels if name == "grey" else pixels.permute(2, 0, 1), image.squeeze(0))
            assert file.parent == tmp_path / name / some.classes[label]


# --------------------------------------------------------------------- downloads and pretrained weights


@pytest.mark.parametrize(("fetch", "longest"), [
    (fetch_mnist, 4 * len(data.MNIST_MIRRORS) * 100), (fetch_cifar10, len(data.CIFAR10_URLS) * 100),
    (lambda root, limit: download(["a", "b", "c"], root / "file", "0", time_limit=limit), 3 * 100)],
    ids=["fetch_mnist", "fetch_cifar10", "download"])
def test_a_second_process_waits_as_long_as_the_first_may_take(fetch, longest, tmp_path, monkeypatch):
    """Each server may take the whole time limit for each file."""
    def refuse(path, wait):
        raise TimeoutError(wait)

    monkeypatch.setattr("data.one_process_at_a_time", refuse)
    monkeypatch.setattr("data.fetch.one_process_at_a_time", refuse)
    with pytest.raises(TimeoutError) as refused:
        fetch(tmp_path, 100)
    assert refused.value.args == (longest,)


def test_images_for_pretrained_weights_are_resized_and_normalised_as_in_their_training(tmp_path):
    for side, resized in ((224, 256), (112, 128)):               # torchvision's: 256, of which 224
        of_imagenet = resnet18_preprocessing(True, side)
        assert (of_imagenet.resize_size, of_imagenet.crop_size) == ([resized], [side])
    _, of_letters, _ = load_resnet18(tmp_path, offline=True, image_size=48)
    white = torch.full((1, 3, 300, 200), 255, dtype=torch.uint8)
    for preprocess, side, means, deviations in (
            (of_imagenet, 112, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            (of_letters, 48, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))):
        x = preprocess(white)
        assert x.shape == (1, 3, side, side)
        for channel, mean, deviation in zip(x[0], means, deviations):
            assert torch.allclose(channel, torch.full((side, side), (1 - mean) / deviation), atol=1e-4)
