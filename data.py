"""Preference files -> pairs of token ids -> batches. Knows no model and no algorithm.

Two ideas carry it. A prompt and its answer are always encoded as one whole text, and the prompt is what the token lists
have in common. And a pair is one row of a batch: the prompt once, both responses behind it."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

MAX_LINE = 1 << 24  # bytes; a longer line is no preference pair, and a small gzip file can hold a huge one
MAX_RENDERED = 1 << 24  # characters; a chat template is a program by a stranger
MAX_STEPS = 2 * 10**6  # lines of it that run for one dialogue: seconds
MAX_DETAIL = 2000  # characters of an error
FIELDS = ("prompt", "chosen", "rejected")
ROLES = ("system", "user", "assistant", "tool")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
HUMAN, TURN = "\n\nHuman:", "\n\nAssistant:"  # what questions and answers follow in dialogues written as plain text
MARK = "Xq7AnswerXq7"  # an answer, where only what the template writes behind it is of interest


class Pair(NamedTuple):
    """One preference as int32 token ids, responses with their end token, and the place it came from."""

    prompt: np.ndarray  # (P,)
    chosen: np.ndarray  # (C,)
    rejected: np.ndarray  # (R,)
    file: str = ""
    line: int = 0
    cut: tuple[int, ...] = (0, 0, 0)  # tokens that truncation took from prompt, chosen, rejected


class Batch(NamedTuple):
    """B pairs as B rows [prompt | chosen | rejected | pad], T the longest; everything int64.

    A response of n tokens is predicted by n hidden states: the last prompt token's and those of its own tokens but the
    last. The M predictions of a batch are listed flat, so that the output matrix is applied to them alone."""

    tokens: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T) those of a rejected response restart after the prompt
    segments: torch.Tensor  # (B, T) -1 pad, 0 prompt, 1 chosen, 2 rejected
    source: torch.Tensor  # (M,) which hidden state predicts: an index into the flattened B*T
    label: torch.Tensor  # (M,) the token to predict
    owner: torch.Tensor  # (M,) for which of the 2B responses: i is the chosen one of pair i, B + i the rejected

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def row_length(pair: Pair) -> int:
    return sum(map(len, pair[:3]))


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pairs as one Batch. Pads, at the right, carry token 0: masks come from `segments`, never from ids.

    No pairs make an empty batch: a process without work still does its forward pass beside the others."""
    size, width = len(pairs), max(map(row_length, pairs), default=1)
    tokens, positions = np.zeros((2, size, width), np.int64)
    segments = np.full((size, width), -1)
    source = np.arange(-1, size * width - 1).reshape(size, width)  # a token is predicted by the one before it,
    for i, pair in enumerate(pairs):
        p, c, r = map(len, pair[:3])
        tokens[i, : p + c + r] = np.concatenate(pair[:3])
        segments[i, : p + c + r] = np.repeat((0, 1, 2), (p, c, r))
        positions[i, : p + c + r] = np.r_[0 : p + c, p : p + r]
        source[i, p + c] = source[i, p]  # the first of the rejected response by the last of the prompt
    response = segments > 0
    owner = np.arange(size)[:, None] + size * (segments == 2)
    flat = (source[response], tokens[response], owner[response])  # (M,) each
    return Batch(*map(torch.from_numpy, (tokens, positions, segments, *flat)))


def micro_batches(pairs: Sequence[Pair], token_budget: int) -> list[list[int]]:
    """Cut one effective batch into lists of indices with rows x longest row <= token_budget; a longer row stands alone.

    Sorting by length happens inside the effective batch only: over the whole set it would make every batch one length,
    and its gradient and beta biased by it. Longest first, so that memory peaks at once."""
    lengths = [row_length(pair) for pair in pairs]
    groups: list[list[int]] = []
    for i in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n pairs in one epoch, (n,) int64: a function of seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class BadRow(ValueError):
    """A row that cannot be used. `reason` is what it is counted under, `detail` is for whoever mends the file."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail:.{MAX_DETAIL}}")
        self.reason = reason


def common_length(*sequences: Sequence) -> int:
    shortest = min(map(len, sequences))
    return next((i for i, items in enumerate(zip(*sequences)) if items.count(items[0]) < len(items)), shortest)


def normal(message: dict) -> dict:
    """A message without nulls, which tables hold for absent fields and templates print as None. Reasoning goes by three
    names; templates read the first or the second."""
    message = {key: value for key, value in message.items() if value is not None}
    names = [name for name in ("reasoning_content", "thinking", "reasoning") if name in message]
    return {"thinking": message[names[0]], **message, "reasoning_content": message[names[0]]} if names else message


def tokens_of(config: dict) -> tuple[dict[str, dict], list[dict], list[dict]]:
    """The tokens that a tokenizer_config.json names, lists with their flags, and adds, each as tokenizers.AddedToken's
    arguments; all three as in transformers."""

    def token(found: str | dict) -> dict:
        found = found if isinstance(found, dict) else {"content": found, "special": True}
        return {key: value for key, value in found.items() if key != "__type"}

    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {k: v for k, v in config.items() if k in NAMES or k.endswith("_token") and isinstance(v, str | dict)}
    for group in (extra, config.get("model_specific_special_tokens")):
        named |= group if isinstance(group, dict) else {}
    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    more = extra if isinstance(extra, list) else []
    named = {name: token(found) for name, found in named.items() if found is not None}
    return named, [token(found) for _, found in listed], [token(found) for found in more]


class Tokenizer:
    """The tokenizer.json of a checkpoint folder, read by the `tokenizers` library, and the folder's chat template.

    `special` holds bos_token, eos_token, … by name; `eos` is the id that ends an answer in plain text, or None; `lead`
    are the ids that the tokenizer itself puts before a text (a config may name a bos_token that is never added)."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Raises ImportError without the hf extra, ValueError naming the folder if it cannot be read."""
        self, folder = cls(), Path(folder)
        try:
            import jinja2  # noqa: F401
            import tokenizers

            files = [folder / name for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json")]
            model, config, older = (json.loads(file.read_text("utf-8")) if file.exists() else {} for file in files)
            named, listed, extra = tokens_of(config if "added_tokens_decoder" in config else config | older)
            self.special = {name: token["content"] for name, token in named.items()}
            self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.id_of = self.backend.token_to_id
            self.backend.add_tokens([tokenizers.AddedToken(**token) for token in listed])
            known = {token.content: token for token in self.backend.get_added_tokens_decoder().values()}
            extra = [tokenizers.AddedToken(**token) for token in extra if token["content"] not in known]
            for token in named.values():
                if self.id_of(token["content"]) is not None:  # else it is a name for nothing
                    extra.append(known.get(token["content"]) or tokenizers.AddedToken(**token))
                    extra[-1].special = True
            self.backend.add_tokens(extra)
            self.backend.encode_special_tokens = config.get("split_special_tokens") is True
            self.backend.no_truncation()  # these three, left over from its own training, would
            self.backend.no_padding()  # cut, pad and vary texts without a word
            if getattr(self.backend.model, "dropout", None):
                self.backend.model.dropout = None
            added = {token.content: token.special for token in self.backend.get_added_tokens_decoder().values()}
            probe = self.backend.encode(next(iter(added), "a"))
            self.lead = probe.ids[: probe.sequence_ids.index(0)]
            eos = self.id_of(self.special["eos_token"]) if "eos_token" in self.special else model.get("eos_token_id")
            self.eos = eos[0] if isinstance(eos, list) else eos
            source = config.get("chat_template")  # one template, or several with names
            if isinstance(source, list):
                source = {entry["name"]: entry["template"] for entry in source}
            self.source = source.get("default") if isinstance(source, dict) else source
            if (file := folder / "chat_template.jinja").exists():
                self.source = file.read_text("utf-8")
        except ImportError as error:
            raise ImportError("text needs the packages tokenizers and jinja2: pip install -e '.[hf]'") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare ones, and panics, which are no Exceptions
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"the tokenizer of {folder} cannot be read: {what:.{MAX_DETAIL}}") from error
        longest_first = sorted(filter(str.strip, added), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.control = re.compile("|".join(re.escape(token) for token in longest_first if added[token]) or "(?!)")
        self.folder, self.now = folder, datetime.now()  # one clock, so that templates write one date in a run
        return self

    def encode(self, texts: Sequence[str], chat: bool) -> list[list[int]]:
        """Token ids. Plain text gets the tokenizer's `lead`, once; in a rendered chat that is up to the template.

        Raises BadRow for a text that the tokenizer fails on."""
        try:
            ids = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # an unknown token without an unk_token; and see above
            raise BadRow("cannot be encoded", f"{error} (the tokenizer of {self.folder})") from error
        return [i if chat or i[: len(self.lead)] == self.lead else self.lead + i for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def bos_length(self, ids: list[int]) -> int:
        """How many ids at a prompt's front mark its beginning: the tokenizer's own, or the template's bos_token."""
        if self.lead and ids[: len(self.lead)] == self.lead:
            return len(self.lead)
        bos = self.id_of(self.special.get("bos_token", ""))
        return int(bos is not None and ids[:1] == [bos] and (ids.count(bos) == 1 or not self.bos_opens_answers))

    @cached_property
    def bos_opens_answers(self) -> bool:
        """Whether the bos_token begins every turn, as ChatML's <|im_start|> does where a config names it so."""
        question = [{"role": "user", "content": MARK}]
        try:
            return self.special["bos_token"] in self.render(question, True).rpartition(MARK)[2]
        except ValueError:  # no template, or one that refuses
            return True

    @cached_property
    def template(self):
        """The chat template in the environment that templates are written for: that of transformers."""
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):  # {% generation %} marks what a model wrote; here it is a scope and no more
            tags = frozenset({"generation"})

            def parse(self, parser):
                line = next(parser.stream).lineno
                return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

        def raise_exception(message):
            raise TemplateError(message)

        def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        class Sandbox(ImmutableSandboxedEnvironment):
            intercepted_binops = frozenset({"*", "**"})  # a few of them would compute for years

            def call_binop(self, context, operator, left, right):
                a, b = (len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right))
                if max(a, b, a * b if operator == "*" else a ** min(b, 99)) > MAX_RENDERED:
                    raise ValueError(f"{operator} gives more than {MAX_RENDERED}")
                return super().call_binop(context, operator, left, right)

        env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        env.filters["tojson"] = tojson
        env.globals.update(raise_exception=raise_exception, strftime_now=self.now.strftime)
        return env.from_string(self.source)

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """A dialogue as the template writes it: byte for byte transformers' `apply_chat_template(…, tokenize=False)`.

        Raises BadRow, with the template's own words, for whatever the template fails with."""
        known = {"messages": list(map(normal, messages)), "tools": None, "documents": None, **self.special}
        if self.source is None:
            raise ValueError(f"{self.folder} has no (default) chat template, which rows of messages need")
        pieces, size, steps, tracer = [], 0, 0, sys.gettrace()

        def count(frame, event, arg):  # each call and each line of the template, for a loop may run and write nothing
            nonlocal steps
            if (steps := steps + 1) > MAX_STEPS:
                raise ValueError(f"it takes more than {MAX_STEPS} steps")
            return count if frame.f_code.co_filename == "<template>" else None

        sys.settrace(count)
        try:
            for piece in self.template.generate(known, add_generation_prompt=add_generation_prompt):
                pieces.append(piece)
                if (size := size + len(piece)) > MAX_RENDERED:
                    raise ValueError(f"it writes more than {MAX_RENDERED} characters")
        except Exception as error:
            what = f"{type(error).__name__}: {error} (the template of {self.folder})"
            raise BadRow("chat template refuses", what) from error
        finally:
            sys.settrace(tracer)
        return "".join(pieces)

    def dialogue(self, prompt: list[dict], answer: list[dict]) -> tuple[str, str, bool]:
        """The text of the prompt, that of the dialogue up to its end-of-turn token, and whether the template wrote one.

        That token is the first added one *behind* the answer's content, in which users may have typed others. Where the
        content ends, the same dialogue with another last message tells: what follows that is the template's."""
        head, whole = self.render(prompt, True), self.render(prompt + answer)
        if not whole.startswith(head):
            at = slice((same := common_length(head, whole)), same + 40)
            what = f"{head[at]!r} at character {same} of the prompt, {whole[at]!r} where an answer follows"
            raise BadRow("chat template changes the prompt", f"the template of {self.folder} writes {what}")
        marked = self.render([*prompt, *answer[:-1], {"role": "assistant", "content": MARK}])
        tail = marked.rpartition(MARK)[2]
        if tail == marked or not whole.endswith(tail):
            raise BadRow("no end of the answer", f"the template of {self.folder} does not write a content as it stands")
        end = self.added.search(tail)
        return head, whole[: len(whole) - len(tail) + (end.end() if end else len(tail.rstrip()))], end is not None


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line that is not blank; the text may be gzipped."""
    number, empty = 0, True
    with open(path, "rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw as stream:
        try:
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}:{number}: more than {MAX_LINE} bytes; one pair a line is expected")
                if line := line.removeprefix(BOM_UTF8).strip():
                    empty = False
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}:{number + 1}: damaged gzip file: {error}") from error
    if empty:
        raise ValueError(f"{path}:1: the file is empty; one JSON object a line is expected")


def parse(line: bytes) -> dict:
    def unique(items: list[tuple]) -> dict:
        if len(row := dict(items)) < len(items):
            raise ValueError(f"a key stands twice among {[key for key, _ in items]}")
        return row

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can escape half a character, which is no text
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", f"{error}; one JSON object a line, in UTF-8, is expected") from error
    if not isinstance(row, dict):
        raise BadRow("not an object", f"{line[:60]!r}; an object with chosen, rejected and a prompt is expected")
    return row


def form_of(name: str, value: object) -> tuple[str, object]:
    """The form of one field, and the field; messages are checked and made normal."""
    if value is None or isinstance(value, str):
        return "absent" if value is None else "text", value
    if not isinstance(value, list) or len({isinstance(item, dict) for item in value}) != 1:
        raise BadRow("unknown form", f"{name} is {value!r:.60}; text, messages or token ids are accepted")
    if not isinstance(value[0], dict):
        return "token ids", value
    for i, message in enumerate(value):
        content, called = message.get("content"), message.get("tool_calls")
        if message.get("role") not in ROLES or not (isinstance(content, str) or content is None and called):
            accepted = f"a role of {', '.join(ROLES)} and a text as content are accepted"
            raise BadRow("not a message", f"{name}[{i}] is {message!r:.80}; {accepted}")
    return "messages", list(map(normal, value))


def one_form(row: dict) -> tuple[str, list]:
    """A row in any of the accepted forms -> which it is, and prompt, chosen and rejected, apart and all three in it.

    Whole dialogues, which repeat the prompt, part at the last start of an answer before which they are equal."""
    (beside, prompt), (form, chosen), (other, rejected) = (form_of(name, row.get(name)) for name in FIELDS)
    if form != other or form == "absent" or (form == "token ids") != (beside == "token ids"):
        found = f"prompt is {beside}, chosen {form}, rejected {other}, found {', '.join(sorted(row))}"
        reason = "missing field" if "absent" in (form, other) else "mixed forms"
        raise BadRow(reason, f"{found}; all three as text, messages or token ids are expected")
    if form == "text" and beside == "messages":
        form, chosen, rejected = "messages", *([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    places, repeats = None, 0
    if form == beside == "text":  # whole dialogues may stand beside a prompt, but must repeat it
        dialogues = [text for text in (chosen, rejected) if TURN in text]
        repeats = sum(bool(prompt.strip()) and text.startswith(prompt) for text in dialogues)
        if repeats == 1 or repeats == 0 and sum(text.startswith(HUMAN) for text in dialogues) == 2:
            raise BadRow("two prompts", f"prompt is {prompt!r:.60}, chosen {chosen!r:.60}, rejected {rejected!r:.60}")
    if form == "text" and (beside == "absent" or repeats):
        places, prompt = [len(prompt or ""), *(mark.end() for mark in re.finditer(TURN, chosen))], None
    elif form == "messages" and {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        both = enumerate(zip(chosen, rejected))
        places = [i for i, (a, b) in both if a["role"] == b["role"] == "assistant"]
    elif form == "messages" and beside == "text":
        prompt = [{"role": "user", "content": prompt}]
    if places is not None:
        n = max((n for n in places if chosen[:n] == rejected[:n]), default=0)
        head, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        if prompt is not None and head:
            asked = next((message.get("content") for message in head if message["role"] == "user"), None)
            if prompt != (asked if beside == "text" else head[: len(prompt)]):
                raise BadRow("two prompts", f"prompt is {prompt!r:.60}, but the dialogues begin with {asked!r:.60}")
        prompt = head or None
    if prompt is None:
        what = f"a prompt, or two whole dialogues (messages, or text with {TURN!r}) that begin alike, are expected"
        raise BadRow("no prompt", what)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        last = answer[-1] if form == "messages" else {"role": "assistant", "content": answer}
        if last["role"] != "assistant":
            raise BadRow("no answer", f"{name} ends with a message of {last['role']}, not of assistant")
        said = last.get("content", "")
        if form != "token ids" and not said.strip() and not last.get("tool_calls"):
            raise BadRow("blank answer", f"{name} is {answer!r:.60}")
    return form, [prompt, chosen, rejected]


def to_ids(form: str, parts: list, tokenizer: Tokenizer | None) -> list[list[int]]:
    """prompt, chosen, rejected in one form -> their token ids.

    The prompt is the longest common prefix of three lists, its own and those of the two whole texts: so the ids are
    those of the whole texts, both responses start at one place, and words that both begin with stay theirs."""
    if form == "token ids":
        return parts
    if tokenizer is None:
        raise ValueError(f"a row of {form} needs the tokenizer of a checkpoint folder; token ids need none")
    prompt, *answers = parts
    ways = [tokenizer.dialogue(prompt, a) if form == "messages" else (prompt, prompt + a, False) for a in answers]
    head, *wholes = tokenizer.encode([ways[0][0], ways[0][1], ways[1][1]], chat=form == "messages")
    if not (shared := common_length(head, *wholes)):
        why = "its first token runs on into an answer" if head else "the tokenizer adds nothing before it"
        raise BadRow("no token of the prompt stands alone", f"the prompt is {ways[0][0]!r:.60}, and {why}")
    for whole, answer, (_, _, ended) in zip(wholes, answers, ways):
        if len(whole) - shared <= ended:
            raise BadRow("blank answer", f"of {answer!r:.60} no token is left")
        if not ended and tokenizer.eos is None:
            raise ValueError(f"no token ends an answer: {tokenizer.folder} names none that its tokenizer has")
        if not ended and whole[-1] != tokenizer.eos:
            whole.append(tokenizer.eos)
    return [head[:shared], wholes[0][shared:], wholes[1][shared:]]


def truncate(ids: list[list[int]], max_length: int, max_prompt_length: int, bos: int) -> list[list[int]]:
    """One cut for both responses. The prompt loses its left side, but for `bos` ids, a response its right side."""
    prompt, chosen, rejected = ids
    keep = min(len(prompt), max(max_length - max(len(chosen), len(rejected)), max_prompt_length))
    bos = min(bos, keep)
    prompt = prompt[:bos] + prompt[len(prompt) - keep + bos :]
    return [prompt, chosen[: max_length - keep], rejected[: max_length - keep]]


@dataclass
class Report:
    """What became of the rows that load_pairs read."""

    read: int = 0
    kept: int = 0
    truncated: int = 0  # pairs that lost tokens of the prompt or of a response
    special: int = 0  # pairs in which someone typed a special token, which then is one
    prompt_tokens: int = 0
    response_tokens: int = 0
    bad: Counter = field(default_factory=Counter)  # reason -> rows skipped because the user asked for it
    dropped: Counter = field(default_factory=Counter)  # reason -> good rows that are of no use at this max_length

    def __str__(self) -> str:
        lines = [
            f"{self.read:,} rows read, {self.kept:,} pairs kept, {self.truncated:,} of them truncated",
            f"{self.prompt_tokens:,} prompt tokens, {self.response_tokens:,} response tokens",
            *(f"{rows:,} bad rows skipped: {reason}" for reason, rows in self.bad.most_common()),
            *(f"{rows:,} rows dropped: {reason}" for reason, rows in self.dropped.most_common()),
        ]
        typed = f"{self.special:,} pairs hold special tokens typed as text, which the model sees as special tokens"
        return "\n".join(lines + [typed] * bool(self.special))


def load_pairs(
    files: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_length: int,
    max_prompt_length: int | None = None,
    skip_bad_rows: bool = False,
    progress: bool = True,
    max_position_embeddings: int | None = None,
) -> tuple[list[Pair], Report]:
    """Read, tokenize and truncate preference files. `max_length` is that of a prompt and one response, in tokens, and
    `max_prompt_length` half of it unless given.

    Raises ValueError naming file and line for the first bad row, unless `skip_bad_rows`; and always for what skipping
    cannot mend: a damaged file, no tokenizer or template, a pair longer than the model has positions."""
    max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
    if not 0 < max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length {max_prompt_length} is not between 0 and max_length {max_length}")
    pairs, report = [], Report()
    for file in map(str, files):
        for line, text in tqdm(read_lines(file), f"tokenizing {Path(file).name}", unit=" rows", disable=not progress):
            report.read += 1
            try:
                form, parts = one_form(parse(text))
                ids = to_ids(form, parts, tokenizer)
                for name, part in zip(FIELDS, ids):
                    if wrong := [i for i in part if type(i) is not int or not 0 <= i < vocab_size]:
                        raise BadRow("not in the vocabulary", f"{wrong[0]!r} in {name}; ids are 0 to {vocab_size - 1}")
                if ids[1] == ids[2]:
                    raise BadRow("equal answers", f"both are {parts[1]!r:.60}")
                bos = tokenizer.bos_length(ids[0]) if tokenizer else 0
                short = truncate(ids, max_length, max_prompt_length, bos)
                longest = len(short[0]) + max(map(len, short[1:]))
                if max_position_embeddings and longest > max_position_embeddings:
                    limit = f"max_position_embeddings of {max_position_embeddings}: lower max_length"
                    raise ValueError(f"prompt and response are {longest} tokens, more than the model's {limit}")
            except ValueError as error:
                bad = isinstance(error, BadRow)
                if not (bad and skip_bad_rows):
                    hint = " (--skip-bad-rows skips and counts such rows)" if bad else ""
                    raise ValueError(f"{file}:{line}: {error}{hint}") from error
                report.bad[error.reason] += 1
                continue
            if short[1] == short[2]:
                report.dropped["equal after truncation"] += 1
                continue
            cut = tuple(len(before) - len(after) for before, after in zip(ids, short))
            pairs.append(Pair(*(np.array(part, np.int32) for part in short), file, line, cut))
            report.kept += 1
            report.truncated += any(cut)
            report.prompt_tokens += len(short[0])
            report.response_tokens += len(short[1]) + len(short[2])
            if form != "token ids":
                fields = (item for part in parts if form == "messages" for message in part for item in message.items())
                said = parts if form == "text" else [str(value) for key, value in fields if key != "role"]
                report.special += any(map(tokenizer.control.search, said))
    return pairs, report


def show_pair(pair: Pair, tokenizer: Tokenizer | None) -> str:
    """The pair as the model sees it: the seam between prompt and responses, the ends, and what was cut are marked."""
    decode = tokenizer.decode if tokenizer else lambda ids: " ".join(map(str, ids))
    prompt, gone = decode(pair.prompt), [f"⟦{n} tokens cut⟧" if n else "" for n in pair.cut]
    lines = [f"{pair.file}:{pair.line}", f"⟦prompt, {len(pair.prompt)} tokens⟧{gone[0]}{prompt}⟦seam⟧"]
    for name, ids, missing in zip(("chosen", "rejected"), pair[1:3], gone[1:]):
        both = decode(np.concatenate((pair.prompt, ids)))  # decoded alone, a response may lose the space at its start
        text = both[len(prompt) :] if both.startswith(prompt) else decode(ids)
        lines.append(f"⟦{name}, {len(ids)} tokens⟧{text}{missing or '⟦end⟧'}")
    return "\n".join(lines)
