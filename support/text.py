"""Text to token ids and back, and dialogues to text: the tokenizer and chat template of a checkpoint folder.

transformers does the work (extra `hf`). Written here is what it does not do: where an answer ends, what marks the start
of a prompt, and one clear error for whatever the library throws."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from support.files import check_link, read_json, what_is
from support.rows import MAX_DETAIL, BadRow

JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
MARK = "Xq7AnswerXq7"  # stands for an answer where only the text that the template writes after it matters


@contextmanager
def one_error(error: type[ValueError], *words: str) -> Iterator[None]:
    """Raise error(*words, details) for whatever fails inside. Rust panics are BaseExceptions, not Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, ImportError):
        raise
    except BaseException as caught:
        details = f"{type(caught).__name__}: {caught}"
        raise error(*words[:-1], f"{words[-1]}: {details:.{MAX_DETAIL}}") from caught


class Tokenizer:
    """The tokenizer of a checkpoint folder: transformers' PreTrainedTokenizerFast and a few facts about it.

    lead: the ids that the tokenizer itself puts before a text. (A config may name a bos_token that is never added.)
    eos: the id that ends an answer in plain text; None if tokenizer.json has no such token."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Raises ImportError without the extra hf, ValueError or OSError naming what cannot be read."""
        self = cls()
        self.folder = Path(folder)
        try:
            import tokenizers
            from transformers import PreTrainedTokenizerFast
        except ImportError as error:
            raise ImportError("text needs the package transformers: pip install -e '.[hf]'") from error
        for file in (self.folder / name for name in ("tokenizer.json", "chat_template.jinja", *JSON_FILES)):
            check_link(file)
            if file.name in JSON_FILES and file.exists():
                read_json(file)  # whose errors name the file, which those of the library do not
            elif file.exists() and (kind := what_is(file)):
                raise ValueError(f"{file} is {kind}")
        with one_error(ValueError, f"cannot read the tokenizer of {folder}"):
            # tokenizer.json is the truth. AutoTokenizer would rebuild some tokenizers from the name of their class.
            own = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self.library = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            self.backend = self.library.backend_tokenizer
            self.backend.no_truncation()  # these three may be stored in tokenizer.json, from its own training;
            self.backend.no_padding()  # they would cut, pad and vary texts without a word
            if getattr(self.backend.model, "dropout", None):
                self.backend.model.dropout = None
            self.eos = own.token_to_id(self.library.eos_token or "")
            if self.library.eos_token is None and (config := self.folder / "config.json").exists():
                named = read_json(config).get("eos_token_id")
                named = named[0] if isinstance(named, list) else named
                self.eos = None if named is None or own.id_to_token(named) is None else named
            # The library adds a token that only a config names after the last id of tokenizer.json: no model has it.
            added = self.backend.get_added_tokens_decoder().values()
            added = [token for token in added if own.token_to_id(token.content) is not None]
            probe = self.backend.encode(added[0].content if added else "a")
            self.lead = probe.ids[: probe.sequence_ids.index(0)]
        self.added = any_of(token.content for token in added)
        self.control = any_of(token.content for token in added if token.special)
        return self

    def encode(self, texts: Sequence[str], chat: bool) -> list[list[int]]:
        """Token ids of each text. Plain text gets `lead` once; in a rendered chat that is up to the template.

        Raises BadRow if the tokenizer fails on one of the texts."""
        with one_error(BadRow, "cannot be encoded", f"the tokenizer of {self.folder} failed"):
            ids = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [i if chat or i[: len(self.lead)] == self.lead else self.lead + i for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def bos_length(self, ids: list[int]) -> int:
        """How many ids at the start of a prompt mark its beginning: `lead`, or the bos_token that a template wrote."""
        if self.lead and ids[: len(self.lead)] == self.lead:
            return len(self.lead)
        bos = self.library.bos_token_id
        return int(bos is not None and ids[:1] == [bos] and (ids.count(bos) == 1 or not self.bos_opens_answers))

    @cached_property
    def bos_opens_answers(self) -> bool:
        """Whether the bos_token begins every turn, as <|im_start|> does where a config calls it bos_token."""
        try:
            question = self.render([{"role": "user", "content": MARK}], add_generation_prompt=True)
        except ValueError:  # no template, or one that refuses
            return True
        return self.library.bos_token in question.rpartition(MARK)[2]

    def template(self, tools: list | None = None) -> str:
        """The source of the chat template. Raises ValueError if there is none."""
        try:
            return self.library.get_chat_template(tools=tools)
        except ValueError:
            raise ValueError(f"{self.folder} has no (default) chat template, which rows of messages need") from None

    @cached_property
    def reserved(self) -> set[str]:
        """Names that are no variables of a template, because apply_chat_template has parameters of that name."""
        return {*inspect.signature(self.library.apply_chat_template).parameters, "messages", "documents"}

    def render(self, messages: list[dict], options: dict | None = None, **how: bool) -> str:
        """The text of a dialogue, by transformers' `apply_chat_template`; options: tools, variables of the template.

        Raises ValueError if there is no template, BadRow with the template's own words if it fails."""
        options = options or {}
        self.template(options.get("tools"))
        with one_error(BadRow, "chat template refuses", f"the template of {self.folder}"):
            return self.library.apply_chat_template(messages, tokenize=False, **how, **options)

    def dialogues(
        self, prompt: list[dict], answers: list[list[dict]], options: dict | None = None
    ) -> tuple[str, list[tuple[str, bool]]]:
        """The text of the prompt; and for each answer the text of prompt and answer up to the end-of-turn token, and
        whether the template wrote such a token.

        A prompt that ends in an assistant's message is a prefill: the first message of an answer continues it.

        The end of turn is the first added token *after* the answer's content, in which users may have typed others. To
        see where the content ends, the same dialogue is rendered with another last message: what follows that message
        is the template's own text."""
        prefill = prompt[-1]["role"] == "assistant"
        head = self.render(prompt, options, **{"continue_final_message" if prefill else "add_generation_prompt": True})
        wholes = []
        for answer in answers:
            messages = [*prompt, *answer]
            if prefill:
                joined = prompt[-1]["content"] + answer[0].get("content", "")
                messages = [*prompt[:-1], {**prompt[-1], **answer[0], "content": joined}, *answer[1:]]
            whole = self.render(messages, options)
            if not whole.startswith(head):
                n = next((i for i, (a, b) in enumerate(zip(head, whole)) if a != b), min(len(head), len(whole)))
                found = f"{head[n : n + 40]!r} at character {n} of the prompt, {whole[n : n + 40]!r} where an answer"
                raise BadRow(
                    "chat template changes the prompt", f"the template of {self.folder} writes {found} follows"
                )
            marked = self.render([*messages[:-1], {"role": "assistant", "content": MARK}], options)
            tail = marked.rpartition(MARK)[2]
            if tail == marked or not whole.endswith(tail):
                details = f"the template of {self.folder} changes the text of a message, so its end cannot be found"
                raise BadRow("no end of the answer", details)
            end = self.added.search(tail)
            wholes.append(
                (whole[: len(whole) - len(tail) + (end.end() if end else len(tail.rstrip()))], end is not None)
            )
        return head, wholes


def any_of(tokens: Iterator[str]) -> re.Pattern:
    """Finds any of the tokens, the longest that fits. White space is no end of a turn, whatever a file says."""
    longest_first = sorted(filter(str.strip, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
