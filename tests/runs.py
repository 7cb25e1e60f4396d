"""Small training runs for the tests of train.py: tiny models, pairs of token ids, processes to stop and to kill."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # takes a second, in the first step of a run: here once, before runs are forked

import train
from model import GPT
from support import cached_reference, device, report
from support import run as support_run
from support.checkpoint import resolve
from support.rows import Pair

CHECKPOINT = os.environ.get("EPSDPO_CHECKPOINT", "")
real = [pytest.mark.real, pytest.mark.skipif(not CHECKPOINT, reason="EPSDPO_CHECKPOINT names no checkpoint folder")]
VOCAB = 32
TIMING = {"seconds", "tokens_per_second", "memory_gb"}  # fields of a metrics line that no two runs share


# ---- a tiny model and its data ---------------------------------------------------------------------------------------


def tiny_model(seed: int = 0, tied: bool = False, **fields) -> GPT:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    model = GPT(resolve({"model_type": "llama"} | sizes | {"tie_word_embeddings": tied} | fields))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


def nudged(model: GPT, scale: float = 0.02, seed: int = 3) -> GPT:
    """A copy with other weights, so that not all steps are "keep"."""
    dice, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=dice, dtype=torch.float64).to(p.dtype))
    return model


def two_models(dtype=torch.float32, **options) -> tuple[GPT, GPT]:
    return tiny_model(**options).to(dtype), tiny_model(**options).to(dtype)


def pretend(monkeypatch, rank: int, world: int) -> None:
    """Answer `rank_and_world` with these numbers, in every module that asks."""
    for module in (train, cached_reference, device, report, support_run):
        if hasattr(module, "rank_and_world"):
            monkeypatch.setattr(module, "rank_and_world", lambda: (rank, world))


def id_rows(n: int, seed: int = 0, vocab: int = VOCAB, longest: int = 8) -> list[dict]:
    """Rows of token ids, lengths from 1 on, the two answers never equal."""
    dice, rows = random.Random(seed), []
    while len(rows) < n:
        ids = [[dice.randrange(vocab) for _ in range(dice.randint(1, longest))] for _ in range(3)]
        if ids[1] != ids[2]:
            rows.append(dict(zip(("prompt", "chosen", "rejected"), ids)))
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_of(rows: list[dict]) -> list[Pair]:
    columns = ("prompt", "chosen", "rejected")
    return [Pair(*(np.array(row[c], np.int32) for c in columns), "ids", i) for i, row in enumerate(rows, 1)]


def flags_of(**given) -> train.Flags:
    """Flags for calls of `train.train` with models in memory."""
    return train.Flags(**{"beta": 0.1, "lr": 1e-2, "batch_size": 4, "epsilon": 0.05, "micro_tokens": 40} | given)


def same_bits(a: dict | torch.nn.Module, b: dict | torch.nn.Module) -> bool:
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def no_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def read_metrics(out: Path, timing: bool = False) -> list[dict]:
    """The lines of a run, strictly JSON, without what no two runs share."""
    text = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    lines = [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]
    return lines if timing else [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def steps_of(lines: list[dict]) -> list[dict]:
    """The lines of optimizer steps, without those of evaluations."""
    return [line for line in lines if "loss" in line]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def ended(argv, capsys, lines: int = 1) -> tuple[int, str]:
    """Exit code and the last `lines` lines on stderr, or all of them (0)."""
    try:
        code = train.main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, "\n".join(err.strip().splitlines()[-lines:])


# ---- processes: forked from a server that has imported train once, so that starting one takes no time ----------------


def _child(argv: list[str], log: str, env: dict[str, str], limit: int | None, before: str) -> None:
    os.environ.update(env)
    os.setsid()
    with open(log, "wb", buffering=0) as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    sys.modules["matplotlib.figure"] = None  # a figure takes longer than a run of this size
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if before:
        exec(before, {"train": train, "torch": torch, "os": os})
    code = train.main(argv)
    sys.stdout.flush()
    sys.exit(code)


class Run:
    """`python train.py argv` in a process of its own; `log` is what it printed."""

    def __init__(self, argv, log: Path, env: dict | None = None, limit: int | None = None, before: str = "") -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # before the server starts
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.runs"])
        self.log_path = Path(log)
        args = ([str(a) for a in argv], str(log), env or {}, limit, before)
        self.process = context.Process(target=_child, args=args, daemon=True)
        self.process.start()

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def wait(self, timeout: float = 120) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.log}")
        return self.process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join(30)

    def wait_for(self, condition, timeout: float = 120) -> None:
        """Until `condition()` holds or the process has ended."""
        end = time.monotonic() + timeout
        while not condition() and self.process.is_alive():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"waited {timeout} s in vain:\n{self.log}")
            time.sleep(0.002)


def run(argv, folder: Path, log: Path | None = None, **options) -> tuple[int, str]:
    """Exit code and output of one run."""
    process = Run(argv, log or folder / f"log-{time.monotonic_ns()}", **options)
    return process.wait(), process.log


def run_many(argv, folder: Path, world: int = 2, before: dict[int, str] | None = None, timeout: float = 120):
    """The same command on `world` processes, as torchrun starts them; exit codes and outputs, by rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    stamp, group = time.monotonic_ns(), []
    for rank in range(world):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group.append(Run(argv, folder / f"log-{stamp}-{rank}", env=env, before=(before or {}).get(rank, "")))
    end = time.monotonic() + timeout
    codes = [r.wait(max(1.0, end - time.monotonic())) for r in group]
    return codes, [r.log for r in group]


def argv_of(folder: Path, out: Path | None, *more, model: str = "model", data: str = "ids.jsonl") -> list[str]:
    """A real run of 3 epochs of 4 steps, the last of them of 7 pairs, in micro-batches of two pairs or so."""
    argv = ["--model", folder / model, "--data", folder / data, *(["--out", out] if out else [])]
    argv += ["--eval-data", folder / "held.jsonl", "--batch-size", 8, "--micro-tokens", 40]
    argv += [] if "--steps" in more else ["--epochs", 3]
    argv += ["--lr", 1e-2, "--beta", 0.1, "--epsilon", 0.05, *more]
    return [str(a) for a in argv]
