"""Train a policy with ε-DPO: on a toy world with a known optimum, or on a real checkpoint with real preferences.

    python train.py                                              the toy, under a minute, ending in an exact report
    python train.py --model DIR --data FILE.jsonl --out DIR      a checkpoint folder and preference pairs
    torchrun --nproc_per_node=8 train.py --model …               the same on many devices (PyTorch's FSDP2)

The only file that imports the others. Top to bottom: the flags, the method, one micro-batch, one run, the two jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from epsdpo import EpsDPOLoss, TokenStats, epsdpo_loss, linear_token_stats, next_beta, sum_over_responses
from model import GPT
from support import toy
from support.checkpoint import SINGLE, load_model, read_config, save_model
from support.data import load_pairs, show_pair
from support.files import replace_file
from support.rows import Batch, Pair, collate, epoch_order, micro_batches, row_length
from support.text import Tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Flags


POSITIVE = ("batch_size", "epochs", "steps", "micro_tokens")  # flags of integers that cannot be 0


@dataclass
class Flags:
    """Every flag of the command line; the comment behind a field is its help, [toy | real] its default."""

    model: str = ""  # checkpoint folder (Llama, Mistral, Qwen2 or Qwen3 family); without it the toy runs
    data: tuple[str, ...] = ()  # preference files: JSON lines, plain or .gz
    eval_data: tuple[str, ...] = ()  # held-out preference files; without them --eval-size pairs of --data are held out
    eval_size: int = 128  # how many pairs of --data to hold out, at most a third of them
    out: str = ""  # folder for metrics, checkpoint and final model [out/toy | must be given]
    beta: float | None = None  # β₀, the KL penalty at the start [0.5 | 0.01]
    epsilon: float = 0.01  # ε, for both of the next two. β has no fixed point: it falls about as
    # exp(−ε · steps · (2·accuracy − 1)), so choose ε times the number of steps of order 1 to 5
    epsilon_check: float | None = None  # ε_c, the perturbation in the check, in [0, 1) [--epsilon]
    epsilon_step: float | None = None  # ε_s, the size of a step of β, in [0, 0.5]; 0 is plain DPO [--epsilon]
    lr: float | None = None  # peak learning rate: linear warm-up, then a cosine to zero [1e-3 | 7e-7]
    warmup: float = 0.1  # share of the steps that warm up
    batch_size: int | None = None  # pairs in one optimizer step, over all processes [64 | 128]
    epochs: int = 1  # passes over the data
    steps: int | None = None  # optimizer steps, in place of --epochs
    micro_tokens: int = 2048  # tokens in one forward pass of one process: fewer need less memory
    cache_reference: str = ""  # folder for the reference's hidden states at response tokens: computed once for these
    # pairs and every later run on them, and no reference in memory; one process
    gradient_checkpointing: bool = False  # keep only the inputs of layers, compute the rest twice: less memory
    clip: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.0  # AdamW's
    max_length: int = 2048  # tokens of a prompt and one response
    max_prompt_length: int | None = None  # tokens a prompt keeps where something must be cut [half of --max-length]
    skip_bad_rows: bool = False  # skip and count rows that cannot be used, in place of stopping at the first
    dtype: str = "float32"  # float32, or float16 or bfloat16: autocast over float32 weights, the decision in float32
    device: str = "auto"  # auto is cuda where there is one, else cpu
    seed: int = 0  # the order of the pairs and, for the toy, its dice
    eval_every: int = 0  # evaluate every N steps too, not only at the start and the end
    save_every: int = 0  # write a checkpoint every N steps, for --resume
    resume: bool = False  # go on from the checkpoint in --out, to the bit as if the run had never stopped
    overwrite: bool = False  # replace the run that --out holds
    samples: int = 2  # responses to held-out prompts to print, before and after
    show: int = 0  # print N pairs as the model sees them, and stop

    def __post_init__(self) -> None:
        """Fill in what depends on the job or on other flags. Raises ValueError naming the flag that is wrong."""
        real = bool(self.model or self.data)
        for name, (of_toy, of_real) in {"beta": (0.5, 0.01), "lr": (1e-3, 7e-7), "batch_size": (64, 128)}.items():
            if getattr(self, name) is None:
                setattr(self, name, of_real if real else of_toy)
        if self.max_prompt_length is None:
            self.max_prompt_length = self.max_length // 2
        self.epsilon_check = self.epsilon if self.epsilon_check is None else self.epsilon_check
        self.epsilon_step = self.epsilon if self.epsilon_step is None else self.epsilon_step
        integers = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.type.startswith("int")]
        integers = [(name, n, int(name in POSITIVE)) for name, n in integers if n is not None]
        for name, ok, expected in (
            ("model", bool(self.model) == bool(self.data), "--model and --data come together"),
            ("eval_data", real or not self.eval_data, "goes with --model and --data"),
            ("cache_reference", real or not self.cache_reference, "goes with --model and --data"),
            ("out", not real or self.out or self.show, "a folder, for a run on real data"),
            ("show", real or not self.show, "pairs of --data; give --model and --data too"),
            ("beta", 0 < self.beta < math.inf, "a finite number above 0"),
            ("epsilon", 0 <= self.epsilon <= 0.5, "a number in [0, 0.5]"),
            ("epsilon_check", 0 <= self.epsilon_check < 1, "a number in [0, 1)"),
            ("epsilon_step", 0 <= self.epsilon_step <= 0.5, "a number in [0, 0.5]"),
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("warmup", 0 <= self.warmup <= 1, "a share, from 0 to 1"),
            ("clip", self.clip > 0, "a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number, at least 0"),
            ("max_length", self.max_length >= 2, "at least 2: a token of the prompt and one of a response"),
            ("max_prompt_length", 0 < self.max_prompt_length < self.max_length, "at least 1, below --max-length"),
            ("dtype", self.dtype in ("float32", "float16", "bfloat16"), "float32, float16 or bfloat16"),
            ("resume", not (self.resume and self.overwrite), "either --resume or --overwrite"),
            ("eval_size", real or self.eval_size <= 10**6, "at most a million for the toy"),
            *((name, n >= least, f"at least {least}") for name, n, least in integers),
            *((name, n < 2**63, "at most 2**63 - 1") for name, n, _ in integers),
        ):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: {expected}")


def parse_flags(argv: Sequence[str] | None = None) -> Flags:
    """The command line, described by `Flags`: names, types and defaults of its fields, help from their comments."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__.split("\n\nThe only")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*(?:\n    # .*)*)$", inspect.getsource(Flags), re.M))
    for f in dataclasses.fields(Flags):
        text = help_of[f.name].replace("\n    # ", "\n")
        if f.default not in (None, "", (), 0, False):
            text += f" [{f.default}]"
        if f.type == "bool":
            kind = {"action": "store_true"}
        elif f.type.startswith("tuple"):
            kind = {"type": str, "nargs": "+", "metavar": "FILE", "action": "extend"}
        else:
            of_type = {"int": int, "float": float, "str": str}[f.type.split()[0]]
            kind = {"type": of_type, "metavar": {int: "N", float: "X", str: "NAME"}[of_type]}
        default = list(f.default) if f.default == () else f.default  # what "extend" extends
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=default, help=text.replace("%", "%%"), **kind)
    return Flags(**vars(parser.parse_args(argv)))


# ----------------------------------------------------------------------------------------------------------------------
# The method


@dataclass
class EpsDPO:
    """ε-DPO as `train` uses a method: a loss of pairs and what changes after a step. Its fields are all its state."""

    beta: float
    epsilon_check: float
    epsilon_step: float

    def loss(self, chosen: TokenStats, rejected: TokenStats, batch: Batch) -> EpsDPOLoss:
        return epsdpo_loss(chosen, rejected, self.beta, self.epsilon_step)

    def after_step(self, sums: dict[str, float], policy: GPT, reference: GPT) -> None:
        """`sums` are over all pairs of the step, in every micro-batch and process; all of them used the old β."""
        counts = (int(sums[f"steps/{name}"]) for name in ("lower", "keep", "raise"))
        self.beta = next_beta(self.beta, *counts, self.epsilon_step)


# ----------------------------------------------------------------------------------------------------------------------
# One micro-batch


def bodies_in(dtype: str, device: torch.device) -> torch.autocast:
    low = torch.float16 if dtype == "float16" else torch.bfloat16
    return torch.autocast(device.type, low, enabled=dtype != "float32")


def compare(
    policy: GPT, reference: GPT | CachedReference, batch: Batch, epsilon_check: float, dtype: str
) -> tuple[TokenStats, TokenStats]:
    """Sums (B,) of the chosen and of the rejected responses: one forward pass of each model, whatever ε is.

    dtype: of the matmuls in the bodies, 16 bits by autocast or "float32" without; heads and decisions are float32.
    """
    where = (batch.tokens, batch.positions, batch.segments, batch.source)
    with bodies_in(dtype, batch.tokens.device):
        with torch.no_grad():
            ref_hidden, ref_weight = reference(*where, lambda hidden, weight: (hidden, weight))  # (M, D), (V, D)

        def head(hidden: Tensor, weight: Tensor) -> TokenStats:
            return linear_token_stats(hidden, weight, ref_hidden, ref_weight, batch.label, epsilon_check)

        tokens = policy(*where, head)  # (M,)
    size = len(batch.tokens)
    sums = sum_over_responses(tokens, batch.owner, 2 * size)  # (2B,)
    return TokenStats(*(x[:size] for x in sums)), TokenStats(*(x[size:] for x in sums))


def with_checksum(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts, and the CRC-32 of them all."""
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
        yield part
    yield checksum.to_bytes(4, "little")


class CachedReference(torch.nn.Module):
    """The reference as a file of its hidden states at response tokens, float32 (M, D) for all pairs one after another.

    Log-probabilities could not be kept: the check mixes both models' logits. Hidden states can: D numbers a token.
    `policy` must still be the reference. The file is named by a hash of all weights, token ids and dtype, and kept.
    Raises ValueError for one of another size and where there is no room.
    """

    def __init__(self, policy: GPT, pairs: Sequence[Pair], flags: Flags) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone(), requires_grad=False)  # (V, D)
        pairs = sorted(pairs, key=lambda pair: (pair.file, pair.line))  # however many are held out, one file
        name = hashlib.sha256(f"{policy.config} {hash_of_ids(pairs)} {flags.dtype}".encode())
        for p in policy.parameters():
            name.update(p.detach().float().cpu().numpy())
        folder, width = Path(flags.cache_reference), policy.config.hidden_size
        file = folder / f"reference-{name.hexdigest()[:16]}.f32"
        counts = [len(pair.chosen) + len(pair.rejected) for pair in pairs]
        size = 4 * sum(counts) * width + 4  # and their checksum
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--cache-reference {folder}: no folder can be made there: {e}") from e
        if not file.exists():
            if (room := shutil.disk_usage(folder).free) < size:
                raise ValueError(f"--cache-reference {folder}: has room for {room / 1e9:.3f} GB of {size / 1e9:.3f}")
            replace_file(file, lambda f: f.writelines(with_checksum(self.states_of(policy, pairs, flags))))
        if file.stat().st_size != size:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, {size} expected: delete it, to have it made again")
        print(f"reference: {sum(counts):,} hidden states of {width} numbers in {file}, {size / 1e9:.2f} GB")
        self.states = np.memmap(file, np.float32, "r", shape=(sum(counts), width))
        *_, checksum = with_checksum(self.states[i : i + 4096] for i in range(0, sum(counts), 4096))
        if checksum != np.memmap(file, np.uint8, "r", offset=size - 4).tobytes():
            raise ValueError(f"{file}: damaged, its checksum is another: delete it, to have it made again")
        keys = (self.key(np.concatenate(pair[:3]), len(pair.prompt), len(pair.chosen)) for pair in pairs)
        starts = np.cumsum([0, *counts])
        self.places = {key: slice(a, b) for key, a, b in zip(keys, starts, starts[1:])}

    @staticmethod
    def key(ids: np.ndarray, prompt: int, chosen: int) -> tuple[bytes, int, int]:
        return ids.astype("<i4").tobytes(), prompt, chosen

    @staticmethod
    @torch.no_grad()
    def states_of(policy: GPT, pairs: Sequence[Pair], flags: Flags) -> Iterator[bytes]:
        device = next(policy.parameters()).device
        at_most = max(1, flags.micro_tokens // max(map(row_length, pairs)))
        for i in tqdm(range(0, len(pairs), at_most), "reference", unit="batch"):
            batch = collate(pairs[i : i + at_most]).to(device)
            with bodies_in(flags.dtype, device):
                yield (
                    policy(batch.tokens, batch.positions, batch.segments, batch.source).float().cpu().numpy().tobytes()
                )

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor, source: Tensor, head) -> object:
        rows = zip(tokens.cpu().numpy(), segments.cpu().numpy())
        keys = (self.key(ids[part >= 0], int((part == 0).sum()), int((part == 1).sum())) for ids, part in rows)
        states = np.concatenate([self.states[self.places[key]] for key in keys])  # (M, D)
        return head(torch.from_numpy(states).to(tokens.device), self.weight)


def totals(out: EpsDPOLoss, chosen: TokenStats, rejected: TokenStats, batch: Batch, beta: float) -> dict[str, Tensor]:
    """What is logged, summed over the pairs: sums add up over micro-batches and processes, means do not."""
    lengths = batch.owner.bincount(minlength=2 * len(out.step))  # (2B,)
    rewards = beta * (chosen.logp - chosen.ref_logp), beta * (rejected.logp - rejected.ref_logp)  # the step's β, not β̃
    return {
        "loss": out.losses.detach().sum(),
        "rewards/chosen": rewards[0].detach().sum(),
        "rewards/rejected": rewards[1].detach().sum(),
        "rewards/margins": (beta * out.margin).sum(),
        "rewards/accuracies": (out.margin > 0).sum(),  # a tie is wrong
        "logps/chosen": chosen.logp.detach().sum(),
        "logps/rejected": rejected.logp.detach().sum(),
        "kl": (chosen.kl + rejected.kl).sum() / 2,  # mean over the 2B responses of their summed per-token KL
        "lengths/chosen": lengths[: len(out.step)].sum(),
        "lengths/rejected": lengths[len(out.step) :].sum(),
        "steps/lower": (out.step > 0).sum(),
        "steps/keep": (out.step == 0).sum(),
        "steps/raise": (out.step < 0).sum(),
        "steps/uncertain": out.uncertain.sum(),
        "margin_squares": ((beta * out.margin) ** 2).sum(),
    }


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(model: GPT) -> GPT:
    """Spread a model over all processes with FSDP2, one group a layer.

    The root group holds what the head needs. It stays whole after a forward, because the reference's output matrix is
    used in the policy's head.
    """
    if rank_and_world()[1] > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=False)
    return model


def my_share(pairs: Sequence[Pair], micro_tokens: int) -> list[list[Pair]]:
    """This process's micro-batches of an effective batch, as many as every other process's: some may be empty."""
    rank, world = rank_and_world()
    by_length = sorted(pairs, key=row_length)
    shares = [by_length[r::world] for r in range(world)]
    plans = [micro_batches(share, micro_tokens) for share in shares]
    mine = [[shares[rank][i] for i in group] for group in plans[rank]]
    return mine + [[]] * (max(map(len, plans)) - len(mine))


def add_up(parts: list[dict[str, Tensor]], extra: float = 0.0) -> tuple[dict[str, float], float]:
    """Sums over micro-batches and processes, in float64 (counts stay exact), and that of one more number."""
    total = torch.stack([torch.stack([x.double() for x in part.values()]) for part in parts]).sum(0)
    total = torch.cat([total, total.new_tensor([extra])])
    if dist.is_initialized():
        dist.all_reduce(total)
    *values, extra = total.tolist()
    return dict(zip(parts[0], values)), extra


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind, and how it goes on from there

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
RESULTS = ("metrics.jsonl", "checkpoint.pt", "model", "run.svg")
# Flags that a resumed run may change: they alter neither the data nor the numbers (micro_tokens: their last bits only).
FREE_ON_RESUME = {
    *("model", "data", "eval_data", "out", "device", "micro_tokens", "eval_every", "save_every", "samples", "show"),
    *("resume", "overwrite", "gradient_checkpointing"),
}


def hash_of_ids(pairs: Sequence[Pair]) -> str:
    ids = hashlib.sha256()
    for pair in pairs:
        for part in pair[:3]:
            ids.update(len(part).to_bytes(8, "little") + part.astype("<i4").tobytes())
    return ids.hexdigest()


def identity(flags: Flags, pairs: Sequence[Pair], eval_pairs: Sequence[Pair]) -> dict[str, str]:
    """What a checkpoint belongs to: the flags that matter, hashes of all token ids and of the first model's files."""
    files, folder = hashlib.sha256(), Path(flags.model)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))] if flags.model else ():
        with open(path, "rb") as f:  # size and ends: enough to tell two models apart, whatever their size
            files.update(path.stat().st_size.to_bytes(8, "little") + f.read(1 << 20))
            f.seek(max(0, path.stat().st_size - (1 << 20)))
            files.update(f.read())
    chosen = {f.name: str(getattr(flags, f.name)) for f in dataclasses.fields(flags) if f.name not in FREE_ON_RESUME}
    chosen["cache_reference"] = str(bool(flags.cache_reference))  # where the file lies changes no number
    hashes = {"the data": hash_of_ids(pairs), "the held-out data": hash_of_ids(eval_pairs)}
    return chosen | hashes | {"the model": files.hexdigest()}


def claim(out: Path, flags: Flags) -> None:
    """Check that `out` can be this run's folder. Raises ValueError if it holds what nobody said to replace.

    Without --out, the toy replaces an earlier toy in its default folder and nothing else.
    """
    before = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        before = dict(json.loads((out / "flags.json").read_text()))
    if not flags.out and before.get("model") == "":
        flags.overwrite = not flags.resume
    held = [name for name in ("flags.json", *RESULTS) if (out / name).exists()]
    for path in filter(None, (flags.model, flags.cache_reference, *flags.data, *flags.eval_data)):
        if any(Path(path).resolve().is_relative_to((out / name).resolve()) for name in RESULTS):
            raise ValueError(f"--out {out}: this run would replace {path}, which it reads; choose another folder")
    # A run that was to save checkpoints and has none was killed before its first: it starts again.
    if flags.resume and not ("checkpoint.pt" in held or (before.get("save_every") and "model" not in held)):
        raise ValueError(f"--resume: {out} holds no checkpoint (--save-every writes them)")
    if held and not (flags.resume or flags.overwrite):
        raise ValueError(f"--out {out}: holds a run ({', '.join(held)}): --resume goes on, --overwrite replaces it")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as probe:  # a folder that cannot be written is an error now, not after hours
        probe.write(b"x")


def begin(out: Path, flags: Flags, lines: list[dict[str, float]], resumed: bool) -> TextIO:
    """Make `out` this run's, now that all is checked, and open metrics.jsonl behind the lines it has so far."""
    torn = [x for name in ("flags.json", *RESULTS) for x in out.glob(f".{name}.[0-9]*.tmp")]
    for path in (*torn, *(out / "model").rglob(".*.[0-9]*.tmp")):  # saves that were killed
        path.unlink()
    for path in () if resumed else (out / name for name in RESULTS):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    if not (resumed and (out / "flags.json").exists()):  # its time stays that of the start, which `real_job` asks for
        replace_file(out / "flags.json", lambda f: f.write(json.dumps(dataclasses.asdict(flags), indent=2).encode()))
    replace_file(out / "metrics.jsonl", lambda f: f.writelines(json.dumps(x).encode() + b"\n" for x in lines))
    return open(out / "metrics.jsonl", "a", encoding="utf-8")


def save_checkpoint(out: Path, step: int, policy: GPT, optimizer, method: EpsDPO, who: dict, lines: list) -> None:
    """All state of a run: weights, moments, β, metrics. Order of pairs and schedule follow from step and flags."""
    weights, moments = get_state_dict(policy, optimizer, options=WHOLE)  # gathered by all processes, written by one
    state = {"step": step, "method": vars(method), "identity": who, "metrics": json.dumps(lines)}
    if rank_and_world()[0] == 0:
        if not all(x.isfinite().all() for x in weights.values()):
            raise ValueError("the weights are not finite any more and were not saved")
        state |= {"weights": weights, "moments": moments}
        replace_file(out / "checkpoint.pt", lambda f: torch.save(state, f))


def load_checkpoint(out: Path, policy: GPT, optimizer, method: EpsDPO, who: dict) -> tuple[int, list]:
    """Put a checkpoint's state in place; return the steps done and their metrics. ValueError if it is another run's."""
    path = out / "checkpoint.pt"
    try:
        if (broken := zipfile.ZipFile(path).testzip()) is not None:  # torch itself does not look at the checksums
            raise ValueError(f"{broken} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        differ = [name for name, value in who.items() if state["identity"].get(name) != value]
        if not differ:
            step, of_method, lines = state["step"], dict(state["method"]), json.loads(state["metrics"])
            weights, moments = state["weights"], state["moments"]
            if len(moments["state"]) != len(list(policy.parameters())):  # which torch would pass over in silence
                raise ValueError("it holds the moments of another model")
            set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments, options=WHOLE)
    except Exception as e:  # torch.load fails in many ways on what is no checkpoint
        raise ValueError(
            f"{path}: not a checkpoint of this program: {(str(e) or type(e).__name__).splitlines()[0]}"
        ) from e
    if differ:
        raise ValueError(f"{path}: is of a run in which {', '.join(differ)} had another value: resume with the same")
    vars(method).update(of_method)
    return step, lines


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Ctrl-C, or a scheduler's SIGTERM, puts its number into the list: stop after this step. A second stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    ours = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be taken
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM) if ours}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------------------
# One run


def learning_rate(step: int, steps: int, flags: Flags) -> float:
    """Of optimizer step 0, 1, … of `steps`: linear warm-up that starts above zero, then a cosine that ends at zero."""
    warmup = math.ceil(flags.warmup * steps - 1e-9)
    if step < warmup:
        return flags.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return flags.lr * (1 + math.cos(math.pi * progress)) / 2


def loss_scales(dtype: str, ideal: float) -> list[float]:
    """What to multiply the loss by, tried in turn until no gradient overflows: 1 in all formats but float16.

    That loses gradients below 6e-8 and overflows above 65504. One of a log-probability is about β/2 over the number of
    pairs: with the inverse of β over the pairs as `ideal`, rounded to a power of two, it is about ½.
    """
    start = round(math.log2(min(max(ideal, 2.0**-99), 2.0**99)))  # within float32's range
    return [2.0 ** (start - 4 * i) for i in range(6)] if dtype == "float16" else [1.0]


def each_micro(
    policy: GPT, reference: GPT | CachedReference, batch: Sequence[Pair], method: EpsDPO, flags: Flags
) -> Iterator[tuple[EpsDPOLoss, TokenStats, TokenStats, Batch]]:
    """What `totals` takes, of each of this process's micro-batches. ValueError names rows with logits not finite."""
    for group in my_share(batch, flags.micro_tokens):
        micro = collate(group).to(next(policy.parameters()).device)
        try:
            chosen, rejected = compare(policy, reference, micro, flags.epsilon_check, flags.dtype)
            result = method.loss(chosen, rejected, micro)
        except ValueError as e:
            raise ValueError(f"rows {rows(group)}: {e}") from e
        yield result, chosen, rejected, micro


def accumulate(
    policy: GPT, reference: GPT, batch: Sequence[Pair], method: EpsDPO, flags: Flags, scale: float = 1.0
) -> list[dict]:
    """Add the gradient of the mean loss over an effective batch, times `scale`; returns what `add_up` adds up."""
    parts = []
    for result, *rest in each_micro(policy, reference, batch, method, flags):
        if torch.is_grad_enabled():
            # FSDP averages gradients over the processes: sum · world / pairs makes that the mean over all pairs.
            (result.losses.sum() * (scale * rank_and_world()[1] / len(batch))).backward()
        parts.append(totals(result, *rest, method.beta))
    return parts


@torch.no_grad()
def decisions(policy: GPT, reference: GPT | CachedReference, pairs: Sequence[Pair], flags: Flags) -> Tensor:
    """The step of every pair, (len(pairs),), in the order of `my_share`."""
    method = EpsDPO(flags.beta, flags.epsilon_check, flags.epsilon_step)
    return torch.cat([result.step for result, *_ in each_micro(policy, reference, pairs, method, flags)])


@torch.no_grad()
def evaluate(policy: GPT, reference: GPT, pairs: Sequence[Pair], method: EpsDPO, flags: Flags) -> dict[str, float]:
    """Means over held-out pairs (at least one), and the standard errors of accuracy and margin."""
    sums, n = add_up(accumulate(policy, reference, pairs, method, flags))[0], len(pairs)
    means = {name: value / n for name, value in sums.items()}
    accuracy, variance = means["rewards/accuracies"], means.pop("margin_squares") - means["rewards/margins"] ** 2
    means["rewards/accuracies_se"] = math.sqrt(accuracy * (1 - accuracy) / n)
    means["rewards/margins_se"] = math.sqrt(max(variance, 0.0) / n)
    return {f"eval/{name}": value for name, value in means.items()} | {"eval/pairs": n}


def gradient(
    policy: GPT, reference: GPT, batch: Sequence[Pair], method: EpsDPO, flags: Flags, asked: Sequence[int]
) -> tuple[dict[str, float], float, dict[str, float]]:
    """Leave the clipped gradient of an effective batch's mean loss in `policy`. Raises ValueError if it is not finite.

    Returns sums over the pairs, whether a process was `asked` to stop, the gradient's norm and float16's loss scale.
    """
    for scale in loss_scales(flags.dtype, len(batch) / method.beta):
        sums, stopping = add_up(accumulate(policy, reference, batch, method, flags, scale), len(asked))
        for p in policy.parameters() if scale != 1 else ():
            p.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), flags.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm) or not math.isfinite(sums["loss"]):
            break
        policy.zero_grad()
    if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):
        said = f"rows {rows(batch)}: the loss is {sums['loss'] / len(batch)}, the gradient's norm {norm}"
        raise ValueError(said + " (float16 overflows above 65504)" * (flags.dtype == "float16"))
    return sums, stopping, {"grad_norm": norm} | ({"loss_scale": scale} if flags.dtype == "float16" else {})


def train(
    policy: GPT,
    reference: GPT,
    pairs: Sequence[Pair],
    flags: Flags,
    method: EpsDPO | None = None,
    eval_pairs: Sequence[Pair] = (),
    out: Path | None = None,
) -> list[dict[str, float]]:
    """Train `policy` in place; return the metrics, a dict for each step. With `out`, also write them and checkpoints.

    Raises ValueError, before the optimizer step, for a loss or gradient that is not finite; KeyboardInterrupt when
    asked to stop, after saving.
    """
    method = method or EpsDPO(flags.beta, flags.epsilon_check, flags.epsilon_step)
    rank, world = rank_and_world()
    shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}
    if shared and world == 1:
        raise ValueError("the reference shares storage with the policy: it would move with it; give it a copy")
    if not pairs:
        raise ValueError("no pairs to train on")
    policy.requires_grad_(True)
    reference.requires_grad_(False)
    policy.gradient_checkpointing = flags.gradient_checkpointing
    optimizer = torch.optim.AdamW(policy.parameters(), lr=flags.lr, weight_decay=flags.weight_decay, fused=True)
    device, steps_per_epoch = next(policy.parameters()).device, math.ceil(len(pairs) / flags.batch_size)
    steps = flags.steps or flags.epochs * steps_per_epoch
    done, lines, file = 0, [], None
    if out:
        who = identity(flags, pairs, eval_pairs)
        if rank == 0:  # which alone writes
            need = count(policy) * (4 + 24 * bool(flags.save_every))  # the new checkpoint beside the old one
            held = sum(x.stat().st_size for x in (out / "checkpoint.pt", out / "model" / SINGLE) if x.exists())
            if (room := shutil.disk_usage(out).free + held) < need:
                raise ValueError(f"--out {out}: has room for {room / 1e9:.3f} GB of this run's {need / 1e9:.3f}")
        if resumed := flags.resume and (out / "checkpoint.pt").exists():
            done, lines = load_checkpoint(out, policy, optimizer, method, who)
        file = begin(out, flags, lines, resumed) if rank == 0 else None
    saved, beta_left = done, False

    def write(step: int, line: dict[str, float]) -> None:
        lines.append({"step": step} | line)
        if file:
            file.write(json.dumps(lines[-1], allow_nan=False) + "\n")
            file.flush()

    def evaluated(step: int) -> None:
        if eval_pairs:
            write(step, evaluate(policy, reference, eval_pairs, method, flags))
            if rank == 0:
                print(EVAL_LINE.format_map(lines[-1]), flush=True)

    bar = tqdm(range(done, steps), "train", steps, False, initial=done, unit="step", disable=rank != 0)
    with file or contextlib.nullcontext(), bar, stop_signal() as asked:
        step = done
        try:
            if not done:
                evaluated(0)
            for step in bar:
                started = time.perf_counter()
                epoch, place = divmod(step, steps_per_epoch)
                order = epoch_order(len(pairs), flags.seed, epoch)[place * flags.batch_size :][: flags.batch_size]
                batch = [pairs[i] for i in order]
                sums, stopping, of_gradient = gradient(policy, reference, batch, method, flags, asked)
                if step == 0 and of_gradient["grad_norm"] == 0:
                    tqdm.write(NOTHING_TO_LEARN)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, flags)
                optimizer.step()
                optimizer.zero_grad()
                beta = method.beta
                method.after_step(sums, policy, reference)

                del sums["margin_squares"]
                seconds, tokens = time.perf_counter() - started, sum(map(row_length, batch))
                line = {"epoch": (step + 1) / steps_per_epoch, "learning_rate": group["lr"]} | of_gradient
                line |= {"beta": beta} | {name: value / len(batch) for name, value in sums.items()}
                line |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
                write(step + 1, line | {"memory_gb": memory_gb(device)})
                bar.set_postfix_str(STEP_LINE.format_map(lines[-1]))
                if not beta_left and not flags.beta / 100 <= method.beta <= 100 * flags.beta:
                    beta_left = True
                    tqdm.write(f"warning: β went from {flags.beta:g} to {method.beta:.3g}: choose a smaller --epsilon")
                last = step + 1 == steps
                if last or (flags.eval_every and (step + 1) % flags.eval_every == 0):
                    evaluated(step + 1)
                if out and (stopping or (flags.save_every and (last or (step + 1) % flags.save_every == 0))):
                    save_checkpoint(out, step + 1, policy, optimizer, method, who, lines)
                    saved = step + 1
                if stopping and not last:
                    how = f", saved: go on with --resume --out {out}" if out else ""
                    raise KeyboardInterrupt(f"stopped after step {step + 1}{how}")
        except ValueError as e:
            last_good = f"go on from step {saved} with --resume" if saved else "no checkpoint was saved (--save-every)"
            raise ValueError(f"step {step + 1}, {e}; {last_good}") from e
    return lines


STEP_LINE = (  # what the progress bar shows of a line of metrics
    "loss {loss:.4f} β {beta:.4g} accuracy {rewards/accuracies:.2f} {tokens_per_second:.0f} tok/s {memory_gb:.1f} GB"
)
EVAL_LINE = (
    "step {step}, {eval/pairs} held-out pairs: "
    "accuracy {eval/rewards/accuracies:.3f} ± {eval/rewards/accuracies_se:.3f}, "
    "reward margin {eval/rewards/margins:.4f} ± {eval/rewards/margins_se:.4f}, loss {eval/loss:.4f}"
)
NOTHING_TO_LEARN = (
    "warning: the first gradient is all zero, so nothing will be learned. Is the policy frozen, does it share its "
    "weights with the reference, are the two answers of every pair equal?"
)


def rows(pairs: Sequence[Pair]) -> str:
    return ", ".join(f"{Path(pair.file).name}:{pair.line}" for pair in pairs[:8]) + " …" * (len(pairs) > 8)


def memory_gb(device: torch.device) -> float:
    """The peak so far: the device's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ----------------------------------------------------------------------------------------------------------------------
# The two jobs


def toy_job(flags: Flags, device: torch.device) -> None:
    """ε-DPO and DPO on a world whose every response is listed, from the same pairs and the same reference."""
    torch.set_num_threads(1)  # more would get in each other's way, and change the last digits with their number
    out = Path(flags.out or "out/toy")
    claim(out, flags)
    if rank_and_world()[1] > 1:
        raise ValueError("the toy is one process's work: without --model, start `python train.py` plainly")
    problem = toy.make_problem(flags.seed, eval_pairs=flags.eval_size, device=device)
    world, reference, pairs = problem.world, problem.reference, problem.pairs
    print(
        f"toy world {flags.seed}: 5 prompts with {len(world.responses)} responses each, all of them listed\n"
        f"reference: a GPT of {count(reference):,} parameters, {problem.distance:.4f} nats from the language it learned"
    )
    policy, baseline = copy.deepcopy(reference), copy.deepcopy(reference)
    lines = train(policy, reference, pairs, flags, eval_pairs=problem.eval_pairs, out=out)
    leave_results(policy, lines, out)
    train(baseline, reference, pairs, dataclasses.replace(flags, epsilon_step=0.0, resume=False))
    betas = [line["beta"] for line in lines if "beta" in line]
    logps = {"ε-DPO": world.list_logps(policy, device), "DPO": world.list_logps(baseline, device)}
    toy.print_report(problem, logps, betas, pairs_seen(len(betas), len(pairs), flags.batch_size))


def real_job(flags: Flags, device: torch.device) -> None:
    """A checkpoint folder and preference files: tokenize, say what is coming, train, leave a folder others can load."""
    out, folder = Path(flags.out), Path(flags.model)
    if flags.cache_reference and rank_and_world()[1] > 1:
        raise ValueError("--cache-reference is for one process")
    config = read_config(folder)
    tokenizer = Tokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None
    old = (out / "flags.json").exists() and (out / "checkpoint.pt").exists()
    if tokenizer and flags.resume and old:  # templates may write the date: that of the start
        tokenizer.now = datetime.fromtimestamp((out / "flags.json").stat().st_mtime)
    rules = {name: getattr(flags, name) for name in ("max_length", "max_prompt_length", "skip_bad_rows")}
    rules |= {"tokenizer": tokenizer, "vocab_size": config.vocab_size, "progress": rank_and_world()[0] == 0}
    rules |= {"max_position_embeddings": config.max_position_embeddings}
    if not flags.show and rank_and_world()[0] == 0:
        claim(out, flags)
    pairs, report = load_pairs(flags.data, **rules)
    print(report)
    if flags.show:
        print("\n\n".join(show_pair(pair, tokenizer) for pair in pairs[: flags.show]))
        return
    if flags.eval_data:
        eval_pairs, report = load_pairs(flags.eval_data, **rules)
        print(f"held out, from --eval-data: {report}")
    else:
        order = np.random.default_rng(0).permutation(len(pairs))  # the same pairs for every seed
        held = min(flags.eval_size, len(pairs) // 3)
        eval_pairs, pairs = [pairs[i] for i in np.sort(order[:held])], [pairs[i] for i in np.sort(order[held:])]
        print(f"held out: {held} of them, {len(pairs):,} to train on")
    if not pairs or (flags.eval_data and not eval_pairs):
        raise ValueError("--data or --eval-data: no usable pair is left")
    policy = load_model(folder, device=device, prepare=shard)
    print(forecast(policy, pairs, flags))
    if flags.cache_reference:
        reference = CachedReference(policy, [*pairs, *eval_pairs], flags)
        print("with it, the first steps need not be 0: other micro-batches round otherwise")
    else:
        reference = load_model(folder, device=device, prepare=shard)
    shown = eval_pairs[: flags.samples] if rank_and_world()[1] == 1 and tokenizer else []
    ends = Counter(int(pair.chosen[-1]) for pair in [*pairs, *eval_pairs] if not pair.cut[1]) or Counter([-1])
    before = answers(policy, shown, end := ends.most_common(1)[0][0])
    leave_results(policy, train(policy, reference, pairs, flags, eval_pairs=eval_pairs, out=out), out)
    if flags.cache_reference and eval_pairs:
        cached, fresh = (
            decisions(policy, x, eval_pairs, flags) for x in (reference, load_model(folder, device=device))
        )
        print(
            f"{(cached != fresh).sum()} of {len(fresh)} held-out decisions differ from those of a reference run afresh"
        )
    for pair, old, new in zip(shown, before, answers(policy, shown, end)):
        texts = [tokenizer.decode(ids).strip()[-400:] for ids in (pair.prompt, old, new)]
        print("\nprompt: …{}\nbefore: {}\nafter:  {}".format(*texts))


def forecast(policy: GPT, pairs: Sequence[Pair], flags: Flags) -> str:
    """Tokens, steps, and rough estimates of memory and time, before any is spent."""
    c, world = policy.config, rank_and_world()[1]
    steps = flags.steps or flags.epochs * math.ceil(len(pairs) / flags.batch_size)
    row = sum(map(row_length, pairs)) / len(pairs)
    tokens = int(row * pairs_seen(steps, len(pairs), flags.batch_size))
    a = torch.rand(1024, 1024, device=next(policy.parameters()).device)
    started = time.perf_counter()
    (a @ a @ a @ a).sum().item()
    rate = 3 * 2 * 1024**3 / (time.perf_counter() - started)
    # Numbers of 4 bytes: the policy's weights, gradient and two moments and the reference's weights; two gradients of a
    # table on their way to it, with more than one process embeddings and heads whole (policy's, gradient, reference's);
    # what backward needs; a chunk of the head.
    layer, table = 9 * c.hidden_size + 2 * c.intermediate_size, c.vocab_size * c.hidden_size
    layers, parameters = c.num_hidden_layers, count(policy)
    kept = layer + layers * c.hidden_size if flags.gradient_checkpointing else layers * layer
    whole = (2 if world == 1 else 3 if c.tie_word_embeddings else 6) * table
    shared = 4 * parameters + (table if flags.cache_reference else parameters)
    memory = 4e-9 * (shared / world + whole + kept * max(flags.micro_tokens, row) + 1024 * c.vocab_size)
    hours = 8 * parameters * tokens / rate / 3600 / world
    return (
        f"{steps:,} steps of {flags.batch_size} pairs, about {tokens:,} tokens; roughly {memory:.1f} GB on each "
        f"device and {hours:.1f} hours, from {rate / 1e9:.0f} GFLOP/s of a float32 matmul here"
    )


@torch.no_grad()
def answers(policy: GPT, pairs: Sequence[Pair], end: int) -> list[list[int]]:
    """Greedy responses to the pairs' prompts, for a look at what training did."""
    return policy.generate([pair.prompt.tolist() for pair in pairs], 64, eos=end) if pairs else []


def leave_results(policy: GPT, lines: list[dict[str, float]], out: Path) -> None:
    """The final model as a folder that transformers loads, and a figure of the run where matplotlib is installed."""
    weights = get_model_state_dict(policy, options=WHOLE)
    if rank_and_world()[0] != 0:
        return
    whole = GPT(policy.config)
    whole.load_state_dict(weights)
    save_model(whole, out / "model", source=policy.source)
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure

        lines = [line for line in lines if "loss" in line]
        panels = "loss", "beta", "steps/lower steps/raise steps/uncertain", "rewards/margins", "kl"
        figure = Figure(figsize=(15, 3), layout="constrained")
        for axes, names in zip(figure.subplots(1, len(panels)), panels):
            for name in names.split():
                axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=name, linewidth=1)
            axes.set_xlabel("optimizer step")
            axes.legend(frameon=False)
        figure.savefig(out / "run.svg")
    print(f"\nwrote {out}: model/, metrics.jsonl")


def keep_freed_memory() -> None:
    """On a CPU, keep what a step frees for the next one, and take large pages: new memory costs a tenth of a step.

    Hints to torch and to glibc's malloc; where they are not understood nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block, for it goes when the block is freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def pairs_seen(steps: int, pairs: int, batch_size: int) -> int:
    """How many pairs that many steps look at: the last batch of an epoch may be smaller."""
    epochs, rest = divmod(steps, math.ceil(pairs / batch_size))
    return epochs * pairs + rest * batch_size


def count(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when all went well, 2 for bad input (one line on stderr says which), 130 when stopped."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without β or ± is no reason to stop
    try:
        flags = parse_flags(argv)
        name = flags.device if flags.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if name.split(":")[0] not in ("cpu", "cuda"):  # mps has no float64, which the sums over responses need
            raise ValueError(f"--device {name}: auto, cpu or cuda expected (mps has no float64)")
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"--device {flags.device}: {str(e).splitlines()[0]}") from e
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun
            if name == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
                raise ValueError(
                    f"FSDP2 of torch {torch.__version__} runs on GPUs alone: one process, or a newer torch"
                )
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
            if name == "cuda":
                name = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(name)
            if rank_and_world()[0] != 0:
                sys.stdout = open(os.devnull, "w")
        (real_job if flags.model else toy_job)(flags, torch.device(name))
        return 0
    except (ValueError, OSError, ImportError) as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(e):
            raise
        advice = "out of memory, try fewer --micro-tokens or --gradient-checkpointing"
        print(f"train.py: error: {advice}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"train.py: {str(e) or 'stopped at once'}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
