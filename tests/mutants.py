"""Mistakes that real ports make, put into the code one at a time; the tests must notice every one.

    python -m tests.mutants                 all of them (about an hour on one core), a line each and a count at the end
    python -m tests.mutants epsdpo mask     those whose file or name contains a word

A mutant is a copy of the repository with one piece of text replaced. It is killed when the tests named beside it fail (or
do not finish in time); the unchanged copy must pass them, or a kill would mean nothing. Exit status 1 if any survives.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIMES = "EPSDPO_TEST_SECONDS"  # names the file of the tests' times


class Mutant(NamedTuple):
    file: str
    mistake: str
    old: str  # stands exactly once in the file
    new: str


TESTS = {
    "epsdpo.py": ["tests/test_epsdpo.py"],
    "support/rows.py": ["tests/test_data.py", "tests/test_cached_reference.py", "tests/test_train.py"],
    "support/text.py": ["tests/test_data_text.py"],
    "support/data.py": ["tests/test_data.py", "tests/test_data_text.py"],
    "support/forms.py": ["tests/test_data_text.py"],
    "model.py": ["tests/test_model.py", "tests/test_checkpoint.py"],
    "support/checkpoint.py": ["tests/test_safetensors.py", "tests/test_checkpoint.py"],
    "support/files.py": ["tests/test_files.py"],
    "support/toy.py": ["tests/test_toy.py"],
    "support/run.py": ["tests/test_run.py", "tests/test_kept_pairs.py", "tests/test_resume.py"],
    "support/signals.py": ["tests/test_resume.py"],
    "support/kept_pairs.py": ["tests/test_kept_pairs.py"],
    "support/report.py": ["tests/test_report.py", "tests/test_resume.py"],
    "support/metrics.py": ["tests/test_train.py"],
    "train.py": ["tests/test_train.py", "tests/test_resume.py", "tests/test_processes.py"],
    "support/device.py": ["tests/test_device.py", "tests/test_train.py", "tests/test_processes.py"],
    "support/flags.py": ["tests/test_flags.py"],
    "support/cached_reference.py": ["tests/test_cached_reference.py"],
}

MUTANTS = [
    Mutant(*fields)
    for file, mutants in {
        "epsdpo.py": [
            ("perturbation with the wrong sign", "policy_logits + s * (", "policy_logits - s * ("),
            ("definition with the wrong sign", "logp_at(+epsilon_check) - logp, logp_at(-epsilon_check)",
             "logp_at(-epsilon_check) - logp, logp_at(+epsilon_check)"),
            ("definition with the KL the other way round", "(log_p.exp() * (log_p - log_p_ref))", "(log_p_ref.exp() * (log_p_ref - log_p))"),
            ("definition in float32", "f, f_ref = policy_logits.double(), ref_logits.double()", "f, f_ref = policy_logits.float(), ref_logits.float()"),
            ("β⁻ and β⁺ swapped", "delta_minus, delta_plus, delta_ref, kl = increments", "delta_plus, delta_minus, delta_ref, kl = increments"),
            ("u without d at the label", "u = d.sub_(d.gather(-1, y))", "u = d"),
            ("increments without the minus", "deltas = [-(s * m.double() + k)", "deltas = [(s * m.double() + k)"),
            ("increments without their mean", "-(s * m.double() + k)", "-k"),
            ("increments in float32", "-(s * m.double() + k)", "-(s * m + k.float()).double()"),
            ("KL with the sign of c turned", "points = (epsilon, -epsilon, -1.0)", "points = (epsilon, -epsilon, 1.0)"),
            ("moments about another mean", "c = u.sub_(m[:, None])", "c = u"),
            ("too few moments", "float(math.factorial(k)) > 1e-7", "float(math.factorial(k)) > 1e-2"),
            ("a series cut a hundred times too early", "float(math.factorial(k)) > 1e-7", "float(math.factorial(k)) > 1e-5"),
            ("moments not divided by k!", ".double() / float(math.factorial(k))", ".double() / float(k)"),
            ("moments that neighbours need", "moment = moment.where(matters(reach, k), 0.0)", "pass"),
            ("a far neighbour sets the number of moments", ".double().where(~far, 0.0)", ".double()"),
            ("expectation under the wrong model", "top = f.amax(-1, keepdim=True)", "f, f_ref = f_ref, 2 * f_ref - f; top = f.amax(-1, keepdim=True)"),
            ("softmax over a whole tile", "total = p.sum(-1, keepdim=True)", "total = p.sum().reshape(1, 1)"),
            ("softmax that overflows", "top = f.amax(-1, keepdim=True)", "top = 0 * f[:, :1]"),
            ("softmax of the library", "    p /= total\n", "    p /= total\n    p = f.log_softmax(-1).exp()\n"),
            ("KL as it cancels", "x.abs() < 0.1, p * series", "x.abs() < 0, p * series"),
            ("the float64 series ends at x³", "x / 4 * (1 + x / 5", "0 * (1 + x / 5"),
            ("the float64 series is used too far", "x.abs() < 0.1", "x.abs() < 2"),
            ("no float64 where moments end", "far = ~((size < FLOAT64_FROM) & (epsilon * size < 1))", "far = size < 0"),
            ("float64 from far too late", "FLOAT64_FROM = 4.0", "FLOAT64_FROM = 40.0"),
            ("float64 for other tokens", "f_ref[far].double(), y[far], epsilon)[1]", "f_ref[far].double(), y[: far.sum()], epsilon)[1]"),
            ("the gradient of token_stats is lost", "stats.logp + (logp - logp.detach())", "stats.logp + 0 * logp.detach()"),
            ("not finite passes in silence", "if not stats.kl.isfinite().all():", "if False:"),
            ("the wrong token is named", ".logical_not().flatten().nonzero()[0]", ".flatten().nonzero()[0]"),
            ("reference log-probability without the KL", "logp.double() + delta_ref", "logp.double() + delta_ref + kl"),
            ("sums of responses in float32", "torch.zeros(num_responses, dtype=torch.float64, device=owner.device)\n    return TokenStats(*(zeros.index_add(0, owner, x.double())",
             "torch.zeros(num_responses, device=owner.device)\n    return TokenStats(*(zeros.index_add(0, owner, x.float()).double()"),
            ("differences of pairs in float32", "delta_minus = chosen.delta_minus.double() - rejected.delta_minus.double()",
             "delta_minus = (chosen.delta_minus.float() - rejected.delta_minus.float()).double()"),
            ("steps with a tie counted as monotone", "(delta_minus > 0) & (delta_plus < 0)",
             "(delta_minus >= 0) & (delta_plus < 0)"),
            ("one side is enough to lower", "(delta_minus > 0) & (delta_plus < 0)", "(delta_minus > 0)"),
            ("one side is enough to raise", "(delta_minus < 0) & (delta_plus > 0)", "(delta_plus > 0)"),
            ("lower and raise swapped", "lower.long() - raise_.long()", "raise_.long() - lower.long()"),
            ("steps by the sign of the margin", "    if not margin.isfinite().all():", "    step = margin.detach().sign().long()\n    if not margin.isfinite().all():"),
            ("NaN keeps β", "if not (delta_minus.isfinite().all() and delta_plus.isfinite().all()):", "if False:"),
            ("infinite margins pass", "if not margin.isfinite().all():", "if margin.isnan().any():"),
            ("β̃ of lower and raise swapped", "beta / (1 + epsilon_step), beta / (1 - epsilon_step))",
             "beta / (1 - epsilon_step), beta / (1 + epsilon_step))"),
            ("β̃ by multiplication", "(beta, beta / (1 + epsilon_step),", "(beta, beta * (1 - epsilon_step),"),
            ("β̃ in float32", "torch.tensor(beta_of_step, dtype=torch.float64,", "torch.tensor(beta_of_step, dtype=torch.float32,"),
            ("loss at β, not at β̃", "-F.logsigmoid(beta_pair * margin)", "-F.logsigmoid(beta * margin)"),
            ("loss with the sign of the margin turned", "-F.logsigmoid(beta_pair * margin)",
             "-F.logsigmoid(-beta_pair * margin)"),
            ("loss that overflows", "-F.logsigmoid(beta_pair * margin)", "(1 + (-beta_pair * margin).exp()).log()"),
            ("margin without the reference", "(rejected.logp.double() - rejected.ref_logp.double())",
             "rejected.logp.double()"),
            ("sum of the losses for their mean", "EpsDPOLoss(losses.mean(), losses", "EpsDPOLoss(losses.sum(), losses"),
            ("harmonic mean", "beta * ((n_lower / (1 + epsilon_step) + n_keep + n_raise / (1 - epsilon_step)) / n)",
             "beta * n / (n_lower * (1 + epsilon_step) + n_keep + n_raise * (1 - epsilon_step))"),
            ("β·n/n is not always β", "beta * ((n_lower / (1 + epsilon_step) + n_keep + n_raise / (1 - epsilon_step)) / n)",
             "(beta * n_lower / (1 + epsilon_step) + beta * n_keep + beta * n_raise / (1 - epsilon_step)) / n"),
            ("β never moves", "return beta * ((n_lower", "return beta + 0 * ((n_lower"),
            ("gradient of the last chunk alone", "grad_weight.addmm_(g_logits.T, h)",
             "grad_weight.copy_(g_logits.T @ h)"),
            ("gradient without the label", ".mul_(-g).scatter_add_(-1, y, g)", ".mul_(-g)"),
            ("kept logits for another chunk", "in reversed(range(0, len(hidden), ctx.chunk_size))",
             "in range(0, len(hidden), ctx.chunk_size)"),
            ("kept logits for all chunks", "                logits = None\n", ""),
            ("kept logits gone at a second backward", "logits, ctx.last_logits = ctx.last_logits, None",
             "logits = ctx.__dict__.pop('last_logits')"),
            ("autocast left on around the head", "        with torch.autocast(hidden.device.type, enabled=False):\n            for h, r, y",
             "        with torch.autocast(hidden.device.type, torch.bfloat16):\n            for h, r, y"),
            ("autocast left on in backward", "        with torch.autocast(hidden.device.type, enabled=False):\n            for start",
             "        with torch.autocast(hidden.device.type, torch.bfloat16):\n            for start"),
            ("float64 rounded to float32", "any(x.dtype == torch.float64 for x in tensors)", "False"),
            ("label outside the vocabulary", "if labels.numel() and not 0 <=", "if False and not 0 <="),
            ("ε_c of 1 passes", "if not 0 <= epsilon_check < 1:", "if not 0 <= epsilon_check <= 1:"),
            ("any output matrices pass", "x.ndim == 2 for x in inputs) and len(weight) == len(ref_weight)", "x.ndim == 2 for x in inputs)"),
            ("sums of other shapes pass", "all(x.shape == chosen.logp.shape for x in (*chosen, *rejected))", "True"),
            ("float64 branch that trusts clipped terms", "torch.where(large.abs() < 0.4,", "torch.where(large.abs() < 1e9,"),
        ],
        "support/rows.py": [
            ("the same pairs in every step", "order[place * batch_size :]", "order[0:]"),
            ("the same order in every epoch", "epoch_order(len(pairs), seed, epoch)", "epoch_order(len(pairs), seed, 0)"),
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
            ("an answer's token may stand in the prompt", "ids.update(len(part).to_bytes(8, \"little\") + ", "ids.update("),
        ],
        "support/data.py": [
            ("prompt cut on its right", "prompt[len(prompt) - keep + bos :]", "prompt[bos:keep]"),
            ("a file may be given twice", "if paths.count(path) > 1]", "if paths.count(path) > 2]"),
            ("held-out pairs are trained on without a word", "if n := sum(ids_hash([pair]) in trained_on for pair in eval_pairs):", "if n := 0:"),
            ("responses cut by their own lengths", "max(max_length - max(len(chosen), len(rejected)), max_prompt_length)",
             "max(max_length - len(chosen), max_prompt_length)"),
            ("end token twice", "if end in response[n:] else [*response, end]", "if False else [*response, end]"),
            ("white space behind an end is scored", " or not tokenizer.decode(response[n - 1 : n]).strip()):", "):"),
            ("a typed end before the end is scored", "response.index(end, n)", "len(response) - response[::-1].index(end) - 1"),
            ("nobody says why answers are equal", "\"\" if parts[1] == parts[2] else", "\"\" if True else"),
            ("an end alone is an answer", "if response == [end]:", "if False:"),
            ("short texts are looked for first", "key=lambda item: -len(item[1])", "key=lambda item: len(item[1])"),
            ("a text written as JSON is left out", "if found not in written:\n            found = squeeze(json", "if False:\n            found = squeeze(json"),
            ("ids of calls are words said", "if key not in (\"role\", \"type\", \"id\", \"tool_call_id\"):", "if key not in (\"role\", \"type\"):"),
            ("roles are words said", "if key not in (\"role\", ", "if key not in ("),
            ("a row of null is a blank line", "yield parse(line) if line else BLANK", "yield (parse(line) or BLANK) if line else BLANK"),
            ("a gigabyte set aside for an array", "stream.read(1 << 20)", "stream.read(MAX_ARRAY + 1)"),
            ("an array of any size", "if len(text) > MAX_ARRAY:", "if False:"),
            ("rows of an array called lines", "place = \"{}: row {}\" if is_array else place", "pass"),
            ("a file of another kind is read as rows", "(kind := kind_of(start, path))", "(kind := None)"),
            ("a path that is no file", "    check_data(Path(path))\n", ""),
            ("what is in a gzip file may be anything", "if start and (kind", "if start and not is_packed and (kind"),
            ("one occurrence counts for two texts", "written = written.replace(found, \"\\0\", 1)", "pass"),
            ("an answer's text looked for in its prompt", "left_out(answer, whole[len(head) :])", "left_out(answer, whole)"),
            ("columns of null are unread", " and row[c] is not None)", ")"),
            ("a row may set anything of the template", "if reserved := example.variables.keys() & tokenizer.reserved:", "if reserved := set():"),
            ("tools do not reach the template", "\"tools\": example.tools})", "\"tools\": None})"),
            ("a text changed by the tokenizer is not said", "self.changed += not all(", "self.changed += False and not all("),
            ("--show keeps its notes", "if notes := reader.report.notes():", "if notes := []:"),
            ("--show reads ahead", "reader.read(files, at_once=1)", "reader.read(files)"),
            ("pairs equal after truncation are an error", "elif isinstance(found.error, Dropped):", "elif False:"),
            ("ids of the rows of a batch are mixed up", "row.ids = [next(ids) for _ in row.texts]", "row.ids = [next(ids) for _ in row.texts][::-1]"),
            ("one bad row spoils its batch", "with suppress(BadRow):", "with suppress():"),
            ("pairs held out of a file are trained on", "        pairs, eval_pairs = hold_out(", "        _, eval_pairs = hold_out("),
            ("held-out pairs are trained on", "[pairs[i] for i in np.sort(order[held:])]", "[pairs[i] for i in np.sort(order)]"),
            ("other pairs are held out", "np.random.default_rng(0).permutation(len(pairs))", "np.random.default_rng(1).permutation(len(pairs))"),
        ],
        "support/forms.py": [
            ("a list of no messages is a prompt", " or name == \"prompt\" and value in ([], {}):", ":"),
            ("an empty text beside dialogues is a prompt", "if prompt is not None and not (are_whole and is_empty(prompt)):", "if prompt is not None:"),
            ("an empty text beside messages is a prompt", "if not is_empty(prompt) and prompt != repeated:", "if prompt is not None and prompt != repeated:"),
            ("columns that nobody reads pass in silence", "    check_unread(row, form, parts[0])\n", ""),
            ("columns in capitals are others", "re.fullmatch(names, name, re.IGNORECASE)", "re.fullmatch(names, name)"),
            ("a column of null is refused", " or not isinstance(value, str | list | dict):", ":"),
            ("what the prompt has already is refused", "if json.dumps(said)[1:-1] not in json.dumps(prompt):", "if True:"),
            ("whole dialogues are refused for their history", "UNREAD if is_complete else UNREAD |", "UNREAD |"),
            ("the human's last words are an answer", "answer.rfind(HUMAN) > answer.rfind(TURN)", "False"),
            ("any text is a dialogue", " and TURN in prompt and answer", " and answer"),
            ("blank means empty", "if BLANK.fullmatch(last.get(\"content\", \"\"))", "if not last.get(\"content\", \"\")"),
            ("what has no width is an answer", "[\\s\\u200b-\\u200d\\u2060\\ufeff]*", "\\s*"),
            ("a prompt twice in one answer", "if repeats == 1 or repeats == 0 and", "if repeats == 0 and"),
            ("dialogues part between two messages of the assistant", " == \"assistant\" != roles[i]]", " == \"assistant\"]"),
            ("a column of system is dropped", "parts[0] = parts[0] if first == system else [system, *parts[0]]", "pass"),
            ("text carries tools in silence", "if given and form != \"messages\":", "if False:"),
            ("an answer continues a tool call", " and prompt[-1].get(\"tool_calls\"):", " and False:"),
            ("one message is no list", "items = [value] if isinstance(value, dict) else value", "items = value"),
            ("an empty system is one", " or isinstance(value, str) and not value.strip()", ""),
        ],
        "support/text.py": [
            ("a template of any kind", "\"chat_template.jinja\", *JSON_FILES)", "*JSON_FILES)"),
            ("a broken link to a template is no template", "            check_link(file)\n", ""),
            ("broken JSON without its file's name", "read_json(file)  #", "pass  #"),
            ("a template's BOS is cut when it opens each question", "(ids.count(bos) == 1 or not self.bos_opens_answers)", "ids.count(bos) == 1"),
            ("a template's BOS is cut when its probe is refused", "or one that refuses\n            return True", "or one that refuses\n            return False"),
            ("only special tokens end a turn", "self.added = any_of(token.content for token in added)", "self.added = any_of(token.content for token in added if token.special)"),
            ("an end that tokenizer.json does not have", "self.eos = own.token_to_id(self.library.eos_token or \"\")", "self.eos = self.library.eos_token_id"),
            ("stored truncation stays", "self.backend.no_truncation()", "None"),
            ("stored dropout stays", "self.backend.model.dropout = None", "pass"),
            ("a prefill is a message of its own", "prefill = prompt[-1][\"role\"] == \"assistant\"", "prefill = False"),
            ("the tokenizer's BOS twice", "if chat or i[: len(self.lead)] == self.lead else", "if chat else"),
            ("white space behind an answer is scored", "len(tail.rstrip())", "len(tail)"),
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
            ("the first layer's window in all layers", "masks.get(self.config.windows[i])", "masks.get(self.config.windows[0])"),
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
            ("an adapter beside the weights without a word", "    require(not adapter, ", "    require(True, "),
            ("a missing shard without a word", "        check_folder(folder, file)\n", ""),
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
            ("a broken link is no file", "if path.is_symlink() and not path.exists():", "if False:"),
            ("a broken link to a tokenizer is no tokenizer", "for name in (wanted, \"tokenizer.json\"):", "for name in (wanted,):"),
            ("a byte-order mark without a word", "    BOM_UTF8: ", "    b\"never \": "),
            ("numbered rows are no table", "|(%b)?(%b ?%b)", "|(%b)(%b ?%b)"),
            ("names of two words are no table", "(%b)?(%b ?%b){2,})", "(%b)?(%b ?%b){99,})"),
            ("UTF-32 is UTF-16", "UTF8.format(\"UTF-32\")", "UTF8.format(\"UTF-16\")"),
            ("semicolons are commas", ", sep=';'", ""),
            ("safetensors taken for another kind", "if start[8:10] == b'{\"':", "if False:"),
            ("an empty file without a word", "if not start:", "if False:"),
            ("half a character is text", "json.dumps(found, ensure_ascii=False).encode()", "pass"),
            ("a file for a folder", "if folder.is_file():", "if False:"),
            ("the first of many checkpoints", "(len(str(path)), path)", "str(path)"),
            ("a path taken for a name of the Hub", " if hub else \"\"", ""),
            ("a folder taken for a file", "(folder / wanted).is_file()", "(folder / wanted).exists()"),
            ("an adapter without a word", "elif \"adapter_config.json\" in names:", "elif False:"),
            ("a cache folder without a word", ", *folder.glob(f\"snapshots/*/{wanted}\")]", "]"),
            ("rests stay beside the file", "beside.unlink(missing_ok=True)", "pass"),
            ("written in place", "with open(beside, \"xb\") as file:", "with open(path, \"wb\") as file:"),
        ],
        "support/toy.py": [
            ("a doubled letter earns a point", "return hits - doubled.sum(-1)", "return hits + doubled.sum(-1)"),
            ("a tie is a loss", "theirs.cumsum(1) - theirs / 2", "theirs.cumsum(1) - theirs"),
            ("preferences turned round", "torch.sigmoid(scale * (r[:, 0] - r[:, 1]))", "torch.sigmoid(scale * (r[:, 1] - r[:, 0]))"),
            ("optimum at 1/β", "reward.double() / beta", "reward.double() * beta"),
            ("pairs drawn from the reference", "sample_pairs(world.list_logps(world.language),", "sample_pairs(world.list_logps(reference, device),"),
            ("held-out pairs are training pairs", "drawn[pairs:])", "drawn[:eval_pairs])"),
            ("the language's log-probabilities as the reference's", "distance, world.list_logps(reference, device),", "distance, world.list_logps(world.language),"),
            ("every label of Bradley–Terry scale 1", "pairs + eval_pairs, scale, seed)", "pairs + eval_pairs, 1.0, seed)"),
            ("making a problem seeds the global generator", "with torch.random.fork_rng(devices=[]):", "if True:"),
            ("the first of two equal responses is kept", "pair[equal] = draws[prompt, torch.arange(n)][equal]",
             "again = draws[prompt, torch.arange(n)]; again[:, 0] = torch.where(pair[:, 0] > 0, pair[:, 0], again[:, 0]); pair[equal] = again[equal]"),
            ("one chain for all prompts", "self.chain[tokens[:, 1:2],", "self.chain[0 * tokens[:, 1:2],"),
            ("the stop that the world makes is scored", "+ 1).clamp(max=self.length)", "+ 1)"),
            ("J with the penalty added", "gained - beta * distance", "gained + beta * distance"),
            ("KL to the optimum the other way round", "kl(logp, optimum(ref_logp, reward, beta))", "kl(optimum(ref_logp, reward, beta), logp)"),
            ("the reference's own reward counts as gained", "share = (gained - start) / (frontier(ref_logp, reward, distance) - start)",
             "share = gained / frontier(ref_logp, reward, distance)"),
            ("the frontier at another KL", "kl(optimum(ref_logp, reward, math.exp(middle)), ref_logp) > at_kl", "kl(ref_logp, optimum(ref_logp, reward, math.exp(middle))) > at_kl"),
            ("Gumbel noise with the wrong sign", "logp[:, None] - (-uniform.log()).log()", "logp[:, None] + (-uniform.log()).log()"),
            ("the report's optimum is that of the last β", "optimum(problem.ref_logp, reward, betas[0])", "optimum(problem.ref_logp, reward, betas[-1])"),
            ("the report's words are about the last policy", "next(iter(logps))", "list(logps)[-1]"),
        ],
        "support/run.py": [
            ("resume one step late", "return step, lines", "return step + 1, lines"),
            ("resume without β", "    vars(method).update(of_method)\n", ""),
            ("resume without the moments", "optim_state_dict=moments", "optim_state_dict=get_state_dict(policy, optimizer)[1]"),
            ("held-out pairs may change places with others", "\"the held-out pairs\": ids_hash(eval_pairs)", "\"the held-out pairs\": \"\""),
            ("a model is known by its files' heads", "            files.update(f.read())\n", ""),
            ("a model is known by its files' tails", "\"little\") + f.read(1 << 20))", "\"little\"))"),
            ("a model is known by one file", "folder.glob(\"*.safetensors\")", "folder.glob(\"model.safetensors\")"),
            ("data may be overwritten", "flags.cache_reference, *flags.data, *flags.eval_data)", "flags.cache_reference)"),
            ("room for one checkpoint", "(4 + 24 * bool(self.flags.save_every))", "(4 + 12 * bool(self.flags.save_every))"),
            ("no room for the pairs", " + pairs_size  # a new", "  # a new"),
            ("β may rise without a word", " <= self.method.beta <= 100 * first:", " <= self.method.beta:"),
            ("weights that are not finite are saved", "if not all(x.isfinite().all() for x in weights.values())", "if False"),
            ("files of others are deleted", "f\".{name}.[0-9]*.tmp\"", "\".*.tmp\""),
            ("flags.json is written anew on resume", "if not (self.resumes and (out / \"flags.json\").exists()):", "if True:"),
            ("a finished run is run again", "self.finished = model < found", "self.finished = False"),
            ("an empty folder is a finished run's model", "self.finished = model < found", "self.finished = bool(found) and (out / \"model\").exists()"),
            ("an empty model is in the way of the new one", "                remove(self.out / \"model\")  # an empty folder, or half of a model\n", ""),
            ("a real run is continued as a toy", "if flags.resume and bool(model) != bool(flags.model):", "if False:"),
            ("a real run without flags.json is continued as a toy", "\"DIR\" if self.has_pairs else flags.model)", "flags.model)"),
            ("other flags are noticed by the checkpoint only", "if before and (self.resumes or self.finished):", "if before and self.finished:"),
            ("a model that cannot be written is all that there was", "if self.saved < self.done:\n                    self.save()", "pass"),
            ("a signal after the last step is forgotten", "if self.asked:\n            raise KeyboardInterrupt(", "if False:\n            raise KeyboardInterrupt("),
            ("matplotlib can end a run", "except Exception as e:  # matplotlib", "except OSError as e:  # matplotlib"),
            ("the input looks like a finished run", "        for path in filter(None, (flags.model,", "        for path in () if self.finished else filter(None, (flags.model,"),
            ("any signal stops at the end of the run only", "raise Stopped\n\n    def log", "pass\n\n    def log"),
            ("an evaluation's last micro-batch is not the end", "            yield group\n        self._stop_here_if_asked()\n", "            yield group\n"),
            ("an evaluation ends before the next one only", "            self._stop_here_if_asked()\n            yield group", "            yield group"),
            ("a stopped run is not saved", "if isinstance(error, Stopped) and self.out and self.done > self.saved:", "if False:"),
            ("a run that is stopped goes on", "if self.stopping and not last:", "if False:"),
            ("a signal stops a run that has ended", "if self.stopping and not last:", "if self.stopping:"),
            ("an evaluation is made up twice", "line[\"step\"] == step and \"eval/loss\" in line", "False"),
            ("a step's line counts as an evaluation", "line[\"step\"] == step and \"eval/loss\" in line", "line[\"step\"] == step"),
            ("the last step is not saved", "(last or self.done % every == 0)", "(self.done % every == 0)"),
            ("no step but the last is saved", "(last or self.done % every == 0)", "last"),
            ("the checkpoint to continue from is that of this process", "self.saved = self.step = self.done", "self.step = self.done"),
            ("checksums are not looked at", "if (broken := zipfile.ZipFile(path).testzip()) is not None:", "if broken := None:"),
            ("moments of another model pass", "if len(moments[\"state\"]) != len(list(policy.parameters())):", "if False:"),
            ("half a model looks finished", "beside = \"\", self.out / f\".model.{os.getpid()}-new.tmp\"", "beside = \"\", self.out / \"model\""),
            ("the old model is removed last", "(\"model\", \"checkpoint.pt\", \"pairs.npz\", \"metrics.jsonl\", \"run.svg\")", "(\"checkpoint.pt\", \"pairs.npz\", \"metrics.jsonl\", \"run.svg\", \"model\")"),
            ("half of the old model stays", "shutil.rmtree(path.replace(doomed))", "shutil.rmtree(path)"),
            ("data flags that differ are ignored", "if differ := differences(self.made_by, made_by(self.flags, self.flags.given)):", "if differ := \"\":"),
            ("defaults that differ are errors", "made_by(self.flags, self.flags.given)", "made_by(self.flags, DATA_FLAGS)"),
            ("kept pairs are forgotten before the first checkpoint", "if name != \"pairs.npz\" or not self.made_by:", "if True:"),
            ("an old run's pairs stay", "if name != \"pairs.npz\" or not self.made_by:", "if name != \"pairs.npz\":"),
            ("lost pairs are not kept again", "if self.flags.model and not self.made_by:", "if self.flags.model and not self.resumes:"),
            ("the bar stays where it was", "            self.bar.update()\n", ""),
        ],
        "support/signals.py": [
            ("no answer in a long call", "                os.write(2, answer)\n", ""),
            ("a second signal waits too", "raise KeyboardInterrupt", "return"),
            ("SIGTERM kills", "NUMBERS = (signal.SIGINT, signal.SIGTERM)", "NUMBERS = (signal.SIGINT,)"),
            ("handlers are not given back", "signal.signal(number, old)", "pass"),
            ("the answer's socket stays with Python", "signal.set_wakeup_fd(before)", "pass"),
        ],
        "support/kept_pairs.py": [
            ("held-out pairs first", "every = [*pairs, *eval_pairs]", "every = [*eval_pairs, *pairs]"),
            ("chosen and rejected swapped", "parts[1::3], parts[2::3], place", "parts[2::3], parts[1::3], place"),
            ("all pairs are of one file", "files.index(pair.file) for", "0 for"),
            ("cuts are forgotten", "np.array([pair.cut for pair in every], np.int64)", "np.zeros((len(every), 3), np.int64)"),
            ("ids outside the vocabulary", "if not 0 <= ids.min() <= ids.max() < vocab_size:", "if not 0 <= ids.min():"),
            ("a vocabulary one too large", "<= ids.max() < vocab_size", "<= ids.max() <= vocab_size"),
            ("negative ids", "if not 0 <= ids.min() <=", "if not ids.min() <="),
            ("columns of other lengths", "require(cut.shape == (n, 3) and place.shape == line.shape == (n,),", "require(True,"),
            ("ids of another dtype", "fits = ids.dtype == np.int32 and", "fits ="),
            ("parts without ids", "lengths.min() > 0 and", ""),
            ("more ids than lengths", " and ends[-1] == len(ids)\n", "\n"),
            ("none to train on", "0 < to_train_on <= n", "True"),
            ("a file is known by its size", "content.update(block)", "pass"),
            ("a file is known by its first block", "for block in iter(lambda: f.read(1 << 20), b\"\"):", "for block in [f.read(1 << 20)]:"),
            ("a file is known by its path", "[describe(x) for x in value]", "[f\"{x} {describe(x)}\" for x in value]"),
            ("some data flags are not kept", "\"max_length\", \"max_prompt_length\", \"skip_bad_rows\")", "\"max_length\", \"max_prompt_length\")"),
            ("written in place", "replace_file(path, lambda f: np.savez(f, **columns, text=np.array(text)))", "np.savez(path, **columns, text=np.array(text))"),
            ("64 bytes a pair are not counted", " + 64 for pair", " for pair"),
        ],
        "support/report.py": [
            ("a bar without a terminal", "if not sys.stderr.isatty():", "if False:"),
            ("a line for every step", "\"mininterval\": 30,", "\"mininterval\": 0,"),
            ("answers end as another row's", "ends.most_common(1)[0][0]", "ends.most_common()[-1][0]"),
            ("before is after", "evaluations[i][f\"eval/{key}\"] for i in (0, -1)", "evaluations[i][f\"eval/{key}\"] for i in (-1, -1)"),
            ("the forecast forgets the moments", "(4 * of_policy + of_reference) / world", "(2 * of_policy + of_reference) / world"),
            ("the forecast forgets the reference", "(4 * of_policy + of_reference) / world", "4 * of_policy / world"),
            ("the forecast of many processes is that of one", "(4 * of_policy + of_reference) / world", "(4 * of_policy + of_reference)"),
            ("the forecast in another unit", "memory = 4e-9 * (", "memory = 4e-9 / 1.024**3 * ("),
            ("the forecast forgets a layer's MLP", "9 * c.hidden_size + 2 * c.intermediate_size, c.vocab_size", "9 * c.hidden_size, c.vocab_size"),
            ("the forecast forgets gradient checkpointing", "if flags.gradient_checkpointing else layers * layer", "if False else layers * layer"),
            ("the forecast forgets long rows", "max(flags.micro_tokens, sum(tokens) / len(tokens))", "flags.micro_tokens"),
            ("the forecast shares the tables", "(2 if world == 1 else 3 if c.tie_word_embeddings else 6)", "2"),
            ("a last batch is counted whole", "return epochs * pairs + rest * batch_size", "return steps * batch_size"),
            ("no evaluation at the end", "return step in (0, steps) or", "return step == 0 or"),
            ("all processes print", "\"disable\": not shown or rank_and_world()[0] != 0}", "\"disable\": not shown}"),
            ("cut answers count as ended", "for pair in pairs if not pair.cut[1])", "for pair in pairs)"),
        ],
        "support/metrics.py": [
            ("a tie counts as right", "(out.margin > 0).sum()", "(out.margin >= 0).sum()"),
            ("rewards with β̃", "\"rewards/margins\": (beta * out.margin).sum()", "\"rewards/margins\": (out.beta * out.margin).sum()"),
            ("a reward without the reference", "(beta * (chosen.logp - chosen.ref_logp))", "(beta * chosen.logp)"),
            ("KL summed over both responses", "(chosen.kl + rejected.kl).sum() / 2,", "(chosen.kl + rejected.kl).sum(),"),
            ("the lengths of the other response", "\"lengths/chosen\": lengths[:pairs]", "\"lengths/chosen\": lengths[pairs:]"),
            ("the root of a variance below zero", "max(sums[SQUARES] / n - margin**2, 0.0)", "sums[SQUARES] / n - margin**2"),
            ("the spread of margins for their standard error", "math.sqrt(variance / n)", "math.sqrt(variance)"),
            ("the standard error of another share", "math.sqrt(accuracy * (1 - accuracy) / n)", "math.sqrt(accuracy / n)"),
            ("means of the wrong number of pairs", "value / n for name", "value / (n + 1) for name"),
            ("squares in the log", " if name != SQUARES}", "}"),
            ("tokens of the prompts alone", "sum(map(row_length, batch))", "sum(len(pair.prompt) for pair in batch)"),
            ("a step that takes no time", "tokens / seconds}", "tokens}"),
        ],
        "train.py": [
            ("β updated with every micro-batch", "parts.append(totals(out,", "method.beta *= 0.999; parts.append(totals(out,"),
            ("mean over micro-batches", "(out.losses.sum() * (scale * rank_and_world()[1] / n)).backward()", "(out.losses.mean()).backward()"),
            ("gradients of many processes are averaged twice", "(scale * rank_and_world()[1] / n)", "(scale / n)"),
            ("first learning rate zero", "flags.lr * (step + 1) / warmup", "flags.lr * step / warmup"),
            ("learning rate that rises after the end", "min(1.0, (step - warmup)", "min(9.0, (step - warmup)"),
            ("learning rate that never reaches the optimizer", "        group[\"lr\"] = lr\n", "        pass\n"),
            ("warmup of 7.000000000000001 steps", "math.ceil(flags.warmup * steps - 1e-9)", "math.ceil(flags.warmup * steps)"),
            ("no weight decay", "weight_decay=flags.weight_decay", "weight_decay=0.0"),
            ("the reference is trained", "reference.requires_grad_(False)", "reference.requires_grad_(True)"),
            ("a reference in another precision", "            ref_hidden, ref_weight = reference(", "            with torch.autocast(batch.tokens.device.type, enabled=False):\n                ref_hidden, ref_weight = reference("),
            ("ε_s in the check", "score_pairs(policy, reference, batch, method.epsilon_check, flags.dtype)", "score_pairs(policy, reference, batch, method.epsilon_step, flags.dtype)"),
            ("chosen and rejected swapped", "return TokenStats(*(x[:pairs] for x in sums)), TokenStats(*(x[pairs:] for x in sums))", "return TokenStats(*(x[pairs:] for x in sums)), TokenStats(*(x[:pairs] for x in sums))"),
            ("β moves the other way", "for name in (\"lower\", \"keep\", \"raise\")", "for name in (\"raise\", \"keep\", \"lower\")"),
            ("next β in the log", "\"grad_norm\": norm, \"beta\": beta}", "\"grad_norm\": norm, \"beta\": method.beta}"),
            ("rows of the whole step are blamed", "raise ValueError(f\"{locations(pairs)}: {e}\") from e", "raise"),
            ("not finite is stepped on", "if not (math.isfinite(norm) and math.isfinite(sums[\"loss\"])):", "if False:"),
            ("gradients pile up", "    optimizer.step()\n    optimizer.zero_grad()\n", "    optimizer.step()\n"),
            ("gradients that overflowed stay", "        optimizer.zero_grad()\n        sums, _ =", "        sums, _ ="),
            ("gradient checkpointing does nothing", "policy.gradient_checkpointing = flags.gradient_checkpointing", "policy.gradient_checkpointing = False"),
            ("a frozen policy stays frozen", "policy.requires_grad_(True)", "policy.train()"),
            ("the same order for every seed", "flags.batch_size, flags.seed)", "flags.batch_size, 0)"),
            ("evaluation trains", "@torch.no_grad()\ndef evaluate(", "def evaluate("),
            ("pairs after those compared are not evaluated", "watch(first + rest), n, method, flags)", "watch(first), n, method, flags)"),
            ("all held-out decisions are made twice", "pairs[: 128 if compare else 0]", "pairs if compare else []"),
            ("decisions compared with themselves", "watch(first), n, method, in_float32)", "watch(first), n, method, flags)"),
            ("decisions compared before the first step", "compare = flags.dtype != \"float32\" and method.epsilon_check > 0 and has_moved", "compare = flags.dtype != \"float32\" and flags.epsilon_check > 0"),
            ("decisions compared in 16 bits with a cached reference", " and has_moved and has_model", " and moved"),
            ("decisions compared without a check", " and method.epsilon_check > 0 and has_moved", " and moved"),
            ("the toy's DPO with steps of β", "dataclasses.replace(flags, epsilon_step=0.0)", "flags"),
            ("samples that nobody can decode", " and flags.samples and not can_answer:", " and False:"),
            ("samples by many processes", "tokenizer is not None and one_process", "tokenizer is not None"),
            ("samples of no pairs", "needs=\"model, eval_data or eval_size\"", "needs=\"model\""),
            ("real data without --out", "needs=\"data or resume, out or show\"", "needs=\"data or resume\""),
            ("epochs beside steps", "instead_of=\"epochs\"", "instead_of=\"\""),
            ("the toy ignores --eval-size", "eval_pairs=flags.eval_size, device=where", "device=where"),
        ],
        "support/device.py": [
            ("a reference that moves with the policy", "if rank_and_world()[1] == 1 and addresses[0]", "if False and addresses[0]"),
            ("bfloat16 for float16", "low = torch.float16 if dtype == \"float16\" else torch.bfloat16", "low = torch.bfloat16"),
            ("float16 gradients stay scaled", "p.grad /= scale", "pass"),
            ("float16 gradients vanish", "2.0 ** (start - 4 * i)", "2.0 ** (-4 * i)"),
            ("float16 gradients overflow", "for i in range(6)]", "for i in range(1)]"),
            ("bfloat16's loss is scaled too", "if dtype == \"float16\" else [1.0]", "if dtype != \"float32\" else [1.0]"),
            ("loss scales beyond float32", "min(max(ideal, 2.0**-99), 2.0**99)", "ideal"),
            ("the peak of memory in units of 1000 bytes", "if sys.platform == \"darwin\" else 1024", "if sys.platform == \"darwin\" else 1000"),
            ("macOS counts units of 1024 bytes", "unit = 1 if sys.platform == \"darwin\" else 1024", "unit = 1024"),
            ("the peak of a GPU is the process's", "if device.type == \"cuda\":\n        return", "if False:\n        return"),
            ("resource must be there", "    except ImportError:\n        return {}", "    except AttributeError:\n        return {}"),
            ("malloc must be there", "(AttributeError, OSError, TypeError)", "(AttributeError, OSError)"),
            ("FSDP on a CPU that cannot", "if device == \"cpu\" and not hasattr(", "if False and not hasattr("),
            ("processes have other numbers of micro-batches", "return mine + [[]] * (max(map(len, plans)) - len(mine))", "return mine"),
            ("processes share pairs", "by_length[r::world]", "by_length[r // 2 :: world]"),
            ("counts in float32", "[x.double() for x in part.values()]", "[x.float() for x in part.values()]"),
            ("sums of one process", "    if dist.is_initialized():\n        dist.all_reduce(total)\n", ""),
            ("every process decides what it resumes", "    dist.broadcast_object_list(box)\n", ""),
            ("a signal stops one process of many", "    dist.all_reduce(flag, dist.ReduceOp.MAX)\n", ""),
            ("the head's matrix is sharded again", "reshard_after_forward=False", "reshard_after_forward=True"),
            ("every unknown device lacks float64", "if name.startswith(\"mps\") else \"\"", "if name else \"\""),
        ],
        "support/flags.py": [
            ("a bound that is left out is accepted", "value >= low if allowed[0] == \"[\" else value > low", "value >= low"),
            ("an upper bound that is left out is accepted", "value <= high if allowed[-1] == \"]\" else value < high", "value <= high"),
            ("errors say one bound", "return f\"between {low:g} and {high:g}\"", "return at_least"),
            ("integers that torch cannot hold", "value > LARGEST:", "value > LARGEST**99:"),
            ("defaults of the other job", "default.real if real else default.toy", "default.toy if real else default.real"),
            ("ε_s has a default of its own", "setattr(flags, field.name, getattr(flags, default.name))", "setattr(flags, field.name, 0.01)"),
            ("a flag that changes nothing is accepted", "if value and not any(getattr(flags, name) for name in names):", "if False:"),
            ("one of two needs is not enough", "not any(getattr(flags, name)", "not all(getattr(flags, name)"),
            ("only the first need counts", "for need in needs.split(\", \") if need)", "for need in needs.split(\", \")[:1] if need)"),
            ("a flag that is off has needs", "            if value and not any(", "            if not any("),
            ("one flag instead of another, beside it", "if other in flags.given:", "if other == field.name:"),
            ("abbreviations", "allow_abbrev=False", "allow_abbrev=True"),
            ("underscores are not dashes", "wrong.replace(\"_\", \"-\"), known", "wrong, ['x']"),
            ("given are the flags that differ", "given=frozenset(values))", "given=frozenset(x for x in values if values[x] != getattr(cls, x, 0)))"),
            ("the last --data replaces the others", "\"action\": \"extend\"", "\"action\": \"store\""),
            ("no default in the help", "text += f\" (default: {default})\"", "pass"),
            ("an error of the program is a user's", "            raise\n        print(f\"train.py: error: {out_of_memory}", "            pass\n        print(f\"train.py: error: {out_of_memory}"),
            ("out of memory is a traceback", "\"DefaultCPUAllocator\" not in str(e)", "True"),
            ("a stopped run is an error", "        return 130\n", "        return 2\n"),
            ("a terminal without Greek ends a run", "errors=\"replace\"", "errors=\"strict\""),
            ("an empty text is a value", "and not allowed and \"\" in (", "and not allowed and 0 in ("),
            ("closed streams end a run", "(stream or open(os.devnull, \"w\") for", "(stream for"),
            ("a reader that leaves is an error", "except BrokenPipeError:", "except ZeroDivisionError:"),
            ("output is written when Python ends", "            sys.stdout.flush()  # here, where an error is caught\n", ""),
        ],
        "support/cached_reference.py": [
            ("a cache for all dtypes", "{ids_hash(pairs)} {dtype}", "{ids_hash(pairs)}"),
            ("a cache for all weights", "name.update(p.detach()", "hash(p.detach()"),
            ("a cache for all configs", "{policy.config} {ids_hash(pairs)}", "{ids_hash(pairs)}"),
            ("a cache for one order of the pairs", "pairs = sorted(pairs, key=lambda pair: (pair.file, pair.line))", "pairs = list(pairs)"),
            ("a cache of another size is read", ".st_size) != size:", ".st_size) < 0:"),
            ("a damaged cache is read", "!= zlib.crc32(self.states):", "!= zlib.crc32(self.states) and False:"),
            ("a cache that was not finished stays", "replace_file(file, lambda f: f.writelines(hidden_states(policy, pairs, dtype, micro_tokens)))", "file.open(\"wb\").writelines(hidden_states(policy, pairs, dtype, micro_tokens))"),
            ("cached states in another dtype", "with autocast(dtype, device):", "with autocast(\"float32\", device):"),
            ("every pair's hidden states from the file's start", "key: slice(a, b) for", "key: slice(0, b - a) for"),
            ("other answers, the same hidden states", "tobytes(), prompt, chosen", "tobytes(), prompt, 0"),
            ("the cached head moves with the policy", "policy.lm_head.weight.detach().clone()", "policy.lm_head.weight.detach()"),
        ],
    }.items()
    for fields in ((file, *mutant) for mutant in mutants)
]  # fmt: skip


# ---- the shortest tests first: pytest loads this file as a plugin, and most mutants die within seconds ----------------

SECONDS: dict[str, float] = {}  # of each test


def pytest_runtest_logreport(report) -> None:
    SECONDS[report.nodeid] = SECONDS.get(report.nodeid, 0.0) + report.duration


def pytest_sessionfinish(session) -> None:
    file = Path(os.environ[TIMES])
    if not file.exists():  # the first run, of the code as it is
        file.write_text(json.dumps(SECONDS), encoding="utf-8")


def pytest_collection_modifyitems(items: list) -> None:
    file = Path(os.environ[TIMES])
    seconds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))


# ---- the run ---------------------------------------------------------------------------------------------------------


def passes(folder: Path, tests: list[str], seconds: float) -> bool:
    present = [test for test in tests if (folder / test).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.mutants", *present]
    try:
        times = folder.parent / f"{'+'.join(Path(test).stem for test in present)}.json"
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", TIMES: str(times)}
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
