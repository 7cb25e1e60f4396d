"""Preference files -> pairs of token ids. Knows no model and no algorithm.

Two ideas carry it. A prompt and its answer are always encoded as one whole text, and the prompt is what the token lists
have in common. And a pair is one row of a batch: the prompt once, both responses behind it."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model import Config
from support.device import rank_and_world
from support.report import progress_bar
from support.rows import BadRow, Pair
from support.text import Tokenizer

MAX_LINE = 1 << 24  # bytes; a longer line is no preference pair, and a small gzip file can hold a huge one
FIELDS = ("prompt", "chosen", "rejected")
ROLES = ("system", "user", "assistant", "tool")
HUMAN, TURN = "\n\nHuman:", "\n\nAssistant:"  # what questions and answers follow in dialogues written as plain text


def common_length(*sequences: Sequence) -> int:
    shortest = min(map(len, sequences))
    return next((i for i, items in enumerate(zip(*sequences)) if items.count(items[0]) < len(items)), shortest)


def without_nulls(message: dict) -> dict:
    """Tables hold null for an absent field, and some templates would print it as None."""
    return {key: value for key, value in message.items() if value is not None}


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
    return "messages", list(map(without_nulls, value))


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
        for line, text in progress_bar(read_lines(file), f"tokenizing {Path(file).name}", " rows", shown=progress):
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


def hold_out(pairs: list[Pair], size: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on, and `size` held-out ones but at most a third: the same for every seed."""
    order = np.random.default_rng(0).permutation(len(pairs))
    held = min(size, len(pairs) // 3)
    return [pairs[i] for i in np.sort(order[held:])], [pairs[i] for i in np.sort(order[:held])]


def show_pairs(files, n, tokenizer, vocab_size, max_length, max_prompt_length) -> None:
    pairs, report = load_pairs(files, tokenizer, vocab_size, max_length, max_prompt_length)
    print(report)
    print("\n\n".join(show_pair(pair, tokenizer) for pair in pairs[:n]))


def read_pairs(flags: object, tokenizer: Tokenizer | None, config: Config) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and the held-out ones, from the files, with a report of what became of their rows."""
    if not flags.data:
        raise ValueError(f"--resume: {flags.out} has no pairs.npz; give --data again")
    rules = {"tokenizer": tokenizer, "vocab_size": config.vocab_size, "max_length": flags.max_length}
    rules |= {"max_prompt_length": flags.max_prompt_length, "skip_bad_rows": flags.skip_bad_rows}
    rules |= {"max_position_embeddings": config.max_position_embeddings, "progress": rank_and_world()[0] == 0}
    pairs, report = load_pairs(flags.data, **rules)
    print(report)
    if flags.eval_data:
        eval_pairs, report = load_pairs(flags.eval_data, **rules)
        print(f"held out, from --eval-data: {report}")
    else:
        pairs, eval_pairs = hold_out(pairs, flags.eval_size)
        print(f"held out: {len(eval_pairs):,} of them, {len(pairs):,} to train on")
    if not pairs or (flags.eval_data and not eval_pairs):
        raise ValueError("--data or --eval-data: no usable pair is left")
    return pairs, eval_pairs
