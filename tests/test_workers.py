"""Worker processes that begin anew, as on macOS and Windows: `spawn` in place of Linux's `fork`."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import convolutional_neural_networks as tutorial
from cells import SOURCE, demonstrations
from data import resnet18_preprocessing
from data.run import Results


WHITE = torch.full((1, 3, 110, 110), 255, dtype=torch.uint8)


class Spawning(DataLoader):
    """A loader with one worker that is spawned, and so gets nothing but what can be pickled."""

    made = []

    def __init__(self, dataset, **settings):
        super().__init__(dataset, num_workers=1, multiprocessing_context="spawn", persistent_workers=True,
                         **settings)
        self.made.append(self)


def test_the_loader_of_the_text_works_with_a_spawned_worker(digits, monkeypatch, capsys):
    """Section 4.3 has the only one. It uses no worker, but a reader who adds one may be on Windows."""
    (loading,) = [code for code in demonstrations("4.3 ") if "DataLoader(" in code]
    assert loading.count("DataLoader(") == SOURCE.count("DataLoader(") == 1
    monkeypatch.setattr(Spawning, "made", [])
    results, names = Results(), vars(tutorial) | {
        "options": SimpleNamespace(seed=0), "digits": digits, "DataLoader": Spawning}
    exec(compile(loading, "<4.3>", "exec"), names | {"results": results})
    assert [row["name"] for row in results] == ["the bare loop"]
    assert results[0]["value"] > 0.85
    assert [type(loader.dataset).__name__ for loader in Spawning.made] == ["TensorDataset"]


@pytest.mark.parametrize(("make", "same"), [
    (lambda digits: tutorial.shift_and_flip, lambda augment: augment is tutorial.shift_and_flip),
    (lambda digits: digits.first(5, 5), lambda some: (some.name, some.train_images.tolist())),
    (lambda digits: resnet18_preprocessing(False, 32), lambda prepare: prepare(WHITE).tolist()),
    (lambda digits: resnet18_preprocessing(True, 96), lambda prepare: prepare(WHITE).tolist()),
    (lambda digits: tutorial.RECIPES, lambda recipes: str(recipes.keys())),
], ids=["augmentation", "data", "letters' preprocessing", "ImageNet's preprocessing", "recipes"])
def test_what_a_worker_may_need_can_be_sent_to_it(make, same, digits):
    sent = make(digits)
    received = pickle.loads(pickle.dumps(sent))
    assert same(received) == same(sent)
