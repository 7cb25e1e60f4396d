"""What a run prints: its forecast, its progress, sampled answers, and a table and a figure at the end."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from model import GPT
from support.device import rank_and_world
from support.rows import Pair


class Lines:
    """A file for tqdm where stderr is no terminal: every state that it shows becomes a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():  # tqdm also writes what clears a line
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress_bar(items: Iterable | None, name: str, unit: str, shown: bool = True, **more: object) -> tqdm:
    """A bar on the terminal; elsewhere a line at the start, every 30 seconds and at the end. Process 0 shows it."""
    more |= {"unit": unit, "disable": not shown or rank_and_world()[0] != 0}
    if not sys.stderr.isatty():
        more |= {"file": Lines(), "mininterval": 30, "miniters": 1, "ncols": 0, "position": 0}
    return tqdm(items, name, **more)


def say(text: str) -> None:
    """Print a line above the bars. Process 0 alone prints."""
    if rank_and_world()[0] == 0:
        tqdm.write(text) if sys.stderr.isatty() else print(text, flush=True)


def printable(text: str) -> str:
    """The text with control characters escaped, which can hide text or move the cursor; tabs and line ends stay."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def step_line(line: dict[str, float]) -> str:
    """What the bar shows of a step."""
    memory = f" {line['memory_gb']:.1f} GB" if "memory_gb" in line else ""
    return (
        f"loss {line['loss']:.4f} β {line['beta']:.4g} accuracy {line['rewards/accuracies']:.2f} "
        f"{line['tokens_per_second']:.0f} tok/s{memory}"
    )


def eval_line(line: dict[str, float]) -> str:
    agree = ""
    if "eval/steps/agree" in line:
        agree = f", {line['eval/steps/agree']:.0%} of {line['eval/steps/agree_pairs']} decisions as in float32"
    return (
        f"step {line['step']}, {line['eval/pairs']} held-out pairs: "
        f"accuracy {line['eval/rewards/accuracies']:.3f} ± {line['eval/rewards/accuracies_se']:.3f}, "
        f"reward margin {line['eval/rewards/margins']:.4f} ± {line['eval/rewards/margins_se']:.4f}, "
        f"loss {line['eval/loss']:.4f}{agree}"
    )


def before_and_after(lines: list[dict[str, float]], beta: float) -> str:
    """A table of the first and the last evaluation, of β at the first step and `beta` now."""
    first = next(line["beta"] for line in lines if "beta" in line)
    evaluations = [line for line in lines if "eval/loss" in line]
    names = {"accuracy": "rewards/accuracies", "reward margin": "rewards/margins", "loss": "loss", "KL": "kl"}
    rows = [("β", first, beta)]
    if evaluations:
        rows = [(f"held-out {x}", *(evaluations[i][f"eval/{key}"] for i in (0, -1))) for x, key in names.items()] + rows
    table = [f"{name:24}{before:12.4f}{after:12.4f}" for name, before, after in rows]
    return "\n".join([f"{'':24}{'before':>12}{'after':>12}", *table])


def draw(lines: list[dict[str, float]], path: Path) -> None:
    """A figure of the run. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    panels = (
        ("loss",),
        ("beta",),
        ("steps/lower", "steps/raise"),
        ("rewards/margins",),
        ("kl",),
        ("eval/rewards/accuracies",),
    )
    figure = Figure(figsize=(18, 3), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels)), panels):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line] or [(0, math.nan)]
            axes.plot(*zip(*points), label=name, linewidth=1, marker="o" if len(points) < 10 else "")
        axes.set_xlabel("optimizer step")
        axes.legend(frameon=False)
    figure.savefig(path)


def forecast(
    policy: GPT, reference: GPT | None, pairs: Sequence[Pair], eval_pairs: Sequence[Pair], flags: object
) -> str:
    """Steps, tokens, evaluations and a rough estimate of memory, before any is spent; a note on an unusual ε."""
    c, world = policy.config, rank_and_world()[1]
    epoch = math.ceil(len(pairs) / flags.batch_size)
    steps = flags.steps or flags.epochs * epoch
    tokens = [sum(map(len, pair[:3])) for pair in pairs]
    seen = sum(tokens) / len(tokens) * pairs_seen(steps, len(pairs), flags.batch_size)
    evaluations = 1 + math.ceil(steps / (flags.eval_every or steps)) if eval_pairs else 0  # see is_due
    # In numbers of 4 bytes: the policy's weights, gradient and two moments; the reference (of a cached one the output
    # matrix); with more than one process embeddings and heads whole (policy's, gradient, reference's); what backward
    # needs; a chunk of the head.
    layer, table = 9 * c.hidden_size + 2 * c.intermediate_size, c.vocab_size * c.hidden_size
    layers, of_policy = c.num_hidden_layers, sum(p.numel() for p in policy.parameters())
    of_reference = sum(p.numel() * p.element_size() for p in reference.parameters()) / 4 if reference else table
    kept = layer + layers * c.hidden_size if flags.gradient_checkpointing else layers * layer
    whole = (0 if world == 1 else 3 if c.tie_word_embeddings else 6) * table
    longest = max(flags.micro_tokens, sum(tokens) / len(tokens))
    memory = 4e-9 * ((4 * of_policy + of_reference) / world + whole + kept * longest + 1024 * c.vocab_size)
    distance = flags.epsilon_step * steps  # about how far log β can go
    few = f"\nε · steps is {distance:.2g}; below 1 β hardly moves, as in plain DPO" if 0 < distance < 1 else ""
    many = f"\nε · steps is {distance:.2g}; above 5 β may come near 0" if distance > 5 else ""
    return (
        f"{steps:,} steps of {flags.batch_size} pairs, about {seen:,.0f} tokens; {evaluations} evaluations of "
        f"{len(eval_pairs):,} pairs; roughly {memory:.1f} GB of memory on each device{few or many}"
    )


def is_due(step: int, steps: int, every: int) -> bool:
    """Whether to evaluate after `step` steps: at the start, at the end and every `every` steps."""
    return step in (0, steps) or bool(every) and step % every == 0


def pairs_seen(steps: int, pairs: int, batch_size: int) -> int:
    """How many pairs that many steps look at: the last batch of an epoch may be smaller."""
    epochs, rest = divmod(steps, math.ceil(pairs / batch_size))
    return epochs * pairs + rest * batch_size


def answers(policy: GPT, prompts: Sequence[Pair], pairs: Sequence[Pair]) -> list[list[int]]:
    """Greedy responses to the prompts, up to the token that ends most chosen responses of `pairs`."""
    if not prompts:
        return []
    ends = Counter(int(pair.chosen[-1]) for pair in pairs if not pair.cut[1]) or Counter([-1])
    return policy.generate([pair.prompt.tolist() for pair in prompts], 64, eos=ends.most_common(1)[0][0])


def show_answers(prompts: Sequence[Pair], before: Sequence, after: Sequence, tokenizer) -> str:
    """The answers from before and after training beside the chosen ones; of long texts the last 400 characters."""
    shown = []
    for pair, old, new in zip(prompts, before, after):
        texts = {"prompt": pair.prompt, "chosen": pair.chosen, "before": old, "after": new}
        shown += ["", *(f"{name + ':':8} {tokenizer.decode(ids).strip()[-400:]}" for name, ids in texts.items())]
    return printable("\n".join(shown))
