"""Functions that a chat request offers to the model: checked, explained to it, held to, and read from its answer.

    use = prepare(tools, tool_choice, parallel_tool_calls, tokenizer)
    ids = tokenizer.chat_ids(use.messages(messages), options=use.template_options)
    config = GenerationConfig(…, response_format=use.response_format, skip_special_tokens=use.skip_special_tokens)
    reader = use.reader(); reader.push(text) …; reader.finish()

The format is the one that the chat template speaks of (`tools_format`). A template that knows no tools gets them in its
system message, in a text of our own, and the model is asked to write calls as Hermes does; how well it does is the
model's affair, unless the calls are required: then a grammar leaves it no choice.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmtool.server.errors import Refusal
from lmtool.server.tools_format import ToolFormat, format_of, knows_tools
from lmtool.server.tools_grammar import tool_grammar
from lmtool.server.tools_messages import Message, conversation, with_tools
from lmtool.server.tools_reader import ToolReader
from lmtool.tokenizer import Tokenizer

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What one request's tools mean. ``tools``: those that may be called, as OpenAI writes them.

    required   the answer is calls and nothing else
    template_options      for `Tokenizer.chat_ids`
    response_format       for `GenerationConfig`; None: nothing holds the model to the format
    skip_special_tokens   for `GenerationConfig`: False where the format's markers are special tokens, which `reader`
                          must see
    """

    tools: tuple[Mapping[str, Any], ...]
    required: bool
    parallel: bool
    form: ToolFormat
    tokenizer: Tokenizer
    template_options: Mapping[str, Any]
    response_format: Mapping[str, Any] | None
    skip_special_tokens: bool

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """What the conversation becomes. Raises Refusal for a call in it whose arguments are not a JSON object."""
        found = conversation(messages, self.tokenizer)
        return found if self.template_options else with_tools(found, self.tools, self._wish)

    def reader(self) -> ToolReader:
        """Of one answer."""
        names = {tool["function"]["name"] for tool in self.tools}
        held = self.response_format is not None
        return ToolReader(self.form, names, parallel=self.parallel, streams=held)

    @property
    def _wish(self) -> str:
        if self.required:
            return "Call one of them now and write nothing else."
        return "Where none of them helps, answer without a call."


def prepare(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    parallel_tool_calls: bool | None,
    tokenizer: Tokenizer,
) -> ToolUse | None:
    """None where nothing may be called: no tools, or ``tool_choice: none``; the messages then still go through
    `tools_messages.conversation`.

    Raises Refusal (400), naming the field, for tools or a choice that are malformed, and where this model's template
    does not allow them.
    """
    known = {_checked(i, tool)["name"]: tool for i, tool in enumerate(tools or ())}
    if tools and len(known) < len(tools):
        names = [tool["function"]["name"] for tool in tools]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refusal(400, f"two tools have the name {twice!r}", "give each its own", param="tools")
    if len(known) > MAX_TOOLS:
        raise Refusal(400, f"there are {len(known)} tools", f"give at most {MAX_TOOLS}", param="tools")
    allowed, required = _chosen(tool_choice, list(known))
    if not allowed:
        return None
    form = format_of(tokenizer)
    offered = tuple(known[name] for name in allowed)
    parallel = parallel_tool_calls is not False and not _is_named(tool_choice) and form.several
    return ToolUse(
        tools=offered,
        required=required,
        parallel=parallel,
        form=form,
        tokenizer=tokenizer,
        template_options={"tools": list(offered)} if knows_tools(tokenizer) else {},
        response_format=tool_grammar(offered, form, tokenizer, required=required, parallel=parallel),
        skip_special_tokens=not any(_is_special(text, tokenizer) for text in (*form.begin, *form.end)),
    )


def _checked(index: int, tool: Mapping[str, Any]) -> Mapping[str, Any]:
    def want(ok: bool, field: str, problem: str, fix: str) -> None:
        if not ok:
            raise Refusal(400, f"tools[{index}]{field} {problem}", fix, param=f"tools[{index}]{field}")

    want(tool.get("type") == "function", ".type", f"is {tool.get('type')!r}", "only functions can be called")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise Refusal(400, f"tools[{index}].function is missing", "give its name", param=f"tools[{index}].function")
    name = function.get("name")
    ok = isinstance(name, str) and _NAME.fullmatch(name) is not None
    want(ok, ".function.name", "is no name", "give 1 to 64 letters, digits, '_', '-' or '.'")
    parameters = function.get("parameters")
    ok = parameters is None or (isinstance(parameters, Mapping) and parameters.get("type", "object") == "object")
    want(ok, ".function.parameters", "is no JSON schema of an object", 'give {"type": "object", "properties": {…}}')
    for field, kind in (("description", str), ("strict", bool)):
        ok = function.get(field) is None or isinstance(function[field], kind)
        want(ok, f".function.{field}", "has the wrong type", f"give a {kind.__name__}")
    return function


def _is_named(choice: str | Mapping[str, Any] | None) -> bool:
    return isinstance(choice, Mapping) and choice.get("type") == "function"


def _chosen(choice: str | Mapping[str, Any] | None, names: list[str]) -> tuple[list[str], bool]:
    """The functions that may be called, and whether one must be."""

    def bad(cause: str) -> Refusal:
        fix = 'give "none", "auto", "required" or {"type": "function", "function": {"name": …}} of one of the tools'
        return Refusal(400, f"tool_choice {cause}", fix, param="tool_choice")

    match choice:
        case "none":
            return [], False
        case None | "auto":
            return names, False
        case "required":
            if not names:
                raise bad("is 'required', and there are no tools")
            return names, True
        case {"type": "function", "function": {"name": name}}:
            wanted, required = [name], True
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*some]}}:
            wanted = [_name_of(one) for one in some]
            required = mode == "required"
        case _:
            raise bad("is none that there is")
    for name in wanted:
        if name not in names:
            raise bad(f"names {name!r}, which is not among the tools")
    return wanted, required


def _name_of(tool: Any) -> Any:
    match tool:
        case {"type": "function", "function": {"name": name}}:
            return name
    return None


def _is_special(text: str, tokenizer: Tokenizer) -> bool:
    token_id = tokenizer.token_id(text)
    return token_id is not None and tokenizer.is_special(token_id)
