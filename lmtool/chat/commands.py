"""The slash commands: a table of name, arguments, help and function.

A function gets the chat and the text behind the command, and says what is to happen next. It raises `InputError` for
what it cannot do. Knows no keys and no rendering.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from lmtool.chat.backend import Backend
from lmtool.chat.escape import neutralise
from lmtool.chat.pictures import Picture
from lmtool.chat.session import Session, Turn
from lmtool.chat.settings import Settings
from lmtool.chat.stats import Totals, TurnStats
from lmtool.errors import InputError

LEAVING_WORDS = ("exit", "quit")


@dataclass(slots=True)
class Chat:
    """All there is to know about a running chat."""

    backend: Backend
    session: Session
    settings: Settings
    say: Callable[[str], None]  # a notice to the user
    last: TurnStats | None = None
    totals: Totals = field(default_factory=Totals)
    pictures: list[Picture] = field(default_factory=list)  # that go with the next message

    def count_tokens(self) -> int | None:
        """Tokens that the conversation takes in the context; None: not known."""
        return self.backend.count_tokens(self.session.messages()) if self.session.turns else 0


@dataclass(frozen=True, slots=True)
class Leave:
    """End the chat."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Send this. ``replaced`` comes back if no answer is made of it."""

    question: str
    pictures: tuple[Picture, ...] = ()
    replaced: Turn | None = None


Next = Leave | Ask | None


@dataclass(frozen=True, slots=True)
class Command:
    arguments: str
    help: str
    run: Callable[[Chat, str], Next]


def parse(text: str) -> tuple[str, str] | None:
    """``(name, argument)`` of a slash command; None for a text to send (a path such as /etc/hosts is one)."""
    match = re.fullmatch(r"/([A-Za-z_?-]*)(?:\s+(.*))?", text.rstrip(), re.DOTALL)
    return (match[1].lower(), (match[2] or "").strip()) if match else None


def run(chat: Chat, name: str, argument: str) -> Next:
    """Raises InputError for an unknown name, with the nearest one."""
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, 1)
        raise InputError(f"there is no /{name}", f"did you mean /{near[0]}?" if near else "see /help")
    if argument and not command.arguments:
        raise InputError(f"/{name} takes nothing behind it", f"type /{name} alone")
    return command.run(chat, argument)


def _help(chat: Chat, _: str) -> Next:
    width = max(len(name) + len(command.arguments) for name, command in COMMANDS.items()) + 3
    for name, command in COMMANDS.items():
        chat.say(f"{f'/{name} {command.arguments}':<{width}} {command.help}")
    chat.say("\nEnter sends; Alt-Enter, Shift-Enter or a \\ at the end of a line makes a new line")
    chat.say("Ctrl-C stops an answer, twice leaves; Ctrl-D, exit and quit leave")
    chat.say("a text that begins with a space is sent as it is, even '/help' and 'exit'")
    return None


def _system(chat: Chat, text: str) -> Next:
    if text:
        chat.session.system = None if text.lower() == "none" else text
    chat.say(f"system prompt: {chat.session.system or 'none given; the template may bring its own'}")
    return None


def _set(chat: Chat, text: str) -> Next:
    if not text:
        _say_settings(chat)
        return None
    name, _, value = text.partition(" ")
    if not value.strip():
        raise InputError(f"/set {name} has no value", "type /set NAME VALUE, such as /set temperature 0.2")
    chat.settings.set(name, value.strip())
    key = name.lstrip("-").replace("-", "_").lower()
    chat.say(next(line for line in chat.settings.lines() if line.split()[0] == key))
    return None


def _say_settings(chat: Chat) -> None:
    for line in chat.settings.lines():
        chat.say(line)


def _show(chat: Chat, what: str) -> Next:
    if what == "prompt":
        chat.say(neutralise(chat.backend.render(chat.session.messages())))
        return None
    if what:
        raise InputError(f"/show does not know {what!r}", "type /show or /show prompt")
    chat.say(chat.backend.description)
    chat.say(f"{_turns(chat)}, {of_context(chat.count_tokens(), chat.backend.session_len)}")
    _system(chat, "")
    _say_settings(chat)
    return None


def _file(text: str, name: str) -> Path:
    if not text:
        raise InputError(f"/{name} has no file", f"type /{name} FILE")
    return Path(text).expanduser()


def _save(chat: Chat, text: str) -> Next:
    path = _file(text, "save")
    chat.session.save(path, model=chat.backend.description)
    chat.say(f"saved {_turns(chat)} to {path}")
    return None


def _load(chat: Chat, text: str) -> Next:
    path = _file(text, "load")
    chat.session = Session.load(path)
    last = f", the last: {_shorten(chat.session.turns[-1].user)}" if chat.session.turns else ""
    chat.say(f"loaded {_turns(chat)} from {path}{last}")
    return None


def _image(chat: Chat, text: str) -> Next:
    waiting = chat.pictures
    if text == "clear":
        chat.say(f"{_pictures(len(waiting))} dropped")
        waiting.clear()
    elif text:
        attach(chat, text)
    elif not waiting:
        chat.say("no picture waits for your next message; /image FILE puts one there")
    for number, picture in enumerate(waiting, 1):
        chat.say(f"{number}. {picture}")
    return None


def attach(chat: Chat, source: str) -> None:
    """Put a picture to the next message. source: a file or a URL, also as terminals write one that is dropped on them:
    in quotes. Raises InputError."""
    if chat.backend.takes_pictures is False:
        raise InputError("this model takes no pictures", "start one that does, such as a LLaVA")
    if len(source) > 1 and source[0] == source[-1] and source[0] in "'\"":
        source = source[1:-1]
    chat.pictures.append(Picture.read(source))


def _pictures(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"


def _regen(chat: Chat, _: str) -> Next:
    turn = chat.session.undo()
    if chat.settings.generation.temperature == 0:
        chat.say("at temperature 0 the answer is the same again; /set temperature 0.7 varies it")
    return Ask(turn.user, turn.pictures, replaced=turn)


def _undo(chat: Chat, _: str) -> Next:
    chat.say(f"took back: {_shorten(chat.session.undo().user)}")
    return None


def _clear(chat: Chat, _: str) -> Next:
    chat.session.clear()
    chat.say("the conversation is empty; the system prompt and settings stay")
    return None


def _stats(chat: Chat, _: str) -> Next:
    if chat.last is None:
        raise InputError("there is no answer yet", "ask something first")
    for line in [*chat.last.lines(), chat.totals.line()]:
        chat.say(line)
    return None


def of_context(count: int | None, limit: int | None) -> str:
    """How much of the context is used, as far as that is known."""
    if limit is None:
        return "tokens not known" if count is None else f"{count:,} tokens"
    return f"{'?' if count is None else f'{count:,}'} of {limit:,} tokens"


def _turns(chat: Chat) -> str:
    number = len(chat.session.turns)
    turns = "1 turn" if number == 1 else f"{number} turns"
    num_pictures = sum(len(turn.pictures) for turn in chat.session.turns)
    return f"{turns} with {_pictures(num_pictures)}" if num_pictures else turns


def _shorten(text: str, width: int = 60) -> str:
    line = " ".join(neutralise(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


COMMANDS = {
    "help": Command("", "show this", _help),
    "system": Command("[TEXT|none]", "show or change the system prompt", _system),
    "set": Command("[NAME VALUE]", "change a setting, as in /set temperature 0.2", _set),
    "show": Command("[prompt]", "model, context, settings; or the text the model gets", _show),
    "save": Command("FILE", "write the conversation to a file", _save),
    "load": Command("FILE", "continue a conversation from a file", _load),
    "image": Command("[FILE|URL|clear]", "put a picture to your next message; or list, or drop them", _image),
    "regen": Command("", "answer the last question again", _regen),
    "undo": Command("", "take the last question and its answer back", _undo),
    "clear": Command("", "forget the conversation", _clear),
    "stats": Command("", "tokens and speed of the last answer, and totals", _stats),
    "exit": Command("", "leave (so do exit, quit and Ctrl-D)", lambda chat, _: Leave()),
}
