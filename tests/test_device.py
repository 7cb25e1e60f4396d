"""support/device.py: precision, memory and machines that lack something."""

from __future__ import annotations

import ctypes

import pytest
import torch

from support import device
from tests.runs import ended

pytestmark = pytest.mark.usefixtures("alone")


def test_where_malloc_is_another_nothing_happens(monkeypatch):
    for other in (lambda _: object(), ctypes.CDLL):
        monkeypatch.setattr(device.ctypes, "CDLL", other)
        device.keep_freed_memory()


def test_a_loss_scale_is_a_float32_whatever_beta_is():
    for beta in (1e-320, 1e-3, 1e300):
        scales = device.loss_scales("float16", 64 / beta)
        assert all(2.0**-126 < scale < 2.0**127 for scale in scales) and scales == sorted(scales, reverse=True)


def test_a_torch_whose_fsdp_needs_gpus_says_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cpu, "Stream", object)
    code, err = ended(["--device", "cpu"], capsys)
    assert code == 2 and f"torch {torch.__version__} needs GPUs" in err
