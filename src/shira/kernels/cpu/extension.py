"""The extension in C, if it was built, and what all that calls it shares."""

import importlib
from contextvars import ContextVar
from typing import Any

import torch

__all__ = ["CPU", "extension", "plain_c"]

extension: Any
try:
    extension = importlib.import_module("._native", __package__)
except ImportError:
    extension = None

CPU = torch.device("cpu")  # named in every allocation, because torch.set_default_device may name another
plain_c: ContextVar[bool] = ContextVar("shira_plain_c", default=False)  # True: no instructions that some processors lack
