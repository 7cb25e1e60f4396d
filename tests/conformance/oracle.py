"""A second implementation, in NumPy float64, that shares no code with `epsdpo.py`.

Each step of the method is a method of a class, so that `mistakes.py` can get one of them wrong at a time.
"""

from __future__ import annotations

import numpy as np


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - log_sum_exp(x)[..., None]


def of_label(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, labels[:, None], -1)[:, 0]


class Oracle:
    """`Oracle().answer(case)`; cases are as `asking.to_arrays` makes them."""

    def answer(self, case: dict) -> dict:
        if case["entry"] == "run":
            return self.run(case)
        b = case["beta"]
        if case["entry"] == "sums":
            sums = [dict(zip(self.NAMES, x)) for x in zip(*(np.asarray(case[k], np.float64) for k in self.NAMES))]
        else:
            responses = self.responses(case)
            sums = [self.total(self.tokens(f, r, y, case["epsilon_check"])) for f, r, y in responses]
        sums = {k: np.array([s[k] for s in sums]).reshape(2, -1) for k in self.NAMES}  # (2, B): chosen, rejected
        minus, plus = self.differences(sums)
        step = self.step(minus, plus)
        margin = self.margin(sums["logp"], sums["ref_logp"])
        beta_tilde = self.beta_tilde(b, step, case)
        losses = np.logaddexp(0, -self.beta_of_loss(b, beta_tilde) * margin)
        parts = np.split(np.arange(len(step)), np.cumsum(case["micro_batches"])[:-1])
        found = {
            "step": step,
            "beta": beta_tilde,
            "loss": self.mean([losses[p] for p in parts]),
            "next_beta": self.next_beta(b, [step[p] for p in parts], case["epsilon_step"], case["baseline"]),
            "margin": margin,
            "losses": losses,
            "delta_minus": minus,
            "delta_plus": plus,
        }
        return found

    def run(self, case: dict) -> dict:
        """Optimizer steps in a row: each starts from the next β of the one before it."""
        found, beta = [], case["beta"]
        for part in case["optimizer_steps"]:
            found.append(self.answer(case | part | {"entry": "logits", "beta": beta}))
            beta = self.beta_of_next_step(case["beta"], found[-1])
        joined = {k: np.concatenate([a[k] for a in found]) for k in ("step", "beta")}
        return joined | {k: [a[k] for a in found] for k in ("loss", "next_beta")}

    NAMES = ("logp", "ref_logp", "delta_minus", "delta_plus")

    def responses(self, case: dict) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per response, logits of both models (T, V) and labels (T,)."""
        if case["entry"] == "logits":
            return list(zip(case["policy_logits"], case["ref_logits"], case["labels"]))
        f, r = (case[k].reshape(-1, case[k].shape[-1]) for k in ("policy_logits", "ref_logits"))  # (B·T, V)
        return [
            (f[case["source"][mine]], r[case["source"][mine]], case["label"][mine])
            for mine in (case["owner"] == i for i in range(2 * len(case["tokens"])))
        ]

    def tokens(self, f: np.ndarray, r: np.ndarray, labels: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
        f, r = f.astype(np.float64), r.astype(np.float64)
        log_p, d = log_softmax(f), f - r
        u = d - of_label(d, labels)[:, None]
        return {
            "logp": of_label(log_p, labels),
            "ref_logp": of_label(log_softmax(r), labels),
            "delta_minus": -self.log_mean_exp(log_p, epsilon * u),
            "delta_plus": -self.log_mean_exp(log_p, -epsilon * u),
        }

    def log_mean_exp(self, log_p: np.ndarray, a: np.ndarray) -> np.ndarray:
        """log E_p[exp(a)]: small sums from exp(a) − 1, so that nothing cancels; large ones directly."""
        direct = log_sum_exp(log_p + a)
        small = np.where(a < 1, np.exp(log_p) * np.expm1(np.minimum(a, 1)), 0)
        with np.errstate(over="ignore"):
            large = np.where(a < 1, 0, np.exp(log_p + a) - np.exp(log_p))
            return np.where(abs(direct) < 0.3, np.log1p(np.maximum((small + large).sum(-1), -0.9)), direct)

    def beta_of_next_step(self, first: float, last: dict) -> float:
        return last["next_beta"]

    def total(self, tokens: dict[str, np.ndarray]) -> dict[str, float]:
        return {k: x.sum() for k, x in tokens.items()}

    def differences(self, sums: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """z(β⁻) − z(β) and z(β⁺) − z(β), with z chosen minus rejected."""
        return tuple(sums[k][0] - sums[k][1] for k in ("delta_minus", "delta_plus"))

    def step(self, minus: np.ndarray, plus: np.ndarray) -> np.ndarray:
        return np.where((minus > 0) & (plus < 0), 1, np.where((minus < 0) & (plus > 0), -1, 0))

    def margin(self, logp: np.ndarray, ref_logp: np.ndarray) -> np.ndarray:
        ratio = logp - ref_logp  # (2, B)
        return ratio[0] - ratio[1]

    def beta_tilde(self, beta: float, step: np.ndarray, case: dict) -> np.ndarray:
        return beta / (1 + step * case["epsilon_step"])

    def beta_of_loss(self, beta: float, beta_tilde: np.ndarray) -> np.ndarray:
        return beta_tilde

    def mean(self, parts: list[np.ndarray]) -> float:
        return np.concatenate(parts).mean()

    def next_beta(self, beta: float, steps: list[np.ndarray], epsilon: float, baseline: str) -> float:
        step = np.concatenate(steps)
        if baseline == "harmonic":
            return beta / (1 + epsilon * step.mean())
        return beta * (1 / (1 + epsilon * step)).mean()


def kl(f: np.ndarray, r: np.ndarray) -> float:
    """KL(π_θ ‖ π_ref), summed over positions: log E_p[exp(−c)] with c = u − E_p[u], by increments where c is small."""
    log_p = log_softmax(f)
    c = f - r
    c = c - (np.exp(log_p) * c).sum(-1, keepdims=True)
    series = c * c / 2 * (1 - c / 3 * (1 - c / 4 * (1 - c / 5 * (1 - c / 6))))
    excess = np.where(abs(c) < 0.1, series, np.expm1(np.minimum(-c, 1)) + c)  # exp(−c) − 1 + c
    far = log_sum_exp(log_p - c)
    near = np.log1p((np.exp(log_p) * np.where(-c < 1, excess, 0)).sum(-1))
    return np.where(c.min(-1) > -1, near, far).sum()


def gradient(f: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """∂(−log p of the labels)/∂f."""
    return np.exp(log_softmax(f)) - np.eye(f.shape[1])[labels]


def answer(case: dict) -> dict:
    """All that an answer may hold."""
    found = Oracle().answer(case)
    if case["entry"] in ("sums", "run"):
        return found
    responses = [(f.astype(np.float64), r.astype(np.float64), y) for f, r, y in Oracle().responses(case)]
    found["kl"] = np.array([kl(f, r) for f, r, _ in responses])
    if case["entry"] == "logits":
        slope = found["beta"] * np.exp(-np.logaddexp(0, found["beta"] * found["margin"])) / len(found["step"])
        signed = np.concatenate([slope, -slope])
        found["grad"] = [s * gradient(f, y) for s, (f, _, y) in zip(signed, responses)]
    return found
