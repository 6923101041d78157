"""The prompt: keys, history, completion and the toolbar, all prompt_toolkit. Knows neither engine nor rendering."""

from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from lmtool.chat import commands
from lmtool.chat.settings import NAMES, SWITCHES

_PROMPT, _CONTINUATION = "> ", "  "
_STYLE = Style.from_dict({"prompt": "bold", "bottom-toolbar": "noreverse fg:ansibrightblack"})
# Shift-Enter in the two encodings of terminals that tell it from Enter, read as Alt-Enter
_SHIFT_ENTER = ("\x1b[13;2u", "\x1b[27;2;13~")


class Reader:
    """Reads what the user types. ``toolbar`` is asked for the bottom line at each drawing."""

    def __init__(self, *, history: Path | None, double_enter: bool, toolbar: Callable[[], str]) -> None:
        for sequence in _SHIFT_ENTER:
            ANSI_SEQUENCES[sequence] = (Keys.Escape, Keys.ControlM)
        # with stdout in a pipe the prompt is drawn on stderr, and the pipe gets the answers only
        self._output = create_output(always_prefer_tty=True)
        self._session: PromptSession[str] = PromptSession(
            _PROMPT,
            multiline=True,
            prompt_continuation=_CONTINUATION,
            key_bindings=_bindings(double_enter=double_enter),
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            completer=_SlashCompleter(),
            complete_while_typing=Condition(lambda: _is_slash(get_app().current_buffer.text)),
            reserve_space_for_menu=6,
            bottom_toolbar=lambda: f" {toolbar()}",
            style=_STYLE,
            output=self._output,
        )

    def read(self, default: str = "") -> str:
        """One message. Raises KeyboardInterrupt (Ctrl-C on an empty line) and EOFError (Ctrl-D)."""
        return self._session.prompt(default=default)

    def confirm(self, question: str) -> bool:
        """Ask; only y or yes is yes."""
        asker: PromptSession[str] = PromptSession(history=InMemoryHistory(), output=self._output)
        try:
            return asker.prompt(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False


def _is_slash(text: str) -> bool:
    return text.startswith("/") and "\n" not in text


def _complete(text: str) -> bool:
    """A command needs no second Enter in double-enter mode."""
    return _is_slash(text) or text.strip() in commands.LEAVING_WORDS


def _bindings(*, double_enter: bool) -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not buffer.text.strip():
            buffer.reset()
        elif buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        elif not double_enter or _complete(buffer.text) or buffer.document.text_before_cursor.endswith("\n"):
            buffer.validate_and_handle()
        else:
            buffer.newline(copy_margin=False)

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("tab")
    def _(event: KeyPressEvent) -> None:
        _complete_now(event.current_buffer)

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


def _complete_now(buffer: Buffer) -> None:
    """Walk through the menu; where it is not there yet, take the only completion or open it."""
    if buffer.complete_state:
        buffer.complete_next()
        return
    found = list(buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
    if len(found) == 1:
        buffer.apply_completion(found[0])
    elif found:
        buffer.start_completion()


class _SlashCompleter(Completer):
    """Names of commands, of settings behind /set, and files behind /save, /load and /image."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not _is_slash(text):
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            for word, command in commands.COMMANDS.items():
                if word.startswith(name.lower()):
                    yield Completion(word, -len(name), display=f"/{word}", display_meta=command.help)
        elif name in ("save", "load", "image"):
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif name == "set":
            yield from _words(argument)


def _words(argument: str) -> Iterable[Completion]:
    setting, space, value = argument.partition(" ")
    known, typed = (("on", "off") if setting in SWITCHES else (), value) if space else (NAMES, setting)
    return (Completion(word, -len(typed)) for word in known if word.startswith(typed))
