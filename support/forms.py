"""A row of a preference file -> prompt, chosen and rejected in one form. Knows no tokenizer.

Rows come as text, as messages or as token ids; with a prompt, or as two whole dialogues that repeat it. `example_of`
takes any of them, or raises a BadRow that says what was found and what is accepted."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from support.rows import BadRow

FIELDS = ("prompt", "chosen", "rejected")
CONTEXT = ("system", "tools", "chat_template_kwargs")  # columns that only a chat template can write into a text
UNREAD = {  # other columns that would change what the model sees -> what to do with them
    "sys.*|preamble": "rename it to system",
    "functions?": "rename it to tools",
    "documents?|images?|videos?|audios?": "write it into prompt as text",
}
UNREAD_BESIDE_A_PROMPT = {"instruction|input|context|history": "merge it into prompt"}
ROLES = ("system", "user", "assistant", "tool")
HUMAN, TURN = "\n\nHuman:", "\n\nAssistant:"  # what questions and answers follow in dialogues written as plain text
ACCEPTED = "expected prompt, chosen and rejected, all as text, as messages or as token ids"
RENAME = "rename columns that have other names"
NO_PROMPT = f"expected a prompt, or two whole dialogues (messages, or text with {TURN!r}) that begin alike; {RENAME}"
ALIKE = "expected two answers, or two whole dialogues with the same messages before an answer"
NOT_A_MESSAGE = f"expected an object with a role ({', '.join(ROLES)}) and a text as content"
SHAREGPT = '; rename "from" to "role" (human: user, gpt: assistant), "value" to "content", "conversations" to "prompt"'
BLANK = re.compile(r"[\s\u200b-\u200d\u2060\ufeff]*")  # white space, and what has no width at all
AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|messages)["']\s*:""")  # tables often hold messages so


class Example(NamedTuple):
    """What a row says. A part is a text, a list of messages, or a list of token ids."""

    form: str  # of all three parts: "text", "messages" or "token ids"
    parts: list  # prompt, chosen, rejected
    tools: list | None  # for the chat template: descriptions of functions,
    variables: dict  # and values by name


def form_of(name: str, value: object) -> tuple[str, object]:
    """The form of one column and its value, messages checked and without nulls."""
    if value is None or name == "prompt" and value in ([], {}):
        return "absent", None
    if isinstance(value, str):
        if AS_TEXT.match(value):
            raise BadRow("unknown form", f"{name} is messages written as text, {value!r:.60}; parse them (json.loads)")
        return "text", value
    items = [value] if isinstance(value, dict) else value  # one message stands for a list of one
    if not isinstance(items, list) or not items:
        raise BadRow("unknown form", f"{name} is {value!r:.60}; {ACCEPTED}")
    if not any(isinstance(item, dict) for item in items):
        if all(isinstance(item, str) for item in items):
            raise BadRow("unknown form", f"{name} is a list of strings, {value!r:.60}; {ACCEPTED}")
        return "token ids", items
    for i, message in enumerate(items):
        known = isinstance(message, dict) and message.get("role") in ROLES
        content = message.get("content") if known else None
        if not known or not (isinstance(content, str) or content is None and message.get("tool_calls")):
            hint = SHAREGPT if isinstance(message, dict) and "from" in message else ""
            raise BadRow("not a message", f"{name}[{i}] is {message!r:.80}; {NOT_A_MESSAGE}{hint}")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise BadRow("unusable tool_calls", f"{name}[{i}] has {calls!r:.60}; expected a list of objects")
    # Tables hold null for an absent field, and some templates would print it as None.
    return "messages", [{key: item for key, item in message.items() if item is not None} for message in items]


def split_texts(prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    """A prompt and two answers, or two whole dialogues like HH's, with or without their prompt beside them.

    Dialogues part at the last start of an answer before which they are equal."""
    places = [0]
    dialogues = [text for text in (chosen, rejected) if TURN in text]
    are_whole = sum(text.startswith(HUMAN) for text in dialogues) == 2
    if prompt is not None and not (are_whole and is_empty(prompt)):
        repeats = sum(bool(prompt.strip()) and text.startswith(prompt) for text in dialogues)
        if repeats == 1 or repeats == 0 and are_whole:
            found = f"prompt is {prompt!r:.60}, chosen {chosen!r:.60}, rejected {rejected!r:.60}"
            expected = "two dialogues that begin with the prompt or have none beside them, or two answers"
            raise BadRow("two prompts", f"{found}; expected {expected}")
        if not repeats:
            return prompt, chosen, rejected
        places = [len(prompt)]
    places += [turn.end() for turn in re.finditer(TURN, chosen)]
    n = max((n for n in places if chosen[:n] == rejected[:n]), default=0)
    if n == 0:
        raise BadRow("no prompt", NO_PROMPT)
    return chosen[:n], chosen[n:], rejected[n:]


def split_messages(prompt: str | list | None, chosen: list, rejected: list) -> tuple[list, list, list]:
    """A prompt and two answers, or two whole dialogues: lists of which one does not begin with the assistant.

    Dialogues part at the last answer before which they are equal, and never between two messages of the assistant."""
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        if prompt is None:
            raise BadRow("no prompt", NO_PROMPT)
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, chosen, rejected
    roles = ["user", *(message["role"] for message in chosen)]  # shifted by one: that of the message before
    places = [i for i, (a, b) in enumerate(zip(chosen, rejected)) if a["role"] == b["role"] == "assistant" != roles[i]]
    n = max((n for n in places if chosen[:n] == rejected[:n]), default=0)
    head = chosen[:n]
    if not head:
        found = f"chosen begins with {chosen[0]!r:.80}, rejected with {rejected[0]!r:.80}"
        raise BadRow("different dialogues", f"{found}; {ALIKE}")
    asked = next((message.get("content") for message in head if message["role"] == "user"), None)
    repeated = asked if isinstance(prompt, str) else head[: len(prompt or ())]
    if not is_empty(prompt) and prompt != repeated:
        raise BadRow("two prompts", f"prompt is {prompt!r:.60}, but the dialogues begin with {asked!r:.60}")
    return head, chosen[n:], rejected[n:]


def parts_of(row: dict) -> tuple[str, list]:
    """The form of a row, and prompt, chosen and rejected in it. Raises BadRow."""
    (beside, prompt), (form, chosen), (other, rejected) = (form_of(name, row.get(name)) for name in FIELDS)
    if "absent" in (form, other):
        absent = " and ".join(name for name, a in (("chosen", form), ("rejected", other)) if a == "absent")
        raise BadRow("missing field", f"no {absent}; {ACCEPTED}; {RENAME}")
    if form != other or (form == "token ids") != (beside == "token ids"):
        raise BadRow("mixed forms", f"prompt is {beside}, chosen {form}, rejected {other}; {ACCEPTED}")
    if form == "token ids":
        return form, [prompt, chosen, rejected]
    if form == "text" and beside == "messages":
        form, chosen, rejected = "messages", *([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    split = split_texts if form == "text" else split_messages
    prompt, chosen, rejected = split(prompt, chosen, rejected)
    if form == "messages" and prompt[-1]["role"] == "assistant" and prompt[-1].get("tool_calls"):
        raise BadRow("no prompt", "the prompt ends with a tool call of the assistant, which no answer can continue")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        human_ends = form == "text" and TURN in prompt and answer.rfind(HUMAN) > answer.rfind(TURN)
        written = {"role": "user" if human_ends else "assistant", "content": answer}
        last = answer[-1] if form == "messages" else written
        if last["role"] != "assistant":
            raise BadRow("no answer", f"{name} ends with a message of {last['role']}; expected one of assistant")
        if BLANK.fullmatch(last.get("content", "")) and not last.get("tool_calls"):
            raise BadRow("blank answer", f"{name} is {answer!r:.60}")
    return form, [prompt, chosen, rejected]


def is_empty(value: object) -> bool:
    """Tables write an absent column as null, or as an empty text, list or object."""
    return value in (None, [], {}) or isinstance(value, str) and not value.strip()


def check_unread(row: dict, form: str, prompt: object) -> None:
    """Raises BadRow for a column that would change what the model sees if it were read, and is not in the prompt."""
    is_complete = form == "token ids" or is_empty(row.get("prompt"))  # token ids, or whole dialogues
    remedies = UNREAD if is_complete else UNREAD | UNREAD_BESIDE_A_PROMPT
    for name, value in row.items():
        remedy = next((remedies[names] for names in remedies if re.fullmatch(names, name, re.IGNORECASE)), None)
        if not remedy or name in CONTEXT or not isinstance(value, str | list | dict):
            continue
        said = value.strip() if isinstance(value, str) else value
        if json.dumps(said)[1:-1] not in json.dumps(prompt):  # without quotes or brackets; empty is in any
            details = f"{name} is {value!r:.60}, which the model would not see; {remedy}, or remove it"
            raise BadRow("unread column", details)


def from_json(name: str, value: object, kind: type) -> object:
    """Tools or variables of a template, which tables often hold as text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(f"unusable {name}", f"{name} is {value!r:.60}, no JSON: {error}") from error
    if not isinstance(found, kind) or kind is list and not all(is_tool(tool) for tool in found):
        expected = "a list of objects" if kind is list else "an object"
        raise BadRow(f"unusable {name}", f"{name} is {value!r:.60}; expected {expected}")
    return found


def is_tool(tool: object) -> bool:
    """An object; its `function`, where it has one, is an object too. Tables hold null for an absent one."""
    return isinstance(tool, dict) and isinstance(tool.get("function") or {}, dict)


def example_of(row: object) -> Example:
    """A row in any of the accepted forms. Raises BadRow.

    A `system` text becomes the first message; `tools` and `chat_template_kwargs` go to the chat template. Rows of text
    or token ids, which no template writes, cannot have these three."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("not an object", f"got {row!r:.60}; expected an object with prompt, chosen and rejected")
    form, parts = parts_of(row)
    check_unread(row, form, parts[0])
    given = {name: row[name] for name in CONTEXT if not is_empty(row.get(name))}
    if given and form != "messages":
        remedy = 'write the prompt as messages, [{"role": "user", "content": "…"}], so that the chat template is used'
        raise BadRow("needs messages", f"a row of {form} cannot carry {' and '.join(given)}; {remedy}")
    if "system" in given:
        system, first = {"role": "system", "content": given["system"]}, parts[0][0]
        if not isinstance(given["system"], str):
            raise BadRow("unusable system", f"system is {given['system']!r:.60}; expected a text")
        if first["role"] == "system" and first != system:
            raise BadRow("two system messages", f"system is {given['system']!r:.60}, but the prompt has {first!r:.80}")
        parts[0] = parts[0] if first == system else [system, *parts[0]]
    tools = from_json("tools", given["tools"], list) if "tools" in given else None
    variables = from_json("chat_template_kwargs", given.get("chat_template_kwargs", {}), dict)
    return Example(form, parts, tools, variables)
