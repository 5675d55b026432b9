"""harness, features.py: features of many images, counting hits, a frozen network."""
import copy

import numpy as np
import pytest
import torch

import lineval
from harness.common.errors import Refused
from harness.data.source import Source
from harness.evaluation import features
from harness.training.run import Job
from tests.helpers import CPU, close, equal, untrained

pytest_plugins = ["tests.fixtures"]


# --- Features -----------------------------------------------------------------------------------------------

def as_they_are(source, batches):
    """Test views: the pixels themselves."""
    for _, index in batches:
        yield index, source.pixels[torch.from_numpy(index)].float()


def test_features_come_in_the_order_of_the_images(world_of_one):
    """More images than a batch holds. Every pixel of an image is its number."""
    numbers = torch.arange(600).float()
    pixels = numbers[:, None, None, None].repeat(1, 3, 2, 2)
    batches = []

    def number_and_square(x):
        batches.append(len(x))
        number = x[:, 0, 0, 0]
        return torch.stack([number, number ** 2], dim=1)

    source = Source(pixels=pixels)
    good, found = features.extract(number_and_square, as_they_are, source, CPU)
    assert torch.equal(found, torch.stack([numbers, numbers ** 2], dim=1))
    assert good is source
    assert len(batches) > 1
    assert sum(batches) == 600


def test_a_calibrated_network_has_the_statistics_of_the_training_images():
    """The first BN's, against the first convolution's output. The network itself doesn't change."""
    torch.manual_seed(0)
    network = untrained("resnet18", 1 / 16, True)
    before = copy.deepcopy(network.state_dict())
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    found = features.calibrated(network, as_they_are, Source(pixels=pixels))
    with torch.no_grad():
        activations = network.conv1(pixels.float()).double()
    variance, mean = torch.var_mean(activations, dim=(0, 2, 3))
    assert close(found.bn1.running_mean, mean, 1e-4)
    assert close(found.bn1.running_var, variance, 1e-4)
    assert equal(network.state_dict(), before)


def test_hits_among_fewer_than_five_classes():
    """Every label is among the first five."""
    labels = torch.tensor([0, 1, 0])
    first, among_five = features.hits(torch.eye(3), labels)
    assert first.tolist() == [True, True, False]
    assert among_five.all()


def test_accuracies_of_unequal_classes(world_of_one):
    """Against a loop over the classes; of seven classes, two are without an image."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice([0, 1, 3, 4, 6], 40, p=[0.5, 0.2, 0.1, 0.1, 0.1]))
    scores = torch.from_numpy(rng.normal(size=(40, 7)))
    found = features.accuracy(lambda mine: scores[mine], labels)
    right = (scores.argmax(dim=1) == labels).numpy()
    shares = [right[labels.numpy() == c].mean() for c in np.unique(labels)]
    assert found["top1"] == 100 * right.sum() / 40
    assert found["balanced"] == pytest.approx(100 * np.mean(shares))
    assert found["largest_class"] == 100 * np.bincount(labels).max() / 40
    above = (scores > scores.gather(1, labels[:, None])).sum(dim=1)
    assert found["top5"] == 100 * (above < 5).sum().item() / 40


@pytest.mark.parametrize("images, classes, asked, k", [
    (160, 2, 0, 16), (50_000, 10, 0, 200), (4, 2, 0, 1), (160, 2, 20, 20), (160, 2, 500, 160)])
def test_how_many_neighbours_vote(images, classes, asked, k):
    """A fifth of a class, at most 200, or as many as asked; never more than there are."""
    assert features.neighbours(images, classes, asked) == k


# --- The frozen network -------------------------------------------------------------------------------------

def test_a_split_needs_an_image_for_each_process(world_of_one, monkeypatch):
    """Three images for four processes."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    train = Source(pixels=torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    job = Job({"data": "DATA", "amp": False}, CPU, train, None, as_they_are, "out", False)
    with pytest.raises(Refused, match="DATA: a split has only 3 images"):
        features.Frozen(lineval.untrained("resnet18", 1 / 16, True), job)


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.bn1.running_var", "bn1.num_batches_tracked"])
def test_the_digest_sees_every_bit(name):
    """The last bit of the last value: a weight's, a statistic's, a counter's."""
    network = untrained("resnet18", 1 / 16, True)
    before = features.digest(network)
    assert features.digest(copy.deepcopy(network)) == before
    last = network.state_dict()[name].view(-1)[-1:]
    last.copy_(torch.nextafter(last, last + 1) if last.is_floating_point() else last + 1)
    assert features.digest(network) != before
