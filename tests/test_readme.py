"""Every code block of the README runs, as it stands there, in a folder of the reader's own.

The one for several processes is started by tests/test_distributed.py.
"""

import re

import pytest
import torch

from convolutional_neural_networks import RECIPES, SimpleCNN, grad_cam, save_whole, standardize
from data import simulated_photo, write_as_files
from data.run import parse_options
from make_notebook import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
(FOR_TORCHRUN,) = [snippet for snippet in SNIPPETS if "train_distributed" in snippet]
BENCHMARK_OPTIONS = {"--only", "--json", "--name", "--train-images", "--epochs"}


def prepare_folder(folder, digits):
    """Put there what the snippets read: a photo, pictures in sub-folders, a trained network."""
    simulated_photo(digits.test_images[3], seed=5).save(folder / "my_digit.jpg")
    *_, new = write_as_files(digits.first(31), folder / "my_pictures")
    new.rename(folder / "new.jpg")
    (folder / "outputs").mkdir()
    save_whole(SimpleCNN().state_dict(), folder / "outputs" / "simple_cnn.pt")


@pytest.mark.parametrize("number", [n for n, snippet in enumerate(SNIPPETS) if snippet != FOR_TORCHRUN])
def test_snippet_runs(number, digits, tmp_path, monkeypatch, capsys):
    snippet = SNIPPETS[number]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES["SimpleCNN on 5,000 digits"], "epochs", 3)  # enough for what is asked below
    prepare_folder(tmp_path, digits)
    if "load_resnet18()" in snippet:                             # no network in tests
        snippet = snippet.replace("load_resnet18()", "load_resnet18(offline=True)")
    if "epochs=20" in snippet:
        snippet = snippet.replace("epochs=20", "epochs=2")
    space = {}
    torch.manual_seed(0)
    exec(compile(snippet, f"<README {number}>", "exec"), space)
    printed = capsys.readouterr().out
    if "grad_cam" in snippet:                                    # of the predicted classes
        heat, model, images = (space[name] for name in ("heat", "model", "images"))
        with torch.no_grad():
            labels = model.eval()(images).argmax(dim=1)
        assert heat.shape == (2, 224, 224) and torch.allclose(heat, grad_cam(model, images, labels), atol=1e-5)
    elif "my_digit" in snippet:
        assert printed.splitlines()[-1].startswith("3 with probability")  # the photo shows a 3
    elif "my_pictures" in snippet:
        assert re.search(r"(?m)^new\.jpg: \d \(\d+%\), \d \(\d+%\), \d \(\d+%\)$", printed)
    elif "simple_cnn.pt" in snippet:
        model = SimpleCNN()
        model.load_state_dict(torch.load("outputs/simple_cnn.pt", weights_only=True))
        assert printed == f"{model(standardize(digits.test_images[:5])).argmax(dim=1)}\n"
    elif "lenet.checkpoint" in snippet:
        history = torch.load("lenet.checkpoint", weights_only=True)["history"]
        assert [row["epoch"] for row in history] == [1, 2] and len(printed.splitlines()) == 2
    else:
        assert "evaluate(" in snippet, "nothing is asked of this snippet"
        assert space["evaluate"](space["model"], digits.test_images, digits.test_labels)[1] > 0.95


def test_options_and_links_exist():
    options = set(re.findall(r"`(--[a-z-]+)", README))
    known = {"--" + name.replace("_", "-") for name in vars(parse_options([]))}
    assert known <= options <= known | BENCHMARK_OPTIONS | {"--nproc-per-node"}
    for path in re.findall(r"\]\(([\w./-]+)", README):
        assert (ROOT / path).exists(), path
    assert all(alt.strip() for alt in re.findall(r"!\[(.*?)\]", README, re.S))


def test_contents_link_to_headings_of_the_notebook():
    script = (ROOT / "convolutional_neural_networks.py").read_text(encoding="utf-8")
    headings = {heading.replace(" ", "-") for heading in re.findall(r"(?m)^#{2,3} (.+)$", script)}
    links = re.findall(r"\(convolutional_neural_networks\.ipynb#([^)]+)\)", README)
    assert len(links) >= 10 and set(links) <= headings
