"""The tokenizer of a checkpoint folder and its chat template."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

from support.rows import MAX_DETAIL, BadRow

MAX_RENDERED = 1 << 24  # characters; a chat template is a program by a stranger
MAX_STEPS = 2 * 10**6  # lines of it that run for one dialogue: seconds
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MARK = "Xq7AnswerXq7"  # an answer, where only what the template writes behind it is of interest


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
