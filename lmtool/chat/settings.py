"""What `/set` changes: sampling, validated by `GenerationConfig`, and two switches of the display.

Knows neither terminal nor engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from lmtool.config import GenerationConfig
from lmtool.errors import RequestError

SAMPLING: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_new_tokens": int,
    "stop": lambda text: (text,),
}
_UNSET: dict[str, Any] = {"seed": None, "max_new_tokens": None, "stop": ()}  # what `none` means for these
SWITCHES = ("think", "markdown")
_ON_OFF = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}

NAMES = (*SAMPLING, *SWITCHES)


@dataclass(slots=True)
class Settings:
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    think: bool = False  # show a model's <think> text instead of folding it
    markdown: bool = True

    def set(self, name: str, text: str) -> None:
        """Change one value by its name. Raises RequestError; then nothing is changed."""
        name = name.lstrip("-").replace("-", "_").lower()
        if name in SWITCHES:
            if text.lower() not in _ON_OFF:
                raise RequestError(f"{name} is {text!r}", "give on or off")
            setattr(self, name, _ON_OFF[text.lower()])
        elif name in SAMPLING:
            self.generation = replace(self.generation, **{name: _parse(name, text)})
        else:
            near = get_close_matches(name, NAMES, 1)
            raise RequestError(
                f"there is no setting {name!r}",
                f"did you mean {near[0]!r}?" if near else "settings are " + ", ".join(NAMES),
            )

    def lines(self) -> list[str]:
        """``name value``, one a line, as `/set` takes them."""
        values = {name: getattr(self.generation, name) for name in SAMPLING}
        shown = {name: _show(value) for name, value in values.items()}
        shown |= {name: "on" if getattr(self, name) else "off" for name in SWITCHES}
        return [f"{name:<18} {value}" for name, value in shown.items()]


def _parse(name: str, text: str) -> Any:
    if name in _UNSET and text.lower() == "none":
        return _UNSET[name]
    try:
        return SAMPLING[name](text)
    except ValueError:
        wanted = "a whole number" if SAMPLING[name] is int else "a number"
        none = " or none" if name in _UNSET else ""
        raise RequestError(f"{name} is {text!r}", f"give {wanted}{none}") from None


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(repr(text) for text in value) or "none"
    return "none" if value is None else f"{value}"
