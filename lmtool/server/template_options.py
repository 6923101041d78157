"""What a request may tell the model's chat template: variables that the template reads, and none of our own."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lmtool.server.errors import Refusal
from lmtool.tokenizer import Tokenizer

# what rendering itself gives a template: `ChatTemplate`, the tokenizer's tokens, the request's other fields
_OWNED = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


@lru_cache(maxsize=64)
def template_variables(source: str) -> frozenset[str]:
    """Names that a template reads and does not set. None for one that is not valid: rendering says so."""
    from jinja2 import Environment, TemplateError, meta

    try:
        # parsed only, never run; extensions as where it is run
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(source)
    except TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(parsed))


def offered(tokenizer: Tokenizer) -> frozenset[str]:
    """Names that a request may set."""
    variables = template_variables(tokenizer.chat_template or "")
    return variables - _OWNED - tokenizer.tokens.keys() - {name for name in variables if name.endswith("_token")}


def template_options(
    tokenizer: Tokenizer, asked: Mapping[str, Any] | None, reasoning_effort: str | None
) -> dict[str, Any]:
    """Raises Refusal for a name that the template does not read: what is not honoured is not taken."""
    names = offered(tokenizer)
    for name in asked or {}:
        if name not in names:
            raise Refusal(
                400,
                f"chat_template_kwargs.{name[:100]} is not read by this model's template",
                "there are " + ", ".join(sorted(names)) if names else "leave it out: there are none",
                param="chat_template_kwargs",
            )
    return {**_effort(reasoning_effort, names), **(asked or {})}


def _effort(effort: str | None, names: frozenset[str]) -> dict[str, Any]:
    if effort is None:
        return {}
    if "reasoning_effort" in names:
        return {"reasoning_effort": effort}
    if "enable_thinking" in names and effort in ("none", "high"):
        return {"enable_thinking": effort != "none"}
    fix = "give 'none' or 'high': it thinks or does not" if "enable_thinking" in names else "leave it out"
    raise Refusal(
        400,
        f"reasoning_effort is {effort!r}, which this model's template cannot ask for",
        fix,
        param="reasoning_effort",
    )
