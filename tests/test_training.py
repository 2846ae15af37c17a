"""Section 4: augmentation, loss, training and evaluation."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convolutional_neural_networks as tutorial
from convolutional_neural_networks import (RECIPES, SimpleCNN, evaluate, predict_logits,
                                           random_affine, random_shift,
                                           standardize, train_model)
from data.options import Results, with_error


@pytest.fixture
def few(digits):
    """400 digits to train with, 100 to test."""
    return dataclasses.replace(
        digits, train_images=digits.train_images[:400], train_labels=digits.train_labels[:400],
        test_images=digits.test_images[:100], test_labels=digits.test_labels[:100])


def test_random_shift_moves_each_image_by_its_own_draw(digits):
    images = digits.train_images[:64].clone()
    images[:, :, 12:16, 12:16] = 255
    moved = random_shift(images, 2)
    assert moved.dtype == torch.uint8 and moved.shape == images.shape
    padded, found = F.pad(images, (2, 2, 2, 2)), set()
    for image, result in zip(padded, moved):
        places = [(y, x) for y in range(5) for x in range(5)
                  if torch.equal(image[:, y:y + 28, x:x + 28], result)]
        assert places, "not a shifted copy with zeros moved in"
        found.add(places[0])
    assert len(found) > 15  # of 25 possible shifts
    assert torch.equal(random_shift(images, 0), images)


def test_random_affine_turns_scales_and_shifts_within_its_limits():
    dot = torch.zeros(400, 3, 33, 33, dtype=torch.uint8)
    dot[:, :, 16, 24:27] = 255  # 9 pixels right of the middle
    assert torch.equal(random_affine(dot, 0, 0, 0), dot)
    place = torch.arange(33.0) - 16

    def centre(images):
        x = images[:, 0].float()
        mass = x.sum(dim=(1, 2))
        return (x.sum(1) @ place / mass), (x.sum(2) @ place / mass)

    right, down = centre(random_affine(dot, 20, 0, 0))
    angles = torch.rad2deg(torch.atan2(down, right))
    assert angles.abs().max() < 20.5 and angles.std() > 8
    assert torch.allclose((right**2 + down**2).sqrt(), torch.tensor(9.0), atol=0.3)
    right, down = centre(random_affine(dot, 0, 0, 3))
    assert (right - 9).abs().max() < 3.1 and down.abs().max() < 3.1 and down.std() > 1
    right, _ = centre(random_affine(dot, 0, 0.2, 0))
    assert right.min() > 9 / 1.25 and right.max() < 9 / 0.78 and right.std() > 0.4


def test_training_learns_and_reports(few):
    model = SimpleCNN()
    history = train_model(model, few, epochs=4, progress=False)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert set(history[0]) == {"epoch", "train_loss", "val_loss", "val_accuracy", "seconds"}
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert evaluate(model, few.test_images, few.test_labels)[1] > 0.5
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(few):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = SimpleCNN()
        train_model(model, few, epochs=1, seed=seed, augment=random_shift, progress=False)
        weights.append(model.fc.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_validation_images_are_not_trained_on(few):
    """Images of noise with labels of noise: what is trained on is learnt by heart, the rest not."""
    torch.manual_seed(0)
    noise = dataclasses.replace(few, train_images=torch.randint(0, 256, (200, 1, 28, 28)).byte(),
                                train_labels=torch.randint(0, 10, (200,)))
    history = train_model(SimpleCNN(), noise, epochs=40, batch_size=20,
                          validation=0.5, progress=False)
    assert history[-1]["train_loss"] < 0.2 and history[-1]["val_accuracy"] < 0.3


def test_options_of_training_work(few):
    for settings in ({"precision": "bfloat16"}, {"channels_last": False}, {"label_smoothing": 0.1},
                     {"augment": random_affine}, {"batch_size": 1000}):
        history = train_model(SimpleCNN(), few, epochs=1, progress=False, **settings)
        assert math.isfinite(history[0]["val_loss"])


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"epochs": 1, "batch_size": 0},
                                      {"epochs": 1, "validation": 1.0},
                                      {"epochs": 1, "precision": "float8"}])
def test_settings_out_of_range_are_refused(few, settings):
    with pytest.raises(ValueError, match="train_model: expected epochs and batch_size >= 1"):
        train_model(SimpleCNN(), few, **settings)


def test_data_that_do_not_fit_the_model_are_refused_before_training(few):
    model = SimpleCNN(num_classes=5)
    before = model.fc.weight.detach().clone()
    with pytest.raises(ValueError, match=r"labels: expected 0..4 .*got 0..9"):
        train_model(model, few, epochs=1)
    with pytest.raises(ValueError, match=r"expected \[N, 1, 32, 32\], got \[1, 1, 28, 28\]"):
        train_model(SimpleCNN(image_size=32), few, epochs=1)
    assert torch.equal(model.fc.weight, before)


def test_evaluate_equals_the_formulas_and_restores_the_mode(few):
    model = nn.Sequential(SimpleCNN(), nn.Dropout(0.5)).train()
    model[0].conv_block1.eval()
    loss, accuracy = evaluate(model, few.test_images, few.test_labels)
    logits = model[0](standardize(few.test_images))
    assert loss == pytest.approx(F.cross_entropy(logits, few.test_labels).item(), abs=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == few.test_labels).float().mean().item())
    assert model.training and model[1].training and not model[0].conv_block1[0].training
    assert torch.allclose(predict_logits(model, few.test_images, batch_size=7), logits, atol=1e-5)


@pytest.mark.parametrize(("images", "labels", "message"), [
    (0, 0, "at least one"), (10, 9, r"expected int64 \[10\], got torch.int64 \[9\]"), (10, None, "expected 0..9")])
def test_evaluate_refuses_what_it_cannot_score(few, images, labels, message):
    labels = torch.full((images,), 10) if labels is None else few.test_labels[:labels]
    with pytest.raises(ValueError, match=message):
        evaluate(SimpleCNN(), few.test_images[:images], labels)


def test_standard_error():
    assert with_error(0.975, 1000) == "97.50% ± 0.49%"


@pytest.mark.parametrize(("metric", "values", "beyond", "told", "spread"), [
    ("points gained", [1.0, 2.0, 3.0], 2.5, "3 seeds: spread 1.0, standard error 0.6, not shown", 1.0),
    ("points gained", [2.9, 3.0, 3.1], 2.5, "3 seeds: spread 0.1, standard error 0.1", 0.1),
    ("points gained", [5.0], 2.5, "one seed: spread unknown, not shown", 0.0),
    ("test accuracy", [0.5, 0.6], 0.0, "2 seeds: spread 7.1%, standard error 5.0%", 0.0707),
    ("test accuracy", [0.5], 0.0, "one seed: spread unknown", 0.0)])
def test_what_seeds_gave_is_kept_with_its_spread(metric, values, beyond, told, spread, digits, capsys):
    results = Results()
    mean, found = results.add_seeds("8.1", "a tip", digits, metric, values, beyond=beyond)
    assert mean == results[0]["value"] == pytest.approx(sum(values) / len(values))
    assert found == pytest.approx(spread, abs=1e-4)
    assert capsys.readouterr().out.splitlines()[1].strip() == told


def test_recipes_are_arguments_of_train_model():
    for name, settings in RECIPES.items():
        assert settings["epochs"] >= 1 and set(settings) <= set(train_model.__kwdefaults__) | {"epochs"}, name


def test_plots_return_figures_and_show_nothing(few, monkeypatch):
    monkeypatch.setattr(tutorial.plt, "show", lambda *_: pytest.fail("a plot was shown"))
    logits = torch.randn(100, 10)
    history = [{"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e, "val_accuracy": 0.5, "seconds": e}
               for e in (1, 2)]
    figures = [tutorial.plot_history(history),
               tutorial.plot_confusion(logits, few.test_labels, few.classes),
               tutorial.plot_mistakes(few.test_images, logits, few.test_labels, few.classes),
               tutorial.plot_curves({"a": [1, 2, 3], "b": ([0, 5], [1, 2])}, marker="o", ylim=(0, 3)),
               tutorial.plot_effects({"a": [1, 2, 3], "b": [1]}, tutorial.plt.figure().gca(), beyond=2),
               tutorial.plot_strip(torch.rand(28, 56), torch.rand(10, 8), range(14, 43, 4)),
               tutorial.plot_curves({"bars": ([1, 2], [3, 4], [0.1, 0.2])}),
               tutorial.plot_filters({"one": -torch.rand(2, 1, 5, 5)}),
               tutorial.plot_feature_maps([(few.test_images[:1], {"a": torch.rand(1, 9, 7, 7)})]),
               tutorial.plot_images([torch.rand(3, 8, 8), torch.rand(1, 8, 8), torch.rand(8, 8)])]
    assert all(isinstance(figure, tutorial.plt.Figure) for figure in figures)
    perfect = 9.0 * F.one_hot(few.test_labels, 10)
    numbers = [text.get_text() for text in
               tutorial.plot_confusion(perfect, few.test_labels, few.classes).axes[0].texts]
    assert numbers == ["10"] * 10
    named = tutorial.plot_images({"a": torch.rand(8, 8), "b": torch.rand(8, 8)}).axes
    assert [ax.get_title() for ax in named] == ["a", "b"]
    coloured = tutorial.plot_filters({"a": 9 * torch.randn(3, 3, 5, 5)}).axes
    assert [ax.get_title() for ax in coloured[:3]] == ["a", "", ""]
    assert all(0 <= ax.images[0].get_array().min() and ax.images[0].get_array().max() <= 1 for ax in coloured[:3])
    tutorial.plt.close("all")
