"""Section 6 of the tutorial on a folder of one's own pictures: `train_on_folder` and `predict`."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms import v2
from tqdm import tqdm

from data import ImageData, load_resnet18, resnet18_preprocessing
from data.checkpoints import write_whole
from data.options import with_error

FORMAT = "cnn tutorial, pictures, 1"


def write_as_files(data: ImageData, folder: str | Path) -> list[Path]:
    """Write the training images as PNG files, a sub-folder for each class; return the files."""
    files = []
    for index, (image, label) in enumerate(zip(data.train_images.cpu(), data.train_labels.tolist())):
        file = Path(folder) / data.classes[label] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(file)
        files.append(file)
    return files


def load_picture(path: str | Path, image_size: int) -> Tensor:
    """Return a picture of any size, format and mode as `uint8 [3, image_size, image_size]`.

    It is turned as its EXIF data say, what is transparent becomes white, its middle square is cut.

    Raises:
        OSError: the file is missing, is no picture or is cut off.
    """
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "I;16", "F"):  # more than 8 bits: scale to them
                values = np.asarray(picture, dtype=np.float64)
                low, high = values.min(), values.max()
                values = (values - low) / max(high - low, 1e-9) * 255
                picture = Image.fromarray(values.astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            array = np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError,
            OSError) as error:
        reason = "is no picture" if isinstance(error, UnidentifiedImageError) else (
            getattr(error, "strerror", None) or str(error))
        raise OSError(f"{path}: {reason}") from None
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    return v2.functional.center_crop(
        v2.functional.resize(tensor, [image_size], antialias=True), [image_size])


@dataclass
class Pictures:
    """A folder of pictures: `uint8 [N, 3, S, S]`, labels `int64 [N]`, and which are for what."""

    images: Tensor
    labels: Tensor
    classes: list[str]
    files: list[Path]
    train: Tensor  # indices
    validation: Tensor


def load_folder(folder: str | Path, image_size: int, validation: float = 0.2,
                seed: int = 0) -> Pictures:
    """Read a folder with one sub-folder a class, or with `train/` and `val/` that are such folders.

    Files that cannot be read are skipped, named and counted.

    Args:
        validation: the share of each class, at least one picture, that is put aside to validate
            with, if there are no `train/` and `val/`.

    Raises:
        ValueError: not a folder, fewer than two classes, other classes in `train/` than in `val/`,
            or a class with too few pictures.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with one sub-folder a class")
    if not 0 < validation < 1:
        raise ValueError(f"validation: expected a share between 0 and 1, got {validation}")
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        first, second = (_read(folder / part, image_size, 1) for part in ("train", "val"))
        if first[2] != second[2]:
            raise ValueError(f"{folder}: expected the same sub-folders in train/ and val/, "
                             f"got {first[2]} and {second[2]}")
        images, labels = (torch.cat([first[i], second[i]]) for i in (0, 1))
        count = len(first[1])
        return Pictures(images, labels, first[2], first[3] + second[3],
                        torch.arange(count), torch.arange(count, len(labels)))
    images, labels, classes, files = _read(folder, image_size, 2)
    random, train, held_out = torch.Generator().manual_seed(seed), [], []
    for label in range(len(classes)):
        indices = torch.nonzero(labels == label).flatten()
        indices = indices[torch.randperm(len(indices), generator=random)]
        count = min(max(1, round(validation * len(indices))), len(indices) - 1)
        held_out.append(indices[:count])
        train.append(indices[count:])
    return Pictures(images, labels, classes, files, torch.cat(train), torch.cat(held_out))


def _read(folder: Path, image_size: int,
          least: int) -> tuple[Tensor, Tensor, list[str], list[Path]]:
    """Read all pictures below `folder`; each class must have `least`."""
    classes = sorted(path.name for path in folder.iterdir()
                     if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{folder}: expected at least two sub-folders, one a class, got {classes}")
    images, labels, files, skipped = [], [], [], []
    found = [(path, label) for label, name in enumerate(classes)
             for path in sorted((folder / name).rglob("*"))
             if path.is_file() and not path.name.startswith(".")]
    for path, label in tqdm(found, f"reading {folder.name}", disable=None, leave=False):
        try:
            images.append(load_picture(path, image_size))
            labels.append(label)
            files.append(path)
        except OSError as error:
            skipped.append(str(error))
    if skipped:
        print(f"skipped {len(skipped)} of {len(found)} files:", *skipped, sep="\n  ")
    counts = {name: labels.count(label) for label, name in enumerate(classes)}
    if min(counts.values()) < least:
        raise ValueError(f"{folder}: expected at least {least} readable pictures a class, "
                         f"got {counts}")
    return torch.stack(images), torch.tensor(labels), classes, files


def report_mistakes(pictures: Pictures, probabilities: Tensor, most: int = 5) -> None:
    """Print the confusion matrix of the validation pictures and the most confident mistakes."""
    labels, classes = pictures.labels[pictures.validation], pictures.classes
    confidence, answers = probabilities.max(dim=1)
    print("true class: how often each class was answered")
    for label, name in enumerate(classes):
        counts = answers[labels == label].bincount(minlength=len(classes)).tolist()
        print(f"  {name}: " + ", ".join(f"{n}× {classes[i]}" for i, n in enumerate(counts) if n))
    wrong = torch.nonzero(answers != labels).flatten()
    for i in wrong[confidence[wrong].argsort(descending=True)][:most].tolist():
        file = pictures.files[pictures.validation[i]]
        print(f"  mistake: {file.parent.name}/{file.name} taken for "
              f"{classes[answers[i]]} ({confidence[i]:.0%})")


def save_model(path: str | Path, model: nn.Module, classes: Sequence[str], imagenet: bool,
               image_size: int) -> None:
    """Write a ResNet-18 with what `load_model` needs to use it; `path` appears only whole."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    write_whole(Path(path), {"format": FORMAT, "classes": list(classes), "imagenet": imagenet,
                             "image_size": image_size, "state_dict": state})


def load_model(path: str | Path) -> tuple[nn.Module, nn.Module, list[str], int]:
    """Return what `save_model` wrote: the model, its preprocessing, its classes and image size.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, of another version, or not one of ours.
    """
    wrong = ValueError(f"{path}: expected a model file written by train_on_folder ({FORMAT!r})")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such model file; train_on_folder writes one") from None
    except (pickle.UnpicklingError, IndexError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise wrong from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise wrong
    model = resnet18(num_classes=len(saved["classes"]))
    try:
        model.load_state_dict(saved["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise wrong from error
    preprocess = resnet18_preprocessing(saved["imagenet"], saved["image_size"])
    return model.eval(), preprocess, saved["classes"], saved["image_size"]


def train_on_folder(folder: str | Path, model_file: str | Path = "pictures.pt", *,
                    image_size: int | None = None, validation: float = 0.2, epochs: int = 30,
                    seed: int = 0, data_dir: str | Path | None = None,
                    offline: bool = False,
                    device: torch.device | None = None) -> dict[str, float]:
    """Train ResNet-18 on a folder of pictures, one sub-folder a class, and write `model_file`.

    Args:
        image_size: side length in pixels that the network sees (default: 224, or 32 with letters).
        validation: share of each class to test with, if there are no `train/` and `val/`.
        data_dir, offline: where the pretrained weights come from, as for `load_resnet18`.
        device: to train on; default: the best there is.

    Returns:
        Accuracy on the validation pictures (0..1) after "feature extraction" and "fine-tuning".

    Raises:
        ValueError: the folder, or a class, is not as expected. OSError: a file cannot be written.
    """
    from convolutional_neural_networks import new_head, run_frozen, split_at, train_tail

    if Path(model_file).is_dir() or not Path(model_file).absolute().parent.is_dir():
        raise OSError(f"{model_file}: expected the name of a file in a folder that exists")
    backbone, preprocess, description = load_resnet18(data_dir, offline, image_size=image_size)
    imagenet = backbone.fc.out_features == 1000
    image_size = image_size or (224 if imagenet else 32)
    pictures = load_folder(folder, image_size * 8 // 7, validation, seed)
    train, held_out, labels = pictures.train, pictures.validation, pictures.labels
    print(f"{description}\n{len(train)} pictures to train, {len(held_out)} to validate, "
          f"classes: {', '.join(pictures.classes)}")
    device = (device or torch.accelerator.current_accelerator(check_available=True)
              or torch.device("cpu"))
    model, scores = new_head(backbone.to(device), len(pictures.classes), seed), {}
    for name, first, rate in (("feature extraction", "fc", 1e-2), ("fine-tuning", "layer4", 1e-3)):
        frozen, tail = split_at(model, first)
        features = run_frozen(frozen, pictures.images, preprocess)
        train_tail(tail, features[train], labels[train], epochs=epochs, head_rate=rate,
                   body_rate=rate / 10, seed=seed)
        with torch.no_grad():
            probabilities = tail(features[held_out]).softmax(dim=1).cpu()
        scores[name] = (probabilities.argmax(dim=1) == labels[held_out]).float().mean().item()
        print(f"{name}: validation accuracy {with_error(scores[name], len(held_out))}")
    report_mistakes(pictures, probabilities)
    save_model(model_file, model, pictures.classes, imagenet, image_size)
    return scores


def predict(files: Sequence[str | Path], model_file: str | Path = "pictures.pt",
            top: int = 3) -> list[list[tuple[str, float]]]:
    """Return, and print, the `top` classes of each picture with their probabilities.

    Raises:
        OSError: a file is missing or no picture. ValueError: `model_file` is not one of ours.
    """
    model, preprocess, classes, image_size = load_model(model_file)
    answers = []
    for file in [files] if isinstance(files, (str, Path)) else files:
        with torch.no_grad():
            logits = model(preprocess(load_picture(file, image_size * 8 // 7)[None]))[0]
        best = logits.softmax(dim=0).topk(min(top, len(classes)))
        answers.append([(classes[index], probability) for probability, index
                        in zip(best.values.tolist(), best.indices.tolist())])
        print(f"{Path(file).name}: " + ", ".join(f"{name} ({p:.0%})" for name, p in answers[-1]))
    return answers
