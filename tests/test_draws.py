"""harness, draws.py: are the random numbers random, and the hash that they claim to be?"""
import math

import numpy as np
import pytest

from harness.common import draws

N = 200_000
KEYS = [3, 1, 4, 1, 5]  # seed, epoch, image, view, draw


def along(argument):
    """The keys of N numbers that differ only in this argument."""
    keys = list(KEYS)
    keys[argument] = np.arange(N)
    return keys


def chi2(values):
    """How far counts in 256 equal bins are from equal: 255 on average, with a standard deviation of 22.6."""
    counts = np.bincount(values, minlength=256)
    expected = len(values) / 256
    return ((counts - expected) ** 2).sum() / expected


def correlated(a, b):
    """Whether two columns are correlated by more than five standard deviations."""
    coefficient = np.corrcoef(a, b)[0, 1]
    return abs(coefficient) >= 5 / math.sqrt(N)


@pytest.mark.parametrize("argument", range(5))
def test_uniforms_are_uniform_and_independent_along_each_argument(argument):
    """Against the chi-squared distribution, about five sigma either way, of pairs of neighbours."""
    u = draws.uniforms(*along(argument))
    assert u.min() >= 0
    assert u.max() < 1
    row, column = (u.reshape(-1, 2) * 16).astype(int).T
    assert 170 < chi2(row * 16 + column) < 360
    for lag in (1, 2, 7, 64):
        assert not correlated(u[:-lag], u[lag:])


@pytest.mark.parametrize("argument", range(5))
def test_no_two_arguments_share_a_stream(argument):
    """Another argument is one larger, or both are swapped: other numbers."""
    keys = along(argument)
    u = draws.uniforms(*keys)
    for other in {0, 1, 2, 3, 4} - {argument}:
        changed = list(keys)
        changed[other] += 1
        assert not correlated(u, draws.uniforms(*changed))
        swapped = list(keys)
        swapped[argument] = keys[other]
        swapped[other] = keys[argument]
        assert np.mean(u == draws.uniforms(*swapped)) < 1e-3


def hash_in_integers(*keys):
    """The same hash in Python's integers, which don't wrap around."""
    mask = 2 ** 64 - 1
    h = 0
    for key in keys:
        h = ((h ^ key) + 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        h ^= h >> 31
    return (h >> 11) / 2 ** 53


def test_uniforms_are_the_hash_they_claim_to_be():
    """Against plain Python integers; arrays broadcast."""
    epochs = np.arange(3)[:, None]
    u = draws.uniforms(7, epochs, 1_281_166, 1, np.arange(35))
    assert u.shape == (3, 35)
    for epoch, draw in np.ndindex(u.shape):
        assert u[epoch, draw] == hash_in_integers(7, epoch, 1_281_166, 1, draw)


def test_permutation_visits_every_image_once_and_differs_between_epochs():
    """Each against a sorted order, and against the first epoch's; another seed's too."""
    first, *others = [draws.permutation(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in others:
        assert sorted(order) == list(range(1000))
        assert np.mean(order == first) < 0.02
