"""What implementations get wrong: the oracle with one mistake each. The docstrings explain the flags of the case file.

A case carries a mistake's flag when an implementation that makes it fails the case: nobody assigns flags by hand.
When an answer fails, the suite looks for the mistake that gives the same answer, and names it.
"""

from __future__ import annotations

import numpy as np

from .oracle import Oracle, log_softmax, log_sum_exp, of_label


class Float32Subtraction(Oracle):
    """Log-probabilities in float32, subtracted: near the reference the difference is rounding. Sum increments instead."""

    def number(self, x):
        return x.astype(np.float32)

    def tokens(self, f, r, labels, epsilon):
        f, r = self.number(f), self.number(r)
        minus, plus = (of_label(log_softmax(f + np.float32(s) * (f - r)), labels) for s in (epsilon, -epsilon))
        logp, ref_logp = of_label(log_softmax(f), labels), of_label(log_softmax(r), labels)
        return {"logp": logp, "ref_logp": ref_logp, "delta_minus": minus, "delta_plus": plus}

    def total(self, tokens):
        sums = {k: x.sum(dtype=np.float32) for k, x in tokens.items()}
        return sums | {k: sums[k] - sums["logp"] for k in ("delta_minus", "delta_plus")}


class Bfloat16Logits(Float32Subtraction):
    """Logits rounded to bfloat16 (often by autocast around the output matrix); casting up afterwards rescues nothing."""

    def number(self, x):
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


class Float64Subtraction(Oracle):
    """Log-probabilities in float64, subtracted: right but for tiny differences and saturated logits. Sum increments."""

    def log_mean_exp(self, log_p, a):
        return log_sum_exp(log_p + a) - log_sum_exp(log_p)


class LogitsReadAsDoubles(Oracle):
    """The 9 digits of a logit read as a double: it is the float32 nearest to it (Math.fround, strtof, np.float32)."""

    def answer(self, case):
        return super().answer(case | case.get("as_written", {}))


class OverflowingIncrements(Oracle):
    """expm1 of large arguments in float32: it overflows from 88 on, and loses all digits to large terms well before."""

    def log_mean_exp(self, log_p, a):
        with np.errstate(all="ignore"):
            p, grown = np.exp(log_p).astype(np.float32), np.expm1(a.astype(np.float32))
            return np.log1p(np.nan_to_num((p * grown).sum(-1), nan=0.0)).astype(np.float64)


class EpsilonSignSwapped(Oracle):
    """ε and −ε swapped in the check: f + ε·(f − f_ref) belongs to the *smaller* β, β/(1+ε)."""

    def tokens(self, f, r, labels, epsilon):
        return super().tokens(f, r, labels, -epsilon)


class StepForCheck(Oracle):
    """epsilon_step used to perturb the logits: that is epsilon_check's part."""

    def answer(self, case):
        return super().answer(case | {"epsilon_check": case["epsilon_step"]})


class CheckForStep(Oracle):
    """epsilon_check used in β̃ and the next β: that is epsilon_step's part."""

    def answer(self, case):
        return super().answer(case | {"epsilon_step": case["epsilon_check"]})


class PerturbedReference(Oracle):
    """f_ref + ε·(f − f_ref) and f_ref − ε·(f − f_ref): the perturbation starts at the policy, not at the reference."""

    def tokens(self, f, r, labels, epsilon):
        f, r = f.astype(np.float64), r.astype(np.float64)
        found, log_q, d = super().tokens(f, r, labels, epsilon), log_softmax(r), f - r
        u = epsilon * (d - of_label(d, labels)[:, None])
        return found | {"delta_minus": -self.log_mean_exp(log_q, u), "delta_plus": -self.log_mean_exp(log_q, -u)}


class MixedProbabilities(Oracle):
    """(1+ε)·p − ε·p_ref: the perturbation is one of logits, not of probabilities."""

    def tokens(self, f, r, labels, epsilon):
        found = super().tokens(f, r, labels, epsilon)
        grown = np.expm1(np.minimum(found["ref_logp"] - found["logp"], 600))
        minus, plus = (np.log1p(np.maximum(s * grown, -1 + 1e-12)) for s in (-epsilon, epsilon))
        return found | {"delta_minus": minus, "delta_plus": plus}


class TokenMean(Oracle):
    """The mean over a response's tokens: the method sums them."""

    def total(self, tokens):
        return {k: x.mean() for k, x in tokens.items()}


class DeltaTokenMean(Oracle):
    """The mean over a response's tokens in the decision alone: it, too, is about sums."""

    def total(self, tokens):
        return {k: x.mean() if k.startswith("delta") else x.sum() for k, x in tokens.items()}


class PaddingCounted(Oracle):
    """Responses padded to the longest, and the padding counted: mask it by the lengths."""

    def responses(self, case):
        found = super().responses(case)
        longest = max(len(y) for _, _, y in found)
        rows = [[*range(len(y)), *[-1] * (longest - len(y))] for _, _, y in found]  # the last position over again
        return [(f[i], r[i], np.r_[y, np.zeros(longest - len(y), int)]) for (f, r, y), i in zip(found, rows)]


class LastTokenLost(Oracle):
    """The last token of each response (its end-of-turn token) left out."""

    def responses(self, case):
        return [(f[:-1], r[:-1], y[:-1]) if len(y) > 1 else (f, r, y) for f, r, y in super().responses(case)]


class FirstTokenLost(Oracle):
    """The first token of each response left out: the prompt's last position predicts it."""

    def responses(self, case):
        return [(f[1:], r[1:], y[1:]) if len(y) > 1 else (f, r, y) for f, r, y in super().responses(case)]


class NotShifted(Oracle):
    """In a packed row, the position of a token used to predict it: the position before it does (`source`)."""

    def responses(self, case):
        if case["entry"] != "packed":
            return super().responses(case)
        segments = np.asarray(case["segments"])
        at = np.concatenate([np.flatnonzero(segments.ravel() == s) for s in (1, 2)])
        order = np.argsort(at)  # sources stand row by row, chosen before rejected
        return super().responses(case | {"source": at[order]})


class RejectedAfterChosen(Oracle):
    """In a packed row, the rejected response's first token predicted by the chosen one's last: the prompt's last does."""

    def responses(self, case):
        if case["entry"] != "packed":
            return super().responses(case)
        source, half = case["source"].copy(), len(case["tokens"])
        for i in range(half):
            source[np.flatnonzero(case["owner"] == half + i)[0]] = source[np.flatnonzero(case["owner"] == i)[-1]] + 1
        return super().responses(case | {"source": source})


class ChosenAndRejectedSwapped(Oracle):
    """Chosen and rejected swapped: the first half of the responses is chosen, the second rejected."""

    def step(self, minus, plus):
        return super().step(-minus, -plus)

    def margin(self, logp, ref_logp):
        return super().margin(logp[::-1], ref_logp[::-1])


class StepsSwapped(Oracle):
    """Steps +1 and −1 swapped: z(β⁻) > z(β) > z(β⁺) *lowers* β, to β/(1+ε), and is step +1."""

    def step(self, minus, plus):
        return -super().step(minus, plus)


class OneSidedCheck(Oracle):
    """Only β⁻ looked at: a step needs both comparisons, and what is not monotone keeps β."""

    def step(self, minus, plus):
        return np.sign(minus).astype(int)


class OtherSidedCheck(Oracle):
    """Only β⁺ looked at: a step needs both comparisons, and what is not monotone keeps β."""

    def step(self, minus, plus):
        return -np.sign(plus).astype(int)


class TiesRaise(Oracle):
    """A tie counted as a pair that wants a larger β (≥ for >): a tie keeps β."""

    def step(self, minus, plus):
        return np.where((minus > 0) & (plus < 0), 1, np.where((minus <= 0) & (plus >= 0), -1, 0))


class TiesLower(Oracle):
    """A tie counted as a pair that wants a smaller β (≥ for >): a tie keeps β."""

    def step(self, minus, plus):
        return np.where((minus >= 0) & (plus <= 0), 1, np.where((minus < 0) & (plus > 0), -1, 0))


class TieMinusLowers(Oracle):
    """z(β⁻) ≥ z(β) > z(β⁺) counted as step +1: both comparisons are strict, a tie on one side keeps β."""

    def step(self, minus, plus):
        return np.where((minus == 0) & (plus < 0), 1, super().step(minus, plus))


class TiePlusLowers(Oracle):
    """z(β⁻) > z(β) ≥ z(β⁺) counted as step +1: both comparisons are strict, a tie on one side keeps β."""

    def step(self, minus, plus):
        return np.where((minus > 0) & (plus == 0), 1, super().step(minus, plus))


class TieMinusRaises(Oracle):
    """z(β⁻) ≤ z(β) < z(β⁺) counted as step −1: both comparisons are strict, a tie on one side keeps β."""

    def step(self, minus, plus):
        return np.where((minus == 0) & (plus > 0), -1, super().step(minus, plus))


class TiePlusRaises(Oracle):
    """z(β⁻) < z(β) ≤ z(β⁺) counted as step −1: both comparisons are strict, a tie on one side keeps β."""

    def step(self, minus, plus):
        return np.where((minus < 0) & (plus == 0), -1, super().step(minus, plus))


class ChosenOnly(Oracle):
    """Only the chosen response looked at in the check: it is about chosen minus rejected."""

    def differences(self, sums):
        return sums["delta_minus"][0], sums["delta_plus"][0]


class StepOfTheBatch(Oracle):
    """One step for the whole batch, from its mean: every pair has its own."""

    def step(self, minus, plus):
        return super().step(np.full_like(minus, minus.mean()), np.full_like(plus, plus.mean()))


class SignOfTheMargin(Oracle):
    """The step from the sign of the margin (Proposition 1 over whole sequences): the check is made token by token."""

    def differences(self, sums):
        margin = self.margin(sums["logp"], sums["ref_logp"])
        return margin, -margin


class Top50(Oracle):
    """The check over the 50 largest logits of the policy: the normaliser of a perturbed policy is a sum over all."""

    k = 50

    def tokens(self, f, r, labels, epsilon):
        found = super().tokens(f, r, labels, epsilon)
        if f.shape[1] <= self.k:
            return found
        keep = np.argsort(-f, axis=1, kind="stable")[:, : self.k]
        keep = [np.union1d(k, y) for k, y in zip(keep, labels)]
        one = [
            super(Top50, self).tokens(f[[t]][:, k], r[[t]][:, k], np.searchsorted(k, labels[[t]]), epsilon)
            for t, k in enumerate(keep)
        ]
        return found | {k: np.concatenate([x[k] for x in one]) for k in ("delta_minus", "delta_plus")}


class Top500(Top50):
    """The check over the 500 largest logits of the policy: the normaliser of a perturbed policy is a sum over all."""

    k = 500


class Top1000(Top50):
    """The check over the 1,000 largest logits of the policy: the normaliser of a perturbed policy is a sum over all."""

    k = 1000


class CutAt512(Oracle):
    """Responses cut to 512 tokens."""

    def responses(self, case):
        return [(f[:512], r[:512], y[:512]) for f, r, y in super().responses(case)]


class BetaClipped(Oracle):
    """β̃ and the next β kept within [0.001, 10]: the method has no such bounds."""

    def beta_tilde(self, beta, step, case):
        return np.clip(super().beta_tilde(beta, step, case), 1e-3, 10)

    def next_beta(self, beta, steps, epsilon, baseline):
        return float(np.clip(super().next_beta(beta, steps, epsilon, baseline), 1e-3, 10))


class FirstOrderBeta(Oracle):
    """β̃ = β·(1−ε) and β·(1+ε) instead of β/(1+ε) and β/(1−ε)."""

    def beta_tilde(self, beta, step, case):
        return beta * (1 - step * case["epsilon_step"])


class LossAtBeta(Oracle):
    """The loss at the batch's β: each pair's loss is at its own β̃."""

    def beta_of_loss(self, beta, beta_tilde):
        return np.full_like(beta_tilde, beta)


class NoReference(Oracle):
    """The margin without the reference's log-probabilities."""

    def margin(self, logp, ref_logp):
        return super().margin(logp, 0 * ref_logp)


class LossSummed(Oracle):
    """The loss summed over pairs: it is their mean."""

    def mean(self, parts):
        return np.concatenate(parts).sum()


class MeanOfLossMeans(Oracle):
    """The loss averaged over micro-batches, whatever their sizes: a mean of means is not the mean."""

    def mean(self, parts):
        return np.mean([x.mean() for x in parts])


class MeanOfBetaMeans(Oracle):
    """The next β averaged over micro-batches (or processes), whatever their sizes: add up the counts instead."""

    def next_beta(self, beta, steps, epsilon, baseline):
        if baseline == "harmonic":
            return super().next_beta(beta, [np.array([s.mean() for s in steps])], epsilon, baseline)
        return float(np.mean([super(MeanOfBetaMeans, self).next_beta(beta, [s], epsilon, baseline) for s in steps]))


class BetaPerMicroBatch(Oracle):
    """β updated after each micro-batch: all of an optimizer step use the old β."""

    def next_beta(self, beta, steps, epsilon, baseline):
        for s in steps:
            beta = super().next_beta(beta, [s], epsilon, baseline)
        return beta


class NextBetaFromLast(Oracle):
    """The next β from the last micro-batch alone."""

    def next_beta(self, beta, steps, epsilon, baseline):
        return super().next_beta(beta, steps[-1:], epsilon, baseline)


class StepsCarriedOver(Oracle):
    """The steps of an optimizer step not forgotten in the next one: the mean of steps (or of β̃) starts anew each time."""

    earlier: list | None = None  # the steps of a run so far

    def run(self, case):
        self.earlier = []
        found = super().run(case)
        self.earlier = None
        return found

    def next_beta(self, beta, steps, epsilon, baseline):
        if self.earlier is None:
            return super().next_beta(beta, steps, epsilon, baseline)
        self.earlier += steps
        mean = np.concatenate(self.earlier).sum() / len(np.concatenate(steps))  # the sum goes on, the count does not
        return super().next_beta(beta, [np.array([mean])], epsilon, baseline)


class BetaNotUpdated(Oracle):
    """Every optimizer step at the first β: each starts from the next β of the one before it."""

    def beta_of_next_step(self, first, last):
        return first


class OtherBaseline(Oracle):
    """The next β of the other baseline: the paper's text says the arithmetic mean of β̃, the authors' code takes the harmonic one."""

    def next_beta(self, beta, steps, epsilon, baseline):
        return super().next_beta(beta, steps, epsilon, "arithmetic" if baseline == "harmonic" else "harmonic")


class BetaInBfloat16(Oracle):
    """β kept in bfloat16: a change of less than 0.2 % is lost. Keep it a Python float (or float64)."""

    def next_beta(self, beta, steps, epsilon, baseline):
        exact = np.float32(super().next_beta(beta, steps, epsilon, baseline))
        return float(Bfloat16Logits().number(np.array([exact]))[0])


def flag(mistake: type) -> str:
    """StepsSwapped -> steps_swapped"""
    return "".join("_" * (c.isupper() and i > 0) + c.lower() for i, c in enumerate(mistake.__name__))


MISTAKES = {
    flag(m): m for m in list(globals().values()) if isinstance(m, type) and issubclass(m, Oracle) and m is not Oracle
}
