"""The conversation on a terminal: read, answer, repeat. Knows neither how keys work nor how tokens are made."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lmtool.chat import commands
from lmtool.chat.backend import Backend, Delta, Message
from lmtool.chat.commands import Ask, Chat, Leave
from lmtool.chat.escape import neutralise
from lmtool.chat.keys import Reader
from lmtool.chat.pictures import Picture
from lmtool.chat.pump import Pump, StopOnInterrupt
from lmtool.chat.render import REFRESH_S, AnswerPrinter, answer_view
from lmtool.chat.screen import without_echo
from lmtool.chat.session import Session, Turn
from lmtool.chat.settings import Settings
from lmtool.chat.stats import TurnStats
from lmtool.errors import InputError, LmtoolError

EXIT_OK, EXIT_INTERRUPTED = 0, 130
_TWICE_S = 2.0  # a Ctrl-C this soon after the one that stopped an answer means: leave
_ANSWER_ROOM = 256  # tokens that a new answer should have when old turns are offered to be dropped

_NOTICES = {
    "length": "stopped at max_new_tokens; /set max_new_tokens NUMBER allows more",
    "context": "the context is full: /undo, /clear, or go on and choose what to drop",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplOptions:
    """``history`` None: none is kept. ``double_enter``: an empty line sends. ``pictures``: for the first message."""

    history: Path | None = None
    double_enter: bool = False
    pictures: tuple[Picture, ...] = ()


def run(backend: Backend, session: Session, settings: Settings, options: ReplOptions) -> int:
    """Chat until the user leaves; returns the exit code: 0, or 130 after Ctrl-C twice."""
    return Repl(backend, session, settings, options).run()


class Repl:
    def __init__(self, backend: Backend, session: Session, settings: Settings, options: ReplOptions) -> None:
        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)
        self._chat = Chat(backend, session, settings, self._say, pictures=list(options.pictures))
        self._reader = Reader(history=options.history, double_enter=options.double_enter, toolbar=self._toolbar)
        self._options = options
        self._used_tokens: int | None = 0
        self._pump: Pump | None = None
        self._draft = ""  # what the next prompt starts with
        self._hinted = False

    def run(self) -> int:
        self._greet()
        try:
            return self._loop()
        except KeyboardInterrupt:  # while the one before was still being answered
            return EXIT_INTERRUPTED
        finally:
            if self._pump is not None:
                self._pump.wait(_TWICE_S)

    def _loop(self) -> int:
        while True:
            try:
                if self._once() is not None:
                    return EXIT_OK
            except EOFError:
                return EXIT_OK
            except KeyboardInterrupt:
                if self._hinted or self._just_stopped():
                    return EXIT_INTERRUPTED
                self._hinted = True
                self._say("Ctrl-C again leaves, so do Ctrl-D and /exit")

    def _just_stopped(self) -> bool:
        return self._pump is not None and time.monotonic() - self._pump.stopped_s < _TWICE_S

    def _greet(self) -> None:
        self._say(self._chat.backend.description)
        enter = "an empty line sends" if self._options.double_enter else "Enter sends"
        self._say(f"{enter}, /help shows the commands, Ctrl-D leaves\n")

    def _once(self) -> Leave | None:
        draft, self._draft = self._draft, ""
        text = self._reader.read(draft)
        self._hinted = False
        try:
            step = self._understand(text)
            if isinstance(step, Ask):
                self._ask(step)
            elif step is not None:
                return step
        except LmtoolError as error:
            self._complain(error)
        return None

    def _understand(self, text: str) -> Leave | Ask | None:
        if text.strip() in commands.LEAVING_WORDS and not text.startswith(" "):
            return Leave()
        command = commands.parse(text)
        if command is None:
            return Ask(text.strip("\n").removeprefix(" "), tuple(self._chat.pictures))
        step = commands.run(self._chat, *command)
        if not isinstance(step, Ask):
            self._used_tokens = self._chat.count_tokens()
        return step

    def _ask(self, ask: Ask) -> None:
        """Answer, and put everything back as it was if there is no answer."""
        answered = False
        try:
            if self._make_room(ask):
                answered = self._answer(ask)
            else:
                self._draft = "" if ask.replaced else ask.question
        finally:
            if not answered and ask.replaced:
                self._chat.session.turns.append(ask.replaced)
            elif answered and not ask.replaced:
                self._chat.pictures.clear()

    def _make_room(self, ask: Ask) -> bool:
        """Whether the conversation fits, after dropping what the user agreed to drop. Never drops silently."""
        session, limit = self._chat.session, self._chat.backend.session_len
        count = self._chat.backend.count_tokens(session.messages(ask.question, ask.pictures))
        if count is None or limit is None or count < limit:
            return True  # what is not known here, a server refuses itself
        alone = self._count(Session(session.system).messages(ask.question, ask.pictures))
        if alone >= limit:
            pictures = " and its pictures" if ask.pictures else ""
            raise InputError(
                f"the message has {alone:,} tokens with the system prompt{pictures}, the context holds {limit:,}",
                "shorten it, or start with a longer --session-len",
            )
        num_turns, left = self._fewest_to_drop(ask, limit)
        turns = "the oldest turn" if num_turns == 1 else f"the {num_turns} oldest turns"
        self._say(
            f"the context is full: the conversation has {count:,} tokens with this message, the context holds {limit:,}"
        )
        if self._reader.confirm(f"drop {turns}, which leaves {left:,} tokens?"):
            session.drop_oldest(num_turns)
            return True
        self._say("nothing was sent or dropped; /undo and /clear make room too")
        return False

    def _fewest_to_drop(self, ask: Ask, limit: int) -> tuple[int, int]:
        """How many of the oldest turns, and the tokens that remain: room for an answer if there can be any."""
        turns, system = self._chat.session.turns, self._chat.session.system
        wanted = limit - min(_ANSWER_ROOM, limit // 4)
        left = 0
        for num_turns in range(1, len(turns) + 1):
            left = self._count(Session(system, turns[num_turns:]).messages(ask.question, ask.pictures))
            if left <= wanted:
                return num_turns, left
        return len(turns), left

    def _count(self, messages: list[Message]) -> int:
        return self._chat.backend.count_tokens(messages) or 0

    def _answer(self, ask: Ask) -> bool:
        """Stream one answer and keep the turn; False when there is nothing to keep."""
        if self._pump is not None:
            self._pump.wait()
        chat = self._chat
        messages = chat.session.messages(ask.question, ask.pictures)
        begun_s = time.monotonic()
        self._pump = pump = Pump(lambda: chat.backend.stream(messages, chat.settings.generation))
        text, last, first_s = "", Delta(text=""), None
        with StopOnInterrupt(pump), without_echo():
            pump.start()
            printer = self._printer(messages)  # these two may ask a server
            count = chat.backend.count_tokens(messages)
            waiting = "waiting …" if count is None else f"reading {count:,} tokens …"
            try:
                for delta in pump.deltas(REFRESH_S):
                    if delta is None:
                        printer.tick(None if text else waiting)
                        continue
                    if first_s is None:
                        first_s = time.monotonic() - begun_s
                    text, last = text + delta.text, delta
                    printer.push(delta.text, delta.num_generated_tokens)
            finally:
                printer.finish()
        stats = TurnStats.of(last, first_s=first_s, duration_s=time.monotonic() - begun_s)
        return self._keep(ask, text, last, stats, partial=pump.stopped)

    def _printer(self, messages: list[Message]) -> AnswerPrinter:
        settings = self._chat.settings
        return AnswerPrinter(
            answer_view(self._out, markdown=settings.markdown),
            self._say,
            inside_thought=self._chat.backend.opens_thought(messages),
            show_thought=settings.think,
        )

    def _keep(self, ask: Ask, text: str, last: Delta, stats: TurnStats, *, partial: bool) -> bool:
        if partial and not text:
            self._draft = ask.question
            self._say("stopped before the first token; nothing is kept")
            return False
        self._chat.session.turns.append(Turn(ask.question, text, partial, ask.pictures))
        self._chat.last = stats
        self._chat.totals.add(stats)
        self._used_tokens = stats.num_prompt_tokens + stats.num_generated_tokens
        if partial:
            self._hinted = True
            self._say("stopped; what there is is kept. Ctrl-C again leaves")
        elif last.finish_reason in _NOTICES:
            self._say(_NOTICES[last.finish_reason])
        return True

    def _toolbar(self) -> str:
        limit = self._chat.backend.session_len
        used = "?" if self._used_tokens is None else f"{self._used_tokens:,}"
        number = len(self._chat.pictures)
        waiting = f" · {number} picture{'s' * (number > 1)} for your next message" if number else ""
        return f"context {used}{'' if limit is None else f'/{limit:,}'} tokens{waiting} · /help"

    def _say(self, text: str) -> None:
        self._tell(text, "dim")

    def _complain(self, error: LmtoolError) -> None:
        self._tell(" ".join(f"error: {error}".split()), "red")

    def _tell(self, text: str, style: str) -> None:
        wrap = self._err.is_terminal  # at words; a file gets the line as it is
        self._err.print(neutralise(text), style=style, markup=False, emoji=False, soft_wrap=not wrap)
