// ε-DPO in another language, run through the suite's command protocol:
//
//     python -m tests.conformance --command 'node tests/conformance/port.js'
//
// Reads a case a line (JSON) from standard input and writes an answer a line. It is the method in 80 lines: port from it.
// Lines without an "id" (the head of the case file) are passed over.
"use strict";

const sum = (xs) => xs.reduce((a, b) => a + b, 0);
const logSumExp = (xs) => {
  const top = xs.reduce((a, b) => Math.max(a, b));
  return top + Math.log(sum(xs.map((x) => Math.exp(x - top))));
};

// log E_p[exp(a)], of log p and a. Near 0 as log1p of a sum of increments, where nothing cancels.
function logMeanExp(logP, a) {
  const direct = logSumExp(a.map((x, v) => x + logP[v]));
  if (Math.abs(direct) > 0.4) return direct;
  return Math.log1p(sum(a.map((x, v) =>
    x < 1 ? Math.exp(logP[v]) * Math.expm1(x) : Math.exp(logP[v] + x) - Math.exp(logP[v]))));
}

// One token: logits of policy and reference, its label, ε of the check.
function token(policy, reference, label, epsilon) {
  const f = policy.map(Math.fround), r = reference.map(Math.fround); // logits are float32: read them as such
  const total = logSumExp(f), logP = f.map((x) => x - total);
  const d = f.map((x, v) => x - r[v]), u = d.map((x) => x - d[label]);
  return {
    logp: logP[label],
    ref_logp: r[label] - logSumExp(r),
    delta_minus: -logMeanExp(logP, u.map((x) => epsilon * x)), // the policy of β/(1+ε), minus the policy
    delta_plus: -logMeanExp(logP, u.map((x) => -epsilon * x)), // the policy of β/(1−ε), minus the policy
  };
}

const NAMES = ["logp", "ref_logp", "delta_minus", "delta_plus"];

// Sums per response, chosen of all pairs first: [{logp, ref_logp, delta_minus, delta_plus}, ...]
function responses(c) {
  if (c.entry === "sums") return c.logp.map((_, i) => Object.fromEntries(NAMES.map((k) => [k, c[k][i]])));
  let tokens; // for each response its [policy logits, reference logits, label]
  if (c.entry === "packed") {
    const f = c.policy_logits.flat(1), r = c.ref_logits.flat(1);
    tokens = Array.from({ length: 2 * c.tokens.length }, () => []);
    c.source.forEach((s, m) => tokens[c.owner[m]].push([f[s], r[s], c.label[m]]));
  } else {
    tokens = c.labels.map((labels, i) => labels.map((y, t) => [c.policy_logits[i][t], c.ref_logits[i][t], y]));
  }
  return tokens.map((ts) => {
    const stats = ts.map(([f, r, y]) => token(f, r, y, c.epsilon_check));
    return Object.fromEntries(NAMES.map((k) => [k, sum(stats.map((s) => s[k]))]));
  });
}

// Several optimizer steps in a row: each starts from the next β of the one before it.
function run(c) {
  const found = [];
  for (const part of c.optimizer_steps) {
    const beta = found.length ? found[found.length - 1].next_beta : c.beta;
    found.push(answer({ ...c, ...part, entry: "logits", beta }));
  }
  const all = (k) => found.map((a) => a[k]);
  return { id: c.id, step: all("step").flat(), beta: all("beta").flat(), loss: all("loss"), next_beta: all("next_beta") };
}

function answer(c) {
  if (c.entry === "run") return run(c);
  const sums = responses(c), pairs = sums.length / 2;
  const difference = (k) => sums.slice(0, pairs).map((s, i) => s[k] - sums[pairs + i][k]); // chosen minus rejected
  const minus = difference("delta_minus"), plus = difference("delta_plus");
  const logp = difference("logp"), refLogp = difference("ref_logp");
  const step = minus.map((m, i) => (m > 0 && plus[i] < 0 ? 1 : m < 0 && plus[i] > 0 ? -1 : 0));
  const beta = step.map((s) => c.beta / (1 + s * c.epsilon_step));
  const margin = logp.map((x, i) => x - refLogp[i]);
  const losses = margin.map((m, i) => logSumExp([0, -beta[i] * m])); // −log σ(β̃·margin)
  const next = c.baseline === "harmonic" ? pairs / sum(beta.map((b) => 1 / b)) : sum(beta) / pairs;
  return { id: c.id, step, beta, loss: sum(losses) / pairs, next_beta: next, margin, losses, delta_minus: minus, delta_plus: plus };
}

require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const c = JSON.parse(line);
  if ("id" in c) process.stdout.write(JSON.stringify(answer(c)) + "\n");
});
