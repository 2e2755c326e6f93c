"""Settings of the whole process, which calls in several threads want at the same time."""

import logging

import pytest
import torch
import tqdm

from shira.checkpoints.loading import _silent
from shira.integrations.lm_eval import _quiet
from shira.masks.calibration import without_cudnn_attention
from shira.weights.process_settings import for_all_inside

SETTINGS = {
    "attention": (without_cudnn_attention, torch.backends.cuda.cudnn_sdp_enabled),
    "Transformers' log": (_silent, lambda: logging.getLogger("transformers").level),
    "progress bars": (_quiet, lambda: (vars(tqdm.tqdm)["__init__"], logging.getLogger("lm_eval").level)),
}


@pytest.mark.parametrize(("context", "read"), SETTINGS.values(), ids=SETTINGS)
def test_calls_that_overlap_leave_a_setting_as_it_was(context, read):
    """The one that began first ends first: what the second one found when it began is not how it was."""
    before = read()
    first, second = context(), context()
    first.__enter__()
    inside = read()
    assert inside != before
    second.__enter__()
    first.__exit__(None, None, None)
    assert read() == inside
    second.__exit__(None, None, None)
    assert read() == before
    with pytest.raises(KeyError), context(), context():
        raise KeyError
    assert read() == before


def test_what_cannot_be_set_leaves_nothing_behind():
    @for_all_inside
    def broken():
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError), broken():
            pass
