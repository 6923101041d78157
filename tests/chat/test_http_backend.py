"""The terminal's other backend: a URL. Real servers (the tiny model's), ill ones, and a real pseudo-terminal."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmtool.chat.http_backend import HttpBackend, InteractiveBackend
from lmtool.chat.http_readers import ChatReader
from lmtool.config import GenerationConfig
from lmtool.errors import ConfigError, EngineError, InputError, LmtoolError, RequestError
from lmtool.tokenizer.thinking import split
from tests.chat.scripted_server import ScriptedServer
from tests.chat.terminal import CTRL_C, CTRL_D, ENTER, REPO, Terminal
from tests.server.serving import TIMEOUT_S, Serving, wait_until

QUESTION = [{"role": "user", "content": "hello"}]
CTRL_U = "\x15"
GREEDY = GenerationConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving() as server:
        yield server


@pytest.fixture
def backend(server) -> Iterator[HttpBackend]:
    backend = HttpBackend(server.url)
    yield backend
    backend.close()


@pytest.fixture
def go_on(server, monkeypatch) -> Iterator[threading.Event]:
    """After some tokens the engine stands still until this is set: what is to be ended does not end by itself."""
    going, step, counter = threading.Event(), server.engine.core.step, itertools.count()

    def held_step() -> list[Any]:
        if next(counter) == 20:
            going.wait(TIMEOUT_S)
        return step()

    monkeypatch.setattr(server.engine.core, "step", held_step)
    yield going
    going.set()


# ------------------------------------------------------------------ a server that is well
def test_an_answer_comes_in_pieces_and_with_counts(server, backend) -> None:
    deltas = list(backend.stream(QUESTION, GREEDY))
    with server.openai() as client:
        same = client.chat.completions.create(messages=QUESTION, model="tiny", temperature=0, max_tokens=8)
    assert "".join(delta.text for delta in deltas) == same.choices[0].message.content
    last = deltas[-1]
    assert (last.finish_reason, last.num_generated_tokens) == ("length", 8)
    assert last.num_prompt_tokens == same.usage.prompt_tokens == backend.count_tokens(QUESTION)
    assert 0 < last.time_to_first_token_s <= last.duration_s
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_what_the_server_tells_of_itself(server, backend) -> None:
    assert (backend.model, backend.session_len) == ("tiny", 512)
    assert backend.description == f"tiny · {server.url} · context 512 tokens"
    tokenizer = server.context.tokenizer
    assert backend.render(QUESTION) == tokenizer.render_chat(QUESTION)
    assert backend.default_generation == {"temperature": 1.0}
    for url in (f"{server.url}/", f"{server.url}/v1", f"{server.url}/v1/"):
        other = HttpBackend(url, model="tiny")
        assert other.root == server.url
        other.close()


def test_a_full_context_is_told_from_a_limit(backend) -> None:
    long = [{"role": "user", "content": "word " * 440}]
    assert [*backend.stream(long, GenerationConfig())][-1].finish_reason in ("context", "stop")
    with pytest.raises(RequestError, match="context holds 512"):
        list(backend.stream([{"role": "user", "content": "word " * 600}], GREEDY))


def test_sampling_and_logprobs_go_along(server, backend) -> None:
    config = GenerationConfig(
        max_new_tokens=6, temperature=1.5, top_k=50, min_p=0.001, repetition_penalty=1.1, seed=7, logprobs=2
    )
    first, second = ([*backend.stream(QUESTION, config)] for _ in range(2))
    assert [delta.text for delta in first if delta.text]
    assert "".join(delta.text for delta in first) == "".join(delta.text for delta in second)
    logprobs = [entry for delta in first for entry in delta.logprobs]
    assert len(logprobs) == 6
    assert all(len(entry["top"]) == 2 for entry in logprobs)


@pytest.mark.parametrize("from_thread", [False, True])
def test_an_answer_is_ended_at_any_moment(server, backend, go_on, from_thread) -> None:
    stream = backend.stream(QUESTION, GenerationConfig(max_new_tokens=450))
    next(stream)

    def end() -> None:
        stream.abort()
        go_on.set()

    if from_thread:
        ender = threading.Thread(target=end)
        ender.start()
        rest = list(stream)
        ender.join()
    else:
        end()
        rest = list(stream)
    assert rest[-1].finish_reason == "abort"
    assert rest[-1].num_generated_tokens < 450
    wait_until(lambda: not server.engine.core.scheduler.has_work)
    assert list(backend.stream(QUESTION, GREEDY))[-1].finish_reason == "length"


def test_an_answer_that_was_ended_before_it_began(backend) -> None:
    stream = backend.stream(QUESTION, GREEDY)
    stream.abort()
    assert [delta.finish_reason for delta in stream] == ["abort"]


# ------------------------------------------------------------------ a session of the server's
def test_only_what_is_new_is_sent(server) -> None:
    backend = InteractiveBackend(server.url, 1)
    messages = list(QUESTION)
    for turn in range(3):
        deltas = list(backend.stream(messages, GREEDY))
        text = "".join(delta.text for delta in deltas)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"and {turn}"}]
    last = deltas[-1]
    assert last.num_cached_tokens >= last.num_prompt_tokens - 25
    kept = [dict(m) for m in messages[:-1]]
    # taken back: the server begins anew with what is left
    again = list(backend.stream([*kept[:2], {"role": "user", "content": "other"}], GREEDY))[-1]
    assert again.num_prompt_tokens < last.num_prompt_tokens
    backend.close()


def test_a_session_that_was_stopped_goes_on(server, go_on) -> None:
    backend = InteractiveBackend(server.url, 2)
    stream = backend.stream(QUESTION, GenerationConfig(max_new_tokens=450))
    text = next(stream).text
    stream.abort()
    go_on.set()
    text += "".join(delta.text for delta in stream)
    said = [*QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
    assert list(backend.stream(said, GREEDY))[-1].finish_reason == "length"
    with pytest.raises(RequestError, match="presence_penalty"):
        backend.stream(said, GenerationConfig(presence_penalty=1.0))
    backend.close()


# ------------------------------------------------------------------ errors are one line, with cause and fix
def said_by(*events: Any, end: bytes = b"data: [DONE]\n\n") -> tuple[int, bytes]:
    return 200, b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + end


def text_event(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, **more}]}


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"^nothing listens at {url}; start the server"):
            HttpBackend(url)


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://x", "http://[::1", ""])
def test_what_is_no_address(url) -> None:
    with pytest.raises(ConfigError, match="give one as in"):
        HttpBackend(url)


def test_a_server_that_wants_a_key() -> None:
    with Serving(api_keys=("secret",)) as server:
        with pytest.raises(InputError, match="give --api-key"):
            HttpBackend(server.url, api_key="wrong")
        backend = HttpBackend(server.url, api_key="secret")
        assert list(backend.stream(QUESTION, GREEDY))[-1].finish_reason == "length"
        backend.close()
        refused = lmtool(server.url, "--prompt", "hello")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "give --api-key" in refused.stderr
        told = lmtool(server.url, "--prompt", "hello", "--max-new-tokens", "2", LMTOOL_API_KEY="secret")
        assert told.returncode == 0, told.stderr


def test_flags_may_come_from_a_file(server, tmp_path) -> None:
    file = tmp_path / "flags.toml"
    file.write_text('max_new_tokens = 3\ntemperature = 0\nmodel-name = "tiny"\n')
    found = lmtool(server.url, "--prompt", "hello", "--json", "--config", str(file))
    assert json.loads(found.stdout)["num_generated_tokens"] == 3


def test_another_model_and_another_kind_of_server(server) -> None:
    with pytest.raises(InputError, match="has no model 'gpt'; there is tiny"):
        HttpBackend(server.url, model="gpt")
    with (
        ScriptedServer(_v1_models=(404, b"<html>")) as other,
        pytest.raises(InputError, match="does not know /v1/models"),
    ):
        HttpBackend(other.url)
    with ScriptedServer(_v1_models=(200, b"<html>")) as other, pytest.raises(InputError, match="no JSON"):
        HttpBackend(other.url)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (said_by(text_event("one "), end=b""), EngineError, "broke the answer off"),
        ((200, b""), EngineError, "broke the answer off"),
        (said_by(text_event("one "), {"error": {"message": "out of memory"}}), EngineError, "out of memory"),
        ((200, b"data: {nonsense\n\n"), EngineError, "no JSON"),
        ((500, b""), EngineError, "failed"),
        ((429, b'{"error": {"message": "too many"}}'), EngineError, "too many"),
        ((400, b'{"error": {"message": "temperature is bad"}}'), RequestError, "temperature is bad"),
        ((404, b'{"error": {"message": "no such model"}}'), InputError, "no such model"),
    ],
)
def test_an_ill_server(answer, kind, words) -> None:
    with ScriptedServer(_v1_chat_completions=answer) as server:
        backend = HttpBackend(server.url)
        assert backend.session_len is None
        assert backend.count_tokens(QUESTION) is None
        with pytest.raises(InputError, match="/tokenize"):
            backend.render(QUESTION)
        with pytest.raises(LmtoolError, match=words) as raised:
            list(backend.stream(QUESTION, GREEDY))
        assert type(raised.value) is kind
        assert "\n" not in str(raised.value)
        backend.close()


def test_a_server_that_tells_less(server) -> None:
    """No usage, no [DONE], a line separator in the text: whole all the same."""
    answer = said_by(text_event("one\u2028"), text_event("two", finish_reason="stop"), end=b"")
    answer = 200, answer[1].replace(b"\\u2028", "\u2028".encode())
    with ScriptedServer(_v1_chat_completions=answer) as other:
        backend = HttpBackend(other.url)
        deltas = list(backend.stream(QUESTION, GREEDY))
        assert "".join(delta.text for delta in deltas) == "one\u2028two"
        assert (deltas[-1].finish_reason, deltas[-1].num_generated_tokens) == ("stop", 2)
        backend.close()


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_thought_that_the_server_split_off_is_a_thought_here(field) -> None:
    reader = ChatReader(None)
    events = [{"choices": [{"delta": delta}]} for delta in ({field: "so"}, {field: " it is"}, {"content": "Yes"})]
    text = "".join(delta.text for event in events if (delta := reader.take(event)))
    assert split(text) == ("so it is\n", "Yes")
    cut = ChatReader(None)
    only = cut.take(events[0])
    assert split(only.text + cut.finish(aborted=True).text) == ("so", "")


# ------------------------------------------------------------------ the command
def lmtool(*words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmtool", "serve", "api_client", *words]
    known = {**os.environ, **environment}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=REPO, env=known, timeout=180)


def test_piped_in_and_out(server) -> None:
    whole = lmtool(server.url, "--temperature", "0", "--max-new-tokens", "8", "--json", stdin="hello")
    assert whole.returncode == 0, whole.stderr
    said = json.loads(whole.stdout)
    assert (said["model"], said["finish_reason"], said["num_generated_tokens"]) == ("tiny", "length", 8)
    plain = lmtool(server.url, "--prompt", "hello", "--temperature", "0", "--max-new-tokens", "8")
    assert plain.stdout.removesuffix("\n") == said["text"].removesuffix("\n")
    shown = lmtool(server.url, "--prompt", "hello", "--show-prompt")
    assert "<|im_start|>user\nhello<|im_end|>" in shown.stdout


def test_a_server_that_is_not_there_is_one_line() -> None:
    found = lmtool("http://127.0.0.1:1", stdin="hello")
    assert (found.returncode, found.stdout) == (2, "")
    assert (
        found.stderr == "lmtool: error: nothing listens at http://127.0.0.1:1; start the server, or give its address\n"
    )


def talk_to(server: Serving, folder: Path, *more: str) -> Terminal:
    flags = ("--temperature", "0", "--max-new-tokens", "8", "--history-file", str(folder / "history"), *more)
    terminal = Terminal("-m", "lmtool", "serve", "api_client", server.url, *flags)
    terminal.prompt()
    return terminal


@pytest.fixture
def terminal(server, tmp_path) -> Iterator[Terminal]:
    terminal = talk_to(server, tmp_path)
    yield terminal
    terminal.close()


def test_a_chat_on_the_terminal(terminal) -> None:
    assert "tiny · http" in terminal.text
    terminal.ask("hello", "stopped at max_new_tokens")
    terminal.ask("/stats", r"generated\s+8 tokens")
    terminal.ask("/show", r"1 turn, \d+ of 512 tokens")
    terminal.ask("word " * 600, "error: .*refuses this|the context holds 512")
    terminal.send(CTRL_D)
    assert terminal.end() == 0


def test_a_session_is_gone_on_with_by_the_next_client(server, tmp_path) -> None:
    counts = []
    for words in ("hello", "and now"):
        terminal = talk_to(server, tmp_path, "--session-id", "99")
        assert "session 99" in terminal.text
        terminal.ask(words, "stopped at max_new_tokens")
        terminal.ask("/stats", r"prompt\s+\d+ tokens, \d+ of them cached")
        counts.append(tuple(map(int, re.search(r"prompt\s+(\d+) tokens, (\d+) of", terminal.text).groups())))
        terminal.send(CTRL_D)
        assert terminal.end() == 0
    (first, _), (second, cached) = counts
    assert second > first + 8
    assert cached == first + 8 - 1  # the last token was only chosen


def test_ctrl_c_stops_an_answer_of_a_server(server, terminal, go_on) -> None:
    terminal.ask("/set max_new_tokens 400", r"max_new_tokens\s+400")
    terminal.send("hello", ENTER)
    wait_until(lambda: bool(server.engine.core.scheduler.running))
    terminal.send(CTRL_C)
    terminal.wait(r"stopped(; what there is| before the first)[\s\S]*^>")
    go_on.set()
    wait_until(lambda: not server.engine.core.scheduler.has_work)
    assert "Traceback" not in terminal.text
    terminal.send(CTRL_U, CTRL_D)  # what was asked in vain is to be sent again
    assert terminal.end() == 0
