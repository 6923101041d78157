"""The one address, with real servers of a tiny model and with replicas that misbehave; without Ray."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("aiohttp", reason="pip install '.[cluster]'")

from tests.cluster.front import KEY, BadReplica, Front, http_answer, record
from tests.server.serving import wait_until

ASK = {"model": "one", "prompt": "Once", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
EVENTS = b'data: {"choices": [{"text": "so"}]}\n\n'
CLOSED = b""
BUSY = http_answer("429 x", "application/json", b'{"error": {"message": "full"}}', more="Retry-After: 7\r\n")
AWAY = http_answer("503 x", "application/json", b'{"error": {"message": "the engine is loading"}}')


def error_of(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


def metric(front: Front, name: str) -> float:
    with front.http() as client:
        lines = client.get("/metrics").text.splitlines()
    starts = (f'lmtool:proxy_{name}{{model_name="one"}}', f'lmtool:proxy_{name}_total{{model_name="one"}}')
    return next(float(line.split()[-1]) for line in lines if line.startswith(starts))


# ---------------------------------------------------------------------- as one server
def test_an_answer_is_what_the_replica_says(front, servers):
    with front.http() as client, servers[0].http(headers={"Authorization": f"Bearer {KEY}"}) as alone:
        through, direct = client.post("/v1/completions", json=ASK), alone.post("/v1/completions", json=ASK)
        assert through.status_code == direct.status_code == 200
        assert through.json()["choices"] == direct.json()["choices"]
        assert through.json()["usage"]["completion_tokens"] == 8
        counted = client.post("/tokenize", json={"model": "one", "prompt": "Once upon"})
        assert counted.json()["count"] == alone.post("/tokenize", json={"prompt": "Once upon"}).json()["count"]
        encoded = client.post("/v1/encode", json={"model": "one", "input": "Once upon"}).json()
        assert encoded["length"] == counted.json()["count"]
    with front.openai() as client:
        chat = client.chat.completions.create(model="one", messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
        assert chat.usage is not None
        assert chat.usage.completion_tokens <= 4


def test_a_stream_comes_as_it_is_made(front, servers):
    def streamed(client: httpx.Client) -> list[str]:
        with client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            return [line for line in response.iter_lines() if line]

    with front.http() as client, servers[0].http(headers={"Authorization": f"Bearer {KEY}"}) as alone:
        through, direct = streamed(client), streamed(alone)
    assert through[-1] == direct[-1] == "data: [DONE]"
    texts = [[json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]] for lines in (through, direct)]
    assert "".join(texts[0]) == "".join(texts[1])


def test_an_event_does_not_wait_for_the_next(front):
    event = b'data: {"choices": [{"text": "one"}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with BadReplica(head + b"%x\r\n%b\r\n" % (len(event), event), hold=True) as replica, front.http() as client:
        front.list(record("a", replica.url))
        with client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as response:
            assert next(response.iter_lines()) == event.decode().strip()


def test_models_are_listed_and_others_refused(front):
    front.list(record("a", "http://127.0.0.1:1", card={"id": "one", "object": "model", "max_model_len": 512}))
    with front.http() as client:
        models = client.get("/v1/models").json()["data"]
        assert [(one["id"], one["max_model_len"]) for one in models] == [("one", 512), ("two", None)]
        assert client.get("/v1/models/two").json()["id"] == "two"
        unknown = client.post("/v1/completions", json={**ASK, "model": "three"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert error_of(unknown) == "there is no model 'three'; here is one, two"
        assert client.get("/v1/models/three").status_code == 404
        missing = client.post("/v1/completions", json={"prompt": "x"})
        assert (missing.status_code, error_of(missing)) == (400, "model is missing; give one of one, two")
        asleep = client.post("/v1/completions", json={**ASK, "model": "two"})
        assert (asleep.status_code, error_of(asleep)) == (503, "no replica of two is ready; ask again in a moment")
        assert asleep.headers["retry-after"] == "2"


def test_bad_requests_are_the_replicas_to_refuse_and_bad_json_ours(front):
    with front.http() as client:
        wrong = client.post("/v1/completions", json={**ASK, "temperature": -1})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "temperature")
        odd = client.post("/v1/completions", json={**ASK, "max_tokens": "many", "n": {}})
        assert odd.status_code == 400
        broken = client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
        assert broken.json()["error"]["code"] == "invalid_json"
        assert client.post("/v1/completions", content=b"x").status_code == 400
        assert client.post("/v1/nothing", json={}).status_code == 404


def test_one_model_needs_no_name(servers):
    with Front("one", max_body_bytes=2048) as front, front.http() as client:
        front.list(record("a", servers[0].url))
        assert client.post("/v1/completions", json={**ASK, "model": None}).status_code == 200
        too_large = client.post("/v1/completions", json={**ASK, "prompt": "x" * 4096})
        assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "request_too_large")


def test_keys_are_the_fronts_and_ids_come_back(servers):
    with Front("one", api_keys=("secret",)) as front:
        front.list(record("a", servers[0].url))
        with front.http() as client:
            assert client.post("/v1/completions", json=ASK).status_code == 401
            assert (
                client.post("/v1/completions", json=ASK, headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
            )
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            headers = {"Authorization": "Bearer secret", "X-Request-Id": "mine"}
            answer = client.post("/v1/completions", json=ASK, headers=headers)
            assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
        with front.openai("secret") as client:
            assert [one.id for one in client.models.list()] == ["one"]
        with front.openai("other") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_ready_is_when_every_model_is(servers):
    with Front("one", "two") as front, front.http() as client:
        assert client.get("/ready").json()["message"] == "no replica is ready of one, two"
        front.list(record("a", servers[0].url), record("c", servers[1].url, "two", is_ready=False))
        assert (client.get("/ready").status_code, client.get("/health").status_code) == (503, 200)
        assert client.get("/ready").json()["message"] == "no replica is ready of two"
        front.list(record("a", servers[0].url), record("c", servers[1].url, "two"))
        assert client.get("/ready").json() == {"status": "ready"}
        front.context.draining = True
        assert client.get("/ready").json() == {"status": "draining"}
        assert error_of(client.post("/v1/completions", json=ASK)) == "the server is shutting down; ask another one"


# ---------------------------------------------------------------------- replicas that fail
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        CLOSED,
        AWAY,
        BUSY,
        http_answer("200 x", "application/json", b'{"choices"', length=999),
        http_answer("200 x", "text/event-stream", b"data: half an ev", length=999),
        http_answer("200 x", "text/event-stream", b""),
    ],
    ids=["closed", "503", "429", "half an answer", "half an event", "no event"],
)
def test_another_is_asked_as_long_as_nothing_went_out(front, servers, said, stream):
    with BadReplica(said) as bad, front.http() as client:
        front.list(record("a", bad.url), record("b", servers[1].url))  # both know nothing: by name, a is asked first
        answer = client.post("/v1/completions", json={**ASK, "stream": stream})
        assert answer.status_code == 200
        assert bad.num_asked == 1
        assert (answer.text.endswith("data: [DONE]\n\n")) == stream
        assert (metric(front, "requests"), metric(front, "retries")) == (1, 1)
        again = client.post("/v1/completions", json={**ASK, "prompt": "something else"})
        assert again.status_code == 200
        assert bad.num_asked == (2 if said == BUSY else 1)  # who failed is left alone; who is full is not
        front.list(record("a", bad.url, beat=2), record("b", servers[1].url))
        assert client.post("/v1/completions", json={**ASK, "prompt": "a third"}).status_code == 200
        assert bad.num_asked == (3 if said == BUSY else 2)  # it has said since that it is well


def test_a_replica_that_is_not_there_is_passed_over(front, servers):
    front.list(record("a", "http://127.0.0.1:1"), record("b", servers[1].url))
    with front.http() as client:
        assert client.post("/v1/completions", json=ASK).status_code == 200


def test_where_all_refuse_the_last_refusal_is_passed_on(front):
    with BadReplica(BUSY) as one, BadReplica(BUSY) as other, front.http() as client:
        front.list(record("a", one.url), record("b", other.url))
        answer = client.post("/v1/completions", json=ASK)
        assert (answer.status_code, error_of(answer), answer.headers["retry-after"]) == (429, "full", "7")
        assert one.num_asked == other.num_asked == 1


def test_a_stream_that_breaks_off_ends_in_an_error_event(front, servers):
    said = http_answer("200 x", "text/event-stream", EVENTS + b'data: {"choi', length=999)
    with BadReplica(said) as bad, front.http() as client:
        front.list(record("a", bad.url), record("b", servers[1].url))
        answer = client.post("/v1/completions", json={**ASK, "stream": True})
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert events[0] == {"choices": [{"text": "so"}]}
    [error] = events[1:]  # and no half event between them
    assert error["error"]["type"] == "service_unavailable_error"
    assert error["error"]["message"].startswith("the replica that was answering is gone")
    assert (metric(front, "broken_answers"), metric(front, "queued_tokens")) == (1, 0)


@pytest.mark.parametrize("begun", [False, True])
def test_who_waits_for_a_replica_that_is_gone_is_told(front, servers, begun):
    """A machine that cannot be reached any more says nothing, not even that the connection is closed."""
    said = http_answer("200 x", "text/event-stream", EVENTS if begun else b"", length=999)
    with BadReplica(said, hold=True) as silent, front.http() as client, ThreadPoolExecutor() as pool:
        front.list(record("a", silent.url), record("b", servers[1].url))
        waiting = pool.submit(client.post, "/v1/completions", json={**ASK, "stream": True})
        assert silent.asked.wait(60)
        if begun:
            wait_until(lambda: metric(front, "queued_tokens") <= 8)
        front.list(record("b", servers[1].url))
        text = waiting.result(60).text
    assert ("is gone" in text) == begun
    assert text.endswith("data: [DONE]\n\n") != begun


def test_a_client_that_goes_away_ends_its_request(front, servers):
    front.list(record("a", servers[0].url))
    with front.http() as client:
        with client.stream("POST", "/v1/completions", json={**ASK, "stream": True, "max_tokens": 400}) as response:
            next(response.iter_lines())
        wait_until(lambda: not servers[0].context.engine.num_open)
        wait_until(lambda: metric(front, "queued_tokens") == 0)
    assert front.context.bodies.num_bytes == 0


# ---------------------------------------------------------------------- figures
def test_the_figures_of_all_replicas_say_whose_they_are(front, servers, monkeypatch):
    monkeypatch.setattr("lmtool.cluster.context._FIGURES_S", 60.0)  # who is slow here is left out otherwise
    with BadReplica(http_answer("200 x", "text/plain", b"no { figures")) as bad, front.http() as client:
        front.list(record("a", servers[0].url), record("b", servers[1].url), record("c", bad.url))
        before = client.get("/metrics").text
        assert bad.asked.is_set()
        front.list(record("a", servers[0].url), record("b", "http://127.0.0.1:1"))
        assert client.post("/v1/completions", json=ASK).status_code == 200
        after = client.get("/metrics").text
    for text in (before, after):
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert {"lmtool:proxy_requests", "lmtool:generation_tokens", "lmtool:time_to_first_token_seconds"} <= set(
            families
        )
        assert text.count("# TYPE lmtool:generation_tokens_total counter") == 1

    def tokens(text: str) -> dict[str, float]:
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return {one.labels["replica"]: one.value for one in families["lmtool:generation_tokens"].samples}

    assert set(tokens(before)) == {"a", "b"}
    assert set(tokens(after)) == {"a"}


# ---------------------------------------------------------------------- who gets what
def test_conversations_come_back_to_where_they_were_and_both_replicas_work(front, servers):
    def cached(text: str) -> int:
        with front.http() as client:
            usage = client.post("/v1/completions", json={**ASK, "prompt": text}).json()["usage"]
            found: int = usage["prompt_tokens_details"]["cached_tokens"]
            return found

    beginnings = [f"Story {i}. " + "word " * 80 + str(i) * 40 for i in range(4)]
    for text in beginnings:
        cached(text)
    assert all(cached(text + f" and then {i}") > 0 for i, text in enumerate(beginnings * 2))
    fleet = front.context.fleet
    assert all(fleet.router("one").remembered_tokens(name) > 0 for name in "ab")


def test_an_engine_that_was_started_again_attracts_nobody_by_what_it_had(front, servers):
    router = front.context.fleet.router("one")
    with front.http() as client:
        client.post("/v1/completions", json={**ASK, "prompt": "x " * 300})
    [name] = [name for name in "ab" if router.remembered_tokens(name)]
    front.list(*(record(one, servers[0].url, num_starts=1 + (one == name)) for one in "ab"))
    assert router.remembered_tokens(name) == 0


def test_many_at_once_are_spread(front, servers):
    def ask(number: int) -> int:
        with front.http() as client:
            return client.post("/v1/completions", json={**ASK, "prompt": f"{number}", "max_tokens": 30}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(24))) == {200}
    assert metric(front, "queued_tokens") == 0
    assert metric(front, "requests") == 24
