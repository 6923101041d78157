"""What the server remembers: the store, and `/v1/chat/interactive` on it."""

import asyncio
import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmtool.engine.response import Response
from lmtool.server import sessions
from lmtool.server.dialogue import Dialogue, next_ids
from lmtool.server.errors import Refusal
from lmtool.server.protocol_interactive import InteractiveRequest
from lmtool.server.sessions import SessionStore
from tests.server.serving import Serving, wait_until
from tests.server.support import smollm2_tokenizer


# ------------------------------------------------------------------ the store
def test_the_least_recent_are_forgotten_by_number_and_by_bytes(tmp_path) -> None:
    async def main() -> None:
        store = SessionStore(tmp_path / "db", max_sessions=3, max_bytes=100)
        for name in "abc":
            await store.put("", name, name.encode())
        assert await store.get("", "a") == b"a"  # and so it is recent
        await store.put("", "d", b"d")
        assert [await store.get("", name) for name in "abcd"] == [b"a", None, b"c", b"d"]
        await store.put("", "large", b"x" * 99)
        assert [await store.get("", name) for name in "acd"] == [None, None, b"d"]
        await store.put("", "larger", b"x" * 101)  # than all that may be there
        assert await store.get("", "larger") is None
        store.close()

    asyncio.run(main())


def test_what_is_one_owners_is_not_found_by_another() -> None:
    async def main() -> None:
        store = SessionStore()
        await store.put("one", "a", b"1")
        assert await store.get("other", "a") is None
        assert not await store.delete("other", "a")
        assert await store.delete("one", "a")
        assert await store.get("one", "a") is None
        store.close()

    asyncio.run(main())


def test_processes_share_one_file(tmp_path) -> None:
    async def main() -> None:
        first, second = (SessionStore(tmp_path / "db") for _ in range(2))
        await first.put("", "a", b"1")
        assert await second.get("", "a") == b"1"
        ended = asyncio.Event()
        async with first.turn("", "a") as turn:
            turn.on_cancel(ended.set)
            with pytest.raises(Refusal, match="under way") as refused:
                async with second.turn("", "a"):
                    pass
            assert refused.value.status == 409
            async with second.turn("", "b"), second.turn("other", "a"):
                pass
            assert await second.cancel("", "a")
            await asyncio.wait_for(ended.wait(), 60)
        assert not await second.cancel("", "a")
        async with second.turn("", "a") as turn:
            assert not turn.cancelled
        first.close()
        second.close()

    asyncio.run(main())


def test_a_turn_whose_process_is_gone_is_over(tmp_path, monkeypatch) -> None:
    async def main() -> None:
        gone, here = (SessionStore(tmp_path / "db") for _ in range(2))
        monkeypatch.setattr(sessions, "_LEASE_S", 0.0)
        gone._begin("", "a", sessions.Turn())
        async with here.turn("", "a"):
            pass
        gone.close()
        here.close()

    asyncio.run(main())


def test_many_at_once_lose_nothing(tmp_path) -> None:
    stores = [SessionStore(tmp_path / "db") for _ in range(4)]

    async def write(store: SessionStore, number: int) -> None:
        await asyncio.gather(*(store.put("", f"{number} {i}", b"x") for i in range(25)))

    threads = [threading.Thread(target=asyncio.run, args=(write(s, i),)) for i, s in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [asyncio.run(stores[0].get("", f"{i} {j}")) for i in range(4) for j in range(25)]
    assert found == [b"x"] * 100
    for store in stores:
        store.close()


# ------------------------------------------------------------------ ids of a conversation
def test_a_conversation_goes_on_with_the_ids_it_had() -> None:
    tokenizer = smollm2_tokenizer()
    first = [{"role": "user", "content": "one"}]
    ids = tokenizer.chat_ids(first)
    letters = [tokenizer.token_id(letter) for letter in "hello"]  # not how the text would be encoded
    eos = next(iter(tokenizer.eos_ids))
    said = {"role": "assistant", "content": "hello"}
    past = Dialogue.of(first, ids, said, Response(text="hello", token_ids=[*letters, eos]), tokenizer)
    assert Dialogue.decode(past.encode()) == past
    second = [{"role": "user", "content": "<|im_end|> two"}]
    found = next_ids(past, second, tokenizer)
    whole = [*first, {"role": "assistant", "content": "hello"}, *second]
    assert found != tokenizer.chat_ids(whole)
    assert found[: len(ids) + 5] == [*ids, *letters]
    assert tokenizer.decode(found, skip_special=False) == tokenizer.render_chat(whole)
    assert found.count(eos) == tokenizer.chat_ids(whole).count(eos)  # the user's stays text


def test_an_answer_that_a_stop_text_cut_is_read_anew() -> None:
    tokenizer = smollm2_tokenizer()
    first, second = ([{"role": "user", "content": text}] for text in ("one", "two"))
    answer = Response(text="hel", token_ids=tokenizer.encode("hello"))
    past = Dialogue.of(first, tokenizer.chat_ids(first), {"role": "assistant", "content": "hel"}, answer, tokenizer)
    whole = [*first, {"role": "assistant", "content": "hel"}, *second]
    assert next_ids(past, second, tokenizer) == tokenizer.chat_ids(whole)


# ------------------------------------------------------------------ the route
URL = "/v1/chat/interactive"
GREEDY = {"temperature": 0.0, "ignore_eos": True, "request_output_len": 6}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving() as server:
        yield server


def say(server: Serving, prompt: Any, session_id: int, status: int = 200, **settings: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "session_id": session_id, "interactive_mode": True, **GREEDY, **settings}
    with server.http() as client:
        answer = client.post(URL, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def parts(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def wait_until_idle(server: Serving) -> None:
    wait_until(lambda: not server.engine.core.has_work and not server.context.sessions.num_turns)


def test_the_tenth_turn_computes_only_its_new_tokens(server) -> None:
    length = 0
    for turn in range(10):
        answer = say(server, f"question {turn}", 1)
        assert answer["tokens"] == 6
        assert answer["finish_reason"] == "length"
        assert answer["history_tokens"] == length
        length += answer["input_tokens"] + answer["tokens"]
        # an answer's last token was never computed on: it was only chosen
        computed = answer["history_tokens"] + answer["input_tokens"] - answer["cached_tokens"]
        if turn:
            assert computed <= answer["input_tokens"] + 1
            assert answer["input_tokens"] < 25
    assert answer["cached_tokens"] >= 150


def test_a_session_answers_as_the_whole_conversation_does(server) -> None:
    say(server, "first question", 2)
    second = say(server, "second question", 2)
    kept = asyncio.run(server.context.sessions.get("", "session 2"))
    dialogue = Dialogue.decode(kept)
    prompt = dialogue.ids[: -second["tokens"]]
    again = server.openai().completions.create(
        model="tiny", prompt=prompt, max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
    )
    assert again.choices[0].text == second["text"] == dialogue.messages[-1]["content"]


def test_without_interactive_mode_the_session_ends_with_its_turn(server) -> None:
    say(server, "one", 3)
    assert say(server, "two", 3, interactive_mode=False)["history_tokens"] > 0
    assert say(server, "three", 3)["history_tokens"] == 0
    say(server, "", 3, interactive_mode=False)
    assert say(server, "four", 3)["history_tokens"] == 0
    assert say(server, "five", -1, interactive_mode=False)["history_tokens"] == 0


def test_messages_may_be_given_as_a_list(server) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    first = say(server, messages, 4)
    assert first["input_tokens"] == len(server.context.tokenizer.chat_ids(messages))


def test_a_stream_says_the_same(server) -> None:
    whole = say(server, "the same question", 5)
    body = {"prompt": "the same question", "session_id": 6, "interactive_mode": True, "stream": True, **GREEDY}
    with server.http() as client, client.stream("POST", URL, json=body) as answer:
        found = list(parts(answer))
    assert "".join(part["text"] for part in found) == whole["text"]
    assert [part["finish_reason"] for part in found if part["finish_reason"]] == ["length"]
    assert found[-1]["tokens"] == whole["tokens"]


def test_a_cancelled_turn_ends_and_what_was_said_is_kept(server) -> None:
    body = {"prompt": "a long one", "session_id": 7, "interactive_mode": True, "stream": True}
    body |= {**GREEDY, "request_output_len": 400}
    with server.http() as client, client.stream("POST", URL, json=body) as answer:
        stream = parts(answer)
        first = next(stream)
        with server.engine.held():
            assert "under way" in say(server, "another", 7, 409)["error"]["message"]
            assert say(server, "", 7, cancel=True)["finish_reason"] is None
            rest = list(stream)
    assert rest[-1]["finish_reason"] == "abort"
    number = rest[-1]["tokens"]
    assert number < 400
    wait_until_idle(server)
    after = say(server, "and now", 7)
    assert after["history_tokens"] == first["input_tokens"] + number
    assert say(server, "", 7, cancel=True)["text"] == ""  # nothing under way: nothing happens


def test_who_goes_away_ends_the_turn_and_finds_what_was_said(server) -> None:
    body = {"prompt": "a long one", "session_id": 8, "interactive_mode": True, "stream": True}
    body |= {**GREEDY, "request_output_len": 400}
    with server.http() as client, client.stream("POST", URL, json=body) as answer:
        next(parts(answer))
        with server.engine.held():
            answer.close()
            wait_until(lambda: not server.context.sessions.num_turns)
    wait_until_idle(server)
    after = say(server, "and now", 8)
    assert 0 < after["history_tokens"] < 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "interactive_mode": True}, "session_id"),
        ({"cancel": True}, "session_id"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "", "session_id": 1, "interactive_mode": True}, "prompt"),
        ({"prompt": "x", "top_p": 2}, "top_p"),
        ({"prompt": "x", "adapter_name": "lora"}, "adapter_name"),
        ({"prompt": "x", "stop": ["y"] * 100}, "stop"),
        ({"prompt": "x" * 4000}, "prompt"),
        ({"prompt": "x", "unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server, body, param) -> None:
    with server.http() as client:
        answer = client.post(URL, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"] == param or param in error["message"]


def test_many_at_once_cut_and_cancelled_leave_nothing_behind() -> None:
    failures: list[str] = []

    def person(server: Serving, number: int) -> None:
        chance = random.Random(number)
        with server.http() as client:
            for _ in range(15):
                session_id = chance.randrange(5)
                body = {
                    "prompt": "hello",
                    "session_id": session_id,
                    "interactive_mode": chance.random() < 0.8,
                    **GREEDY,
                }
                match chance.randrange(4):
                    case 0:
                        answer = client.post(URL, json={**body, "prompt": "", "cancel": True})
                    case 1:
                        settings = {"stream": True, "request_output_len": 60}
                        with client.stream("POST", URL, json={**body, **settings}) as answer:
                            for _ in zip(range(chance.randrange(4)), answer.iter_lines(), strict=False):
                                pass
                    case _:
                        answer = client.post(URL, json=body)
                if answer.status_code not in (200, 400, 409):  # 400: the context is full
                    failures.append(answer.text)

    with Serving() as server:
        blocks = server.engine.core.scheduler.blocks
        num_free = blocks.num_free
        people = [threading.Thread(target=person, args=(server, number)) for number in range(6)]
        for one in people:
            one.start()
        for one in people:
            one.join()
        assert failures == []
        wait_until_idle(server)
        assert server.context.engine.num_open == 0
        wait_until(lambda: blocks.num_free == num_free)
        say(server, "", 1, interactive_mode=False)
        assert say(server, "hello", 1)["history_tokens"] == 0


def test_every_field_is_on_the_page_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "conversations.md").read_text()
    for name, field in InteractiveRequest.model_fields.items():
        default = f" {field.default:g}" if type(field.default) in (int, float) and name != "session_id" else ""
        assert re.search(rf"`{name}`{re.escape(default)}", page), name


def test_another_key_does_not_find_a_session() -> None:
    with Serving(api_keys=("one", "two")) as server:

        def ask(key: str) -> dict[str, Any]:
            body = {"prompt": "mine", "session_id": 1, "interactive_mode": True, **GREEDY}
            with server.http(headers={"authorization": f"Bearer {key}"}) as client:
                return client.post(URL, json=body).json()

        assert ask("one")["history_tokens"] == 0
        assert ask("one")["history_tokens"] > 0
        assert ask("two")["history_tokens"] == 0
