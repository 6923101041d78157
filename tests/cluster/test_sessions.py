"""Sessions of `/v1/chat/interactive`: their turns go where the first one went."""

import json
import time

import httpx
import pytest

pytest.importorskip("aiohttp", reason="pip install '.[cluster]'")

from lmtool.chat.http_backend import InteractiveBackend
from lmtool.cluster.sessions import Sessions
from lmtool.config import GenerationConfig
from lmtool.engine.core import EngineCore
from lmtool.errors import LmtoolError
from tests.cluster.front import KEY, BadReplica, Front, http_answer, record

URL = "/v1/chat/interactive"
OF_FRONT = {"Authorization": f"Bearer {KEY}"}
ASK = {"model": "one", "interactive_mode": True, "request_output_len": 4, "temperature": 0.01, "ignore_eos": True}


def say(
    client: httpx.Client, prompt: str, session_id: int = 1, *, key: str = "secret", **more: object
) -> dict[str, int]:
    body = {**ASK, "prompt": prompt, "session_id": session_id, **more}
    answer = client.post(URL, json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def closed_front(servers):
    with Front("one", "two", api_keys=("secret", "other")) as made:
        made.list(record("a", servers[0].url), record("b", servers[1].url))
        yield made


@pytest.fixture
def client(closed_front):
    with closed_front.http(headers={"Authorization": "Bearer secret"}) as made:
        yield made


def test_turns_go_where_the_conversation_is(client) -> None:
    """Each but the first would go to the replica that was given least, were it no turn of a session."""
    length = 0
    for number in range(4):
        turn = say(client, "Once upon a time " * (20 if number == 0 else 1), 1)
        assert turn["history_tokens"] == length
        length += turn["input_tokens"] + turn["tokens"]
        say(client, "And then?", 2 + number)
    assert say(client, "Mine?", 1, key="other")["history_tokens"] == 0
    assert say(client, "", 1, interactive_mode=False)["tokens"] == 0
    assert say(client, "Once more", 1)["history_tokens"] == 0


def test_a_turn_is_cancelled_where_it_is(client, closed_front, monkeypatch) -> None:
    step = EngineCore.step
    monkeypatch.setattr(EngineCore, "step", lambda core: time.sleep(0.02) or step(core))  # or it may be over before
    body = {**ASK, "prompt": "Once", "session_id": 10, "stream": True, "request_output_len": 400}
    with client.stream("POST", URL, json=body) as response:
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        said = json.loads(next(events))["text"]
        with closed_front.http(headers={"Authorization": "Bearer secret"}) as other:
            assert other.post(URL, json={**body, "prompt": "And?"}).status_code == 409
            assert say(other, "", 10, cancel=True)["tokens"] == 0
        *parts, last, done = events
    assert (json.loads(last)["finish_reason"], done) == ("abort", "[DONE]")
    assert len(parts) < 400
    assert said is not None
    assert say(client, "Go on", 10)["history_tokens"] > 0


def test_a_session_whose_replica_is_gone(servers) -> None:
    """It is told, and not begun anew behind the client's back."""
    with Front("one") as front, front.http() as client:
        both = record("a", servers[0].url), record("b", servers[1].url)
        front.list(both[0])
        say(client, "Once", 20)
        front.list(both[1])
        body = {**ASK, "prompt": "And?", "session_id": 20}
        for _ in range(2):
            refused = client.post(URL, json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (404, "session_id")
            assert refused.json()["error"]["message"] == (
                "the replica that remembers session 20 is gone; "
                "end it by an empty prompt, then send the whole conversation"
            )
        assert say(client, "", 20, cancel=True)["tokens"] == 0
        front.list(*both)
        assert say(client, "And?", 20)["history_tokens"] > 0  # it was only away
        front.list(both[1])
        assert say(client, "", 20, interactive_mode=False)["tokens"] == 0
        assert say(client, "And?", 20)["history_tokens"] == 0


def test_a_chat_in_the_terminal_goes_on_with_another_replica(servers) -> None:
    greedy = GenerationConfig(max_new_tokens=3, temperature=0)
    with Front("one", "two") as front:
        front.list(record("a", servers[0].url, card={"id": "one"}))
        chat = InteractiveBackend(front.url, 30, model="one")
        said = [{"role": "user", "content": "Once upon a time"}]
        said += [{"role": "assistant", "content": "".join(delta.text for delta in chat.stream(said, greedy))}]
        said += [{"role": "user", "content": "And?"}]
        front.list(record("b", servers[1].url, card={"id": "one"}))
        with pytest.raises(LmtoolError, match="the replica that remembers session 30 is gone"):
            list(chat.stream(said, greedy))
        assert list(chat.stream(said, greedy))[-1].num_generated_tokens == 3
        chat.close()


def test_what_was_refused_is_remembered_nowhere(servers) -> None:
    full = http_answer("503 Service Unavailable", "application/json", b"{}")
    with Front("one") as front, front.http() as client, BadReplica(full) as busy:
        front.list(record("0", busy.url), record("a", servers[0].url))
        assert say(client, "Once", 40)["history_tokens"] == 0
        assert busy.num_asked == 1
        assert say(client, "And?", 40)["history_tokens"] > 0
        for session_id, wrong in ((41, {"temperature": -1}), (-1, {}), ("1", {}), (True, {})):
            body = {**ASK, "prompt": "x", "session_id": session_id, **wrong}
            assert client.post(URL, json=body).status_code == 400
        front.list(record("b", servers[1].url))
        assert say(client, "Once", 41)["history_tokens"] == 0
        unknown = client.post(f"{servers[0].url}{URL}", json={**ASK, "model": "two", "prompt": "x"}, headers=OF_FRONT)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_places_that_nobody_asked_for_longest_are_forgotten_first() -> None:
    sessions = Sessions(most=2)
    for number in (1, 2, 1, 3):
        place = sessions.place("", "one", number)
        place.replica = place.replica or f"of {number}"
    assert [sessions.place("", "one", number).replica for number in (1, 3)] == ["of 1", "of 3"]
    assert sessions.place("", "two", 1).replica is None
    assert sessions.place("", "one", 2).replica is None
