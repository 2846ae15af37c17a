"""Section 4.8: digits in photos. The photos are simulated here, in another way than the tutorial does it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from convolutional_neural_networks import (RECIPES, SimpleCNN, digit_from_photo, evaluate,
                                           frame_like_mnist, ink_on_paper, only_one_digit, pieces,
                                           predict_logits, seeded, train_model)

PHOTOS = 80
PENS = {"black": (25, 25, 28), "blue": (35, 55, 160), "red": (185, 35, 45), "green": (30, 115, 60)}


def photograph(digit, seed, largest=450):
    """Return a photo of a digit `uint8 [1, 28, 28]`: each 4th in another ink, each 5th light on dark."""
    random = np.random.default_rng([2024, seed])
    width, height = random.integers(160, largest, size=2).tolist()
    side = int(random.uniform(0.4, 0.85) * min(width, height))
    stroke = Image.fromarray(digit[0].numpy()).resize((2 * side, 2 * side), Image.Resampling.LANCZOS)
    stroke = stroke.filter(ImageFilter.GaussianBlur(side / 28))
    stroke = stroke.point(lambda value: 255 if value > 100 else 0)  # a pen covers, or it does not
    stroke = stroke.rotate(random.uniform(-8, 8), Image.Resampling.BICUBIC)
    stroke = stroke.resize((side, side), Image.Resampling.BOX)
    sheet = Image.new("L", (width, height))
    sheet.paste(stroke, (random.integers(width - side + 1).item(), random.integers(height - side + 1).item()))
    covered = np.asarray(sheet)[:, :, None] / 255
    paper = np.array([random.uniform(215, 245), random.uniform(215, 245), random.uniform(195, 240)])
    ink = np.array(list(PENS.values())[seed % 4])
    if seed % 5 == 4:
        paper, ink = ink, paper
    scene = paper * (1 - covered) + ink * covered
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    lamp_y, lamp_x = random.uniform(-0.3, 1.3, size=2)
    far = (y - lamp_y) ** 2 + (x - lamp_x) ** 2
    scene *= (1.05 / (1 + random.uniform(0, 0.4) * far))[:, :, None]  # darker far from the lamp
    scene += random.normal(0, random.uniform(1, 6), size=scene.shape)
    picture = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0.3, max(width, height) / 300)))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=random.integers(35, 95).item())
    return Image.open(file)


def drawing(*lines, size=(300, 400), thick=14, sheet=(235, 232, 225), ink=(30, 30, 60)):
    """Return a picture of strokes with round ends, each a list of points (x, y)."""
    picture = Image.new("RGB", size, sheet)
    draw = ImageDraw.Draw(picture)
    for points in lines:
        draw.line(points, fill=ink, width=thick, joint="curve")
        for x, y in points:
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=ink)
    return picture


@pytest.fixture(scope="module")
def reader(digits):
    """A SimpleCNN, trained as in the tutorial."""
    with seeded(0):
        model = SimpleCNN()
    train_model(model, digits.train_images, digits.train_labels, on_epoch=None,
                **RECIPES["SimpleCNN on 5,000 digits"])
    return model


@pytest.fixture(scope="module")
def photos(digits):
    return [photograph(image, seed) for seed, image in enumerate(digits.test_images[:PHOTOS])]


@pytest.fixture(scope="module")
def prepared(photos):
    return torch.stack([digit_from_photo(photo) for photo in photos])


def difference(first, second):
    """Return the mean difference of two images, of 255."""
    return (first.float() - second.float()).abs().mean().item()


def answer(model, image):
    return predict_logits(model, image[None]).argmax().item()


# ------------------------------------------------------------------------------------- accuracy


def test_photos_of_digits_are_read_nearly_as_well_as_the_digits(reader, photos, prepared, digits):
    labels = digits.test_labels[:PHOTOS]
    accuracy = evaluate(reader, prepared, labels)[1]
    assert accuracy >= 0.93
    small = np.stack([np.asarray(photo.convert("L").resize((28, 28))) for photo in photos])
    resized = torch.from_numpy(small)[:, None]
    for merely_resized in (resized, 255 - resized):
        assert accuracy > evaluate(reader, merely_resized, labels)[1] + 0.5


def test_photos_become_the_digits_that_were_drawn(prepared, digits):
    similar = [np.corrcoef(ours.flatten(), mnist.flatten())[0, 1]
               for ours, mnist in zip(prepared, digits.test_images)]
    assert np.median(similar) > 0.86 and np.mean(np.array(similar) > 0.7) > 0.95


def test_strokes_are_as_bright_as_those_of_mnist(prepared, digits):
    assert prepared.amax(dim=(1, 2, 3)).min() > 230
    ours, mnist = ((images > 127).float().mean().item() for images in (prepared, digits.test_images))
    assert ours == pytest.approx(mnist, rel=0.35), "another share of bright pixels"
    assert (prepared == 0).float().mean() > 0.6, "the paper is not black"


# --------------------------------------------------------------------------------- size and place


def test_the_result_is_framed_as_in_mnist(prepared):
    assert prepared.dtype == torch.uint8 and prepared.shape == (PHOTOS, 1, 28, 28)
    for image in prepared[:, 0].numpy().astype(float):
        rows, columns = image.any(axis=1).nonzero()[0], image.any(axis=0).nonzero()[0]
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert 19 <= max(height, width) <= 20, "the digit does not fill a box of 20 pixels"


def centres_of_mass(images):
    """Return `[N, 2]`: rows and columns."""
    images = images[:, 0].double()
    pixels, mass = torch.arange(28.0).double(), images.sum(dim=(1, 2))
    return torch.stack([images.sum(dim=2) @ pixels / mass, images.sum(dim=1) @ pixels / mass], dim=1)


def test_the_centre_of_mass_lies_where_mnist_puts_it(prepared, digits):
    """In MNIST it lies at pixel 14 of 0 to 27, but for rounding by up to half a pixel."""
    for images in (digits.test_images, prepared):
        centres = centres_of_mass(images)
        assert (centres - 14).abs().quantile(0.98) < 0.52
        assert centres.mean(dim=0).tolist() == pytest.approx([14, 14], abs=0.12)


@pytest.mark.parametrize(("height", "width"), [
    (100, 50), (50, 100), (7, 90), (90, 7), (20, 20), (300, 299), (2, 90), (90, 2)])
def test_a_box_of_20_pixels_keeps_the_proportions(height, width):
    image = frame_like_mnist(torch.ones(height, width))[0].float()
    scale = 20 / max(height, width)
    assert (image.amax(dim=1) > 127).sum() == max(1, round(height * scale))
    assert (image.amax(dim=0) > 127).sum() == max(1, round(width * scale))
    assert image.max() == 255


def test_a_digit_that_is_heavy_on_one_side_is_placed_by_its_centre_of_mass():
    ink = torch.zeros(40, 40)
    ink[:, :26] = 1                                              # all ink at the left …
    ink[19:21] = 1                                               # … but for a thin bar
    image = frame_like_mnist(ink)
    (row, column), = centres_of_mass(image[None]).tolist()
    assert row == pytest.approx(14, abs=0.51) and column == pytest.approx(14, abs=0.51)
    filled = (image[0].sum(dim=0) > 0).nonzero()[:, 0]           # the bar's right end lies at the border
    assert (filled[0], filled[-1]) == (8, 27), "placed by its box, not by its mass"


def test_the_size_of_the_photo_does_not_matter(digits):
    large = photograph(digits.test_images[2], 2).convert("RGB").resize((1500, 1200))
    small = large.resize((300, 240), Image.Resampling.BOX)
    assert difference(digit_from_photo(large), digit_from_photo(small)) < 4


def test_dark_on_light_is_the_same_as_light_on_dark(photos, prepared):
    for photo, expected in zip(photos[:20], prepared):
        inverted = ImageOps.invert(photo.convert("RGB"))
        assert difference(digit_from_photo(inverted), expected) < 1.5


def test_ink_on_paper_is_zero_on_unevenly_lit_paper_and_not_on_the_stroke():
    """Dark corners, as lenses make them, and a thick stroke that covers a tenth of the sheet."""
    y, x = np.mgrid[-1:1:240j, -1:1:320j]
    light = (1 - 0.15 * x - 0.2 * (x * x + y * y))[:, :, None]
    paper, red = np.array([230.0, 225, 205]) * light, np.array([180.0, 40, 40]) * light
    pixels = paper.copy()
    pixels[40:200, 20:70] = red[40:200, 20:70]
    ink = ink_on_paper(pixels.round().astype(np.uint8))
    assert ink.shape == (120, 160) and ink.dtype == torch.float32
    distance = np.linalg.norm(paper - red, axis=2)[::2, ::2]     # of the two colours, in this light
    share = ink[22:98, 12:33] / torch.from_numpy(distance)[22:98, 12:33]
    assert 0.95 < share.min() and share.max() < 1.05
    assert torch.cat([ink[:, :8], ink[:, 37:]], dim=1).max() < 2


INK = [([160, 104], 343.53, 9.463), ([70, 160], 289.05, 2.692), ([160, 158], 259.35, 21.419),
       ([160, 78], 257.60, 13.750), ([160, 93], 313.88, 8.016), ([160, 89], 278.42, 8.356),
       ([160, 104], 255.55, 13.401), ([160, 74], 302.59, 6.591)]  # shape, largest, mean


@pytest.mark.parametrize("seed", range(len(INK)))
def test_the_ink_of_photos_is_what_it_was_when_section_4_8_was_measured(seed, photos):
    """Whoever changes how the paper is fitted measures 4.8 again, and puts the new numbers here."""
    ink = ink_on_paper(photos[seed])
    shape, largest, mean = INK[seed]
    assert list(ink.shape) == shape
    assert ink.max().item() == pytest.approx(largest, rel=0.005)  # other versions of Pillow, other JPEG
    assert ink.mean().item() == pytest.approx(mean, rel=0.01)


def test_only_what_differs_enough_from_the_paper_is_ink():
    for darker, is_ink in ((11, False), (12, True)):             # in three colours: 19.1 and 20.8
        sheet = np.full((160, 120, 3), 200, np.uint8)
        sheet[40:80, 40:50] -= darker
        if is_ink:
            assert ink_on_paper(sheet).max().item() == pytest.approx(darker * 3 ** 0.5, abs=0.1)
        else:
            with pytest.raises(ValueError, match="nothing stands out"):
                ink_on_paper(sheet)


def test_four_times_the_usual_difference_is_not_ink_but_the_paper_s_texture():
    sheet = np.full((160, 120, 3), 200, np.uint8)
    for top in range(0, 160, 8):                                 # stripes, each 2 darker or lighter
        sheet[top:top + 4] += 2
        sheet[top + 4:top + 8] -= 2
    sheet[60:100, 50:62] = 100
    ink = ink_on_paper(sheet)
    assert ink[62:98, 52:60].mean().item() == pytest.approx((100 - 4 * 2) * 3 ** 0.5, abs=2)
    assert ink.count_nonzero() == pytest.approx(40 * 12, abs=8)  # but for the rounded corners


def test_ink_of_different_strength_becomes_even():
    ink = torch.ones(60, 60)
    ink[:, 40:] = 4                                              # where the pen rested
    image = frame_like_mnist(ink)[0]
    assert (image > 0).sum() == 400 and image[image > 0].min() == 255


@pytest.mark.parametrize("strength", [0.01, 1, 1000])
def test_faint_ink_becomes_as_bright_as_strong_ink(strength):
    """Half of the ink is full: what is as strong as the median, or stronger."""
    ink = torch.zeros(20, 20)
    ink[:, :10], ink[:8, 10:] = strength, strength / 2           # 200 pixels, and 80 half as strong
    image = frame_like_mnist(ink)[0]
    assert (image == 255).sum() == 200 and (image == 128).sum() == 80


def test_the_brightest_tenth_of_the_box_is_white_on_average():
    ink = torch.zeros(20, 20)
    ink[0, :], ink[-1, :4], ink[-1, 4:] = 1, 1, 0.4              # 24 pixels, and 16 that are weaker
    image = frame_like_mnist(ink)[0]
    weaker = 0.4 / ((24 + 16 * 0.4) / 40)                        # 40 of 400 pixels are the brightest tenth
    assert (image == 255).sum() == 24 and (image == round(255 * weaker)).sum() == 16


def test_fine_texture_is_averaged_and_not_left_out():
    """Lines of 3 pixels with gaps of 4: none of them may fall between the pixels of the small image."""
    ink = torch.zeros(140, 140)
    for top in range(0, 140, 7):
        ink[top:top + 3] = 1
    box = frame_like_mnist(ink)[0].float()
    rows = box.amax(dim=1)
    assert (rows > 0).sum() == 20 and rows[rows > 0].min() > 150


# ------------------------------------------------------------------------------- kinds of pictures


@pytest.mark.parametrize("name", ["my digit.jpg", "été 五.png", "a #1 'quoted'.bmp"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_file_names_of_all_kinds_are_taken(tmp_path, photos, prepared, name, kind):
    path = tmp_path / name
    photos[3].convert("RGB").save(path, **({"quality": 95} if name.endswith("jpg") else {}))
    assert difference(digit_from_photo(kind(path)), prepared[3]) < 2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK"])
def test_pictures_of_all_modes_are_taken(photos, prepared, mode):
    photo = photos[0].convert("RGB").convert(mode)               # black ink: grey says as much
    assert photo.mode == mode
    assert difference(digit_from_photo(photo), prepared[0]) < 3


def test_arrays_are_taken(photos, prepared):
    rgb, grey = np.array(photos[0].convert("RGB")), np.array(photos[0].convert("L"))
    assert rgb.ndim == 3 and grey.ndim == 2
    before = rgb.copy()
    assert torch.equal(digit_from_photo(rgb), prepared[0])
    assert difference(digit_from_photo(grey), prepared[0]) < 3
    assert np.array_equal(rgb, before)


def test_digits_of_mnist_become_what_they_were(digits, reader):
    """White on black, 28×28, and no noise at all. Number 117 is a 7 with a thin place, 260 a thick 0."""
    chosen = [*range(40), 117, 260, 640]
    mnist, labels = digits.test_images[chosen], digits.test_labels[chosen]
    ours = torch.stack([digit_from_photo(image[0].numpy()) for image in mnist])
    similar = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(ours, mnist)]
    assert np.median(similar) > 0.95
    assert evaluate(reader, ours, labels)[1] >= evaluate(reader, mnist, labels)[1] - 0.03


def test_a_photo_is_turned_upright_as_its_exif_data_say(tmp_path, photos):
    upright = photos[2].convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6                                             # the camera was held sideways
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert difference(digit_from_photo(tmp_path / "a.jpg"), digit_from_photo(upright)) < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_black_ink_on_a_transparent_sheet_is_seen(digits, mode):
    """As drawing programs save it: every pixel is black, and only its opacity tells what is ink."""
    digit = Image.fromarray(digits.test_images[3, 0].numpy())
    opacity = digit.resize((280, 280), Image.Resampling.BICUBIC)
    picture = Image.new(mode, (280, 280))
    picture.putalpha(opacity)
    on_white = ImageOps.invert(opacity)                          # what a viewer shows
    assert difference(digit_from_photo(picture), digit_from_photo(on_white)) < 2


# ------------------------------------------------------------------------------- one digit or not


def noisy_sheet(level, noise, shape=(300, 200, 3)):
    return np.random.default_rng(0).normal(level, noise, shape).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("sheet", [
    np.full((300, 200, 3), 255, np.uint8), np.zeros((200, 300), np.uint8), noisy_sheet(230, 8),
    noisy_sheet(128, 30), noisy_sheet(40, 3),
    np.linspace(100, 230, 200).astype(np.uint8)[None].repeat(300, axis=0),
], ids=["white", "black", "noise", "strong noise", "dark", "uneven light"])
def test_an_empty_sheet_is_told(sheet):
    with pytest.raises(ValueError, match="^digit_from_photo: nothing stands out from the paper"):
        digit_from_photo(sheet)


ONE, SEVEN = [(0, 0), (-5, 150)], [(0, 0), (80, 0), (30, 150)]
ZERO = [(40 + 40 * np.cos(t), 75 + 75 * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 40)]


def moved(points, right, down):
    return [(x + right, y + down) for x, y in points]


@pytest.mark.parametrize(("second", "gap"), [(ONE, 40), (SEVEN, 40), (ZERO, 40), (SEVEN, 110)])
@pytest.mark.parametrize("first", [ONE, SEVEN, ZERO])
def test_two_digits_side_by_side_are_told(first, second, gap):
    width = max(x for x, _ in first)
    picture = drawing(moved(first, 60, 100), moved(second, 60 + width + gap + 14, 110), size=(500, 400))
    with pytest.raises(ValueError, match="^digit_from_photo: several digits side by side; cut the picture"):
        digit_from_photo(picture)


@pytest.mark.parametrize("first", [ONE, SEVEN, ZERO])
@pytest.mark.parametrize("second", [ONE, SEVEN, ZERO])
def test_two_digits_above_each_other_are_told(first, second):
    picture = drawing(moved(first, 100, 20), moved(second, 110, 220))
    with pytest.raises(ValueError, match="^digit_from_photo: several digits above each other; cut"):
        digit_from_photo(picture)


def test_pairs_of_real_digits_are_told(digits):
    """Digits of the test set side by side, a quarter of their height apart."""
    told = 0
    for index in range(30):
        pair = []
        for image in digits.test_images[[index, 2 * index + 31], 0]:
            columns = (image.amax(dim=0) > 60).nonzero()[:, 0]
            pair += [image[:, columns[0]:columns[-1] + 1], torch.zeros(28, 5, dtype=torch.uint8)]
        picture = Image.fromarray(torch.cat([pair[1], *pair], dim=1).numpy())
        try:
            digit_from_photo(picture.resize((8 * picture.width, 8 * picture.height)))
        except ValueError as error:
            told += "several digits side by side" in str(error)
    assert told >= 29


CURVE = [(135 + 55 * np.cos(t), 235 + 55 * np.sin(t)) for t in np.linspace(-2.3, 2.6, 40)]
GAPS = {  # of 8 pixels in a digit that is 200 high, between strokes that are 14 thick
    "5, bar begins too far right": (5, [(110, 100), (105, 190), *CURVE], [(132, 100), (200, 100)]),
    "5, bar too high": (5, [(110, 110), (105, 190), *CURVE], [(105, 88), (190, 88)]),
    "4, bar too short": (4, [(110, 100), (95, 180), (153, 180)], [(175, 90), (175, 300)]),
    "4, low bar too short": (4, [(110, 100), (95, 210), (153, 210)], [(175, 90), (175, 300)])}


@pytest.mark.parametrize("case", GAPS)
def test_a_digit_with_a_small_gap_in_its_stroke_is_one_digit(case, reader):
    digit, *strokes = GAPS[case]
    picture = drawing(*strokes)
    assert answer(reader, digit_from_photo(picture)) == digit


def test_a_speck_beside_the_digit_does_not_matter():
    digit = moved(SEVEN, 100, 120)
    clean, with_speck = drawing(digit), drawing(digit, [(280, 30), (282, 30)], [(15, 380), (15, 380)])
    assert difference(digit_from_photo(clean), digit_from_photo(with_speck)) < 1


def test_pieces_are_parted_by_zeros_and_specks_are_left_out():
    ink = torch.tensor([0, 3, 4, 0, 0, 1, 0, 5, 0.5, 0, 9])
    assert pieces(ink) == [(1, 3), (7, 9), (10, 11)]             # the 1 of 22.5 is a speck
    assert pieces(torch.ones(4)) == [(0, 4)]
    assert pieces(torch.tensor([1.0, 0, 9])) == [(2, 3)], "a tenth of the ink is a speck"
    assert pieces(torch.tensor([1.1, 0, 9])) == [(0, 1), (2, 3)]


def test_only_the_box_around_the_ink_is_kept():
    ink = torch.zeros(50, 60)
    ink[10:31, 20:34] = 8
    ink[0, 0] = 2.0                                              # a quarter of the ink is not enough
    assert torch.equal(only_one_digit(ink), torch.full((21, 14), 8.0))
    ink[5:10, 20:34] = 2.1                                       # this is more
    assert only_one_digit(ink).shape == (26, 14)


def bars(left, right, gap, speck=False):
    """Two upright strokes of these heights, so many columns apart; perhaps a speck at the upper left."""
    ink = torch.zeros(120, 60)
    ink[120 - left:, 10:20] = 1
    ink[120 - right:, 20 + gap:30 + gap] = 1
    if speck:
        ink[:3, 5:11] = 1
    return ink


@pytest.mark.parametrize("speck", [False, True])
@pytest.mark.parametrize(("left", "right", "gap", "several"), [
    (100, 100, 9, True), (100, 100, 8, False),                   # a gap of more than 8% of the height
    (100, 51, 9, True), (100, 50, 9, False), (51, 100, 9, True), (50, 100, 9, False),
    (40, 100, 9, False), (100, 40, 9, False)])                   # and both more than half as high
def test_digits_beside_each_other_are_tall_and_apart(left, right, gap, several, speck):
    ink = bars(left, right, gap, speck)
    if several:
        with pytest.raises(ValueError, match="several digits side by side"):
            only_one_digit(ink)
    else:
        assert only_one_digit(ink).shape == (100, 20 + gap)


@pytest.mark.parametrize(("parts", "gap", "several"), [
    ([43, 50], 7, True), ([44, 50], 6, False),                   # a gap of more than 6% of the height
    ([34, 59], 7, True), ([33, 60], 7, False), ([60, 33], 7, False),  # and each more than a third as high
    ([10], 0, False)])
def test_digits_above_each_other_are_tall_and_apart(parts, gap, several):
    ink = torch.zeros(sum(parts) + gap, 20)
    ink[:parts[0]], ink[-parts[-1]:] = 1, 1
    if several:
        with pytest.raises(ValueError, match="several digits above each other"):
            only_one_digit(ink)
    else:
        assert torch.equal(only_one_digit(ink), ink)
