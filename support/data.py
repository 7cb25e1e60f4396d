"""Preference files -> pairs of token ids. Knows no model and no algorithm.

Each section hands its results to the next one:

    a file -> rows -> prompt, chosen, rejected (forms.py) -> whole texts -> token ids -> pairs, cut to length, a report

A prompt and its answer are always encoded as one whole text; the prompt is what the lists of token ids have in common.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from model import Config
from support.device import rank_and_world
from support.files import check_data, kind_of
from support.forms import CONTEXT, FIELDS, Example, example_of
from support.report import printable, progress_bar
from support.rows import BadRow, Pair, ids_hash
from support.text import Tokenizer

MAX_LINE = 1 << 24  # bytes; a longer line is no preference pair, and a small gzip file can hold a huge one
MAX_ARRAY = 1 << 30  # bytes; a JSON array is in memory as a whole
GZIP = b"\x1f\x8b"
# A PDF, or control characters (text has none) in what does not begin as JSON: a damaged row makes no binary file.
BINARY = re.compile(rb"%PDF|(?!\s*[\[{]).*[\0-\x08\x0e-\x1f]", re.DOTALL)
BLANK = object()  # stands for a line without a row

# ----------------------------------------------------------------------------------------------------------------------
# A file -> rows


def parse(text: bytes | bytearray) -> object:
    """A value of JSON. A key that occurs twice is an error, wherever it is. Raises BadRow."""

    def unique(items: list[tuple]) -> dict:
        if len(row := dict(items)) < len(items):
            raise ValueError(f"a key occurs twice among {[key for key, _ in items]}")
        return row

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(found, ensure_ascii=False).encode()  # JSON can escape half a character, which is no text
        return found
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", f"{error}; expected one JSON object per line, in UTF-8, or one JSON array") from error


def rows_of_lines(stream: BinaryIO) -> Iterator[object]:
    """The value of each line; BLANK for a blank one, a BadRow for one that is not JSON."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"more than {MAX_LINE} bytes; expected one pair per line")
        line = line.removeprefix(BOM_UTF8).strip()
        try:
            yield parse(line) if line else BLANK
        except BadRow as error:
            yield error


def rows_of_array(stream: BinaryIO) -> list:
    text = bytearray()
    while piece := stream.read(1 << 20):  # read(n) reserves n bytes at once
        text += piece
        if len(text) > MAX_ARRAY:
            raise ValueError(f"a JSON array of more than {MAX_ARRAY} bytes; write one object per line instead")
    return parse(text.removeprefix(BOM_UTF8))


def read_rows(path: str) -> Iterator[tuple[int, str, object]]:
    """Number, place and value of each row of JSON lines, or of one JSON array; either may be gzipped.

    Raises ValueError for what is wrong with the file, not with a row: another kind of file, damaged, empty; OSError if
    it is not there."""
    number, empty, place = 0, True, "{}:{}"
    check_data(Path(path))
    with open(path, "rb") as raw:
        is_packed = raw.peek(2)[:2] == GZIP
        with gzip.open(raw) if is_packed else raw as stream:
            try:
                is_array, start = True, stream.peek(512)[:512]  # until a line is read, an error is that of the file
                start = start.removeprefix(BOM_UTF8)
                kind = kind_of(start, path) if start else None
                if not kind and BINARY.match(start):
                    kind = "a binary file; expected JSON lines"
                if kind:
                    raise ValueError(f"this is, unpacked, {kind}" if is_packed else f"this is {kind}")
                is_array = start.lstrip().startswith(b"[")
                place = "{}: row {}" if is_array else place
                for number, row in enumerate(rows_of_array(stream) if is_array else rows_of_lines(stream), 1):
                    if row is not BLANK:
                        empty = False
                        yield number, place.format(path, number), row
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{place.format(path, number + 1)}: damaged gzip file: {error}") from error
            except ValueError as error:
                raise ValueError(f"{path if is_array else place.format(path, number + 1)}: {error}") from error
    if empty:
        raise ValueError(f"{path}: the file is empty; expected one JSON object per line, or one JSON array")


# ----------------------------------------------------------------------------------------------------------------------
# Prompt, chosen and rejected -> whole texts -> token ids


@dataclass
class Texts:
    """A row on its way to token ids: the texts to encode, and what became of the row's own texts."""

    example: Example
    texts: list[str] = field(default_factory=list)  # prompt, prompt + chosen, prompt + rejected; none for token ids
    ended: tuple[bool, bool] = (False, False)  # whether the chat template wrote the end token of chosen, of rejected
    said: list[tuple[str, str]] = field(default_factory=list)  # every text in the row, with the name of its field
    left_out: set[str] = field(default_factory=set)  # fields with text that the chat template did not write
    ids: list[list[int]] = field(default_factory=list)  # of each text, once it is encoded


def said_in(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Every text in a value of JSON, with a name, but for labels that are not content."""
    if isinstance(value, str):
        yield name, value
    for item in value if isinstance(value, list) else ():
        yield from said_in(name, item)
    for key, item in value.items() if isinstance(value, dict) else ():
        if key not in ("role", "type", "id", "tool_call_id"):
            yield from said_in(name or f"{key} of {value.get('role')}", item)


def squeeze(text: str) -> str:
    return "".join(text.split())


def left_out(said: list[tuple[str, str]], written: str) -> set[str]:
    """The fields of `said` with a text that is not in `written`, white space aside. A template may write it as JSON.

    What is found is taken out, so that each occurrence counts once; longest texts first."""
    written, missing = squeeze(written), set()
    for name, text in sorted(said, key=lambda item: -len(item[1])):
        found = squeeze(text)
        if found not in written:
            found = squeeze(json.dumps(text, ensure_ascii=False)[1:-1])
        if found not in written:
            missing.add(name)
        if found:
            written = written.replace(found, "\0", 1)
    return missing


def mentions(template: str, name: str) -> bool:
    """Whether `name` stands in the template as a word of its own."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def write(example: Example, tokenizer: Tokenizer | None) -> Texts:
    """The texts to encode. Raises BadRow if the chat template cannot write them, ValueError without a tokenizer."""
    prompt, *answers = example.parts
    if example.form == "token ids":
        return Texts(example)
    if tokenizer is None:
        remedy = "AutoTokenizer.from_pretrained(…).save_pretrained(…) makes one of a tokenizer.model"
        raise ValueError(f"a row of {example.form} needs a tokenizer.json in the checkpoint folder ({remedy})")
    if example.form == "text":
        texts = [prompt, *(prompt + answer for answer in answers)]
        return Texts(example, texts, said=[("text", text) for text in example.parts])
    if reserved := example.variables.keys() & tokenizer.reserved:
        details = f"{', '.join(sorted(reserved))} cannot be set by a row; expected variables of the chat template"
        raise BadRow("unusable chat_template_kwargs", details)
    head, ways = tokenizer.dialogues(prompt, answers, {**example.variables, "tools": example.tools})
    functions = [tool.get("function") or tool for tool in example.tools or []]
    names = [f.get("name") or f.get("description") or f.get("type") for f in functions]
    called = [("tools", str(name)) for name in names if name]
    said = [list(said_in("", part)) for part in example.parts]
    missing = left_out(said[0] + called, head)
    for (whole, _), answer in zip(ways, said[1:]):
        missing |= left_out(answer, whole[len(head) :])
    template = tokenizer.template(example.tools)
    missing |= {f"{name} of chat_template_kwargs" for name in example.variables if not mentions(template, name)}
    for message in sum(example.parts, []):  # numbers and switches, such as a weight of 0 for "do not train on this"
        marks = [key for key, value in message.items() if isinstance(value, int | float)]
        missing |= {f"{key} of {message['role']}" for key in marks if not mentions(template, key)}
    wholes, ended = zip(*ways)
    return Texts(example, [head, *wholes], ended, sum(said, []), missing)


def encode(rows: Sequence[Texts], tokenizer: Tokenizer) -> None:
    """Fill in the ids of all texts, in one call, which uses all cores. Raises BadRow if the tokenizer fails on one."""
    for chat in (False, True):
        some = [row for row in rows if row.texts and (row.example.form == "messages") == chat]
        ids = iter(tokenizer.encode([text for row in some for text in row.texts], chat) if some else ())
        for row in some:
            row.ids = [next(ids) for _ in row.texts]


def end_once(response: list[int], end: int, tokenizer: Tokenizer) -> list[int]:
    """A response with its end token: behind the first one that only white space and more of them follow is nothing."""
    if end not in response:
        return [*response, end]
    n = len(response)
    while n and (response[n - 1] == end or not tokenizer.decode(response[n - 1 : n]).strip()):
        n -= 1
    return response[: response.index(end, n) + 1] if end in response[n:] else [*response, end]


def split_ids(row: Texts, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of prompt, chosen and rejected. Raises BadRow.

    The prompt is the longest common prefix of three lists, its own and those of the two whole texts. So the ids are
    those of the whole texts, both responses start at the same place, and words that both begin with stay in them."""
    head, *wholes = row.ids
    shared = len(os.path.commonprefix([head, *wholes]))
    if not shared:
        why = "its first token runs on into an answer" if head else "the tokenizer adds nothing before it"
        details = f"the prompt is {row.texts[0]!r:.60}, and {why}"
        raise BadRow("the prompt and the answers share no whole token", details)
    responses = []
    for whole, answer, ended in zip(wholes, row.example.parts[1:], row.ended):
        end = whole[-1] if ended else tokenizer.eos
        if end is None:
            raise ValueError(f"no token ends an answer: {tokenizer.folder} names none that its tokenizer.json has")
        response = end_once(whole[shared:], end, tokenizer)
        if response == [end]:
            why = f"; the chat template leaves out {', '.join(sorted(row.left_out))}" if row.left_out else ""
            raise BadRow("blank answer", f"no token is left of {answer!r:.60}{why}")
        responses.append(response)
    return [head[:shared], *responses]


def check_ids(ids: list[list[int]], parts: list, vocab_size: int) -> None:
    """Raises BadRow for ids outside the vocabulary, and for two responses that are the same."""
    for name, part in zip(FIELDS, ids):
        if set(map(type, part)) != {int} or min(part) < 0 or max(part) >= vocab_size:
            wrong = next(i for i in part if type(i) is not int or not 0 <= i < vocab_size)
            raise BadRow("not in the vocabulary", f"{wrong!r} in {name}; expected ids from 0 to {vocab_size - 1}")
    if ids[1] == ids[2]:
        chosen, rejected = (
            answer[-1].get("content") if isinstance(answer[-1], dict) else answer for answer in parts[1:]
        )
        why = "" if parts[1] == parts[2] else "; the chat template or the tokenizer makes them equal"
        raise BadRow("equal answers", f"chosen is {chosen!r:.200}, rejected {rejected!r:.200}{why}")


def truncate(ids: list[list[int]], max_length: int, max_prompt_length: int, bos: int) -> list[list[int]]:
    """Cut a pair once for both responses: the prompt on its left, but for its first `bos` ids, a response on its right.

    With P prompt tokens and C of the longer response, P + C <= max_length leaves all as it is. Otherwise the prompt
    keeps at most max(max_length - C, max_prompt_length) tokens, and each response at most the rest of max_length."""
    prompt, chosen, rejected = ids
    keep = min(len(prompt), max(max_length - max(len(chosen), len(rejected)), max_prompt_length))
    bos = min(bos, keep)
    prompt = prompt[:bos] + prompt[len(prompt) - keep + bos :]
    return [prompt, chosen[: max_length - keep], rejected[: max_length - keep]]


# ----------------------------------------------------------------------------------------------------------------------
# Rows -> pairs, and a report


@dataclass
class Report:
    """What became of the rows, to be printed before training."""

    read: int = 0
    kept: int = 0
    truncated: int = 0  # pairs that lost tokens of the prompt or of a response
    prompt_tokens: int = 0
    response_tokens: int = 0
    special: int = 0  # pairs in which someone typed a special token, which then is one
    changed: int = 0  # pairs whose token ids do not decode to the text that was encoded
    incomplete: int = 0  # pairs with text that the chat template left out
    repeated: int = 0  # pairs of text whose answers both begin with the prompt, which is then there twice
    with_variables: int = 0  # pairs with chat_template_kwargs
    bad: Counter = field(default_factory=Counter)  # reason -> rows skipped because the user asked for it
    dropped: Counter = field(default_factory=Counter)  # reason -> good rows that are of no use at this max_length
    unread: Counter = field(default_factory=Counter)  # column -> rows that have it, though nothing reads it
    variables: Counter = field(default_factory=Counter)  # key of chat_template_kwargs -> pairs
    left_out: Counter = field(default_factory=Counter)  # field that the chat template left out -> pairs

    def add(self, pair: Pair, row: Texts, tokenizer: Tokenizer | None) -> None:
        self.kept += 1
        self.truncated += any(pair.cut)
        self.prompt_tokens += len(pair.prompt)
        self.response_tokens += len(pair.chosen) + len(pair.rejected)
        self.special += any(tokenizer.control.search(text) for _, text in row.said)
        decoded = map(tokenizer.decode, row.ids[1:]) if tokenizer else ()
        self.changed += not all(squeeze(own).endswith(squeeze(text)) for own, text in zip(decoded, row.texts[1:]))
        prompt, *answers = row.example.parts
        is_text = row.example.form == "text" and prompt.strip()
        self.repeated += bool(is_text) and all(answer.startswith(prompt) for answer in answers)
        self.incomplete += bool(row.left_out)
        self.left_out.update(row.left_out)
        self.with_variables += bool(row.example.variables)
        self.variables.update(row.example.variables.keys())

    def notes(self) -> list[str]:
        """What to know about the pairs and the columns of their rows, a line each."""
        lines = []
        for n, what, names in (
            (len(self.unread), "columns are not read", self.unread),
            (self.with_variables, "pairs have chat_template_kwargs", self.variables),
            (self.incomplete, "pairs have text or numbers that the chat template leaves out", self.left_out),
            (self.repeated, "pairs have answers that both repeat the prompt: remove it from the answers", {}),
            (self.changed, "pairs have text that the tokenizer changes (see --show)", {}),
            (self.special, "pairs contain special tokens typed as text, which the model sees as special tokens", {}),
        ):
            listed = ", ".join(f"{name} ({count:,})" for name, count in Counter(names).most_common())
            lines += [f"{n:,} {what}" + f": {listed}" * bool(listed)] * bool(n)
        return lines

    def __str__(self) -> str:
        lines = [
            f"{self.read:,} rows read, {self.kept:,} pairs kept, {self.truncated:,} of them truncated",
            f"{self.prompt_tokens:,} prompt tokens, {self.response_tokens:,} response tokens",
            *(f"{n:,} bad rows skipped: {reason}" for reason, n in self.bad.most_common()),
            *(f"{n:,} rows dropped: {reason}" for reason, n in self.dropped.most_common()),
        ]
        return "\n".join(lines + self.notes())


class Dropped(BadRow):
    """A good row that is of no use at this max_length."""


class Refused(NamedTuple):
    """A row without a pair. Skipping it helps if `error` is a BadRow."""

    place: str
    error: ValueError
    columns: list[str]

    def __str__(self) -> str:
        columns = f" (columns: {', '.join(self.columns):.200})" if self.columns else ""
        return f"{self.place}: {self.error}{columns}"


@dataclass
class Reader:
    """Turns rows into pairs. `max_length` is that of a prompt and one response, in tokens."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_length: int
    max_prompt_length: int | None = None  # half of max_length unless given
    max_position_embeddings: int | None = None
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        if self.max_prompt_length is None:
            self.max_prompt_length = self.max_length // 2
        if not 0 < self.max_prompt_length < self.max_length:
            found = f"max_prompt_length {self.max_prompt_length} and max_length {self.max_length}"
            raise ValueError(f"expected 0 < max_prompt_length < max_length, got {found}")

    def read(self, files: Sequence[str | Path], at_once: int = 64, progress: bool = False) -> Iterator[Pair | Refused]:
        """What becomes of each row, in order; rows are read and encoded `at_once`.

        Raises ValueError where a file cannot be read any further."""
        for file in map(str, files):
            rows = iter(progress_bar(read_rows(file), f"tokenizing {Path(file).name}", " rows", shown=progress))
            while batch := list(islice(rows, at_once)):
                written = [self.texts(row) for _, _, row in batch]
                with suppress(BadRow):  # a row that fails is encoded alone below, and then fails with its own error
                    encode([row for row in written if isinstance(row, Texts)], self.tokenizer)
                for (number, place, row), texts in zip(batch, written):
                    columns = sorted(row) if isinstance(row, dict) else []
                    self.report.read += 1
                    self.report.unread.update(c for c in columns if c not in FIELDS + CONTEXT and row[c] is not None)
                    try:
                        yield self.pair(texts, file, number)
                    except ValueError as error:
                        yield Refused(place, error, columns)

    def texts(self, row: object) -> Texts | ValueError:
        """What to encode of a row, or the error that `pair` raises when the row's turn has come."""
        try:
            return write(example_of(row), self.tokenizer)
        except ValueError as error:
            return error

    def pair(self, row: Texts | ValueError, file: str, number: int) -> Pair:
        """The pair of a row. Raises BadRow, or ValueError for problems that skipping the row cannot fix."""
        if isinstance(row, ValueError):
            raise row
        if row.texts and not row.ids:
            encode([row], self.tokenizer)
        ids = split_ids(row, self.tokenizer) if row.texts else row.example.parts
        check_ids(ids, row.example.parts, self.vocab_size)
        bos = self.tokenizer.bos_length(ids[0]) if self.tokenizer else 0
        short = truncate(ids, self.max_length, self.max_prompt_length, bos)
        longest = len(short[0]) + max(map(len, short[1:]))
        if self.max_position_embeddings and longest > self.max_position_embeddings:
            limit = f"max_position_embeddings of {self.max_position_embeddings}: lower max_length"
            raise ValueError(f"prompt and response are {longest} tokens, more than the model's {limit}")
        if short[1] == short[2]:
            raise Dropped("equal after truncation", f"both responses begin with the same {len(short[1])} tokens")
        cut = tuple(len(before) - len(after) for before, after in zip(ids, short))
        pair = Pair(*(np.array(part, np.int32) for part in short), file, number, cut)
        self.report.add(pair, row, self.tokenizer)
        return pair


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
    """Read, tokenize and truncate preference files.

    Raises ValueError naming file and line for the first bad row, unless `skip_bad_rows`; and always for problems that
    skipping a row cannot fix: a damaged file, no tokenizer or template, a pair longer than the model has positions."""
    reader = Reader(tokenizer, vocab_size, max_length, max_prompt_length, max_position_embeddings)
    pairs, report = [], reader.report
    for found in reader.read(files, progress=progress):
        if isinstance(found, Pair):
            pairs.append(found)
        elif isinstance(found.error, Dropped):
            report.dropped[found.error.reason] += 1
        elif isinstance(found.error, BadRow) and skip_bad_rows:
            report.bad[found.error.reason] += 1
        else:
            hint = "; --skip-bad-rows skips and counts such rows" if isinstance(found.error, BadRow) else ""
            raise ValueError(f"{found}{hint}") from found.error
    return pairs, report


def hold_out(pairs: Sequence[Pair], size: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs to evaluate on: `size` of them, at most a third, the same for every seed."""
    order = np.random.default_rng(0).permutation(len(pairs))
    held = min(size, len(pairs) // 3)
    return [pairs[i] for i in np.sort(order[held:])], [pairs[i] for i in np.sort(order[:held])]


# ----------------------------------------------------------------------------------------------------------------------
# Pairs as the model sees them


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


def check_given_once(flags: object) -> None:
    """ValueError for a file that is given twice."""
    paths = [os.path.realpath(file) for file in (*flags.data, *flags.eval_data)]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"--data, --eval-data: {twice[0]} is given twice, so held-out pairs could be trained on")


def read_pairs(flags: object, tokenizer: Tokenizer | None, config: Config) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and the held-out ones, from the files, with a report of what became of their rows."""
    check_given_once(flags)
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
    trained_on = {ids_hash([pair]) for pair in pairs}
    if n := sum(ids_hash([pair]) in trained_on for pair in eval_pairs):
        print(f"warning: {n} of the held-out pairs are also trained on")
    return pairs, eval_pairs


def show_pairs(
    files: Sequence[str | Path],
    n: int,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_length: int,
    max_prompt_length: int | None = None,
    max_position_embeddings: int | None = None,
) -> Iterator[str]:
    """The first n pairs, a note in place of each bad row before the nth, and the report's notes on them.

    Rows after the nth pair are not read.
    Raises ValueError, as load_pairs does, for problems that skipping a row cannot fix."""
    reader = Reader(tokenizer, vocab_size, max_length, max_prompt_length, max_position_embeddings)
    for found in reader.read(files, at_once=1):
        if isinstance(found, Pair):
            yield show_pair(found, tokenizer)
        elif isinstance(found.error, BadRow):
            yield f"⟦no pair⟧ {found}"
        else:
            raise ValueError(str(found)) from found.error
        if reader.report.kept == n:
            break
    if notes := reader.report.notes():
        yield "\n".join(notes)


def print_pairs(flags: object, tokenizer: Tokenizer | None, config: Config) -> None:
    """Print the first --show pairs of --data, then those of --eval-data, as the model will see them."""
    check_given_once(flags)
    lengths = flags.max_length, flags.max_prompt_length, config.max_position_embeddings
    for files in filter(None, (flags.data, flags.eval_data)):
        for text in show_pairs(files, flags.show, tokenizer, config.vocab_size, *lengths):
            print(f"\n{printable(text)}")
