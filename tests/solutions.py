"""Solutions to the exercises of tutorial.md, in the form of a file of answers. Try them yourself first."""

import numpy as np
import torch

from epsdpo import epsdpo_loss, next_beta
from train import score_pairs

# 1. (a) From β⁺ to β⁻ the odds are (1/4, 1/6, 1/10) / (1/3): they fall as β gets smaller. (b) (1/2, 2/3, 4/5) over
# (3/6, 9/14, 27/36) is 1 < 1.037 < 1.067. (c) The third pair of section 5 upside down: a valley instead of a peak.
exercise_1 = (-1, +1, 0)

# 2. The second number depends on how the batch was cut. This is why `next_beta` takes counts.
lower, keep, raised = 0.4 / 1.25, 0.4, 0.4 / 0.75
exercise_2 = ((3 * lower + 2 * keep + raised) / 6, ((3 * lower + keep) / 4 + (raised + keep) / 2) / 2)


# 3. Equation (16).
def exercise_3(f, f_ref, label, s):
    d = f - f_ref
    u = d - d[label]
    return -(f.softmax(-1) * (s * u).expm1()).sum().log1p().item()


# 4. By (14) the KL gap must exceed the margin. The chosen word is a little more likely than 1/3, at a position where the
# policy has moved a lot.
exercise_4 = ((0.60, 0.36, 0.04), 1, (1 / 3, 1 / 3, 1 / 3), 0)

# 5. The prompt's only token, at place 0, predicts the first token of both responses.
exercise_5 = {
    "tokens": [3, 8, 2, 8, 6, 2],
    "positions": [0, 1, 2, 1, 2, 3],
    "segments": [0, 1, 1, 2, 2, 2],
    "source": [0, 1, 0, 3, 4],
    "label": [8, 2, 8, 6, 2],
    "owner": [0, 0, 1, 1, 1],
}


# 6. Section 7's loop.
def exercise_6(policy, reference, batches, beta, epsilon, lr):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    betas = [beta]
    for batch in batches:
        chosen, rejected = score_pairs(policy, reference, batch, epsilon, "float32")
        out = epsdpo_loss(chosen, rejected, beta, epsilon)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts = [int((out.step == s).sum()) for s in (+1, 0, -1)]
        beta = next_beta(beta, *counts, epsilon)
        betas.append(beta)
    return betas


# 7. One run gives the accuracy of each step, and with it the mean step, 2 · accuracy − 1. For a large ε follow equation
# (9) step by step instead of the exponential (10). The last line of the metrics has seen 63 updates.
def predict(accuracies, epsilon, beta=0.5):
    for accuracy in accuracies[:-1]:
        right = round(64 * accuracy)
        beta = next_beta(beta, right, 0, 64 - right, epsilon)
    return beta


def predictions():  # a minute; it gives the numbers below
    from tests.exercises import section_8_run

    metrics, _ = section_8_run(0.0)  # DPO: β does not move, but the pairs become right as in ε-DPO
    accuracies = [line["rewards/accuracies"] for line in metrics]
    accuracies[0] = 0.5  # all pairs are kept at the first step: no move
    return tuple(predict(accuracies, epsilon) for epsilon in (0.005, 0.02, 0.05))


exercise_7 = (0.4526, 0.3417, 0.2110)

# 8. ε · steps is 12.8. β ends at a fiftieth of where it began: nothing holds the policy near the reference, and it learns
# the noise of these few labels.
exercise_8 = 0.1


# 9. The definition, with NumPy alone.
def exercise_9(case):
    if case["entry"] != "logits":
        return None  # not offered
    eps_c, eps_s, beta = case["epsilon_check"], case["epsilon_step"], case["beta"]

    def log_prob(s):  # (2B,): sums over each response, under softmax(f + s·(f − f_ref))
        sums = []
        for f, f_ref, label in zip(case["policy_logits"], case["ref_logits"], case["labels"]):
            f, f_ref = f.astype(np.float64), f_ref.astype(np.float64)
            logits = f + s * (f - f_ref)
            logits -= logits.max(-1, keepdims=True)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            sums.append(logp[np.arange(len(label)), label].sum())
        return np.array(sums)

    def log_odds(s):  # (B,): chosen minus rejected
        chosen, rejected = np.split(log_prob(s), 2)
        return chosen - rejected

    z = log_odds(0)
    minus, plus, margin = log_odds(eps_c) - z, log_odds(-eps_c) - z, z - log_odds(-1)
    step = ((minus > 0) & (plus < 0)).astype(int) - ((minus < 0) & (plus > 0)).astype(int)
    betas = beta / (1 + step * eps_s)
    return {"step": step, "beta": betas, "loss": np.logaddexp(0, -betas * margin).mean(), "next_beta": betas.mean()}
