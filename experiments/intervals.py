"""Intervals over the seeds of an experiment."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t. values: of two seeds or more."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(student.ppf(0.975, len(values) - 1)) * error
