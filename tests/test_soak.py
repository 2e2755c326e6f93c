"""A few seconds of tests/soak.py: the base is never lost, and what is refused is refused with an error of ours."""

import pytest

import soak


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # python swallows what strikes in a destructor
@pytest.mark.parametrize("dtype", soak.DTYPES)
def test_a_short_life(dtype):
    counts = soak.live(0, 200, dtype)
    assert counts["checked"] > 20 and counts["interrupt"] > 5 and counts["refused"] > 0
