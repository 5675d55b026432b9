"""Differences between runs of one seed: the same images, views and first weights of the backbone, so that
what the two have in common by chance cancels."""
import math
import statistics
from typing import NamedTuple

# Student's t, 95%, by the number of pairs
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


class Difference(NamedTuple):
    """What pairs tell of a difference, in the unit of its values."""
    pairs: list    # the differences, by seed
    mean: float
    error: float   # the standard error of the mean
    low: float     # Student's interval of 95%, from
    high: float    # to


def difference(mine, theirs):
    """Of {seed: value} and {seed: value}, over the seeds that both have -> Difference; None for fewer than
    two pairs, which tell nothing of its error."""
    pairs = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if len(pairs) < 2:
        return None
    mean = statistics.mean(pairs)
    half = half_interval(pairs)
    return Difference(pairs, mean, standard_error(pairs), mean - half, mean + half)


def standard_error(values):
    """Of the mean of some values, two at least."""
    return statistics.stdev(values) / math.sqrt(len(values))


def half_interval(values):
    """Half the width of Student's interval of 95% for the mean of some values, two at least."""
    return T95[len(values)] * standard_error(values)
