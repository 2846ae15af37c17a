"""On a GPU or the like: the same answers as on the CPU, with images and labels that lie on the CPU.

TF32 is off here. It rounds numbers to 11 bits, and so hides the differences that these tests look for.
"""

import copy
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch

import convolutional_neural_networks as tutorial
import data.run
from cells import demonstrations
from convolutional_neural_networks import (
    EarlyStopping, LeNet5, SimpleCNN, SmallVGG, best_device, choose_speed, class_activation_map,
    deep_network, evaluate, feature_maps, grad_cam, new_head, predict, predict_logits,
    random_affine, random_shift, run, run_frozen, saliency_map, seeded, shift_and_flip, slide, split_at,
    standardize, tail_accuracy, train_epoch, train_model, train_on_folder, train_tail)
from data import colour_digits, load_bundled_digits, load_resnet18, write_as_files

DEVICE = best_device()
CPU = torch.device("cpu")
pytestmark = [pytest.mark.accelerator,
              pytest.mark.skipif(DEVICE.type == "cpu", reason="PyTorch finds no accelerator on this machine")]

DIGITS = load_bundled_digits().first(400, 100)
COLOUR = colour_digits(DIGITS)
BRIEFLY = dict(epochs=4, batch_size=50, on_epoch=None)           # 8 steps an epoch: 360 images, 40 put aside
WITHOUT_NOISE = partial(SmallVGG, channels=(8, 16), dropout=0.0)
WITH_DROPOUT = partial(SmallVGG, channels=(8, 16), dropout=0.3)
KINDS = {"SimpleCNN": (SimpleCNN, DIGITS), "LeNet5": (LeNet5, DIGITS), "SmallVGG": (WITHOUT_NOISE, COLOUR),
         "deep network": (partial(deep_network, 3, residual=True), COLOUR)}


@pytest.fixture(autouse=True)
def exact():
    """Convolutions and products in full single precision."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, value in zip(settings, before):
        setting.allow_tf32 = value


def fresh(make, device=CPU):
    torch.manual_seed(0)
    return make().to(device)


def two_of(make):
    """The same network on the CPU and on the accelerator, in evaluation mode."""
    model = fresh(make).eval()
    return model, copy.deepcopy(model).to(DEVICE)


def lies_on(model):
    return {value.device.type for value in model.state_dict().values()}


def close(ours, theirs, tolerance=1e-3):
    return torch.allclose(ours.detach().cpu(), theirs.detach().cpu(), rtol=tolerance, atol=tolerance)


def numbers_of(model):
    return torch.cat([value.flatten().cpu() for value in model.state_dict().values()
                      if value.is_floating_point()])


def mean_difference(a, b):
    return (numbers_of(a) - numbers_of(b)).abs().mean().item()


def losses(history):
    return [value for row in history for value in (row["train_loss"], row["val_loss"])]


def stop_after_two(row):
    return row["epoch"] == 2


# ------------------------------------------------------------------------------------- random draws


def test_seeded_draws_repeat_and_the_generator_goes_on_as_if_nothing_had_happened():
    def draw():
        return torch.rand(3, device=DEVICE)

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    with seeded(1, 2):
        inside = draw()
    with seeded(1, 2):
        assert torch.equal(draw(), inside)
    assert torch.equal(draw(), second) and not torch.equal(inside, second)


@pytest.mark.parametrize("augment", [random_shift, random_affine, shift_and_flip])
def test_augmentations_draw_where_the_images_are(augment):
    images = COLOUR.train_images[:50].to(DEVICE)
    changed = augment(images)
    assert changed.device == images.device and changed.dtype == torch.uint8 and changed.shape == images.shape
    assert not torch.equal(changed, images) and 0.7 < changed.float().mean() / images.float().mean() < 1.3


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_is_that_of_the_cpu(kind):
    make, images = KINDS[kind]
    here, there = two_of(make)
    logits = predict_logits(there, images.test_images)
    assert logits.device.type == "cpu" and close(logits, predict_logits(here, images.test_images))
    on_device = images.test_images.to(DEVICE), images.test_labels.to(DEVICE)
    assert torch.equal(predict_logits(there, on_device[0]), logits)
    expected = evaluate(here, images.test_images, images.test_labels)
    for given in (on_device, (images.test_images, images.test_labels)):
        assert evaluate(there, *given) == pytest.approx(expected, abs=0.011)  # one image may tip over


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_nearly_that_of_the_cpu(kind):
    make, images = KINDS[kind]
    models, histories = [fresh(make), fresh(make, DEVICE)], []
    untrained = fresh(make)
    given = images.train_images.clone()
    for model in models:
        histories.append(train_model(model, given, images.train_labels, **BRIEFLY))
    assert losses(histories[1]) == pytest.approx(losses(histories[0]), abs=0.1)
    assert losses(histories[1])[:1] == pytest.approx(losses(histories[0])[:1], abs=0.02)
    assert mean_difference(*models) < 0.3 * mean_difference(models[0], untrained)
    assert lies_on(models[1]) == {DEVICE.type} and torch.equal(given, images.train_images)


def test_a_few_steps_are_those_of_the_cpu():
    here, there = fresh(WITHOUT_NOISE), fresh(WITHOUT_NOISE, DEVICE)
    batches = torch.arange(150).split(50)
    both = [train_epoch(model, batches, COLOUR.train_images, COLOUR.train_labels,
                        torch.optim.SGD(model.parameters(), lr=0.01)) for model in (here, there)]
    assert both[1].device.type == "cpu" and close(*both) and mean_difference(here, there) < 1e-4


def test_with_augmentation_and_dropout_a_seed_gives_the_same_training_again():
    settings = BRIEFLY | dict(augment=shift_and_flip)
    histories = [train_model(fresh(WITH_DROPOUT, DEVICE), COLOUR.train_images, COLOUR.train_labels,
                             seed=seed, **settings) for seed in (0, 0, 1)]
    assert losses(histories[0]) == pytest.approx(losses(histories[1]), abs=0.02)
    assert losses(histories[0]) != pytest.approx(losses(histories[2]), abs=0.02)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_format_trains(precision, channels_last):
    model = fresh(WITHOUT_NOISE, DEVICE)
    settings = BRIEFLY | {"validation": 0}
    plain = train_model(fresh(WITHOUT_NOISE), COLOUR.train_images, COLOUR.train_labels, **settings)
    history = train_model(model, COLOUR.train_images, COLOUR.train_labels, precision=precision,
                          channels_last=channels_last, **settings)
    assert losses(history)[::2] == pytest.approx(losses(plain)[::2], abs=0.15)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_choose_speed_measures_on_the_accelerator(monkeypatch, capsys):
    monkeypatch.setattr(tutorial, "SPEEDS", {})
    model = fresh(SimpleCNN, DEVICE)
    before = copy.deepcopy(model)
    chosen = choose_speed(model, DIGITS.train_images.to(DEVICE), DIGITS.train_labels.to(DEVICE))
    assert chosen.keys() == {"precision", "channels_last"} and mean_difference(model, before) == 0
    assert "images/s" in capsys.readouterr().out and lies_on(model) == {DEVICE.type}
    train_model(model, DIGITS.train_images, DIGITS.train_labels, **BRIEFLY, **chosen)


def test_run_trains_there_and_tests_there():
    here, there = (run(SimpleCNN, DIGITS, 3, device, **BRIEFLY | {"epochs": 6}) for device in (CPU, DEVICE))
    assert lies_on(there[0]) == {DEVICE.type} and losses(there[1]) == pytest.approx(losses(here[1]), abs=0.1)
    assert there[2] == pytest.approx(here[2], abs=0.06)


# --------------------------------------------------------------------------- checkpoints and stopping


@pytest.mark.parametrize("first", ["cpu", "accelerator"])
@pytest.mark.parametrize("make", [WITHOUT_NOISE, WITH_DROPOUT], ids=["without noise", "with dropout"])
def test_what_was_stopped_on_one_goes_on_on_the_other(make, first, tmp_path):
    before, after = (CPU, DEVICE) if first == "cpu" else (DEVICE, CPU)
    stopped, resumed, whole = fresh(make, before), fresh(make, after), fresh(make)
    settings = BRIEFLY | dict(augment=None, checkpoint=tmp_path / "c")
    train_model(stopped, COLOUR.train_images, COLOUR.train_labels, **settings | {"on_epoch": stop_after_two})
    saved = torch.load(tmp_path / "c", weights_only=True, map_location="cpu")
    assert all(torch.equal(value, stopped.state_dict()[name].cpu()) for name, value in saved["model"].items())
    history = train_model(resumed, COLOUR.train_images, COLOUR.train_labels, **settings)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4] and history[:2] == saved["history"]
    assert lies_on(resumed) == {after.type}
    expected = train_model(whole, COLOUR.train_images, COLOUR.train_labels, **settings | {"checkpoint": None})
    noise = 0.1 if make is WITHOUT_NOISE else 0.4                # each device drops other activations
    assert losses(history) == pytest.approx(losses(expected), abs=noise)


def test_stopped_and_resumed_on_the_accelerator_it_ends_nearly_the_same(tmp_path):
    whole, resumed = fresh(WITH_DROPOUT, DEVICE), fresh(WITH_DROPOUT, DEVICE)
    settings = BRIEFLY | dict(augment=shift_and_flip)
    expected = train_model(whole, COLOUR.train_images, COLOUR.train_labels, **settings)
    for on_epoch in (stop_after_two, None):
        history = train_model(resumed, COLOUR.train_images, COLOUR.train_labels, checkpoint=tmp_path / "c",
                              **settings | {"on_epoch": on_epoch})
    assert losses(history) == pytest.approx(losses(expected), abs=0.05)
    assert mean_difference(whole, resumed) < 0.01


def test_early_stopping_keeps_and_restores_the_weights_there():
    model, seen = fresh(WITHOUT_NOISE, DEVICE), {}
    stopping = EarlyStopping(model, patience=2)

    def on_epoch(row):
        seen[row["epoch"]] = {name: value.clone() for name, value in model.state_dict().items()}
        return stopping(row)

    train_model(model, COLOUR.train_images, COLOUR.train_labels,
                **BRIEFLY | dict(epochs=20, learning_rate=0.1, one_cycle=False, on_epoch=on_epoch))
    stopping.restore()
    assert lies_on(model) == {DEVICE.type}
    best = seen[stopping.best_epoch]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------- looking inside


MAPS = {"grad_cam": grad_cam, "grad_cam of an early layer": partial(grad_cam, layer="features.3"),
        "class_activation_map": class_activation_map, "saliency_map": saliency_map}


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_those_of_the_cpu(name):
    here = fresh(WITHOUT_NOISE)
    train_model(here, COLOUR.train_images, COLOUR.train_labels, **BRIEFLY)
    there, images = copy.deepcopy(here).to(DEVICE), standardize(COLOUR.test_images[:8])
    labels = predict_logits(here, COLOUR.test_images[:8]).argmax(dim=1)
    expected = MAPS[name](here, images, labels)
    for given in (labels, labels.to(DEVICE)):
        maps = MAPS[name](there, images.to(DEVICE), given)
        assert maps.device.type == DEVICE.type and close(maps, expected, 5e-3)
    assert close(MAPS[name](there, images.to(DEVICE)), maps)     # of the predicted classes


def test_feature_maps_and_tables_are_those_of_the_cpu():
    here, there = two_of(WITHOUT_NOISE)
    images = standardize(COLOUR.test_images[:4])
    expected = feature_maps(here, images, ["features.3", "pool"])
    maps = feature_maps(there, images.to(DEVICE), ["features.3", "pool"])
    assert maps.keys() == expected.keys() and all(close(maps[name], expected[name]) for name in maps)
    assert tutorial.layer_table(there, (3, 32, 32)) == tutorial.layer_table(here, (3, 32, 32))


def test_slide_reads_a_strip_there():
    here, there = two_of(SimpleCNN)
    strip = standardize(torch.cat([*DIGITS.test_images[:3]], dim=2)[None])
    assert close(slide(there, strip.to(DEVICE)), slide(here, strip))


def test_activations_that_are_kept_grow_with_the_batch():
    model = fresh(WITHOUT_NOISE, DEVICE)
    kept = [tutorial.activation_bytes(model, torch.zeros(count, 3, 32, 32, device=DEVICE))
            for count in (4, 8)]
    assert 4 * 3 * 32 * 32 * 4 < kept[0] and kept[1] == pytest.approx(2 * kept[0], rel=0.1)


def test_pictures_are_drawn_of_what_lies_there():
    model = fresh(SimpleCNN, DEVICE)
    image = standardize(DIGITS.test_images[:1]).to(DEVICE)
    heat = torch.rand(28, 28, device=DEVICE)
    figures = [
        tutorial.plot_network(model, image, {"block": model.conv_block1, "logits": model.fc}, ""),
        tutorial.plot_filters(model.conv_block1[0].weight),
        tutorial.plot_images([image, heat])]
    assert all(len(figure.axes) >= 2 for figure in figures)
    assert tutorial.overlay(DIGITS.test_images[0], heat).device.type == "cpu"
    plt.close("all")


# ------------------------------------------------------------------------------- transfer learning


@pytest.mark.parametrize("first", ["fc", "layer4"])
def test_frozen_layers_and_tails_give_what_they_give_on_the_cpu(first):
    backbone, preprocess, _ = load_resnet18(offline=True)
    logits, accuracies = [], []
    for device in (CPU, DEVICE):
        frozen, tail = split_at(new_head(copy.deepcopy(backbone).to(device), 10, seed=1), first)
        features = run_frozen(frozen, COLOUR.train_images, preprocess)
        assert features.device.type == device.type
        train_tail(tail, features, COLOUR.train_labels, epochs=3)
        logits.append((features, tail(features)))
        accuracies.append(tail_accuracy(tail, features, COLOUR.train_labels))
    (features, answers), (features_there, answers_there) = logits
    assert close(features_there, features)
    assert (answers.argmax(dim=1) == answers_there.argmax(dim=1).cpu()).float().mean() > 0.95
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.05) and accuracies[0] > 0.5


def test_a_folder_is_learnt_there_and_predicted_on_the_cpu(tmp_path, capsys):
    *_, new = write_as_files(DIGITS.first(101), tmp_path / "pictures")
    new = new.rename(tmp_path / "new.png")
    backbone, preprocess, _ = load_resnet18(offline=True)
    scores = train_on_folder(tmp_path / "pictures", tmp_path / "m.pt", backbone, preprocess, epochs=4,
                             device=DEVICE)
    assert all(score > 0.5 for score in scores.values())
    assert len(predict([new], tmp_path / "m.pt", preprocess)[0]) == 3


# ------------------------------------------------------------------------- the text's own cells


def run_cells(device, folder, monkeypatch):
    """Run the cells of 4.4, 5.2 and 5.5, after the preparations, on a device; return what they left."""
    pictures, results = [], data.run.Results()

    def show_figure(figure, name):
        pictures.append(name)
        plt.close(figure)

    options = data.run.parse_options(["--quick", "--device", str(device), "--output-dir", str(folder)])
    monkeypatch.setattr(data.run, "start_run", lambda: (options, results, show_figure))
    names = vars(tutorial) | {"digits_kind": "5,000 digits"}
    for title in ("Preparations", "4.4 ", "5.2 ", "5.5 "):
        for code in demonstrations(title):
            exec(compile(code, f"<{title}>", "exec"), names)
            names["STEPS"] = 12
    return names, {(row["section"], row["name"]): row["value"] for row in results}, pictures


def test_sections_4_4_and_5_2_and_5_5_measure_there_what_they_measure_on_the_cpu(
        tmp_path, monkeypatch, capsys):
    names, values, pictures = run_cells(DEVICE, tmp_path, monkeypatch)
    assert names["device"].type == DEVICE.type
    assert {name[:3] for name in pictures} == {"4_4", "5_2", "5_5"} and len(pictures) == 6
    _, expected, _ = run_cells(CPU, tmp_path, monkeypatch)
    assert len(values) >= 8 and values == pytest.approx(expected, abs=0.15)


def test_the_networks_of_these_sections_are_trained_there(tmp_path, monkeypatch, capsys):
    """Their data lie on the CPU: it is `train_epoch` that moves each batch."""
    devices = set()

    def watched(model, batches, images, *arguments, **settings):
        devices.add((next(model.parameters()).device.type, images.device.type))
        return train_epoch(model, batches, images, *arguments, **settings)

    monkeypatch.setattr(tutorial, "train_epoch", watched)
    run_cells(DEVICE, tmp_path, monkeypatch)
    assert devices == {(DEVICE.type, "cpu")}
