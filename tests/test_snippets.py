"""Each definition of the script, pasted into an empty file with the imports and the project's definitions
that it names, works. All in one process."""

import ast

import matplotlib.pyplot as plt
import pytest
import torch
import torchvision

from make_notebook import SCRIPT

SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
IMPORTS = [node for node in TREE.body if isinstance(node, (ast.Import, ast.ImportFrom))]
DEFINITIONS = {node.name if hasattr(node, "name") else node.targets[0].id: node for node in TREE.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign))}
PUBLIC = [name for name, node in DEFINITIONS.items() if not isinstance(node, ast.Assign)]
USES = {  # each is evaluated where the definition was pasted, and must be true
    "show_figure": "show_figure(plt.figure(), 'empty') is None",
    "receptive_field": "receptive_field([(3, 1), (3, 1)]) == 5",
    "conv_output_size": "conv_output_size(28, 5) == 24",
    "conv2d_by_hand": "conv2d_by_hand(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item() == 9",
    "standardize": "standardize(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)).shape == (1, 1, 2, 2)",
    "SimpleCNN": "SimpleCNN()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)",
    "slide": "slide(SimpleCNN(), tiny.test_images.repeat(1, 1, 1, 2)).shape == (20, 10, 1, 8)",
    "predict_logits": "predict_logits(net, tiny.test_images).shape == (20, 10)",
    "evaluate": "0 <= evaluate(net, tiny.test_images, tiny.test_labels)[1] <= 1",
    "train_epoch": "train_epoch(net, torch.arange(18).split(9), tiny.train_images, tiny.train_labels, "
                   "torch.optim.SGD(net.parameters(), 0.1)).shape == (2,)",
    "tail_accuracy": "0 <= tail_accuracy(net, torch.rand(9, 784), torch.arange(9)) <= 1",
    "InceptionBlock": "InceptionBlock(4, 1, 2, 3, 1, 2, 2)(torch.ones(1, 4, 5, 5)).shape == (1, 8, 5, 5)",
    "ResidualBlock": "ResidualBlock(2, 4, stride=2)(torch.ones(1, 2, 8, 8)).shape == (1, 4, 4, 4)",
    "feature_maps": "feature_maps(small, x, ['0'])['0'].shape == (2, 3, 6, 6)",
    "saliency_map": "saliency_map(small, x).shape == (2, 8, 8)",
    "as_maps": "as_maps(torch.ones(2, 3, 3), (6, 6)).shape == (2, 6, 6)",
    "grad_cam": "grad_cam(small, x).shape == (2, 8, 8)",
    "class_activation_map": "class_activation_map(small, x).shape == (2, 8, 8)",
    "occlusion_map": "occlusion_map(small, x, patch=4, stride=2).shape == (2, 8, 8)",
    "train_distributed": "'torchrun' in train_distributed.__doc__",
    "train_model": "len(train_model(net, tiny, epochs=1, progress=False)) == 1",
    "SmallVGG": "SmallVGG()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)",
    "new_head": "new_head(resnet, 5).fc.out_features == 5",
    "split_at": "split_at(resnet, 'fc')[1](torch.zeros(2, 512)).shape == (2, 1000)",
    "run_frozen": "run_frozen(net, tiny.test_images, lambda x: x / 255).shape == (20, 10)",
    "train_tail": "train_tail(net, torch.rand(9, 784), torch.arange(9), epochs=1) is None",
    "LeNet5": "LeNet5()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)",
}


def needed(name, found=None):
    """The definitions that `name` needs, itself included, in the script's order."""
    found = {name} if found is None else found
    for node in ast.walk(DEFINITIONS[name]):
        if isinstance(node, ast.Name) and node.id in DEFINITIONS and node.id not in found:
            found.add(node.id)
            needed(node.id, found)
    return [definition for definition in DEFINITIONS if definition in found]


def test_every_definition_is_used_below():
    assert set(USES) == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_pasted_into_an_empty_file_it_works(name, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    pasted = [*IMPORTS, *(DEFINITIONS[need] for need in needed(name))]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    tiny = type(digits)(digits.train_images[:50], digits.train_labels[:50], digits.test_images[:20],
                        digits.test_labels[:20], digits.classes, "50 bundled digits")
    resnet = torchvision.models.resnet18()
    small = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                torch.nn.Flatten(), torch.nn.Linear(3, 10))
    file = {"__name__": "somewhere_else", "net": net, "tiny": tiny, "resnet": resnet, "small": small,
            "x": torch.rand(2, 1, 8, 8)}
    exec(compile("\n\n".join(ast.unparse(node) for node in pasted), f"<{name}>", "exec"), file)
    assert eval(USES[name], file)
    plt.close("all")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_definition_says_what_it_does(name):
    node = DEFINITIONS[name]
    assert ast.get_docstring(node)
    if isinstance(node, ast.FunctionDef):
        assert node.returns is not None
        assert all(arg.annotation for arg in node.args.args + node.args.kwonlyargs)
