"""A few of the kills of `make crash`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_few_kills_leave_no_half_file_and_each_run_resumes():
    pytest.importorskip("fastapi")
    command = [sys.executable, str(Path(__file__).with_name("crash.py")), "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("ended right 2") == 5, done.stdout
