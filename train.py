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
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import toy
from data import Batch, Pair, Tokenizer, collate, epoch_order, load_pairs, micro_batches, row_length, show_pair
from epsdpo import EpsDPOLoss, TokenStats, epsdpo_loss, linear_token_stats, next_beta, sum_over_responses
from model import GPT, Config

# ----------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class Flags:
    """Every flag of the command line; the comment behind a field is its help, [toy | real] its default."""

    model: str = ""  # checkpoint folder (Llama, Mistral, Qwen2 or Qwen3 family); without it the toy runs
    data: tuple[str, ...] = ()  # preference files: JSON lines, plain or .gz
    eval_data: tuple[str, ...] = ()  # held-out preference files; without them --eval-size pairs of --data are held out
    eval_size: int = 128  # how many pairs of --data to hold out, at most a tenth of them
    out: str = ""  # folder for metrics, checkpoint and final model [out/toy | must be given]
    beta: float | None = None  # β₀, the KL penalty at the start [0.5 | 0.01]
    epsilon: float = 0.01  # ε, for both of the next two. β has no fixed point: it falls about as
    # exp(−ε · steps · (2·accuracy − 1)), so choose ε times the number of steps of order 1 to 5
    epsilon_check: float | None = None  # ε_c, the perturbation in the check, in [0, 1) [--epsilon]
    epsilon_step: float | None = None  # ε_s, the size of a step of β, in [0, 0.5]; 0 is plain DPO [--epsilon]
    lr: float | None = None  # peak learning rate: linear warm-up, then a cosine to zero [2e-3 | 7e-7]
    warmup: float = 0.1  # share of the steps that warm up
    batch_size: int | None = None  # pairs in one optimizer step, over all processes [64 | 128]
    epochs: int = 1  # passes over the data
    steps: int | None = None  # optimizer steps, in place of --epochs
    micro_tokens: int = 8192  # tokens in one forward pass of one process: fewer need less memory
    clip: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.0  # AdamW's
    max_length: int = 2048  # tokens of a prompt and one response
    max_prompt_length: int | None = None  # tokens a prompt keeps where something must be cut [half of --max-length]
    skip_bad_rows: bool = False  # skip and count rows that cannot be used, in place of stopping at the first
    dtype: str = "float32"  # float32, or bfloat16: autocast over float32 weights, the decision still in float32
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
        for name, (of_toy, of_real) in {"beta": (0.5, 0.01), "lr": (2e-3, 7e-7), "batch_size": (64, 128)}.items():
            if getattr(self, name) is None:
                setattr(self, name, of_real if real else of_toy)
        self.epsilon_check = self.epsilon if self.epsilon_check is None else self.epsilon_check
        self.epsilon_step = self.epsilon if self.epsilon_step is None else self.epsilon_step
        for name, ok, expected in (
            ("model", bool(self.model) == bool(self.data), "--model and --data come together"),
            ("out", not real or self.out or self.show, "a folder, for a run on real data"),
            ("beta", 0 < self.beta < math.inf, "a finite number above 0"),
            ("epsilon_check", 0 <= self.epsilon_check < 1, "a number in [0, 1)"),
            ("epsilon_step", 0 <= self.epsilon_step <= 0.5, "a number in [0, 0.5]"),
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("warmup", 0 <= self.warmup <= 1, "a share, from 0 to 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1"),
            ("micro_tokens", self.micro_tokens >= 1, "at least 1"),
            ("clip", self.clip > 0, "a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number, at least 0"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("resume", not (self.resume and self.overwrite), "either --resume or --overwrite"),
            *((name, getattr(self, name) >= 0, "at least 0") for name in ("eval_size", "eval_every", "save_every")),
            *((name, getattr(self, name) >= 0, "at least 0") for name in ("seed", "samples", "show")),
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
            kind = {"type": str, "nargs": "+", "metavar": "FILE"}
        else:
            of_type = {"int": int, "float": float, "str": str}[f.type.split()[0]]
            kind = {"type": of_type, "metavar": {int: "N", float: "X", str: "NAME"}[of_type]}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, help=text.replace("%", "%%"), **kind)
    return Flags(**vars(parser.parse_args(argv)))


# ----------------------------------------------------------------------------------------------------------------------
# The method


@dataclass
class EpsDPO:
    """ε-DPO as `train` uses a method: a loss for pairs, and what changes after a step. Its fields are its whole state."""

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


def compare(
    policy: GPT, reference: GPT, batch: Batch, epsilon_check: float, dtype: str
) -> tuple[TokenStats, TokenStats]:
    """Sums (B,) of the chosen and of the rejected responses: one forward pass of each model, whatever ε is."""
    where = (batch.tokens, batch.positions, batch.segments, batch.source)
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        with torch.no_grad():
            ref_hidden, ref_weight = reference(*where, lambda hidden, weight: (hidden, weight))  # (M, D), (V, D)

        def head(hidden: Tensor, weight: Tensor) -> TokenStats:
            return linear_token_stats(hidden, weight, ref_hidden, ref_weight, batch.label, epsilon_check)

        tokens = policy(*where, head)  # (M,)
    size = len(batch.tokens)
    sums = sum_over_responses(tokens, batch.owner, 2 * size)  # (2B,)
    return TokenStats(*(x[:size] for x in sums)), TokenStats(*(x[size:] for x in sums))


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
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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


@torch.no_grad()
def evaluate(policy: GPT, reference: GPT, pairs: Sequence[Pair], method: EpsDPO, flags: Flags) -> dict[str, float]:
    """Means over held-out pairs, and the standard errors of accuracy and margin."""
    parts = []
    for group in my_share(pairs, flags.micro_tokens):
        batch = collate(group).to(next(policy.parameters()).device)
        chosen, rejected = compare(policy, reference, batch, flags.epsilon_check, flags.dtype)
        parts.append(totals(method.loss(chosen, rejected, batch), chosen, rejected, batch, method.beta))
    n = len(pairs)
    means = {name: value / n for name, value in add_up(parts)[0].items()}
    accuracy, variance = means["rewards/accuracies"], means.pop("margin_squares") - means["rewards/margins"] ** 2
    means["rewards/accuracies_se"] = math.sqrt(accuracy * (1 - accuracy) / n)
    means["rewards/margins_se"] = math.sqrt(max(variance, 0.0) / n)
    return {f"eval/{name}": value for name, value in means.items()} | {"eval/pairs": n}


def learning_rate(step: int, steps: int, flags: Flags) -> float:
    """Of optimizer step 0, 1, … of `steps`: linear warm-up that starts above zero, then a cosine that ends at zero."""
    warmup = math.ceil(flags.warmup * steps)
    if step < warmup:
        return flags.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return flags.lr * (1 + math.cos(math.pi * progress)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
RUN_FILES = ("flags.json", "metrics.jsonl", "checkpoint.pt", "model", "reference", "run.svg")
FREE_ON_RESUME = {"model", "data", "eval_data", "out", "device", "micro_tokens", "eval_every", "save_every", "samples"}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write the next version of `path`: flushed and moved over it at the end, or gone if that fails."""
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def fingerprint(pairs: Sequence[Pair], folder: str) -> dict[str, str]:
    """What a checkpoint belongs to, as hashes: the token ids of all pairs, and the files of the first weights."""
    ids, files = hashlib.sha256(), hashlib.sha256()
    for pair in pairs:
        for part in (pair.prompt, pair.chosen, pair.rejected):
            ids.update(len(part).to_bytes(8, "little") + part.astype("<i4").tobytes())
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        with open(path, "rb") as f:  # sizes, and the ends of the files: enough to tell two models apart, at any size
            head = f.read(1 << 20)
            f.seek(max(0, path.stat().st_size - (1 << 20)))
            files.update(path.stat().st_size.to_bytes(8, "little") + head + f.read())
    return {"data": ids.hexdigest(), "model": files.hexdigest()}


def save_checkpoint(path: Path, step: int, policy: GPT, optimizer, method: EpsDPO, identity: dict[str, str]) -> None:
    """All of a run's state: weights, moments, β and the step. Order and schedule follow from the step and the flags."""
    weights, moments = get_state_dict(policy, optimizer, options=WHOLE)
    if rank_and_world()[0] == 0:
        with replacing(path) as beside:
            state = {"step": step, "method": vars(method), "identity": identity}
            torch.save({"weights": weights, "moments": moments, **state}, beside)


def load_checkpoint(path: Path, policy: GPT, optimizer, method: EpsDPO, identity: dict[str, str]) -> int:
    """Put a checkpoint's state in place and return the number of steps done. Raises ValueError if it is another run's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        differ = [name for name, value in identity.items() if state["identity"].get(name) != value]
    except Exception as e:  # torch.load fails in many ways on a file that is none of its own
        raise ValueError(f"{path}: not a checkpoint of this program ({type(e).__name__}: {e})") from e
    if differ:
        raise ValueError(f"{path}: a checkpoint of another run, its {', '.join(differ)} differ: resume with the same")
    set_state_dict(
        policy, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"], options=WHOLE
    )
    vars(method).update(state["method"])
    return state["step"]


class Log:
    """metrics.jsonl: strict JSON, one line a step, written by one process; on resume cut back to the checkpoint's step."""

    def __init__(self, out: Path | None, done: int | None) -> None:
        self.lines: list[dict[str, float]] = []
        self.file = None
        if out is None or rank_and_world()[0] != 0:
            return
        path = out / "metrics.jsonl"
        if done is not None and path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line may be torn: a killed run's normal state
                    self.lines += [x for x in [json.loads(line)] if x["step"] <= done]
        with replacing(path) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(path, "a")

    def write(self, line: dict[str, float]) -> None:
        self.lines.append(line)
        if self.file:
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()


# ----------------------------------------------------------------------------------------------------------------------
# One run


def train(
    policy: GPT,
    reference: GPT,
    pairs: Sequence[Pair],
    flags: Flags,
    method: EpsDPO | None = None,
    eval_pairs: Sequence[Pair] = (),
    out: Path | None = None,
) -> list[dict[str, float]]:
    """Train `policy` in place and return the metrics, one dict a step; with `out`, also write them and checkpoints.

    `reference` must share no storage with it. Raises ValueError when a loss or gradient is not finite, before
    the optimizer step, and naming the rows.
    """
    method = method or EpsDPO(flags.beta, flags.epsilon_check, flags.epsilon_step)
    rank, world = rank_and_world()
    device = next(policy.parameters()).device
    policy.train().requires_grad_(True)
    reference.eval().requires_grad_(False)
    steps_per_epoch = math.ceil(len(pairs) / flags.batch_size)
    steps = flags.steps or flags.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(policy.parameters(), lr=flags.lr, weight_decay=flags.weight_decay, fused=True)
    checkpoint = out / "checkpoint.pt" if out else None
    identity = fingerprint([*pairs, *eval_pairs], flags.model) | {
        f.name: str(getattr(flags, f.name)) for f in dataclasses.fields(flags) if f.name not in FREE_ON_RESUME
    }
    done = None
    if flags.resume and out:
        done = load_checkpoint(checkpoint, policy, optimizer, method, identity)
    log = Log(out, done)
    beta_0, beta_reported, saved = flags.beta, False, done
    stop = StopSignal()

    def evaluated(step: int) -> None:
        if eval_pairs:
            log.write({"step": step} | evaluate(policy, reference, eval_pairs, method, flags))

    if done is None:
        evaluated(0)
    bar = tqdm(total=steps, initial=done or 0, desc="train", unit="step", disable=rank != 0, leave=False)
    for step in range(done or 0, steps):
        started = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        order = epoch_order(len(pairs), flags.seed, epoch)[place * flags.batch_size : (place + 1) * flags.batch_size]
        batch = [pairs[i] for i in order]
        parts = []
        for group in my_share(batch, flags.micro_tokens):
            micro = collate(group).to(device)
            try:
                chosen, rejected = compare(policy, reference, micro, flags.epsilon_check, flags.dtype)
                result = method.loss(chosen, rejected, micro)
            except ValueError as e:
                raise ValueError(f"step {step + 1}, rows {rows_of(group)}: {e}; {last_good(saved, out)}") from e
            # FSDP averages gradients over the processes: sum · world / pairs makes that the mean over all pairs.
            (result.losses.sum() * (world / len(batch))).backward()
            parts.append(totals(result, chosen, rejected, micro, method.beta))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), flags.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        sums, stopping = add_up(parts, float(stop.asked))
        if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
            problem = f"the loss is {sums['loss'] / len(batch)} and the gradient's norm {norm}"
            raise ValueError(f"step {step + 1}, rows {rows_of(batch)}: {problem}; {last_good(saved, out)}")
        if step == 0 and norm == 0:
            tqdm.write(
                "warning: the first gradient is all zero, so nothing will be learned: is the policy frozen, does the "
                "reference share its weights, are the two answers of every pair equal?"
            )
        lr = learning_rate(step, steps, flags)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        beta = method.beta
        method.after_step(sums, policy, reference)

        seconds = time.perf_counter() - started
        del sums["margin_squares"]
        tokens = sum(map(row_length, batch))
        log.write(
            {"step": step + 1, "epoch": (step + 1) / steps_per_epoch, "learning_rate": lr, "grad_norm": norm}
            | {"beta": beta}
            | {name: value / len(batch) for name, value in sums.items()}
            | {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds, "memory_gb": memory_gb()}
        )
        line = log.lines[-1]
        bar.set_postfix_str(
            f"loss {line['loss']:.4f} β {beta:.4g} acc {line['rewards/accuracies']:.2f} "
            f"{line['tokens_per_second']:.0f} tok/s {line['memory_gb']:.1f} GB"
        )
        bar.update()
        if not beta_reported and not beta_0 / 100 <= method.beta <= beta_0 * 100:
            beta_reported = True
            tqdm.write(
                f"warning: β went from {beta_0:g} to {method.beta:.3g}: ε times the steps is too large (--epsilon)"
            )
        last = step + 1 == steps
        if last or (flags.eval_every and (step + 1) % flags.eval_every == 0):
            evaluated(step + 1)
        if out and (stopping or last or (flags.save_every and (step + 1) % flags.save_every == 0)):
            if flags.save_every or stopping:
                save_checkpoint(checkpoint, step + 1, policy, optimizer, method, identity)
                saved = step + 1
        if stopping and not last:
            bar.close()
            raise KeyboardInterrupt(f"stopped after step {step + 1}; {last_good(saved, out)}")
    bar.close()
    return log.lines


def rows_of(pairs: Sequence[Pair]) -> str:
    shown = ", ".join(f"{Path(pair.file).name}:{pair.line}" for pair in pairs[:8])
    return shown + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")


def last_good(saved: int | None, out: Path | None) -> str:
    return f"go on with --resume from step {saved} in {out}" if saved else "no checkpoint had been saved (--save-every)"


def memory_gb() -> float:
    """The peak so far: of the device on a GPU, of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


class StopSignal:
    """Ctrl-C (or a scheduler's SIGTERM) asks the run to stop after the step it is in; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may: elsewhere signals keep their meaning
                signal.signal(name, self.ask)

    def ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt("stopped at once: nothing saved since the last checkpoint")
        self.asked = True
        tqdm.write("stopping after this step; once more to stop at once")


# ----------------------------------------------------------------------------------------------------------------------
# The two jobs

TOY_PAIRS, TOY_SCALE = (
    16384,
    2.0,
)  # pairs of the toy world, and what a point of reward counts in its Bradley–Terry labels


def toy_job(flags: Flags, device: torch.device, out: Path | None) -> None:
    """ε-DPO and DPO on a world whose every response is listed, from the same pairs and the same reference."""
    world = toy.World(flags.seed)
    torch.manual_seed(flags.seed)
    config = Config(
        vocab_size=6, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    reference = GPT(config).to(device)
    print(f"toy world {flags.seed}: 5 prompts, {len(world.responses)} responses each, all of them listed")
    distance = toy.fit_reference(reference, world, seed=flags.seed)
    print(f"reference: a GPT of {count(reference):,} parameters, {distance:.4f} nats from the language it learned")
    ref_logp = world.list_logps(reference, device)
    prompt, *answers = toy.sample_pairs(ref_logp, world.reward, TOY_PAIRS + flags.eval_size, TOY_SCALE, flags.seed)
    pairs = [
        Pair(np.array([x], np.int32), world.ids(int(w)), world.ids(int(l)), "toy", i + 1)
        for i, (x, w, l) in enumerate(zip(prompt.tolist(), *answers))
    ]
    eval_pairs, pairs = pairs[TOY_PAIRS:], pairs[:TOY_PAIRS]
    if flags.steps is None:
        flags = dataclasses.replace(flags, steps=flags.epochs * math.ceil(len(pairs) / flags.batch_size))
    logps = {"reference": ref_logp}
    for name, of_run, folder in (
        ("ε-DPO", flags, out),
        ("DPO", dataclasses.replace(flags, epsilon_step=0.0, resume=False), None),
    ):
        policy = copy.deepcopy(reference)
        lines = train(policy, reference, pairs, of_run, eval_pairs=eval_pairs, out=folder)
        logps[name] = world.list_logps(policy, device)
        if folder:
            leave_results(policy, lines, folder)
            betas = [line["beta"] for line in lines if "beta" in line]
            print(f"{name}: {len(betas)} steps of {flags.batch_size} pairs, β {betas[0]:.3f} → {betas[-1]:.3f}")
    logps["optimum π*"] = toy.optimum(ref_logp, world.reward, flags.beta)
    print(f"\nExact, over all responses; J and π* at β₀ = {flags.beta}:")
    reports = {name: toy.report(logp, ref_logp, world.reward, flags.beta) for name, logp in logps.items()}
    print(toy.table(reports))


def real_job(flags: Flags, device: torch.device, out: Path | None) -> None:
    """A checkpoint folder and preference files: tokenize, say what is coming, train, leave a folder others can load."""
    has_tokenizer = (Path(flags.model) / "tokenizer.json").exists()
    tokenizer = Tokenizer.from_pretrained(flags.model) if has_tokenizer else None
    config = Config.from_json(Path(flags.model) / "config.json")
    rules = dict(
        tokenizer=tokenizer, vocab_size=config.vocab_size, max_length=flags.max_length,
        max_prompt_length=flags.max_prompt_length, skip_bad_rows=flags.skip_bad_rows,
        max_position_embeddings=config.max_position_embeddings,
    )  # fmt: skip
    pairs, report = load_pairs(flags.data, **rules)
    print(report)
    if flags.show:
        print("\n\n".join(show_pair(pair, tokenizer) for pair in pairs[: flags.show]))
        return
    if flags.eval_data:
        eval_pairs, report = load_pairs(flags.eval_data, **rules)
        print(f"held out: {report}")
    else:
        order = np.random.default_rng(0).permutation(len(pairs))  # the same pairs for every seed
        held = min(flags.eval_size, len(pairs) // 10)
        eval_pairs, pairs = [pairs[i] for i in sorted(order[:held])], [pairs[i] for i in sorted(order[held:])]
        print(f"held out: {held} pairs of --data")
    reference = GPT.from_pretrained(flags.model).to(device)
    policy = GPT.from_pretrained(flags.model).to(device)
    lines = train(policy, reference, pairs, flags, eval_pairs=eval_pairs, out=out)
    leave_results(policy, lines, out)
    print_evaluations(lines)


def leave_results(policy: GPT, lines: list[dict[str, float]], out: Path) -> None:
    """The final model as a folder that transformers loads, and a figure where matplotlib is installed."""
    policy.save_pretrained(out / "model")
    draw(lines, out / "run.svg")
    print(f"wrote {out}: model/, metrics.jsonl")


def draw(lines: list[dict[str, float]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = [line for line in lines if "loss" in line]
    panels = (("loss",), ("beta",), ("steps/lower", "steps/raise", "steps/uncertain"), ("rewards/margins",), ("kl",))
    figure = Figure(figsize=(15, 3), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels)), panels):
        for name in names:
            axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=name, linewidth=1)
        axes.set_xlabel("optimizer step")
        axes.legend(frameon=False)
    figure.savefig(path)


def print_evaluations(lines: list[dict[str, float]]) -> None:
    for line in lines:
        if "eval/loss" in line:
            numbers = (
                f"{name} {line['eval/rewards/' + key]:.3f} ± {line['eval/rewards/' + key + '_se']:.3f}"
                for name, key in (("accuracy", "accuracies"), ("margin", "margins"))
            )
            print(f"held out, step {line['step']}: {', '.join(numbers)}, loss {line['eval/loss']:.4f}")


def count(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    try:
        flags = parse_flags(argv)
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if flags.device == "auto" else flags.device
        )
        real = bool(flags.model)
        out = Path(flags.out or "out/toy")
        out.mkdir(parents=True, exist_ok=True)
        (real_job if real else toy_job)(flags, device, out)
        return 0
    except (ValueError, OSError) as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
