"""Mistakes that real ports make, put into the code one at a time; the tests must notice every one.

    python -m tests.mutants                 all of them (about an hour on one core), a line each and a count at the end
    python -m tests.mutants epsdpo mask     those whose file or name contains a word

A mutant is a copy of the repository with one piece of text replaced. It is killed when the tests named beside it fail (or
do not finish in time); the unchanged copy must pass them, or a kill would mean nothing. Exit status 1 if any survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    file: str
    mistake: str
    old: str  # stands exactly once in the file
    new: str


TESTS = {
    "epsdpo.py": ["tests/test_epsdpo.py"],
    "support/rows.py": ["tests/test_data.py"],
    "support/text.py": ["tests/test_data_text.py"],
    "support/data.py": ["tests/test_data.py", "tests/test_data_text.py"],
    "model.py": ["tests/test_model.py", "tests/test_checkpoint.py"],
    "support/checkpoint.py": ["tests/test_safetensors.py", "tests/test_checkpoint.py"],
    "support/files.py": ["tests/test_files.py"],
    "support/toy.py": ["tests/test_toy.py"],
    "train.py": ["tests/test_train.py", "tests/test_resume.py"],
}

MUTANTS = [
    Mutant(*fields)
    for file, mutants in {
        "epsdpo.py": [
            ("perturbation with the wrong sign", "policy_logits + s * (", "policy_logits - s * ("),
            ("β⁻ and β⁺ swapped", "ref_logp, delta_minus, delta_plus, kl, floor), size",
             "ref_logp, delta_plus, delta_minus, kl, floor), size"),
            ("u without d at the label", "u = d.sub_(d_y)", "u = d"),
            ("float64 increments without the minus", "(-_log_mean_exp(p, log_p, s * u", "(_log_mean_exp(p, log_p, s * u"),
            ("increment without its mean", "-(epsilon * u_mean.double() + minus)", "-minus"),
            ("increment with the sign of K turned", "epsilon * u_mean.double() - plus", "epsilon * u_mean.double() + plus"),
            ("KL of the moments with the sign of c turned", "points = (epsilon, -epsilon, -1.0)", "points = (epsilon, -epsilon, 1.0)"),
            ("too few moments", "while left_out > 1e-7:", "while left_out > 1e-2:"),
            ("moments not divided by k!", "float(math.factorial(k))", "float(k)"),
            ("expectation under the wrong model", "log_p = f.log_softmax(-1)  # (n, V)", "log_p = f_ref.log_softmax(-1)"),
            ("log-softmax over the wrong axis", "p = log_p.exp()", "p = f.softmax(0)"),
            ("KL as it cancels", "torch.where(x.abs() < 0.1, series, x.expm1() - x)", "x.expm1() - x"),
            ("KL with the sign of c turned", "u_mean[:, None] - u, _expm1", "u - u_mean[:, None], _expm1"),
            ("no float64 where exp overflows", "far = ~(size < limit)", "far = size < 0"),
            ("ε forgotten in the float64 limit", "min(FLOAT64_FROM, 1 / epsilon) if epsilon", "1e9 if epsilon"),
            ("not finite passes in silence", "if not stats.floor.isfinite().all():", "if False:"),
            ("reference log-probability without the KL", "(u_mean.double() - kl)", "u_mean.double()"),
            ("sums of responses in float32", "dtype=torch.float64, device=x.device).index_add(0, owner, x.double())",
             "device=x.device).index_add(0, owner, x.float())"),
            ("the series ends before the tail", "min(largest, 2 * FLOAT64_FROM)", "min(largest, FLOAT64_FROM)"),
            ("differences of pairs in float32", "delta_minus = chosen.delta_minus.double() - rejected.delta_minus.double()",
             "delta_minus = (chosen.delta_minus.float() - rejected.delta_minus.float()).double()"),
            ("a floor for float32 alone", "floor += epsilon * eps * (", "floor += epsilon * eps * (f.dtype == torch.float32) * ("),
            ("a floor of NaN is certain", "uncertain = ~certain", "uncertain = torch.minimum(delta_minus.abs(), delta_plus.abs()) <= chosen.floor + rejected.floor"),
            ("steps with a tie counted as monotone", "(delta_minus > 0) & (delta_plus < 0)",
             "(delta_minus >= 0) & (delta_plus < 0)"),
            ("one side is enough to lower", "(delta_minus > 0) & (delta_plus < 0)", "(delta_minus > 0)"),
            ("lower and raise swapped", "lower.long() - raise_.long()", "raise_.long() - lower.long()"),
            ("NaN keeps β", "if not (delta_minus.isfinite().all() and delta_plus.isfinite().all()):", "if False:"),
            ("β̃ of lower and raise swapped", "beta / (1 + epsilon_step), beta / (1 - epsilon_step))",
             "beta / (1 - epsilon_step), beta / (1 + epsilon_step))"),
            ("β̃ by multiplication", "(beta, beta / (1 + epsilon_step),", "(beta, beta * (1 - epsilon_step),"),
            ("loss at β, not at β̃", "-F.logsigmoid(beta_pair * margin)", "-F.logsigmoid(beta * margin)"),
            ("loss with the sign of the margin turned", "-F.logsigmoid(beta_pair * margin)",
             "-F.logsigmoid(-beta_pair * margin)"),
            ("margin without the reference", "(rejected.logp.double() - rejected.ref_logp.double())",
             "rejected.logp.double()"),
            ("sum of the losses for their mean", "EpsDPOLoss(losses.mean(), losses", "EpsDPOLoss(losses.sum(), losses"),
            ("harmonic mean", "beta * ((n_lower / (1 + epsilon_step) + n_keep + n_raise / (1 - epsilon_step)) / n)",
             "beta * n / (n_lower * (1 + epsilon_step) + n_keep + n_raise * (1 - epsilon_step))"),
            ("β·n/n is not always β", "beta * ((n_lower / (1 + epsilon_step) + n_keep + n_raise / (1 - epsilon_step)) / n)",
             "(beta * n_lower / (1 + epsilon_step) + beta * n_keep + beta * n_raise / (1 - epsilon_step)) / n"),
            ("gradient of the last chunk alone", "grad_weight.addmm_(g_logits.T, h)",
             "grad_weight.copy_(g_logits.T @ h)"),
            ("gradient without the label", ".mul_(-g).scatter_add_(-1, y, g)", ".mul_(-g)"),
            ("kept logits for another chunk", "in reversed(range(0, len(hidden), ctx.chunk_size))",
             "in range(0, len(hidden), ctx.chunk_size)"),
            ("kept logits for all chunks", "                logits = None\n", ""),
            ("kept logits gone at a second backward", "logits, ctx.last_logits = ctx.last_logits, None",
             "logits = ctx.__dict__.pop('last_logits')"),
            ("autocast left on around the head", "torch.autocast(x.device.type, enabled=False)",
             "torch.autocast(x.device.type, torch.bfloat16)"),
            ("float64 rounded to float32", "any(x.dtype == torch.float64 for x in tensors)", "False"),
            ("floor of nothing", "2.0**-16 * (u_abs", "2.0**-40 * (u_abs"),
            ("floor without the rounding of d", "floor += epsilon * eps * (", "floor += 0 * eps * ("),
            ("label outside the vocabulary", "if labels.numel() and not 0 <=", "if False and not 0 <="),
            ("float64 branch that trusts clipped terms", "torch.where(far.abs() < 0.4,", "torch.where(far.abs() < 1e9,"),
        ],
        "support/rows.py": [
            ("source one place too early", "np.arange(-1, size * width - 1)", "np.arange(-2, size * width - 2)"),
            ("source is the token itself", "np.arange(-1, size * width - 1)", "np.arange(0, size * width)"),
            ("the last prompt token predicts only one response", "source[i, p + c] = source[i, p]", "pass"),
            ("positions not restarted", "np.r_[0 : p + c, p : p + r]", "np.arange(p + c + r)"),
            ("both responses owned by the chosen one", "size * (segments == 2)", "0 * (segments == 2)"),
            ("pads counted as prompt", "segments = np.full((size, width), -1)", "segments = np.full((size, width), 0)"),
            ("prompt tokens predicted too", "response = segments > 0", "response = segments > -1"),
            ("micro-batches that lose a pair", "groups[-1].append(i)", "pass"),
            ("budget that forgets the padding", "lengths[groups[-1][0]] <= token_budget", "1 <= token_budget"),
            ("one order for all epochs", "default_rng((seed, epoch))", "default_rng(seed)"),
        ],
        "support/data.py": [
            ("prompt cut on its right", "prompt[len(prompt) - keep + bos :]", "prompt[bos:keep]"),
            ("responses cut by their own lengths", "max(max_length - max(len(chosen), len(rejected)), max_prompt_length)",
             "max(max_length - len(chosen), max_prompt_length)"),
            ("end token twice", "if not ended and whole[-1] != tokenizer.eos:", "if True:"),
            ("blank means empty", "not said.strip()", "not said"),
            ("an end alone is an answer", "len(whole) - shared <= ended", "False"),
            ("a prompt twice in one answer", "if repeats == 1 or repeats == 0 and", "if repeats == 0 and"),
            ("roles are words said", "if key != \"role\"]", "]"),
        ],
        "support/text.py": [
            ("flags of named tokens are lost", "extra.append(known.get(token[\"content\"]) or ", "extra.append("),
            ("flags of listed tokens are lost", "for token in listed])", "for token in listed[:0]])"),
            ("names in an older file", "else config | older)", "else config)"),
            ("a template's BOS is cut when it opens each question", "(ids.count(bos) == 1 or not self.bos_opens_answers)", "ids.count(bos) == 1"),
            ("a template's BOS is cut when its probe is refused", "or one that refuses\n            return True", "or one that refuses\n            return False"),
        ],
        "model.py": [
            ("rejected sees chosen", "(key == 0) & (query >= 0) | (key == query)", "(query >= 0)"),
            ("a response sees itself alone", "(key == 0) & (query >= 0) | (key == query)", "(key == query)"),
            ("padding attends to the prompt and is attended to", "(key >= 0) & ((key == 0)", "((key <= 0)"),
            ("padding attends to nothing", "seen & prompt_or_own | (places[:, None] == places)", "seen & prompt_or_own"),
            ("no causality", "seen = (places[:, None] >= places)", "seen = (places[:, None] >= places - 1)"),
            ("window by one too wide", "positions[:, None, :] < window)", "positions[:, None, :] <= window)"),
            ("window by row place", "(positions[:, :, None] - positions[:, None, :] < window)",
             "(places[:, None] - places < window)"),
            ("the first layer's window in all layers", "masks.get(windows[i])", "masks.get(windows[0])"),
            ("RoPE with interleaved pairs", "a, b = x.chunk(2, dim=-1)", "a, b = x[..., ::2], x[..., 1::2]"),
            ("RoPE rotates the other way", "(a * cos - b * sin, b * cos + a * sin)", "(a * cos + b * sin, b * cos - a * sin)"),
            ("linear scaling multiplies", "frequency = frequency / scaling.factor", "frequency = frequency * scaling.factor"),
            ("llama3 scales the high frequencies", "(1 - keep) * frequency / scaling.factor + keep * frequency",
             "keep * frequency / scaling.factor + (1 - keep) * frequency"),
            ("keys and heads matched wrongly", "y.repeat_interleave(self.groups, dim=1)", "y.repeat(1, self.groups, 1, 1)"),
            ("queries and keys without their norm", "if hasattr(self, \"q_norm\"):", "if False:"),
            ("tokens at each other's places", "index_put((self.places,), x)", "index_put((self.places.flip(0),), x)"),
            ("padding for tokens", "x.flatten(0, 1)[self.places]", "x.flatten(0, 1)[: len(self.places)]"),
            ("norm without eps", "wide.pow(2).mean(-1, keepdim=True) + self.eps", "wide.pow(2).mean(-1, keepdim=True)"),
            ("norm in the dtype of its input", "x.to(torch.promote_types(x.dtype, torch.float32))", "x"),
            ("a 16-bit weight decides the dtype", "F.linear(x, self.weight.to(x.dtype), self.bias)",
             "F.linear(x.to(self.weight.dtype), self.weight, None if self.bias is None else self.bias.to(self.weight.dtype)).to(x.dtype)"),
            ("head before the last norm", "x = self.model.norm(x.flatten(0, 1)[source])", "x = x.flatten(0, 1)[source]"),
            ("logits rounded under autocast", "enabled=False):  # it would round the logits", "enabled=True):  # it would round the logits"),
            ("positions ignored", "cos, sin = rope(self.config, positions[:, -T:])",
             "cos, sin = rope(self.config, torch.arange(positions.shape[1])[None, -T:].expand(positions[:, -T:].shape))"),
            ("gate and up swapped", "lambda gate, up: self.down_proj(F.silu(gate) * up)", "lambda up, gate: self.down_proj(F.silu(gate) * up)"),
            ("a matmul done again in backward", "lambda gate, up: self.down_proj(F.silu(gate) * up)",
             "lambda gate, up: self.down_proj(F.silu(gate) * up).clamp(-1e9)"),
            ("biases drawn at random", "std=0.0 if name.endswith(\"bias\") else 0.02", "std=0.02"),
            ("earlier keys forgotten", "if cache:  #", "if False:  #"),
            ("temperature ignored", "((logits - best) / temperature)", "(logits - best)"),
            ("answers go on after their end", "if not answer or answer[-1] not in ends:", "if True:"),
        ],
        "support/checkpoint.py": [
            ("untied after loading", "model.to_empty(device=device).tie()", "model.to_empty(device=device)"),
            ("a different head of a tied model passes", "require(same, f\"{folder}: tie", "require(True, f\"{folder}: tie"),
            ("file longer than its tensors", "require(base + end == length,", "require(base + end <= length,"),
            ("shared ranges of the data", "fits = info[\"data_offsets\"] == [start, end]", "fits = info[\"data_offsets\"][1] >= 0"),
            ("shapes that overflow", " and all(math.prod(shape[:i]) < 2**64 for i in range(len(shape)))", ""),
            ("a tensor's name twice", "require(len(keys) == len(set(keys)),", "require(True,"),
            ("weights that are something else go unnamed", "        what = what_is(path)", "        what = None"),
            ("a path out of the folder", "\"..\" not in parts and not file.startswith(\"/\")", "True"),
            ("integers for weights", "require(not odd,", "require(True,"),
            ("a source with another number", "read_config(source) == model.config",
             "read_config(source).hidden_size == model.config.hidden_size"),
            ("weights that are not finite are saved", "require(not wrong,", "require(True,"),
            ("stale shards stay", "stale.unlink(missing_ok=True)", "pass"),
            ("old weights are copied", " and not file.name.endswith(WEIGHT_FILES)", ""),
            ("an unknown key passes", "require(_changes_nothing(key, value),", "require(True,"),
            ("text under a key of numbers passes", " and not CHANGES_NUMBERS.search(key)", ""),
            ("what transformers' base class writes is refused", "|chunk_size_feed_forward|", "|"),
            ("RoPE of two types", "known = kind in ROPE and rope.get(\"type\", kind) == kind", "known = kind in ROPE"),
            ("two values of θ", "require(given.get(key, value) == value,", "require(True,"),
            ("a window that is not used is checked", "if not always and given.get(", "if False and given.get("),
            ("layer types that contradict Mistral", "if given.get(\"layer_types\") == kinds:", "if \"layer_types\" in given:"),
            ("Mistral without its default window", "ABSENT,  4096,    4096,    4096),", "ABSENT,  None,    4096,    4096),"),
            ("Qwen2 without biases", "c[\"o_bias\"] or family == \"qwen2\"", "c[\"o_bias\"]"),
            ("the head is kept in 16 bits", "isinstance(module, Linear)", "isinstance(module, nn.Linear)"),
            ("kept in 16 bits whatever dtype is asked for", "if stored.itemsize == 2 < dtype.itemsize:", "if stored.itemsize == 2:"),
            ("a 16-bit model that can be trained", "model.requires_grad_(False)", "pass"),
        ],
        "support/files.py": [
            ("safetensors taken for another kind", "if start[8:10] == b'{\"':", "if False:"),
            ("an empty file without a word", "if not start:", "if False:"),
            ("half a character is text", "json.dumps(found, ensure_ascii=False).encode()", "pass"),
            ("a file for a folder", "if folder.is_file():", "if False:"),
            ("an adapter without a word", "elif \"adapter_config.json\" in names:", "elif False:"),
            ("a cache folder without a word", ", *folder.glob(f\"snapshots/*/{wanted}\")]", "]"),
            ("rests stay beside the file", "beside.unlink(missing_ok=True)", "pass"),
            ("written in place", "with open(beside, \"wb\") as file:", "with open(path, \"wb\") as file:"),
        ],
        "support/toy.py": [
            ("a doubled letter earns a point", "return hits - doubled.sum(-1)", "return hits + doubled.sum(-1)"),
            ("a tie is a loss", "theirs.cumsum(1) - theirs / 2", "theirs.cumsum(1) - theirs"),
            ("preferences turned round", "torch.sigmoid(scale * (r[:, 0] - r[:, 1]))", "torch.sigmoid(scale * (r[:, 1] - r[:, 0]))"),
            ("optimum at 1/β", "reward.double() / beta", "reward.double() * beta"),
        ],
        "train.py": [
            ("β updated with every micro-batch", "parts.append(totals(result,",
             "method.beta *= 0.999; parts.append(totals(result,"),
            ("mean over micro-batches", "(result.losses.sum() * (scale * rank_and_world()[1] / len(batch))).backward()",
             "(result.losses.mean()).backward()"),
            ("a tie counts as right", "(out.margin > 0).sum()", "(out.margin >= 0).sum()"),
            ("rewards with β̃", "\"rewards/margins\": (beta * out.margin).sum()",
             "\"rewards/margins\": (out.beta * out.margin).sum()"),
            ("first learning rate zero", "flags.lr * (step + 1) / warmup", "flags.lr * step / warmup"),
            ("learning rate that rises after the end", "min(1.0, (step - warmup)", "min(9.0, (step - warmup)"),
            ("the reference is trained", "reference.requires_grad_(False)", "reference.requires_grad_(True)"),
            ("ε_s in the check", "chosen, rejected = compare(policy, reference, micro, flags.epsilon_check, flags.dtype)",
             "chosen, rejected = compare(policy, reference, micro, flags.epsilon_step, flags.dtype)"),
            ("next β in the log", "line |= {\"beta\": beta} |", "line |= {\"beta\": method.beta} |"),
            ("not finite is stepped on", "if not (math.isfinite(sums[\"loss\"]) and math.isfinite(norm)):", "if False:"),
            ("gradients pile up", "optimizer.step()\n                optimizer.zero_grad()", "optimizer.step()"),
            ("gradients that overflowed stay", "break\n        policy.zero_grad()", "break"),
            ("float16 gradients stay scaled", "p.grad /= scale", "pass"),
            ("float16 gradients vanish", "2.0 ** (start - 4 * i)", "2.0 ** (-4 * i)"),
            ("a cache for all dtypes", "{hash_of_ids(pairs)} {flags.dtype}", "{hash_of_ids(pairs)}"),
            ("a cache for all weights", "name.update(p.detach()", "hash(p.detach()"),
            ("cached states in another dtype", "with bodies_in(flags.dtype, device):\n                yield",
             "with bodies_in(\"float32\", device):\n                yield"),
            ("float16 gradients overflow", "for i in range(6)]", "for i in range(1)]"),
            ("every pair's hidden states from the file's start", "key: slice(a, b) for", "key: slice(0, b - a) for"),
            ("other answers, the same hidden states", "tobytes(), prompt, chosen", "tobytes(), prompt, 0"),
            ("chosen and rejected swapped", "return TokenStats(*(x[:size] for x in sums)), TokenStats(*(x[size:] for x in sums))",
             "return TokenStats(*(x[size:] for x in sums)), TokenStats(*(x[:size] for x in sums))"),
            ("resume one step late", "return step, lines", "return step + 1, lines"),
            ("resume without β", "    vars(method).update(of_method)\n", ""),
            ("an answer's token may stand in the prompt", "ids.update(len(part).to_bytes(8, \"little\") + ", "ids.update("),
            ("held-out pairs may change places with others", "hash_of_ids(eval_pairs)}", "\"\"}"),
            ("a model is known by its files' heads", "            files.update(f.read())\n", ""),
            ("a model is known by its files' tails", "\"little\") + f.read(1 << 20))", "\"little\"))"),
            ("a model is known by one file", "folder.glob(\"*.safetensors\")", "folder.glob(\"model.safetensors\")"),
            ("data may be overwritten", "flags.cache_reference, *flags.data, *flags.eval_data)", "flags.cache_reference)"),
            ("warmup of 7.000000000000001 steps", "math.ceil(flags.warmup * steps - 1e-9)", "math.ceil(flags.warmup * steps)"),
            ("the root of a variance below zero", "math.sqrt(max(variance, 0.0) / n)", "math.sqrt(variance / n)"),
            ("room for one checkpoint", "(4 + 24 * bool(flags.save_every))", "(4 + 12 * bool(flags.save_every))"),
            ("β may rise without a word", "not flags.beta / 100 <= method.beta <= 100 * flags.beta", "not flags.beta / 100 <= method.beta"),
            ("the optimum of the last β", "toy.optimum(ref_logp, world.reward, flags.beta)", "toy.optimum(ref_logp, world.reward, betas[-1])"),
            ("the toy's DPO with steps of β", "dataclasses.replace(flags, epsilon_step=0.0, resume=False)", "dataclasses.replace(flags, resume=False)"),
            ("a damaged cache is read", "if checksum != np.memmap", "if False and checksum != np.memmap"),
            ("weights that are not finite are saved", "if not all(x.isfinite().all() for x in weights.values())", "if False"),
            ("files of others are deleted", "f\".{name}.[0-9]*.tmp\"", "\".*.tmp\""),
            ("held-out pairs are trained on", "[pairs[i] for i in np.sort(order[held:])]", "[pairs[i] for i in np.sort(order)]"),
            ("other pairs are held out for another seed", "np.random.default_rng(0).permutation(len(pairs))", "np.random.default_rng(flags.seed).permutation(len(pairs))"),
            ("flags.json is written anew on resume", "if not (resumed and (out / \"flags.json\").exists()):", "if True:"),
            ("templates write the date of the resume", "if tokenizer and flags.resume and old", "if False"),
            ("answers end as another row's", "ends.most_common(1)[0][0]", "ends.most_common()[-1][0]"),
            ("a frozen policy stays frozen", "policy.requires_grad_(True)", "policy.train()"),
            ("the same pairs in every step", "[place * flags.batch_size :]", "[0:]"),
        ],
    }.items()
    for fields in ((file, *mutant) for mutant in mutants)
]  # fmt: skip


def passes(folder: Path, tests: list[str], seconds: float) -> bool:
    present = [test for test in tests if (folder / test).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *present]
    try:
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.mistake}" for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "out", "__pycache__", ".hypothesis"))
        for file in sorted({m.file for m in chosen}):
            if not passes(folder, TESTS[file], 900):
                print(f"{file}: its tests fail on the code as it is; a kill would mean nothing")
                return 1
        for m in chosen:
            text = (folder / m.file).read_text(encoding="utf-8")
            if text.count(m.old) != 1:
                print(f"{m.file}: {m.mistake}: its text stands there {text.count(m.old)} times, not once")
                return 1
            (folder / m.file).write_text(text.replace(m.old, m.new), encoding="utf-8")
            alive = passes(folder, TESTS[m.file], 900)
            (folder / m.file).write_text(text, encoding="utf-8")
            survivors += [m] * alive
            print(f"{'SURVIVES' if alive else 'killed  '}  {m.file:10} {m.mistake}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - len(survivors)} killed, {len(survivors)} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
