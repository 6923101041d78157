"""Chat templates: where one comes from, and running it in Jinja's sandbox.

A template is a program from the network: the sandbox gives it messages and a handful of functions, nothing else.
Does not know token ids.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lmtool.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.ext import Extension

BUILT_IN = ("chatml", "internlm", "internlm2", "llama2", "llama3", "llava", "llava-chatml", "mistral", "qwen", "vicuna")
# what an architecture is spoken to with when its checkpoint does not say; a Llama may be anything
BY_ARCHITECTURE = {
    "InternLMForCausalLM": "internlm",
    "InternLM2ForCausalLM": "internlm2",
    "QWenLMHeadModel": "qwen",
    "LlavaLlamaForCausalLM": "llava",
    "LlavaMistralForCausalLM": "mistral",
}
_PROBE = "Which form does this template take?"


class ChatTemplate:
    """A Jinja template, compiled when it is first used.

    source     the Jinja text
    origin     where it is from, for messages to the user
    """

    def __init__(self, source: str, origin: str) -> None:
        self.source = source
        self.origin = origin
        self._takes_parts: bool | None = None

    def takes_parts(self, tokens: Mapping[str, str], image_token: str) -> bool:
        """Whether a message's content is to be a list of parts: found out by showing it one with a picture."""
        if self._takes_parts is None:
            parts = self._shown([{"type": "image"}, {"type": "text", "text": _PROBE}], tokens)
            shows_parts = _PROBE in parts and "'type'" not in parts  # and not the list as Python writes it
            self._takes_parts = shows_parts and (image_token in parts or _PROBE not in self._shown(_PROBE, tokens))
        return self._takes_parts

    def _shown(self, content: Any, tokens: Mapping[str, str]) -> str:
        """'' where the template refuses it."""
        try:
            return self.render([{"role": "user", "content": content}], True, tokens, {})
        except TokenizerError:
            return ""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tokens: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> str:
        """The prompt. `tokens` are bos_token and the like, `options` what the template offers (enable_thinking).

        Raises TokenizerError with the template's own complaint.
        """
        from jinja2 import TemplateError

        known: dict[str, Any] = {"tools": None, "documents": None, **tokens, **options}
        known |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render(known)
        except TokenizerError:
            raise
        except (
            TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise TokenizerError(
                f"the chat template of {self.origin} refuses this conversation: {_one_line(error)}",
                "change the messages, or give another one with --chat-template NAME|FILE",
            ) from error

    @cached_property
    def _compiled(self) -> "Template":
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self.source)
        except TemplateError as error:
            raise TokenizerError(
                f"the chat template of {self.origin} is not valid Jinja: {_one_line(error)}",
                "give another one with --chat-template NAME|FILE",
            ) from error


@cache
def _generation_tag() -> "type[Extension]":
    """{% generation %} … {% endgeneration %}: for training, what is between is what the model learns to say."""
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_json(value: Any, indent: int | None = None) -> str:
    # not Jinja's own, which escapes <, > and & for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


# ------------------------------------------------------------------ where a template comes from


def built_in(name: str) -> ChatTemplate:
    source = (files("lmtool.tokenizer") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, f"the built-in {name!r}")


def built_in_name(name: str) -> str | None:
    """'internlm-chat-7b' -> 'internlm': LMDeploy's names of models are names of templates too."""
    stem = re.sub(r"-(chat|instruct|v\d[\d.]*|\d+([._]\d+)?b)\b", "", name.lower()).replace("llama-", "llama")
    return stem if stem in BUILT_IN else None


def chosen(name_or_file: str, own: Mapping[str, str]) -> ChatTemplate:
    """What `--chat-template` names: one of the checkpoint's own, a built-in one, or a .jinja or .json file."""
    if name_or_file in own:
        return ChatTemplate(own[name_or_file], f"the checkpoint, {name_or_file!r}")
    known = built_in_name(name_or_file)
    if known:
        return built_in(known)
    path = Path(name_or_file)
    if not path.is_file():
        names = ", ".join([*sorted(own), *BUILT_IN])
        raise TokenizerError(
            f"--chat-template {name_or_file} is neither a name nor a file", f"give a .jinja or .json file or {names}"
        )
    try:
        source = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            source = json.loads(source)["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(
            f"--chat-template {path} cannot be read: {error!r}", 'give Jinja, or JSON {"chat_template": "…"}'
        ) from error
    if not isinstance(source, str):
        raise TokenizerError(f"--chat-template {path}: chat_template is not a text", "give one Jinja template")
    return ChatTemplate(source, str(path))


def by_default(own: Mapping[str, str], origin: str, fallback: str | None) -> ChatTemplate | None:
    """The checkpoint's own, else the built-in one of this name, else None."""
    if own:
        if "default" not in own and len(own) > 1:
            raise TokenizerError(
                f"{origin} has several chat templates and no default", f"--chat-template {'|'.join(sorted(own))}"
            )
        return ChatTemplate(own.get("default") or next(iter(own.values())), origin)
    return None if fallback is None else built_in(fallback)
