"""Every code block of the README runs, as it stands there, in a folder of the reader's own."""

import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from data.options import parse_options
from data.pictures import write_as_files
from make_notebook import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, digits, tmp_path, monkeypatch, capsys):
    snippet = SNIPPETS[number]
    monkeypatch.chdir(tmp_path)
    if "train_distributed" in snippet:
        (tmp_path / "own.py").write_text(snippet)
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "own.py"],
            capture_output=True, text=True, env=environment(), timeout=200)
        assert done.returncode == 0 and done.stdout.count("epoch  2:") == 1, done.stderr
        return
    if "my_pictures" in snippet:
        write_as_files(digits.first(24), tmp_path / "my_pictures")
        Image.fromarray(digits.test_images[0, 0].numpy()).save(tmp_path / "new.jpg")
        for name in "0123456789":  # classes with one picture only would be refused, rightly
            folder = tmp_path / "my_pictures" / name
            if folder.exists() and len(list(folder.iterdir())) < 2:
                [file.unlink() for file in folder.iterdir()]
                folder.rmdir()
    space = {}
    torch.manual_seed(0)
    exec(compile(snippet, f"<README {number}>", "exec"), space)
    if "heat" in space:
        assert space["heat"].shape == (2, 224, 224)


def environment():
    """The environment of a reader whose file lies beside the script."""
    import os

    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def test_options_and_links_exist():
    options = set(re.findall(r"`(--[a-z-]+)", README))
    known = {"--" + name.replace("_", "-") for name in vars(parse_options([]))} 
    assert known <= options <= known | {"--nproc-per-node", "--only", "--json", "--arrays"}  # torchrun's, the benchmark's
    for path in re.findall(r"\]\(([\w./-]+)", README):
        assert (ROOT / path).exists(), path
    assert all(alt.strip() for alt in re.findall(r"!\[(.*?)\]", README, re.S))


def test_contents_link_to_headings_of_the_notebook():
    script = (ROOT / "convolutional_neural_networks.py").read_text(encoding="utf-8")
    headings = {heading.replace(" ", "-") for heading in re.findall(r"(?m)^#{2,3} (.+)$", script)}
    links = re.findall(r"\(convolutional_neural_networks\.ipynb#([^)]+)\)", README)
    assert len(links) >= 9 and set(links) <= headings
