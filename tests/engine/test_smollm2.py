"""The real SmolLM2-135M-Instruct, end to end: text in, text out, equal to transformers in float32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from lmtool import EngineConfig, GenerationConfig, Pipeline, pipeline
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.hub import resolve_model
from lmtool.errors import ConfigError, MemoryShortError, RequestError
from tests.support import check_greedy

GREEDY = GenerationConfig(temperature=0, max_new_tokens=64, ignore_eos=True)
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a Python function that adds two numbers.",
    "Who wrote Hamlet?",
    "Explain gravity to a child.",
    "What is 7 times 8?",
    "Translate 'good morning' into Spanish.",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "List the planets of the solar system.",
    "What does HTTP stand for?",
    "Summarise the plot of Romeo and Juliet.",
    "How do plants make food?",
    "Write a haiku about autumn.",
    "What is the boiling point of water?",
    "Name a famous painter and one painting.",
    "How many days are in a leap year?",
    "What is a prime number?",
    "Describe a cat in one sentence.",
    "上海是",
]


@pytest.fixture(scope="module")
def exact() -> Iterator[Pipeline]:
    with pipeline("smollm2-135m", EngineConfig(dtype="float32", session_len=2048, device="cpu")) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def quick() -> Iterator[Pipeline]:
    """As `lmtool chat` loads it: on a CPU its own 4-bit weights."""
    with pipeline("smollm2-135m", EngineConfig(session_len=2048, device="cpu")) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def reference() -> Any:
    checkpoint = open_checkpoint(resolve_model("smollm2-135m"))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config)).eval()
    state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model


@pytest.mark.slow
def test_greedy_equals_transformers(exact: Pipeline, reference: Any) -> None:
    """20 prompts x 64 tokens, all at once here; there each is scored whole: every token must be its step's argmax."""
    responses = exact(QUESTIONS, GREEDY)
    compared = 0
    for question, response in zip(QUESTIONS, responses, strict=True):
        assert len(response.token_ids) == 64
        prompt = exact.tokenizer.chat_ids([{"role": "user", "content": question}])
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + response.token_ids])).logits[0]
        compared += check_greedy(response.token_ids, logits[len(prompt) - 1 : -1])
    print(f"{compared} of {20 * 64} steps compared")
    assert compared >= 0.9 * 20 * 64


def test_generate_of_transformers_says_the_same(exact: Pipeline, reference: Any) -> None:
    prompt = torch.tensor([exact.tokenizer.chat_ids([{"role": "user", "content": QUESTIONS[0]}])])
    generated = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, pad_token_id=2
    )
    ours = exact(QUESTIONS[0], GenerationConfig(temperature=0, max_new_tokens=32))
    assert ours.token_ids == generated[0, prompt.shape[1] :].tolist()
    assert ours.text == "The capital of France is Paris."


def test_four_bit_weights_as_they_are_lose_little(quick: Pipeline, reference: Any) -> None:
    """Against the same weights in float32: the packed product's bfloat16 rows and scales, and the 8-bit head."""
    assert quick.loaded.weights == "int4"
    words = "The quick brown fox jumps over the lazy dog. Paris is the capital of France, and Rome that of Italy. "
    ids = quick.tokenizer.encode(words * 3)[:64]
    decoder = quick.loaded.core._executor._runner.decoder  # type: ignore[attr-defined]
    from tests.support import all_logits

    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)
        ours = torch.log_softmax(all_logits(decoder, ids, num_prefill=1), -1)
    kl = (expected.exp() * (expected - ours)).sum(-1)
    print(f"KL to float32: mean {kl.mean():.5f}, largest {kl.max():.5f}")
    assert kl.mean() < 0.002
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


def test_it_knows_the_capital_of_france(quick: Pipeline) -> None:
    response = quick("What is the capital of France?", GenerationConfig(temperature=0, max_new_tokens=40))
    assert response.text == "The capital of France is Paris."
    assert response.finish_reason == "stop"
    assert response.num_prompt_tokens == 37
    assert response.num_generated_tokens == len(response.token_ids) == 8
    assert response.time_to_first_token_s is not None
    assert response.duration_s is not None
    assert 0 < response.time_to_first_token_s < response.duration_s
    assert response.tokens_per_s is not None


def test_strings_messages_and_lists_of_both(exact: Pipeline) -> None:
    config = GenerationConfig(temperature=0, max_new_tokens=10)
    question = "What is the capital of France?"
    messages = [{"role": "user", "content": question}]
    one = exact(question, config)
    assert exact(messages, config).text == one.text
    several = exact([question, "Who wrote Hamlet?"], config)
    assert [r.index for r in several] == [0, 1]
    assert several[0].text == one.text
    assert exact([messages, messages], config)[1].text == one.text
    assert exact([], config) == []


def test_streamed_pieces_add_up_and_closing_ends_the_request(exact: Pipeline) -> None:
    config = GenerationConfig(temperature=0, max_new_tokens=24, ignore_eos=True)
    whole = exact("Name three colours.", config)
    pieces = list(exact.stream_infer("Name three colours.", config))
    assert "".join(p.text for p in pieces) == whole.text
    assert [i for p in pieces for i in p.token_ids] == whole.token_ids
    stream = exact.stream_infer("Count to a thousand.", GenerationConfig(temperature=0, ignore_eos=True))
    next(stream)
    stream.close()
    exact("Hi", GenerationConfig(max_new_tokens=1))  # the abort was taken in before this
    assert not exact.loaded.core.has_work


def test_the_course_snippets_run() -> None:
    """P2 and P5 of the tutorial, as its readers type them (the model at hand, the format that it has)."""
    from lmtool import TurbomindEngineConfig
    from lmtool import turbomind as tm

    backend_config = TurbomindEngineConfig(cache_max_entry_count=0.2, model_format="gguf", session_len=2048)
    pipe = pipeline("smollm2-135m", backend_config=backend_config)
    assert pipe.session_len == 2048
    pipe.close()

    tm_model = tm.TurboMind.from_pretrained("smollm2-135m", model_name="chatml")
    generator = tm_model.create_instance()
    input_ids = tm_model.tokenizer.encode(tm_model.model.get_prompt("What is the capital of France?"))
    for outputs in generator.stream_infer(session_id=0, input_ids=[input_ids]):
        res, tokens = outputs[0]
    assert tokens == len(res)
    assert tm_model.tokenizer.decode(res.tolist()) == "The capital of France is Paris."
    tm_model.close()


def test_a_stop_text_ends_the_answer_and_is_not_in_it(quick: Pipeline) -> None:
    config = GenerationConfig(temperature=0, max_new_tokens=40, stop=("France is",))
    response = quick("What is the capital of France?", config)
    assert response.text == "The capital of "
    assert response.finish_reason == "stop"


def test_bad_words_logit_bias_and_logprobs(quick: Pipeline) -> None:
    question = "What is the capital of France?"
    config = GenerationConfig(temperature=0, max_new_tokens=12, bad_words=("Paris",))
    assert "Paris" not in quick(question, config).text
    biased = quick(question, GenerationConfig(temperature=0, max_new_tokens=3, logit_bias={100: 100.0}))
    assert biased.token_ids == [100] * 3
    scored = quick(question, GenerationConfig(temperature=0, max_new_tokens=5, logprobs=2)).logprobs
    assert scored is not None
    assert len(scored) == 5
    assert all(one.top[0] == (one.token_id, pytest.approx(one.logprob)) for one in scored)


def test_a_conversation_computes_only_what_is_new(quick: Pipeline) -> None:
    config = GenerationConfig(temperature=0, max_new_tokens=30)
    session = quick.chat("Name a colour that rhymes with bed.", gen_config=config)
    first = session.response
    assert first is not None
    session = quick.chat("Now one that rhymes with mean.", session, config)
    second = session.response
    assert second is not None
    computed_before = first.num_prompt_tokens + first.num_generated_tokens - 1
    assert second.num_cached_tokens == computed_before
    assert len(session.messages) == 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"session_len": 9000}, ConfigError, "--session-len 9000 is longer than the model's 8192 tokens"),
        (
            {"cache_gb": 0.01, "session_len": 8192},
            MemoryShortError,
            "one session of 8192 tokens needs 362 MiB, 10 MiB are given",
        ),
        ({"cache_gb": 1e6}, MemoryShortError, "--cache-gb 1e.06 asks for more than"),
        ({"device": "cuda:0"}, None, ""),
        ({"device": "tpu"}, ConfigError, "--device is 'tpu'"),
        ({"model_format": "hf"}, ConfigError, "--model-format is 'hf'"),
    ],
)
def test_what_cannot_be_set_up(settings: dict[str, Any], error: type[Exception] | None, message: str) -> None:
    if error is None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        from lmtool.errors import DeviceError

        error, message = DeviceError, "CUDA"
    with pytest.raises(error, match=message) as caught:
        pipeline("smollm2-135m", EngineConfig(**settings)).close()
    assert "\n" not in str(caught.value)


def test_requests_that_are_refused(exact: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"the prompt has \d+ tokens, the context holds 2048"):
        exact("word " * 3000)
    with pytest.raises(RequestError, match="token id 49152 is outside the vocabulary"):
        exact("Hi", GenerationConfig(logit_bias={49152: 1.0}))
    with pytest.raises(RequestError, match="a prompt is a int"):
        exact([3])
    with pytest.raises(RequestError, match="gen_config is a dict"):
        exact("Hi", {"temperature": 0})
    with pytest.raises(RequestError, match="message 1: content is None"):
        exact([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}])
    with pytest.raises(ConfigError, match="engine_config is a dict"):
        pipeline("smollm2-135m", {"session_len": 5})
    with pytest.raises(RequestError, match="--top-p is 1.5"):
        GenerationConfig(top_p=1.5)
