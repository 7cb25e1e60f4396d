"""Measure the cost of a training step: `python -m experiments.bench --model DIR --data FILE.jsonl`

    ours     train.py's step with ε > 0
    low      the same with --gradient-checkpointing and twice the --micro-tokens: less memory
    cached   as ours, with a --cache-reference file, which is made before the clock starts
    dpo      the same step as plain DPO: the head computes log-probabilities and never the difference of logits
    usual    two padded sequences per pair, logits of all their tokens, three log-softmaxes (and the reference's)
    trl      TRL's DPOTrainer (plain DPO), where trl is installed

Each measurement has a process of its own, so that peak memory is measured for it alone. The ways take turns, so that a
slow minute of the machine affects all. Without --model: random weights of --shape, and pairs of random ids.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

import train
from epsdpo import EpsDPOLoss, TokenStats, _LinearTokenStats, epsdpo_loss, linear_token_stats, perturbed_logits
from model import GPT
from support.cached_reference import CachedReference
from support.checkpoint import load_model, read_config, resolve
from support.data import load_pairs
from support.device import autocast, gradient_in_place, keep_freed_memory, memory_gb, my_micro_batches
from support.rows import Pair, collate, row_length
from support.text import Tokenizer

WAYS = ("ours", "low", "cached", "dpo", "usual", "trl")
SHAPE = "vocab_size=2048,hidden_size=128,intermediate_size=384,num_hidden_layers=4,num_attention_heads=4"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--data", help="preference file; its first --pairs usable pairs are used")
    parser.add_argument("--shape", default=SHAPE, help="config.json's keys of a random model [%(default)s]")
    parser.add_argument("--lengths", default="128,64,64", help="tokens of random prompts and responses [%(default)s]")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=2, help="pairs in an optimizer step [2]")
    parser.add_argument("--micro-tokens", type=int, default=512, help="tokens in a forward pass of ours and dpo [512]")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 [float32]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="[%(default)s]")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # internal: the way to measure in this process
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> tuple[list[Pair], Callable[[], GPT]]:
    """The pairs, and a function that makes a model."""
    if args.model:
        config, tokenizer = read_config(args.model), Tokenizer.from_pretrained(args.model)
        rules = {"vocab_size": config.vocab_size, "max_length": args.max_length, "skip_bad_rows": True}
        pairs = load_pairs([args.data], tokenizer, progress=False, **rules)[0]
        return pairs[: args.pairs], lambda **options: load_model(args.model, device=args.device, **options)
    shape = {key: json.loads(value) for key, value in (item.split("=") for item in args.shape.split(","))}
    config = resolve({"model_type": "llama"} | shape)
    generator = torch.Generator().manual_seed(0)

    def random_ids(n: int):
        return torch.randint(config.vocab_size, (n,), generator=generator).int().numpy()

    sizes = [int(n) for n in args.lengths.split(",")]
    ids = [[random_ids(n) for n in sizes] for _ in range(args.pairs)]

    def random_model(keep_16_bit: bool = False) -> GPT:
        torch.manual_seed(0)
        with torch.device(args.device):
            return GPT(config)

    return [Pair(*parts) for parts in ids], random_model


class LogpsAlone(_LinearTokenStats):
    """Plain DPO's head: two log-softmaxes, chunk by chunk. The backward pass is inherited."""

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, labels, epsilon_check, chunk_size, weight_grad):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk_size, ctx.dtype, ctx.weight_grad = chunk_size, torch.float32, weight_grad

        def logps(states: Tensor, w: Tensor) -> Tensor:
            chunks = []
            for h, y in zip(states.split(chunk_size), labels.split(chunk_size)):
                ctx.last_logits = h.float() @ w.T
                chunks.append(ctx.last_logits.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1))
            return torch.cat(chunks)

        with torch.autocast(hidden.device.type, enabled=False):  # the policy last: backward needs its logits
            ref_logp = logps(ref_hidden, ref_weight)
            logp = logps(hidden, weight)
        ctx.mark_non_differentiable(ref_logp)
        return logp, ref_logp


def logps_alone(
    hidden, weight, ref_hidden, ref_weight, labels, epsilon_check, chunk_size=256, weight_grad=None
) -> TokenStats:
    tensors = (hidden, weight, ref_hidden, ref_weight, labels)
    logp, ref_logp = LogpsAlone.apply(*tensors, epsilon_check, chunk_size, weight_grad)
    zero = torch.zeros_like(ref_logp, dtype=torch.float64)
    return TokenStats(logp, ref_logp.double(), zero, zero, zero)


def usual_loss(policy: GPT, reference: GPT, pairs: list[Pair], flags: train.Flags) -> EpsDPOLoss:
    """The usual way: 2B padded sequences [prompt | response], logits (2B, T, V) of both models, all log-softmaxes."""
    rows = [(pair.prompt, pair[side]) for side in (1, 2) for pair in pairs]
    T, device = max(len(x) + len(y) for x, y in rows), next(policy.parameters()).device
    tokens, mask = torch.zeros(2, len(rows), T, dtype=torch.int64)
    for i, (x, y) in enumerate(rows):
        tokens[i, : len(x) + len(y)] = torch.tensor([*x, *y])
        mask[i, len(x) : len(x) + len(y)] = 1
    tokens, mask = tokens.to(device), mask[:, 1:].to(device)
    with autocast(flags.dtype, device):
        logits = policy(tokens)[:, :-1]  # (2B, T-1, V)
        with torch.no_grad():
            ref_logits = reference(tokens)[:, :-1]

    def sums(logits: Tensor) -> Tensor:  # (2B, T-1, V) -> (2B,)
        return (logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1) * mask).sum(-1)

    logp = sums(logits)
    with torch.no_grad():
        minus, plus = (sums(perturbed_logits(logits, ref_logits, s)) - logp for s in (0.01, -0.01))
        stats = TokenStats(logp, sums(ref_logits), minus, plus, torch.zeros_like(minus))
    sides = (TokenStats(*(x[half] for x in stats)) for half in (slice(len(pairs)), slice(len(pairs), None)))
    return epsdpo_loss(*sides, flags.beta, flags.epsilon_step)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds per pair and peak memory of one way, after one warm-up step."""
    pairs, make = work(args)
    if args.one == "trl":
        return measure_trl(args, pairs)
    if args.one != "usual":
        keep_freed_memory()
    policy, flags = make(), train.Flags(beta=0.1, micro_tokens=args.micro_tokens, dtype=args.dtype)
    if args.one == "low":
        policy.gradient_checkpointing, flags.micro_tokens = True, 2 * args.micro_tokens
    if args.one == "cached":
        folder = tempfile.mkdtemp()
        reference = CachedReference(policy, pairs, folder, args.dtype, args.micro_tokens)
        shutil.rmtree(folder)  # the mapped file stays readable
    else:
        reference = make(keep_16_bit=True).requires_grad_(False)
    method = train.EpsDPO(0.1, 0.01, 0.0 if args.one == "dpo" else 0.01)
    train.linear_token_stats = logps_alone if args.one == "dpo" else linear_token_stats
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, weight_decay=0.0, fused=True)
    parts: dict[str, float] = {}

    def timed(part: str, f: Callable, *arguments) -> object:
        synchronize(args)
        started = time.perf_counter()
        result = f(*arguments)
        synchronize(args)
        parts[part] = parts.get(part, 0.0) + time.perf_counter() - started
        return result

    def step(batch: list[Pair]) -> None:
        if args.one == "parts":
            in_parts(policy, reference, batch, flags, timed)
        elif args.one == "usual":
            usual_loss(policy, reference, batch, flags).loss.backward()
        else:
            groups = my_micro_batches(batch, flags.micro_tokens)
            train.run_batch(policy, reference, groups, len(batch), method, flags)
        timed("clip", torch.nn.utils.clip_grad_norm_, policy.parameters(), 1.0)
        timed("optimizer", optimizer.step)
        optimizer.zero_grad()

    step(pairs[: args.batch])
    parts.clear()
    started = time.perf_counter()
    for i in range(0, len(pairs), args.batch):
        step(pairs[i : i + args.batch])
    synchronize(args)
    found = {"seconds": (time.perf_counter() - started) / len(pairs)} | memory_gb(torch.device(args.device))
    found["parameters"], found["rate"] = sum(p.numel() for p in policy.parameters()), matmul_rate(args)
    return found | {part: seconds / len(pairs) for part, seconds in parts.items()}


def in_parts(policy: GPT, reference: GPT, pairs: list[Pair], flags: train.Flags, timed: Callable) -> None:
    """Time the parts of our step. The head runs with ε and as plain DPO's, on the same hidden states."""

    def keep(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, weight

    for group in my_micro_batches(pairs, flags.micro_tokens):
        batch = collate(group).to(next(policy.parameters()).device)
        where = (batch.tokens, batch.positions, batch.segments, batch.source, keep)
        with autocast(flags.dtype, batch.tokens.device), gradient_in_place(policy.model.embed_tokens, True):
            with torch.no_grad():
                ref = timed("reference", reference, *where)
            now = timed("policy", policy, *where)
        with torch.no_grad():
            timed("head without ε", logps_alone, *now, *ref, batch.label, 0.01)
        tokens = timed("head with ε", linear_token_stats, *now, *ref, batch.label, 0.01, 256, now[1].grad)
        loss = -tokens.logp.sum() / len(pairs)
        timed("backward", loss.backward)


def measure_trl(args: argparse.Namespace, pairs: list[Pair]) -> dict[str, float]:
    """TRL's DPOTrainer on the same token ids, rows and optimizer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [tokenizer.batch_decode(pair[:3]) for pair in pairs]
    rows = Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), row)) for row in [*texts[: args.batch], *texts]]
    )
    options = {"per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1, "num_train_epochs": 1}
    options |= {"max_length": args.max_length, "optim": "adamw_torch_fused", "learning_rate": 1e-6, "beta": 0.1}
    options |= {"bf16": args.dtype == "bfloat16", "use_cpu": args.device == "cpu", "gradient_checkpointing": False}
    config = DPOConfig(
        "out/trl", report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **options
    )
    models = [AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2)]
    trainer = DPOTrainer(
        models[0], models[1], config, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.train()
    return {"seconds": (marks[-1] - marks[0]) / len(pairs)} | memory_gb(torch.device(args.device))


def synchronize(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize()


def matmul_rate(args: argparse.Namespace) -> float:
    """FLOP/s of a square matmul in the measured dtype, the best of five."""
    size = 2048 if args.device == "cpu" else 8192
    a = torch.rand(size, size, device=args.device, dtype=getattr(torch, args.dtype))
    times = []
    for _ in range(5):
        synchronize(args)
        started = time.perf_counter()
        a @ a
        synchronize(args)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def main() -> None:
    args = parse()
    if args.one:
        print(json.dumps(measure(args)))
        return
    ways = [way for way in args.ways.split(",") if way != "trl" or (args.model and importlib.util.find_spec("trl"))]
    results: dict[str, list[dict]] = {way: [] for way in [*ways, "parts"]}
    for _ in range(args.repeats):
        for way in results:
            command = [sys.executable, "-m", "experiments.bench", *sys.argv[1:], "--one", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{way}: {results[way][-1]['seconds']:.3f} s/pair", file=sys.stderr)
    pairs, parts = work(args)[0], results["parts"]
    tokens = sum(map(row_length, pairs)) / len(pairs)
    of = {way: [r["seconds"] for r in rs] for way, rs in results.items()}
    rate = median(r["rate"] for r in parts)
    print(f"\n{len(pairs)} pairs of {tokens:.0f} tokens, batch {args.batch}, {args.dtype}, {args.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s of a matmul; median (least to most)\n")
    print("| way | s/pair | tokens/s | peak GB | time of ours / its | model FLOP/s of the matmul's |")
    print("|---|---|---|---|---|---|")
    for way in ways:
        ratios = [a / b for a, b in zip(of["ours"], of[way])] if "ours" in of else [math.nan]
        share = 8 * parts[0]["parameters"] * tokens / median(of[way]) / rate
        memory = median(r["memory_gb"] for r in results[way])
        speed = f"{spread(of[way])} | {tokens / median(of[way]):.0f}"
        print(f"| {way} | {speed} | {memory:.2f} | {spread(ratios)} | {share:.0%} |")
    print("\n| part of ours | s/pair |\n|---|---|")
    for name in [
        name for name in parts[0] if name not in ("seconds", "memory_gb", "rate", "parameters", "head without ε")
    ]:
        print(f"| {name} | {spread([r[name] for r in parts])} |")
    own = [r["head with ε"] - r["head without ε"] for r in parts]
    shares = [100 * x / (r["seconds"] - r["head without ε"]) for x, r in zip(own, parts)]
    print(f"| ε's own work | {spread(own, 4)}, {spread(shares, 2)} % |")


def spread(values: list[float], digits: int = 3) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
