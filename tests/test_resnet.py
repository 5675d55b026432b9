"""resnet.py: names, shapes and values against torchvision's; what its comments claim; how it starts."""
import inspect
import math
import re

import pytest
import torch

import resnet
from tests.helpers import close, torchvision_names

ARCHS = {
    "resnet18": (2, (2, 2, 2, 2), 1, 11_689_512),
    "resnet34": (2, (3, 4, 6, 3), 1, 21_797_672),
    "resnet50": (3, (3, 4, 6, 3), 4, 25_557_032),
    "resnet101": (3, (3, 4, 23, 3), 4, 44_549_160),
    "resnet152": (3, (3, 8, 36, 3), 4, 60_192_808),
}


@pytest.mark.parametrize("arch", ARCHS)
def test_resnet_has_torchvisions_names_order_and_shapes(arch):
    """torchvision's naming scheme and its published counts of parameters; and where the stride is."""
    convs, blocks, expansion, parameters = ARCHS[arch]
    with torch.device("meta"):
        network = resnet.ARCHS[arch]()
    found = [(name, tuple(t.shape)) for name, t in network.state_dict().items()]
    expected = torchvision_names(convs, blocks, expansion)
    assert found == list(expected.items())
    assert sum(p.numel() for p in network.parameters()) == parameters
    strided = [m for m in network.modules() if getattr(m, "stride", None) == (2, 2)]
    stem, *sizes = [m.kernel_size[0] for m in strided]
    assert stem == 7
    assert sorted(sizes) == [1, 1, 1, 3, 3, 3]  # the shortcuts', and the blocks' middle ones


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_equals_torchvisions_where_that_is_installed(arch):
    """Against torchvision itself, with the same weights."""
    models = pytest.importorskip("torchvision.models")
    ours = resnet.ARCHS[arch]().eval()
    theirs = getattr(models, arch)(zero_init_residual=True).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


def test_resnet_forward_has_the_shapes_that_its_comments_claim():
    """The comments of features(), read from the source, against what each module returns."""
    source = inspect.getsource(resnet.ResNet.features)
    comments = re.findall(r"# (\(N, .*\))$", source, re.M)
    claimed = [eval(shape, {"N": 2}) for shape in comments]
    with torch.device("meta"):  # which has only shapes
        network = resnet.resnet50()
        x = torch.zeros(2, 3, 224, 224)
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    seen = []
    for module in (network.conv1, network.maxpool, *stages, network.avgpool):
        module.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    features = network.features(x)
    assert [*seen, tuple(features.shape)] == claimed
    assert len(claimed) == 8


def test_resnet_initialisation():
    """Convolutions have He's standard deviation; BN scales are 1, but 0 at a block's end."""
    torch.manual_seed(0)
    network = resnet.resnet18()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert close(module.weight.std(), math.sqrt(2 / fan_out), 0.05), name
        if isinstance(module, torch.nn.BatchNorm2d):
            scale = 0 if re.search(r"layer.*bn2", name) else 1
            assert torch.all(module.weight == scale), name


def test_resnet_width_and_cifar_stem():
    """The features' width and the first stage's size, counted by hand."""
    network = resnet.resnet18(width=1 / 8, cifar_stem=True)
    sizes = []
    network.layer1.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape)))
    features = network.features(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 64)
    assert network.num_features == 64
    assert sizes == [(2, 8, 32, 32)]
    with pytest.raises(ValueError, match="width"):
        resnet.resnet18(width=0.001)
