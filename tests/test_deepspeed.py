"""DeepSpeed's ZeRO-3 on two processes of this machine's CPU: they train what one does, and switch. `make test-deepspeed`."""

import importlib.util

import pytest

import shira
from test_distributed import run_two, same_adapter, trained_alone

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed; make test-deepspeed installs it"
)


def test_zero3_trains_what_one_process_does_and_switches(tmp_path):
    code, printed = run_two("zero3", tmp_path)
    assert code == 0, printed
    for mask in ("wm", "snip"):
        for most_gathered in (0, 100, 100_000):
            same_adapter(shira.load(tmp_path / f"zero3-{most_gathered}-{mask}.safetensors"), trained_alone(mask))
    same_adapter(shira.load(tmp_path / "zero3-early.safetensors"), trained_alone())


def test_what_zero3_cannot_do_is_an_error_before_the_first_step(tmp_path):
    code, printed = run_two("zero3-refused", tmp_path)
    assert code == 0, printed
