"""Example adapters: `python -m tests.conformance --impl tests.conformance.adapters:ours`.

`ours` is the adapter of an implementation with two ε, `trl_style` that of a trainer with one ε and with state. The
textbook versions are what people write first. `python -m tests.conformance.scales` prints what each passes. All need
torch.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def tensors(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy logits (M, V), reference logits (M, V), labels (M,), owner (M,) of entries logits and packed."""
    if case["entry"] == "packed":
        f, r = (torch.tensor(case[k]).flatten(0, 1)[case["source"]] for k in ("policy_logits", "ref_logits"))
        return f, r, torch.tensor(case["label"]), torch.tensor(case["owner"])
    f, r, labels = (torch.tensor(np.concatenate(case[k])) for k in ("policy_logits", "ref_logits", "labels"))
    lengths = torch.tensor([len(y) for y in case["labels"]])
    return f, r, labels, torch.arange(len(lengths)).repeat_interleave(lengths)


def ours(case: dict) -> dict:
    import epsdpo

    if case["entry"] == "run":
        return in_a_row(case, ours)
    if case["entry"] == "sums":
        columns = (torch.tensor(case[k]) for k in ("logp", "ref_logp", "delta_minus", "delta_plus"))
        sums = epsdpo.TokenStats(*columns, kl=torch.zeros(len(case["logp"])))
    else:
        f, r, labels, owner = tensors(case)
        f.requires_grad_()
        stats = epsdpo.token_stats(f, r, labels, case["epsilon_check"])
        sums = epsdpo.sum_over_responses(stats, owner, int(owner.max()) + 1)
    chosen, rejected = (epsdpo.TokenStats(*(x.chunk(2)[i] for x in sums)) for i in range(2))
    out = epsdpo.epsdpo_loss(chosen, rejected, case["beta"], case["epsilon_step"])
    lower, keep, raise_ = ([int(s) for s in out.step].count(s) for s in (1, 0, -1))
    answer = {
        "step": out.step,
        "beta": out.beta,
        "loss": out.loss.detach(),
        "next_beta": epsdpo.next_beta(case["beta"], lower, keep, raise_, case["epsilon_step"]),
        "margin": out.margin,
        "losses": out.losses.detach(),
        "delta_minus": chosen.delta_minus - rejected.delta_minus,
        "delta_plus": chosen.delta_plus - rejected.delta_plus,
    }
    if case["baseline"] == "harmonic":  # `epsdpo.py` has the paper's text; the authors' code is one line
        answer["next_beta"] = case["beta"] / (1 + case["epsilon_step"] * (lower - raise_) / len(out.step))
    if case["entry"] != "sums":
        answer["kl"] = sums.kl
    if case["entry"] == "logits":
        (grad,) = torch.autograd.grad(out.loss, f)
        answer["grad"] = grad.split([len(y) for y in case["labels"]])
    return answer


def in_a_row(case: dict, answer) -> dict:
    """Entry run, by an implementation without state: each optimizer step gets the next β of the one before it."""
    found, beta = [], case["beta"]
    for part in case["optimizer_steps"]:
        found.append(answer(case | part | {"entry": "logits", "beta": beta}))
        beta = float(found[-1]["next_beta"])
    joined = {k: np.concatenate([np.asarray(a[k]) for a in found]) for k in ("step", "beta")}
    return joined | {k: [float(a[k]) for a in found] for k in ("loss", "next_beta")}


def textbook(case: dict, dtype: torch.dtype) -> dict | None:
    """The definition, line by line: log-softmaxes of perturbed logits, summed, subtracted, compared."""
    if case["entry"] == "sums":
        return None
    if case["entry"] == "run":
        return in_a_row(case, lambda one: textbook(one, dtype))
    f, r, labels, owner = tensors(case)
    f, r = f.to(dtype), r.to(dtype)

    def sum_logp(logits: torch.Tensor) -> torch.Tensor:  # (2B,)
        logp = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        return torch.zeros(int(owner.max()) + 1).index_add(0, owner, logp)

    logp, ref_logp = sum_logp(f), sum_logp(r)
    minus, plus = (sum_logp(f + s * (f - r)) for s in (case["epsilon_check"], -case["epsilon_check"]))
    z_ref, z, z_minus, z_plus = (x.chunk(2)[0] - x.chunk(2)[1] for x in (ref_logp, logp, minus, plus))
    step = ((z_minus > z) & (z > z_plus)).long() - ((z_minus < z) & (z < z_plus)).long()
    beta = case["beta"] / (1 + step * case["epsilon_step"])
    next_beta = beta.mean() if case["baseline"] == "arithmetic" else 1 / (1 / beta).mean()
    return {"step": step, "beta": beta, "loss": -F.logsigmoid(beta * (z - z_ref)).mean(), "next_beta": next_beta}


def textbook_float32(case: dict) -> dict | None:
    return textbook(case, torch.float32)


def textbook_bfloat16(case: dict) -> dict | None:
    """Logits as a head under bf16 autocast gives them; everything after that in float32."""
    return textbook(case, torch.bfloat16)


class PatchedTrainer:
    """What a patch of a DPO trainer looks like: padded batches, labels of −100, three passes of `selective_log_softmax`,
    one ε, and β as an attribute that is updated once an optimizer step from the mean step, as in the authors' code."""

    def __init__(self, beta: float, epsilon: float):
        self.beta, self.epsilon, self.steps = beta, epsilon, []

    def get_batch_logps(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        mask = labels != -100  # logits (2B, T, V), labels (2B, T)
        labels = labels.masked_fill(~mask, 0)
        per_token = torch.gather(logits.float().log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
        return (per_token * mask).sum(-1)

    def compute_loss(self, logits: torch.Tensor, ref_logits: torch.Tensor, labels: torch.Tensor) -> tuple:
        e = self.epsilon
        policy = self.get_batch_logps(logits, labels)
        reference = self.get_batch_logps(ref_logits, labels)
        with torch.no_grad():
            lower = self.get_batch_logps((1 + e) * logits - e * ref_logits, labels)
            higher = self.get_batch_logps((1 - e) * logits + e * ref_logits, labels)
            z, z_lower, z_higher = (x.chunk(2)[0] - x.chunk(2)[1] for x in (policy, lower, higher))
            step = torch.where((z_lower > z) & (z > z_higher), 1, torch.where((z_lower < z) & (z < z_higher), -1, 0))
            beta = self.beta / (1 + e * step)
        log_ratio = policy - reference
        losses = -F.logsigmoid(beta * (log_ratio.chunk(2)[0] - log_ratio.chunk(2)[1]))
        self.steps.append(step)
        return losses, beta, step

    def end_of_step(self, baseline: str) -> None:
        step, e = torch.cat(self.steps).double(), self.epsilon
        factor = 1 / (1 + e * step.mean()) if baseline == "harmonic" else (1 / (1 + e * step)).mean()
        self.beta *= factor.item()
        self.steps = []


def trl_style(case: dict) -> dict | None:
    """The adapter of a port with one ε and with state: it declines what has two, and keeps the trainer for a run."""
    if case["entry"] not in ("logits", "run") or case["epsilon_check"] != case["epsilon_step"]:
        return None
    trainer = PatchedTrainer(case["beta"], case["epsilon_step"])
    found = [optimizer_step(trainer, part, case["baseline"]) for part in case.get("optimizer_steps", [case])]
    losses, betas, steps, next_betas = zip(*found)
    answer = {"step": torch.cat(steps), "beta": torch.cat(betas)}
    if case["entry"] == "run":
        return answer | {"loss": losses, "next_beta": next_betas}
    return answer | {"loss": losses[0], "next_beta": next_betas[0]}


def optimizer_step(trainer: PatchedTrainer, part: dict, baseline: str) -> tuple:
    """The loss, β̃, the steps and the next β of one optimizer step."""
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
        [torch.tensor(x) for x in rows], batch_first=True, padding_value=value
    )
    logits, ref_logits = (pad(part[k], 0.0) for k in ("policy_logits", "ref_logits"))
    labels, pairs = pad(part["labels"], -100), len(part["labels"]) // 2
    found = []
    for pair in torch.arange(pairs).split([int(n) for n in part["micro_batches"]]):
        rows = torch.cat([pair, pair + pairs])
        found.append(trainer.compute_loss(logits[rows], ref_logits[rows], labels[rows]))
    losses, beta, step = (torch.cat(x) for x in zip(*found))
    trainer.end_of_step(baseline)
    return losses.mean(), beta, step, trainer.beta
