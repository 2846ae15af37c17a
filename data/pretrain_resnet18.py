"""Make `resnet18_letters.pth`: torchvision's ResNet-18, trained on letters in matplotlib's fonts.

    python data/pretrain_resnet18.py

No network is needed. Letters, upper and lower case with look-alikes merged (37 classes), are drawn
at random sizes, angles, slants, strokes and places, and blended with photo patches.
"""

import argparse
import functools
import hashlib
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.models import resnet18
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convolutional_neural_networks import evaluate, random_shift, train_model  # noqa: E402
from data import HERE, blend, load_photo  # noqa: E402
from data.fetch import write_whole  # noqa: E402
from data.run import with_error  # noqa: E402

MERGED = "CIJKLMOPSUVWXYZ"  # these look alike in both cases once they are scaled
CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ") + tuple("abdefghnqrt")
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
         "DejaVuSerif-Italic", "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral",
         "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10"]


def letter(text: str, font: ImageFont.FreeTypeFont, random: np.random.Generator) -> np.ndarray:
    """Draw one letter, `uint8 [32, 32]`, white on black."""
    canvas = Image.new("L", (64, 64))
    ImageDraw.Draw(canvas).text((32, 32), text, fill=255, font=font, anchor="mm",
                                stroke_width=int(random.integers(0, 3)))
    box = canvas.getbbox() or (0, 0, 64, 64)
    angle, slant = random.uniform(-0.26, 0.26), random.uniform(-0.3, 0.3)
    zoom = max(box[2] - box[0], box[3] - box[1]) / random.uniform(17, 25)
    centre = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, slant], [0, 1]])  # from the output's pixels to the canvas's
    offset = centre - matrix @ (np.array([16, 16]) + random.uniform(-3, 3, size=2))
    return np.asarray(canvas.transform(
        (32, 32), Image.Transform.AFFINE, (*matrix[0], offset[0], *matrix[1], offset[1]),
        Image.Resampling.BILINEAR))


def letters(count: int, photo: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `count` letters on patches of `photo`: `uint8 [count, 3, 32, 32]` and labels."""
    random = np.random.default_rng(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 40) for name in FONTS]
    labels = random.integers(len(CLASSES), size=count)
    drawn = np.empty((count, 32, 32), np.uint8)
    for i in trange(count, desc="drawing letters", disable=None):
        text = CLASSES[labels[i]]
        text = text.lower() if text in MERGED and random.random() < 0.5 else text
        drawn[i] = letter(text, fonts[random.integers(len(fonts))], random)
    return blend(torch.from_numpy(drawn), photo, random), torch.from_numpy(labels)


def main() -> None:
    """Draw the letters, train, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=Path, default=HERE / "resnet18_letters.pth")
    options = parser.parse_args()
    photo = load_photo()  # the same split of it as for colour digits
    images, labels = letters(options.images, photo[:, :, 160:], seed=1)
    test_images, test_labels = letters(5_000, photo[:, :, :160], seed=2)
    torch.manual_seed(0)
    model = resnet18(num_classes=len(CLASSES))
    checkpoint = options.output.with_suffix(".checkpoint")  # interrupted, it goes on from there
    history = train_model(model, images, labels, epochs=options.epochs, batch_size=128,
                          learning_rate=2e-3, validation=0.05,
                          augment=functools.partial(random_shift, pixels=2), checkpoint=checkpoint)
    _, accuracy = evaluate(model, test_images, test_labels)
    seconds = sum(row["seconds"] for row in history)
    print(f"{with_error(accuracy, 5_000)} of 5,000 test letters, {seconds:.0f} s", flush=True)
    running = ("running_mean", "running_var")  # BatchNorm's statistics stay in single precision
    state = {name: value.half() if value.is_floating_point() and not name.endswith(running)
             else value for name, value in model.state_dict().items()}
    file = io.BytesIO()
    torch.save({"state_dict": state, "classes": list(CLASSES), "accuracy": accuracy}, file)
    content = file.getvalue()
    write_whole(options.output, content)
    checkpoint.unlink()
    print(f"{options.output.name}: {len(content) / 1e6:.1f} MB, "
          f"SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
