"""Random numbers without state.

Every random number of a run is a pure function of five integers: (seed, epoch, image, view, draw). So a
view doesn't depend on the number of workers, processes or interruptions, and we can make any view of any
epoch again.
"""
import numpy as np

# Three streams per image that aren't views. These numbers stand for the view's.
SHUFFLE = 1000
SHAPES = 1001
HELD_OUT = 1002


def mix(h):
    """The finaliser of SplitMix64 (Steele et al. 2014): uint64 -> uint64.

    Flipping one bit of the input flips half of the output's.
    """
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def uniforms(seed, epoch, index, view, draw):
    """Uniform numbers in [0, 1), float64: a hash of five non-negative integers.

    They can be arrays, which broadcast.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    h = np.zeros(1, np.uint64)  # an array, because numpy warns when a scalar wraps around
    for key in (seed, epoch, index, view, draw):
        key = np.asarray(key).astype(np.uint64)
        h = mix((h ^ key) + step)
    return (h >> np.uint64(11)) * 2.0 ** -53  # a float64 holds the upper 53 bits


def permutation(seed, epoch, n):
    """The order in which an epoch visits n images: int64 (n,)"""
    u = uniforms(seed, epoch, np.arange(n), SHUFFLE, 0)
    return np.argsort(u, kind="stable")
