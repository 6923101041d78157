"""Responses that are remembered: their ids say which replica has them, and the front's keys whose they are."""

import openai
import pytest

pytest.importorskip("aiohttp", reason="pip install '.[cluster]'")

from tests.cluster.front import Front, record


@pytest.fixture
def closed_front(servers):
    with Front("one", "two", api_keys=("secret", "other")) as made:
        made.list(record("a", servers[0].url), record("b", servers[1].url))
        yield made


def test_a_response_is_gone_on_from_where_it_is_remembered(closed_front):
    """Who has nothing in its cache yet, the other replica, would be the next one."""
    with closed_front.openai("secret") as client, closed_front.openai("other") as other:
        ask = {"model": "one", "max_output_tokens": 4, "temperature": 0}
        first = client.responses.create(input="Once upon a time " * 30, **ask)
        assert first.id.startswith("resp_a_")
        second = client.responses.create(input="And then?", previous_response_id=first.id, **ask)
        assert second.id.startswith("resp_a_")
        assert second.usage.input_tokens > first.usage.input_tokens
        events = list(client.responses.create(input="Else?", previous_response_id=second.id, stream=True, **ask))
        assert events[-1].response.id.startswith("resp_a_")
        assert client.responses.create(input="Another", **ask).id.startswith("resp_b_")
        assert client.responses.retrieve(first.id).output_text == first.output_text
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            other.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="there is no response"):
            other.responses.create(input="x", previous_response_id=first.id, **ask)
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)


def test_a_response_whose_replica_is_gone_is_refused_by_name(closed_front, servers):
    with closed_front.openai("secret") as client:
        first = client.responses.create(model="one", input="Once", max_output_tokens=4)
        gone = "or the replica that remembered it is gone; send the whole conversation"
        with pytest.raises(openai.BadRequestError, match="is of the model one; give model one"):
            client.responses.create(model="two", input="x", previous_response_id=first.id)
        closed_front.list(record("b", servers[1].url))
        with pytest.raises(openai.BadRequestError, match=gone):
            client.responses.create(model="one", input="x", previous_response_id=first.id)
        for response_id in (first.id, "resp_nobody", "x"):
            with pytest.raises(openai.NotFoundError, match=gone):
                client.responses.retrieve(response_id)
        assert client.responses.create(model="one", input="x", max_output_tokens=4).id.startswith("resp_b_")
