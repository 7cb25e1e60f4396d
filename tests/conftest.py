"""How the whole suite runs, and the fixtures of the tests that train: test_train.py, test_resume.py, test_processes.py."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from support import toy
from support.checkpoint import save_model
from tests.runs import id_rows, tiny_model, write_rows


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config) -> None:
    """`pytest` alone runs the suite in two processes, a file at a time. What you name runs in one, for a debugger."""
    whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    undecided = config.getoption("numprocesses", 0) is None and not config.option.usepdb  # 0: without pytest-xdist
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # one of the two, which must start no more
    if whole_suite and undecided and not is_worker:
        config.option.numprocesses, config.option.dist = 2, "loadfile"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))  # threads of each


@pytest.fixture
def alone(monkeypatch):
    """One thread, so that bits are comparable; no figure, which takes longer than a run of this size."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with the checkpoints `model`, `tied` and `other`, and `ids.jsonl` of 31 pairs, `held.jsonl` of 7."""
    root = tmp_path_factory.mktemp("runs")
    save_model(tiny_model(), root / "model")
    save_model(tiny_model(tied=True), root / "tied")
    save_model(tiny_model(seed=1), root / "other")
    write_rows(root / "ids.jsonl", id_rows(31))
    write_rows(root / "held.jsonl", id_rows(7, seed=1))
    return root


@pytest.fixture
def quick_toy(tmp_path, monkeypatch):
    """A toy job of seconds, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "make_problem", partial(toy.make_problem, pairs=96))
    monkeypatch.setattr(toy, "fit_reference", partial(toy.fit_reference, steps=3))
    threads = torch.get_num_threads()
    yield tmp_path / "out" / "toy"
    torch.set_num_threads(threads)
