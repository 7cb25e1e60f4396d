"""support/device.py: precision, memory, the share of each process, and machines that lack something."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from support import device
from support.rows import row_length
from tests.runs import ended, id_rows, pairs_of, pretend, read_metrics

pytestmark = pytest.mark.usefixtures("alone")
CPU = torch.device("cpu")


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_autocast_computes_matmuls_in_the_dtype_that_it_is_given(dtype):
    x = torch.ones(2, 2)
    with device.autocast(dtype, CPU):
        assert (x @ x).dtype == getattr(torch, dtype)
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_is_scaled_in_float16_only(dtype):
    assert device.loss_scales(dtype, 64 / 1e-9) == [1.0]


def test_loss_scales_fit_float32_whatever_beta_is():
    for beta in (1e-320, 1e-3, 1e300):
        scales = device.loss_scales("float16", 64 / beta)
        assert all(2.0**-126 < scale < 2.0**127 for scale in scales) and scales == sorted(scales, reverse=True)
        assert all(math.frexp(scale)[0] == 0.5 for scale in scales)  # powers of two change no digit


@pytest.mark.parametrize("scale", [1.0, 8.0, 2.0**-20])
def test_clipping_takes_the_loss_scale_out_first(scale):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = scale * torch.tensor([[3.0, 4.0]])
    assert device.clip_gradient(layer, 2.0, scale) == 5.0  # the norm before clipping
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[1.2, 1.6]]), rtol=1e-5, atol=0)
    layer.weight.grad = scale * torch.tensor([[3.0, 4.0]])
    assert device.clip_gradient(layer, math.inf, scale) == 5.0
    assert layer.weight.grad.tolist() == [[3.0, 4.0]]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system, peak, gb", [("linux", 3_000_000, 3.072), ("darwin", 3_000_000_000, 3.0)])
def test_the_peak_of_a_cpu_is_in_gb_on_linux_and_macos(system, peak, gb, monkeypatch):
    """getrusage gives units of 1024 bytes on Linux and bytes on macOS."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=peak))
    assert device.memory_gb(CPU) == {"memory_gb": pytest.approx(gb, rel=1e-12)}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_peak_of_this_process_is_what_the_kernel_says():
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    assert device.memory_gb(CPU)["memory_gb"] == pytest.approx(peak / 1e9, rel=0.01)


def test_the_peak_of_a_gpu_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: 2_500_000_000 * (1 + where.index))
    assert device.memory_gb(torch.device("cuda:1")) == {"memory_gb": 5.0}


def test_another_malloc_is_left_alone(monkeypatch):
    def windows(name: None) -> None:
        raise TypeError("argument of type 'NoneType' is not iterable")

    for other in (lambda _: object(), windows, ctypes.CDLL):
        monkeypatch.setattr(device.ctypes, "CDLL", other)
        device.keep_freed_memory()


# ---- other machines --------------------------------------------------------------------------------------------------

AS_ON_WINDOWS = """
import ctypes, functools, runpy, sys
sys.path[0] = sys.argv[1]
sys.modules["resource"] = None  # it cannot be imported
load = ctypes.CDLL

class CDLL(load):
    def __init__(self, name, *more, **named):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        super().__init__(name, *more, **named)

ctypes.CDLL = CDLL
from support import toy
toy.make_problem = functools.partial(toy.make_problem, pairs=96)
toy.fit_reference = functools.partial(toy.fit_reference, steps=3)
sys.argv = ["train.py", "--steps", "2", "--eval-size", "8", "--batch-size", "32"]
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""


def test_the_toy_runs_where_resource_and_malloc_are_missing(tmp_path):
    """As on Windows: `resource` cannot be imported and `ctypes.CDLL(None)` raises TypeError."""
    root = Path(train.__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, str(root)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "after 2 steps" in done.stdout
    lines = read_metrics(tmp_path / "out" / "toy", timing=True)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert not any("memory_gb" in line for line in lines) and all("seconds" in line for line in lines if "loss" in line)


def test_fsdp_that_needs_gpus_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cpu, "Stream", object)
    code, err = ended(["--device", "cpu"], capsys)
    assert code == 2 and f"torch {torch.__version__} needs GPUs" in err


@pytest.mark.parametrize("name", ["gpu", "CPU", "mps", "mps:0"])
def test_an_unknown_device_is_one_line_with_those_that_there_are(name, capsys):
    code, err = ended(["--device", name], capsys)
    assert code == 2 and f"--device must be auto, cpu, cuda or cuda:N (got {name})" in err
    assert ("mps has no float64" in err) == name.startswith("mps")


# ---- processes -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 60))
def test_processes_share_a_batch_without_loss_in_equally_many_micro_batches(n, world, tokens):
    pairs, shares = pairs_of(id_rows(n, seed=n)), []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            pretend(patch, rank, world)
            shares.append(device.my_micro_batches(pairs, tokens))
    every = [pair.line for share in shares for group in share for pair in group]
    assert sorted(every) == list(range(1, n + 1))
    assert len({len(share) for share in shares}) == 1  # a process without a forward would make the others wait
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for group in (group for share in shares for group in share if len(group) > 1):
        assert max(map(row_length, group)) * len(group) <= tokens


def test_sums_over_micro_batches_keep_counts_exact():
    large = {"count": torch.tensor(2**24), "sum": torch.tensor(0.1, dtype=torch.float64)}
    one = {"count": torch.tensor(1), "sum": torch.tensor(0.2, dtype=torch.float64)}
    assert device.sum_over_processes([large, one]) == {"count": 2**24 + 1, "sum": 0.1 + 0.2}
