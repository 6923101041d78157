"""SmolLM2 behind the server, asked by OpenAI's own client: what it says is what the pipeline says."""

import pytest

from lmtool.checkpoint.hub import resolve_model
from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.pipeline import pipeline
from lmtool.engine.setup import load_engine
from tests.server.serving import Serving
from tests.server.support import EngineInThread

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
SETTINGS = EngineConfig(session_len=512, cache_gb=0.1, dtype="float32")


@pytest.fixture(scope="module")
def told():
    """By the pipeline: the answer, with the logprobs of its tokens."""
    with pipeline("smollm2-135m", SETTINGS) as pipe:
        return pipe(CAPITAL, GenerationConfig(max_new_tokens=24, temperature=0.0, logprobs=2))


@pytest.fixture(scope="module")
def client(told):
    engine = EngineInThread(load_engine(resolve_model("smollm2-135m"), SETTINGS, None).core)
    with Serving(engine) as server:
        yield server.openai()
    engine.close()


def test_a_chat_says_what_the_pipeline_says(client, told):
    answer = client.chat.completions.create(
        model="tiny", messages=CAPITAL, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.message.content == told.text
    assert choice.finish_reason == told.finish_reason == "stop"
    assert answer.usage.completion_tokens == told.num_generated_tokens
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(
        [one.logprob for one in told.logprobs], abs=1e-4
    )


def test_a_stream_says_it_too(client, told):
    chunks = client.chat.completions.create(model="tiny", messages=CAPITAL, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == told.text


def test_a_text_goes_on(client):
    answer = client.completions.create(
        model="tiny", prompt="The capital of France is", max_tokens=1, temperature=0, echo=True, logprobs=3
    )
    (choice,) = answer.choices
    assert choice.text == "The capital of France is Paris"
    assert choice.logprobs.tokens[-1] == " Paris"
    assert choice.logprobs.token_logprobs[-1] == pytest.approx(max(choice.logprobs.top_logprobs[-1].values()), abs=1e-4)
    likely = client.completions.create(model="tiny", prompt="The capital of France is Paris", max_tokens=0, **ECHO)
    strange = client.completions.create(model="tiny", prompt="The capital of France is Whale", max_tokens=0, **ECHO)
    last = [answer.choices[0].logprobs.token_logprobs[-1] for answer in (likely, strange)]
    assert last[0] == pytest.approx(choice.logprobs.token_logprobs[-1], abs=1e-3)
    assert last[1] < last[0] - 3


ECHO = {"echo": True, "logprobs": 0}
