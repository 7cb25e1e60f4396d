"""Example adapters: `pytest tests/conformance --impl tests.conformance.adapters:ours`.

`ours` shows the adapter of a good implementation; the others are what people write first, and what it costs them:
`python -m tests.conformance.scales` prints what each passes. All need torch.
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
    if case["entry"] == "logits":
        (grad,) = torch.autograd.grad(out.loss, f)
        answer["grad"] = grad.split([len(y) for y in case["labels"]])
    return answer


def textbook(case: dict, dtype: torch.dtype) -> dict | None:
    """The definition, line by line: log-softmaxes of perturbed logits, summed, subtracted, compared."""
    if case["entry"] == "sums":
        return None
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
    β as an attribute, updated once an optimizer step from the mean step, as the authors' code does."""

    def __init__(self, beta: float, epsilon: float):
        self.beta, self.epsilon, self.steps = beta, epsilon, []

    def get_batch_logps(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        mask = labels != -100  # logits (2B, T, V), labels (2B, T)
        labels = labels.masked_fill(~mask, 0)
        per_token = torch.gather(logits.float().log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
        return (per_token * mask).sum(-1)

    def compute_loss(
        self, logits: torch.Tensor, ref_logits: torch.Tensor, labels: torch.Tensor, epsilon: float
    ) -> tuple:
        policy = self.get_batch_logps(logits, labels)
        reference = self.get_batch_logps(ref_logits, labels)
        with torch.no_grad():
            lower = self.get_batch_logps((1 + epsilon) * logits - epsilon * ref_logits, labels)
            higher = self.get_batch_logps((1 - epsilon) * logits + epsilon * ref_logits, labels)
            z, z_lower, z_higher = (x.chunk(2)[0] - x.chunk(2)[1] for x in (policy, lower, higher))
            step = torch.where((z_lower > z) & (z > z_higher), 1, torch.where((z_lower < z) & (z < z_higher), -1, 0))
            beta = self.beta / (1 + self.epsilon * step)
        log_ratio = policy - reference
        losses = -F.logsigmoid(beta * (log_ratio.chunk(2)[0] - log_ratio.chunk(2)[1]))
        self.steps.append(step)
        return losses, beta, step

    def end_of_step(self, baseline: str) -> None:
        step = torch.cat(self.steps).double()
        factor = (
            1 / (1 + self.epsilon * step.mean()) if baseline == "harmonic" else (1 / (1 + self.epsilon * step)).mean()
        )
        self.beta *= factor.item()


def trl_style(case: dict) -> dict | None:
    if case["entry"] != "logits":
        return None
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
        [torch.tensor(x) for x in rows], batch_first=True, padding_value=value
    )
    logits, ref_logits, labels = (
        pad(case["policy_logits"], 0.0),
        pad(case["ref_logits"], 0.0),
        pad(case["labels"], -100),
    )
    trainer = PatchedTrainer(case["beta"], case["epsilon_step"])
    found, pairs = [], len(labels) // 2
    for pair in torch.arange(pairs).split(case["micro_batches"]):
        rows = torch.cat([pair, pair + pairs])
        found.append(trainer.compute_loss(logits[rows], ref_logits[rows], labels[rows], case["epsilon_check"]))
    losses, beta, step = (torch.cat(x) for x in zip(*found))
    trainer.end_of_step(case["baseline"])
    return {"step": step, "beta": beta, "loss": losses.mean(), "losses": losses, "next_beta": trainer.beta}
