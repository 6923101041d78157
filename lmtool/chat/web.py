"""The chat as a page in a browser, made with gradio: streamed answers, conversations, a system prompt, sampling, and
pictures where the model takes them.

Nothing of it comes from elsewhere or is told to anybody: gradio's analytics are off, fonts and scripts are its own.
"""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmtool.chat.backend import Backend
from lmtool.chat.pictures import Picture
from lmtool.chat.web_book import Answering, Book, answer_shown, sampling, shown
from lmtool.config import GenerationConfig
from lmtool.errors import InputError, LmtoolError
from lmtool.images.load import MOST_BYTES, file_bytes

_REFRESH_S = 0.05
_TRIALS = 3  # of free ports, before what is wrong is said
_NUM_PARTS = 7  # of the page, that `Page._page` fills
_KEEP_S = (600, 3600)  # how often uploaded files are looked for, and how old they get
_DROPPED = "stopped; nothing is kept"
_POLICY = "img-src 'self' data: blob:; media-src 'self' data: blob:; object-src 'none'"
_CSS = "footer {display: none !important}"


class Page:
    """blocks: gradio's, to be launched. defaults: sampling before a user changes it."""

    def __init__(self, backend: Backend, defaults: GenerationConfig, *, users: int) -> None:
        self._backend = backend
        self._defaults = defaults
        self._answering: dict[str | None, Answering] = {}  # by browser page
        self.takes_pictures = backend.takes_pictures is not False  # a server that does not say may
        self.blocks = self._build()
        # answers wait in the backend, not in gradio: by itself it would make one at a time
        self.blocks.queue(default_concurrency_limit=users, api_open=False)

    # ------------------------------------------------------------------ what is on the page
    def _build(self) -> gr.Blocks:
        defaults = self._defaults
        with gr.Blocks(title="lmtool", analytics_enabled=False, fill_height=True, delete_cache=_KEEP_S) as blocks:
            book = gr.State(Book())
            with gr.Row():
                with gr.Column(scale=1, min_width=220):
                    gr.Markdown(f"**lmtool**\n\n`{self._backend.description.replace('`', '')}`")
                    chosen = gr.Radio(Book().titles(), value=1, label="Conversations", elem_id="conversations")
                    with gr.Row():
                        new = gr.Button("New", elem_id="new")
                        delete = gr.Button("Delete", elem_id="delete")
                    system = gr.Textbox(label="System prompt", lines=3, elem_id="system")
                    temperature = gr.Slider(0, 2, defaults.temperature, label="Temperature", elem_id="temperature")
                    top_p = gr.Slider(0.01, 1, defaults.top_p, label="Top p", elem_id="top_p")
                    most = gr.Number(
                        defaults.max_new_tokens or 0, label="Most new tokens (0: the context)", precision=0
                    )
                with gr.Column(scale=4):
                    chat = gr.Chatbot(
                        show_label=False,
                        height="70vh",
                        elem_id="chat",
                        allow_tags=False,  # a model's HTML is text
                        buttons=["copy", "copy_all"],  # and none that shares with others
                    )
                    status = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="status")
                    with gr.Row():
                        question = _question_box(self.takes_pictures)
                        send = gr.Button("Send", variant="primary", elem_id="send")
                        stop = gr.Button("Stop", elem_id="stop")
            page = [chat, question, status, chosen, new, delete, book]
            fields = [question, book, system, temperature, top_p, most]
            answered = gr.on(
                [send.click, question.submit],
                self._answer,
                fields,
                [*page, send],
                show_progress="hidden",
                api_visibility="private",
            )
            # only now: a click that comes before gradio knows the end of an answer it drops without a word
            answered.then(lambda: gr.update(interactive=True), None, send, queue=False, api_visibility="private")
            # not queued: it is wanted now, whoever else waits
            stop.click(self._stop, queue=False, api_visibility="private")
            for event, turn, more in (
                (chosen.input, self._choose, [chosen]),
                (new.click, self._begin, []),
                (delete.click, self._delete, []),
                (chat.clear, self._clear, []),
            ):
                event(turn, [book, system, *more], [*page, system], show_progress="hidden", api_visibility="private")
            blocks.unload(self._stop)
        return blocks

    # ------------------------------------------------------------------ what happens
    def _answer(
        self,
        question: str | dict[str, Any],
        book: Book,
        system: str,
        temperature: float,
        top_p: float,
        most: float | None,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """What `_page` gives, and the button that sends."""
        session = book.session
        if request.session_hash in self._answering:  # Enter, pressed while an answer comes
            yield [gr.skip()] * (_NUM_PARTS + 1)
            return
        text, files = (question, []) if isinstance(question, str) else (question["text"] or "", question["files"])
        if not text.strip():
            yield [*self._page(book, "type something first"), gr.skip()]
            return
        session.system = system.strip() or None
        drawn_s, draft = 0.0, None
        try:
            config = sampling(self._defaults, temperature, top_p, most)
            pictures = tuple(_uploaded(file) for file in files)
            asked = shown(session, text, pictures)
            first = self._page(book, "…", asked, busy=True, draft=self._draft("", []))
            yield [*first, gr.update(interactive=False)]
            turn = Answering(self._backend, session, text, config, pictures)
            self._answering[request.session_hash] = turn
            for answer in turn:
                if time.monotonic() - drawn_s > _REFRESH_S:
                    drawn_s = time.monotonic()
                    now = asked + answer_shown(answer, inside=turn.inside)
                    yield [*self._page(book, "…", now, busy=True), gr.skip()]
            kept = turn.keep()
            status = turn.summary() if kept else _DROPPED
            draft = None if kept else self._draft(text, files)
        except LmtoolError as error:
            status, draft = " ".join(f"error: {error}".split()), self._draft(text, files)
        finally:
            self._answering.pop(request.session_hash, None)
        yield [*self._page(book, status, draft=draft), gr.skip()]

    def _draft(self, text: str, files: list[str]) -> str | dict[str, Any]:
        """What stands in the question's field."""
        return {"text": text, "files": files} if self.takes_pictures else text

    def _stop(self, request: gr.Request) -> None:
        turn = self._answering.get(request.session_hash)
        if turn is not None:
            turn.abort()

    def _choose(self, book: Book, system: str, number: int) -> list[Any]:
        return self._turn_to(book, system, lambda: book.choose(number))

    def _begin(self, book: Book, system: str) -> list[Any]:
        return self._turn_to(book, system, book.begin)

    def _delete(self, book: Book, system: str) -> list[Any]:
        return self._turn_to(book, system, book.delete)

    def _clear(self, book: Book, system: str, request: gr.Request) -> list[Any]:
        """An answer that is under way goes with the rest."""
        turn = self._answering.get(request.session_hash)
        if turn is None:
            return self._turn_to(book, system, book.session.clear)
        turn.drop()
        return self._turn_to(book, system, book.session.clear, _DROPPED)  # whichever of the two says it last

    def _turn_to(self, book: Book, system: str, go: Any, status: str = "") -> list[Any]:
        """Another conversation; the one that is left keeps what its system prompt was made."""
        book.session.system = system.strip() or None
        try:
            go()
        except LmtoolError as error:
            status = f"error: {error}"
        return [*self._page(book, status), book.session.system or ""]

    def _page(
        self, book: Book, status: str, messages: Any = None, *, busy: bool = False, draft: Any = None
    ) -> list[Any]:
        """What stands in chat, question, status, conversations and their buttons, and the book itself. draft: instead
        of what the user is typing."""
        idle = not busy  # an answer that is under way belongs to the conversation on the page
        return [
            shown(book.session) if messages is None else messages,
            gr.skip() if draft is None else draft,
            status,
            gr.update(choices=book.titles(), value=book.current, interactive=idle),
            gr.update(interactive=idle),
            gr.update(interactive=idle),
            book,
        ]


def _question_box(takes_pictures: bool) -> gr.Textbox | gr.MultimodalTextbox:
    if not takes_pictures:
        return gr.Textbox(show_label=False, placeholder="Say something", scale=8, lines=1, elem_id="question")
    return gr.MultimodalTextbox(
        show_label=False,
        placeholder=f"Say something; drop or paste pictures here, of at most {MOST_BYTES // 10**6} MB each",
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        submit_btn=False,
        scale=8,
        lines=1,
        elem_id="question",
    )


def _uploaded(file: str) -> Picture:
    """Raises InputError for what is no picture, or was never uploaded: gradio looks after that, and so do we."""
    path = Path(file).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise InputError(f"{path.name} was not uploaded", "put it into the field again")
    return Picture.of(path.name, file_bytes(path))


class _OwnPicturesOnly:
    """A model's answer may name pictures elsewhere, and a browser that fetched them would tell what is in their names:
    of the conversation, where something that the model was shown has asked for that."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def launch(page: Page, name: str, port: int) -> str:
    """Serve it on threads of its own, port 0: at a free one; its address."""
    if port:
        return _launch(page, name, port)
    for _ in range(_TRIALS):
        with contextlib.suppress(OSError):  # gradio takes no socket: somebody else may have it before gradio does
            return _launch(page, name, _free_port(name))
    return _launch(page, name, _free_port(name))


def _free_port(name: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET) as trial:
        trial.bind((name, 0))
        return int(trial.getsockname()[1])


def _launch(page: Page, name: str, port: int) -> str:
    _, url, _ = page.blocks.launch(
        server_name=name,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        css=_CSS,
        theme=gr.themes.Base(),
        footer_links=[],
        max_file_size=MOST_BYTES if page.takes_pictures else 1024,  # else there is nothing to upload
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(_OwnPicturesOnly)]},
        enable_monitoring=False,
    )
    return str(url)
