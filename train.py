"""Train a policy with ε-DPO: on a toy world with a known optimum, or on a real checkpoint with real preferences.

    python train.py                                            the toy, about a minute, ending in an exact report
    python train.py --model DIR --data FILE.jsonl --out DIR    a Llama, Mistral or Qwen folder and preference pairs
    torchrun --nproc_per_node=8 train.py --model …             the same on many devices (PyTorch's FSDP2)

The file reads top to bottom: the flags, the method, one batch, one step, the loop, the two jobs.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from epsdpo import EpsDPOLoss, TokenStats, epsdpo_loss, linear_token_stats, next_beta, sum_over_responses
from model import GPT
from support import device, toy
from support.cached_reference import CachedReference
from support.checkpoint import check_model, load_model, read_config
from support.data import print_pairs, read_pairs
from support.device import autocast, clip_gradient, loss_scales, my_micro_batches, rank_and_world, sum_over_processes
from support.flags import PerJob, SameAs, fill_in, flag, one_line_errors, parse_flags, resume_command
from support.metrics import means, speed, standard_errors, totals
from support.report import answers, before_and_after, forecast, is_due, pairs_seen, show_answers
from support.rows import Batch, Pair, collate, locations, pairs_of_step
from support.run import Run
from support.text import Tokenizer

Reference = GPT | CachedReference
Pairs = Sequence[Pair]

# ---- the flags -------------------------------------------------------------------------------------------------------


@dataclass
class Flags:
    """The flags of the command line: type, default, help and range of each."""

    model: str = flag("", "checkpoint folder; without it the toy runs", needs="data or resume, out or show")
    data: tuple[str, ...] = flag((), "preference files: JSON lines or one JSON array, plain or .gz", needs="model")
    eval_data: tuple[str, ...] = flag((), "held-out preference files", needs="model", instead_of="eval_size")
    eval_size: int = flag(128, "how many pairs of --data to hold out, at most a third of them", "[0, inf)")
    out: str = flag("", "folder for metrics, checkpoint and final model; the toy's is out/toy if none is given")
    beta: float = flag(PerJob(toy=0.5, real=0.01), "β at the start, the KL penalty", "(0, inf)")
    epsilon: float = flag(0.01, "sets the next two; choose ε times the number of steps between 1 and 5", "[0, 0.5]")
    epsilon_check: float = flag(SameAs("epsilon"), "ε_c, how far the check perturbs β", "[0, 1)")
    epsilon_step: float = flag(SameAs("epsilon"), "ε_s, how far a step moves β; 0 is plain DPO", "[0, 0.5]")
    lr: float = flag(PerJob(toy=1e-3, real=7e-7), "peak learning rate: linear warm-up, then cosine", "(0, inf)")
    warmup: float = flag(0.1, "fraction of the steps that warm up", "[0, 1]")
    batch_size: int = flag(PerJob(toy=64, real=128), "pairs in one optimizer step, over all processes", "[1, inf)")
    epochs: int = flag(1, "passes over the data", "[1, inf)")
    steps: int | None = flag(None, "optimizer steps", "[1, inf)", instead_of="epochs")
    micro_tokens: int = flag(2048, "tokens in one forward pass of one process; fewer need less memory", "[1, inf)")
    cache_reference: str = flag("", "folder to cache the reference's hidden states in (one process)", needs="model")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    clip: float = flag(1.0, "clip the gradient norm to this value", "(0, inf]")
    weight_decay: float = flag(0.0, "AdamW weight decay", "[0, inf)")
    max_length: int = flag(2048, "tokens of a prompt and one response", "[2, inf)", needs="model")
    max_prompt_length: int | None = flag(None, "least tokens of a cut prompt, if not half", "[1, inf)", needs="model")
    skip_bad_rows: bool = flag(False, "skip and count bad rows, instead of stopping at the first", needs="model")
    dtype: str = flag("float32", "16 bits: autocast over float32 weights", "float32 | float16 | bfloat16")
    device: str = flag("auto", "auto (a GPU if there is one), cpu or cuda")
    seed: int = flag(0, "order of the pairs; also the toy world", "[0, inf)")
    eval_every: int = flag(0, "evaluate at start, end and every N steps", "[0, inf)", needs="eval_data or eval_size")
    save_every: int = flag(0, "write a checkpoint every N steps and at the end, for --resume", "[0, inf)")
    resume: bool = flag(False, "continue the run in --out, with the same flags; --data is not needed again")
    overwrite: bool = flag(False, "replace the run in --out", instead_of="resume")
    samples: int = flag(2, "answers shown before and after training", "[0, inf)", needs="model, eval_data or eval_size")
    show: int = flag(0, "print N pairs as the model sees them, and stop", "[0, inf)", needs="data")
    given: frozenset[str] = frozenset()  # the flags that the command line sets

    def __post_init__(self) -> None:
        """Fill in defaults. Raises ValueError naming the flag that is wrong."""
        fill_in(self, real=bool(self.model))
        self.max_prompt_length = self.max_prompt_length or self.max_length // 2
        if self.max_prompt_length >= self.max_length:
            raise ValueError("--max-prompt-length must be below --max-length")
        if not self.model and self.eval_size > 10**6:
            raise ValueError("--eval-size must be at most 1000000 for the toy")


# ---- one step --------------------------------------------------------------------------------------------------------


@dataclass
class EpsDPO:
    """A method as the loop sees it: its loss, and its update after a step. A checkpoint saves its fields."""

    beta: float
    epsilon_check: float
    epsilon_step: float

    def loss(self, chosen: TokenStats, rejected: TokenStats, batch: Batch) -> EpsDPOLoss:
        return epsdpo_loss(chosen, rejected, self.beta, self.epsilon_step)

    def after_step(self, sums: dict[str, float], policy: GPT, reference: GPT) -> None:
        """β ← mean of β̃ over all pairs of the step. The models are for methods that need them."""
        counts = (int(sums[f"steps/{name}"]) for name in ("lower", "keep", "raise"))
        self.beta = next_beta(self.beta, *counts, self.epsilon_step)


def score_pairs(
    policy: GPT, reference: Reference, batch: Batch, epsilon_check: float, dtype: str, in_place: bool = False
) -> tuple[TokenStats, TokenStats]:
    """Sums (B,) over the chosen and over the rejected responses: one forward pass of each model, whatever ε is.

    dtype: "float16" or "bfloat16" runs the layers under autocast, "float32" does not. Heads never have 16 bits.
    in_place: `backward()` must follow at once. It adds the gradients of both (V, D) matrices to `.grad` directly.
    """
    inputs = (batch.tokens, batch.positions, batch.segments, batch.source)
    with autocast(dtype, batch.tokens.device), device.gradient_in_place(policy.model.embed_tokens, in_place):
        with torch.no_grad():
            ref = reference(*inputs, lambda hidden, weight: (hidden, weight))  # (M, D), (V, D)

        def head(hidden: Tensor, weight: Tensor) -> TokenStats:
            weight_grad = weight.grad if in_place else None
            return linear_token_stats(hidden, weight, *ref, batch.label, epsilon_check, weight_grad=weight_grad)

        tokens = policy(*inputs, head)  # numbers per token, (M,)
    pairs = len(batch.tokens)
    sums = sum_over_responses(tokens, batch.owner, 2 * pairs)  # (2B,), the chosen ones first
    return TokenStats(*(x[:pairs] for x in sums)), TokenStats(*(x[pairs:] for x in sums))


def run_batch(
    policy: GPT, reference: Reference, micro_batches: Iterable[Pairs], n: int, method: EpsDPO, flags: Flags, scale=1.0
) -> tuple[dict[str, float], Tensor]:
    """Score a batch of n pairs; with gradients on, add that of its mean loss times `scale` (float16's).

    micro_batches: this process's share. Returns sums over the pairs of all processes, and the steps (N,) of this
    process's pairs. Raises ValueError naming the rows whose logits are not finite.
    """
    world = rank_and_world()[1]
    parts, steps = [], []
    for pairs in micro_batches:
        batch = collate(pairs).to(policy.lm_head.weight.device)
        try:
            chosen, rejected = score_pairs(policy, reference, batch, method.epsilon_check, flags.dtype, world == 1)
            out = method.loss(chosen, rejected, batch)
        except ValueError as e:
            raise ValueError(f"{locations(pairs)}: {e}") from e
        if torch.is_grad_enabled():
            # FSDP averages gradients over the processes: sum · world / n makes that the mean over all pairs.
            (out.losses.sum() * (scale * world / n)).backward()
        parts.append(totals(out, chosen, rejected, batch, method.beta))  # metrics, and the counts for the next β
        steps.append(out.step)
    return sum_over_processes(parts), torch.cat(steps)


def train_step(
    policy: GPT, reference: Reference, batch: Pairs, method: EpsDPO, optimizer: Optimizer, lr: float, flags: Flags
) -> dict[str, float]:
    """Both updates of ε-DPO, of the policy and of β, from one effective batch. Returns the line of metrics.

    Raises ValueError, before anything is updated, for a loss or a gradient that is not finite.
    """
    started, beta = time.perf_counter(), method.beta
    micro_batches = my_micro_batches(batch, flags.micro_tokens)
    for scale in loss_scales(flags.dtype, len(batch) / beta):  # [1.0]; float16: from batch/β, gradients near ½, down
        optimizer.zero_grad()
        sums, _ = run_batch(policy, reference, micro_batches, len(batch), method, flags, scale)
        norm = clip_gradient(policy, flags.clip, scale)
        if math.isfinite(norm) or not math.isfinite(sums["loss"]):  # success, or a loss that no scale can repair
            break
    if not (math.isfinite(norm) and math.isfinite(sums["loss"])):
        hint = " (float16 overflows above 65504)" if flags.dtype == "float16" else ""
        raise ValueError(f"{locations(batch)}: the loss is {sums['loss'] / len(batch)}, the gradient norm {norm}{hint}")

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(sums, policy, reference)  # β ← mean of β̃

    line = {"learning_rate": lr, "grad_norm": norm, "beta": beta} | means(sums, len(batch)) | speed(batch, started)
    return line | ({"loss_scale": scale} if flags.dtype == "float16" else {})


def learning_rate(step: int, steps: int, flags: Flags) -> float:
    """For optimizer step 0, 1, …: a linear warm-up from above zero, then a cosine that would reach zero at `steps`."""
    warmup = math.ceil(flags.warmup * steps - 1e-9)
    if step < warmup:
        return flags.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return flags.lr * (1 + math.cos(math.pi * progress)) / 2


# ---- the loop --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    policy: GPT, reference: Reference, pairs: Pairs, method: EpsDPO, flags: Flags, run: Run | None = None
) -> dict[str, float]:
    """Means over held-out pairs (at least one), and the standard errors of accuracy and margin.

    Under 16 bits also the share of decisions, on at most 128 pairs, that float32 layers would make too. `run` shows a
    bar and can stop the evaluation between two micro-batches.
    """
    has_moved, has_model = run is None or run.done > 0, not isinstance(reference, CachedReference)
    compare = flags.dtype != "float32" and method.epsilon_check > 0 and has_moved and has_model
    n, compared = len(pairs), pairs[: 128 if compare else 0]
    first, rest = (my_micro_batches(some, flags.micro_tokens) for some in (compared, pairs[len(compared) :]))
    watch = run.watch if run else iter

    sums, steps = run_batch(policy, reference, watch(first + rest), n, method, flags)
    line = means(sums, n) | standard_errors(sums, n) | {"pairs": n}
    if compare:
        in_float32 = dataclasses.replace(flags, dtype="float32")
        _, exact = run_batch(policy, reference, watch(first), n, method, in_float32)
        agree = sum_over_processes([{"steps/agree": (steps[: len(exact)] == exact).sum()}])
        line |= means(agree, len(compared)) | {"steps/agree_pairs": len(compared)}
    return {f"eval/{name}": value for name, value in line.items()}


def train(
    policy: GPT,
    reference: Reference,
    pairs: Pairs,
    flags: Flags,
    method: EpsDPO | None = None,
    eval_pairs: Pairs = (),
    run: Run | None = None,
) -> list[dict[str, float]]:
    """Train `policy` in place; return the metrics, a line for each step and evaluation. `run` writes and saves them.

    Raises ValueError, before the update, for a loss or gradient that is not finite; KeyboardInterrupt when stopped.
    """
    run = run or Run()
    method = method or EpsDPO(flags.beta, flags.epsilon_check, flags.epsilon_step)
    device.check_apart(policy, reference)
    if not pairs:
        raise ValueError("no pairs to train on")
    policy.requires_grad_(True)
    reference.requires_grad_(False)
    policy.gradient_checkpointing = flags.gradient_checkpointing
    optimizer = AdamW(policy.parameters(), lr=flags.lr, weight_decay=flags.weight_decay, fused=True)
    per_epoch = math.ceil(len(pairs) / flags.batch_size)
    steps = flags.steps or flags.epochs * per_epoch
    run.start(policy, optimizer, method, pairs, eval_pairs)  # --resume: loads the state of all three; opens the log

    def evaluate_if_due() -> None:
        if eval_pairs and is_due(run.done, steps, flags.eval_every) and not run.has_evaluated(run.done):
            run.log(run.done, evaluate(policy, reference, eval_pairs, method, flags, run))

    with run:  # from here on Ctrl-C means: stop after this step
        evaluate_if_due()  # at step 0, or where a run was stopped in the middle of one
        for step in run.progress(steps):
            batch = pairs_of_step(pairs, step, flags.batch_size, flags.seed)
            line = train_step(policy, reference, batch, method, optimizer, learning_rate(step, steps, flags), flags)
            run.log(step + 1, {"epoch": (step + 1) / per_epoch} | line | device.memory_gb(run.device))
            evaluate_if_due()  # run.log has advanced run.done
            last = step + 1 == steps
            if run.must_save(last):
                run.save()
            run.stop_if_asked(last)
        run.write_model()
    return run.lines


# ---- the two jobs ----------------------------------------------------------------------------------------------------


def toy_job(flags: Flags, where: torch.device, command: str) -> None:
    """ε-DPO and DPO on a world whose every response is listed, from the same pairs and the same reference."""
    torch.set_num_threads(1)  # more threads would slow it down and change the last digits
    if rank_and_world()[1] > 1:
        raise ValueError("the toy needs one process: without --model, start `python train.py` without torchrun")
    run = Run(Path(flags.out or "out/toy"), flags, command)
    if run.finished:
        return
    problem = toy.make_problem(flags.seed, eval_pairs=flags.eval_size, device=where)
    print(f"toy world {flags.seed}, all its responses listed; reference {problem.distance:.4f} nats from its language")
    policy, plain = copy.deepcopy(problem.reference), copy.deepcopy(problem.reference)
    lines = train(policy, problem.reference, problem.pairs, flags, eval_pairs=problem.eval_pairs, run=run)
    run.finish()
    print("now plain DPO on the same pairs, for comparison", flush=True)
    train(plain, problem.reference, problem.pairs, dataclasses.replace(flags, epsilon_step=0.0))
    logps = {name: problem.world.list_logps(model, where) for name, model in (("ε-DPO", policy), ("DPO", plain))}
    betas = [*(line["beta"] for line in lines if "beta" in line), run.method.beta]
    toy.print_report(problem, logps, betas, pairs_seen(len(betas) - 1, len(problem.pairs), flags.batch_size))


def checkpoint_job(flags: Flags, where: torch.device, command: str) -> None:
    """A checkpoint folder and preference files: tokenize, forecast, train, save a folder that others can load."""
    config, folder = read_config(flags.model), Path(flags.model)
    tokenizer = Tokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None
    one_process = rank_and_world()[1] == 1
    can_answer = tokenizer is not None and one_process
    if flags.show:
        check_model(folder)  # a folder that cannot train should not pass here
        return print_pairs(flags, tokenizer, config)
    if flags.cache_reference and not one_process:
        raise ValueError("--cache-reference needs one process")
    if "samples" in flags.given and flags.samples and not can_answer:
        raise ValueError("--samples needs a tokenizer.json in the checkpoint folder, and one process")
    run = Run(Path(flags.out), flags, command)
    if run.finished:
        return
    pairs, eval_pairs = run.saved_pairs(config.vocab_size) or read_pairs(flags, tokenizer, config)
    load = partial(load_model, folder, device=where, prepare=device.shard)
    policy = load()
    reference = None if flags.cache_reference else load(keep_16_bit=True)
    print(forecast(policy, reference, pairs, eval_pairs, flags))
    if reference is None:  # the policy has not moved yet: it is the reference
        both = [*pairs, *eval_pairs]
        reference = CachedReference(policy, both, flags.cache_reference, flags.dtype, flags.micro_tokens)
    prompts = eval_pairs[: flags.samples] if can_answer else []
    before = answers(policy, prompts, pairs)
    lines = train(policy, reference, pairs, flags, eval_pairs=eval_pairs, run=run)
    run.finish()
    print(before_and_after(lines, run.method.beta))
    print(show_answers(prompts, before, answers(policy, prompts, pairs), tokenizer))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when all went well, 2 for bad input (one line on stderr says which), 130 when stopped."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> None:
        flags = parse_flags(Flags, __doc__, argv)
        with device.start(flags.device) as where:
            job = checkpoint_job if flags.model else toy_job
            job(flags, where, resume_command(argv))

    return one_line_errors(program)


if __name__ == "__main__":
    sys.exit(main())
