"""How a model family writes a call of a function: the markers around it and the names of its two fields.

Which one a model was trained on is read from its chat template. Knows neither requests nor grammars.
"""

from dataclasses import dataclass

from lmtool.server.errors import Refusal
from lmtool.server.template_options import template_variables
from lmtool.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """A block of calls: ``begin``, ``opening``, JSON objects with ``between``, ``closing``, ``end``.

    begin       marks the block; a tuple because it may be several special tokens, one behind the other
    padding     whitespace that the model writes after ``begin`` and before ``end``
    opening, closing   '[' and ']' where the calls of a block are a JSON list, else ''
    between     what separates two calls of one block; None: a block is one call
    arguments   the field with the arguments, beside "name"
    bare        a call may also stand at the beginning of an answer without ``begin``
    several     an answer may have more calls than one
    short_ids   ids of calls are nine letters or digits, on which Mistral's templates insist
    """

    name: str
    begin: tuple[str, ...]
    end: tuple[str, ...] = ()
    padding: str = ""
    opening: str = ""
    closing: str = ""
    between: str | None = None
    arguments: str = "arguments"
    bare: bool = False
    several: bool = True
    short_ids: bool = False

    @property
    def begin_text(self) -> str:
        return "".join(self.begin)

    @property
    def end_text(self) -> str:
        return "".join(self.end)


HERMES = ToolFormat(name="hermes", begin=("<tool_call>",), end=("</tool_call>",), padding="\n")
# its template refuses a conversation in which an answer has two calls
LLAMA3 = ToolFormat(name="llama3", begin=("<|python_tag|>",), arguments="parameters", bare=True, several=False)
MISTRAL = ToolFormat(
    name="mistral", begin=("[TOOL_CALLS]",), padding=" ", opening="[", closing="]", between=", ", short_ids=True
)
INTERNLM2 = ToolFormat(
    name="internlm2",
    begin=("<|action_start|>", "<|plugin|>"),
    end=("<|action_end|>",),
    padding="\n",
    arguments="parameters",
)


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the chat template does something with a variable ``tools``.

    Raises Refusal for a model without a template.
    """
    if tokenizer.chat_template is None:
        raise Refusal(
            400,
            f"{tokenizer.source} has no chat template, so it cannot be told of tools",
            "start the server with --chat-template NAME|FILE",
            param="tools",
        )
    return "tools" in template_variables(tokenizer.chat_template)


def format_of(tokenizer: Tokenizer) -> ToolFormat:
    """The format that the template speaks of; Hermes's for one that knows no tools: `tools_messages` explains it then.

    Raises Refusal for a model without a template, or whose template knows tools in a way that we do not.
    """
    if not knows_tools(tokenizer):
        return HERMES
    source = tokenizer.chat_template or ""
    if "<|action_start|>" in source:
        return INTERNLM2
    if "[TOOL_CALLS]" in source and "[ARGS]" not in source:
        return MISTRAL
    if "<tool_call>" in source and "<function=" not in source and "<arg_key>" not in source:
        return HERMES
    if "<|python_tag|>" in source or ('"parameters"' in source and "<|start_header_id|>" in source):
        return LLAMA3
    raise Refusal(
        400,
        f"{tokenizer.source} writes calls in a form that lmtool cannot read",
        "known are those of Hermes and Qwen, Llama 3, Mistral to v7 and InternLM2",
        param="tools",
    )
