"""Answers that follow a grammar, end to end on SmolLM2 and on the tiny decoder: they are what was asked for, also drawn
wildly, and whoever shares the batch does not notice."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from lmtool import EngineConfig, GenerationConfig, Pipeline, pipeline
from lmtool.engine.core import EngineCore
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.grammar_process import GrammarLimits
from lmtool.errors import EngineError, RequestError
from tests.engine.test_device_runner import Late, device_core
from tests.support import check_equal, collect, request, run_all, tiny_core, tiny_decoder

pytest.importorskip("xgrammar")

QUESTION = "Describe a person: name, age, colours they like."
PHONE = {"type": "regex_schema", "regex_schema": r"\+[0-9]{2} [0-9]{3}-[0-9]{4}"}
CHOICE = {"type": "choice", "choice": ["red", "green", 'the "other" one']}
SUM = {"type": "grammar", "grammar": 'root ::= number (" + " number){1,3}\nnumber ::= [1-9] [0-9]{0,2}'}


class Home(BaseModel):
    city: str = Field(max_length=12)
    floor: int = Field(ge=0, le=40)


class Person(BaseModel):
    name: str = Field(max_length=16)
    age: int = Field(ge=0, le=120)
    likes: list[Literal["red", "green", "blue"]] = Field(min_length=1, max_length=3)
    home: Home | None


PERSON = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True},
}


def config(form: dict[str, Any] | None = None, **settings: Any) -> GenerationConfig:
    return GenerationConfig(**{"temperature": 0.0, "max_new_tokens": 160, "response_format": form, **settings})


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with pipeline("smollm2-135m", EngineConfig(session_len=2048, device="cpu")) as made:
        yield made


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (1.5, 0), (1.5, 1)])
def test_answers_by_a_schema_are_valid(temperature: float, seed: int, pipe: Pipeline) -> None:
    response = pipe(QUESTION, config(PERSON, temperature=temperature, seed=seed, max_new_tokens=400))
    assert response.finish_reason == "stop"
    Person.model_validate_json(response.text, strict=True)


@pytest.mark.parametrize(("temperature", "seeds"), [(0.0, 1), (1.5, 3)])  # without temperature a seed changes nothing
def test_answers_by_pattern_choice_and_grammar(temperature: float, seeds: int, pipe: Pipeline) -> None:
    for seed in range(seeds):
        settings = {"temperature": temperature, "seed": seed}
        phone, colour, total = (pipe("Say something.", config(form, **settings)) for form in (PHONE, CHOICE, SUM))
        assert re.fullmatch(PHONE["regex_schema"], phone.text)
        assert colour.text in CHOICE["choice"]
        assert re.fullmatch(r"[1-9]\d{0,2}( \+ [1-9]\d{0,2}){1,3}", total.text)
        assert {phone.finish_reason, colour.finish_reason, total.finish_reason} == {"stop"}


def test_any_object(pipe: Pipeline) -> None:
    schema = {"type": "object", "maxProperties": 2, "additionalProperties": {"type": "integer", "maximum": 99}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert all(isinstance(value, int) for value in json.loads(pipe("Count.", config(form)).text).values())
    text = pipe("Give a short JSON object.", config({"type": "json_object"}, max_new_tokens=24)).text
    assert text.startswith("{")


@pytest.mark.slow
def test_different_grammars_beside_free_answers() -> None:
    """In one batch, what is free is what it is without the others, by the rule of docs/design.md."""
    free = config(max_new_tokens=24, ignore_eos=True)
    asked = [
        (QUESTION, free),
        (QUESTION, config(PERSON)),
        ("A number?", config(PHONE)),
        ("Why is the sky blue?", free),
        ("Which?", config(CHOICE)),
        ("Add.", config(SUM)),
        ("Describe Anna.", config(PERSON)),
    ]
    with pipeline("smollm2-135m", EngineConfig(session_len=2048, device="cpu", dtype="float32")) as exact:
        prompts = [exact.tokenizer.chat_ids([{"role": "user", "content": question}]) for question, _ in asked]
        requests = [exact.request(ids, form) for ids, (_, form) in zip(prompts, asked, strict=True)]
        texts, ids = [""] * 7, [list[int]() for _ in asked]
        for part in exact.stream(requests):
            texts[part.index] += part.text
            ids[part.index] += part.token_ids
        alone = {i: exact(asked[i][0], free).token_ids for i in (0, 3)}
        decoder = exact.loaded.core._executor._runner.decoder  # type: ignore[attr-defined]
        check_equal(alone, {i: ids[i] for i in alone}, decoder, dict(enumerate(prompts)))
    for text in (texts[1], texts[6]):
        Person.model_validate_json(text, strict=True)
    assert re.fullmatch(PHONE["regex_schema"], texts[2])
    assert texts[4] in CHOICE["choice"]
    assert re.fullmatch(r"[1-9]\d{0,2}( \+ [1-9]\d{0,2}){1,3}", texts[5])


def test_what_is_wrong_ends_its_own_request_with_the_cause(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="response_format: type is 'xml'"):
        pipe("Hi", config({"type": "xml"}))
    with pytest.raises(RequestError, match="response_format: EBNF"):
        pipe("Hi", config({"type": "grammar", "grammar": 'root ::= "a'}))
    with pytest.raises(RequestError, match="no text fits its grammar"):
        pipe("Hi", config({"type": "grammar", "grammar": "root ::= root"}))
    with pytest.raises(RequestError, match="--bad-words leave no token that it allows"):
        pipe("Hi", config({"type": "choice", "choice": ["a"]}, bad_words=("a",)))
    assert pipe("Say red.", config(CHOICE)).text in CHOICE["choice"]


def test_with_everything_else_that_may_be_asked(pipe: Pipeline) -> None:
    """The grammar wins over stops that are held back; the others only choose among what it allows."""
    held = pipe("Hi", config(CHOICE, min_new_tokens=50, ignore_eos=True, repetition_penalty=1.5, logprobs=5))
    assert held.text in CHOICE["choice"]
    assert held.logprobs is not None
    for one in held.logprobs:
        assert all(value > float("-inf") for _, value in one.top)
    green = pipe.tokenizer.encode("green", add_special=False)[0]
    assert pipe("Hi", config(CHOICE, logit_bias={green: 100.0})).text == "green"
    scored = pipe("Hi", config(CHOICE, prompt_logprobs=1))
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == scored.num_prompt_tokens - 1
    cut = pipe("Hi", config(PERSON, max_new_tokens=3))
    assert cut.finish_reason == "length"


# ---------------------------------------------------------------------- on both runners, over a vocabulary of bytes
VOCABULARY = GrammarVocabulary([bytes([i]) for i in range(210)] + [b"\xff<end>"], [210])
WORDS = {"type": "regex_schema", "regex_schema": "(ab|cd){3,5}"}
LONG = {"type": "regex_schema", "regex_schema": "(ab|cd){40,45}"}


@pytest.fixture(scope="module", params=["plain", "device", "late device"])
def core(request: pytest.FixtureRequest) -> Iterator[EngineCore]:
    decoder = tiny_decoder()
    kind = {"device": DeviceRunner, "late device": Late}.get(request.param)
    settings = {"num_blocks": 9, "session_len": 220}
    made = device_core(decoder, kind, **settings) if kind is not None else tiny_core(decoder, **settings)
    made.give_vocabulary(lambda: VOCABULARY, GrammarLimits(compile_s=60.0, step_s=60.0))  # the machine is shared
    yield made
    made.close()


def test_while_others_come_go_and_preempt(core: EngineCore) -> None:
    free = [request(i, [i] * (20 + 30 * i), max_new_tokens=60) for i in range(4)]
    bound = [
        request(10 + i, [i] * 50, max_new_tokens=99, temperature=1.0, seed=i, response_format=LONG) for i in range(4)
    ]
    answers = run_all(core, [one for pair in zip(free, bound, strict=True) for one in pair])
    expected = run_all(tiny_core(tiny_decoder()), free)
    prompts = {one.request_id: one.prompt_ids for one in free}
    check_equal(expected, {i: answers[i] for i in expected}, tiny_decoder(), prompts)
    for i in range(10, 14):
        assert answers[i][-1] == 210
        assert re.fullmatch(rb"(ab|cd){40,45}", bytes(answers[i][:-1]))
    assert core.scheduler.counters.num_preemptions > 0
    core.scheduler.blocks.check_integrity([])


def test_choices_of_one_prompt_wait_for_their_grammar_and_for_the_first(core: EngineCore) -> None:
    prompt = [5] * 70
    choices = [
        request(
            20 + i, prompt, max_new_tokens=20, temperature=1.0, seed=i, response_format=WORDS, after=20 if i else None
        )
        for i in range(3)
    ]
    cached = core.scheduler.counters.num_cached_tokens
    answers = run_all(core, choices)
    assert all(re.fullmatch(rb"(ab|cd){3,5}", bytes(answer[:-1])) for answer in answers.values())
    assert core.scheduler.counters.num_cached_tokens - cached >= 2 * 64


def test_an_abort_while_the_grammar_is_compiled_and_one_that_is_refused(core: EngineCore) -> None:
    monster = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "maxLength": 10**8}}}
    core.add(request(30, [1, 2], max_new_tokens=4, response_format=monster))
    core.add(request(31, [1, 2], max_new_tokens=4, after=30))
    core.add(request(32, [1, 2], max_new_tokens=4, response_format={"type": "regex_schema", "regex_schema": "(("}))
    core.add(request(33, [3], max_new_tokens=9, response_format=WORDS))
    answers: dict[int, list[int]] = {31: [], 33: []}
    outputs = core.step()  # the refusal may be among them
    assert core.has_work
    aborted = core.abort(30)
    assert aborted is not None
    assert aborted.finish_reason == "abort"
    errors = {o.request_id: o.error for o in outputs if o.error is not None}
    collect([o for o in outputs if o.error is None], answers)
    while core.has_work:
        outputs = core.step()
        errors |= {o.request_id: o.error for o in outputs if o.error is not None}
        collect([o for o in outputs if o.error is None], answers)
    assert len(answers[31]) == 4
    assert re.match(rb"(ab|cd)+", bytes(answers[33]))
    assert isinstance(errors.pop(32), RequestError)
    assert not errors
    core.scheduler.blocks.check_integrity([])


def test_an_engine_that_was_given_no_vocabulary_says_so() -> None:
    core = tiny_core()
    core.add(request(0, [1, 2], response_format=WORDS))
    core.add(request(1, [1, 2], response_format={"type": "xml"}))
    core.add(request(2, [1, 2], response_format={"type": "text"}, max_new_tokens=3))
    outputs = []
    while core.has_work:
        outputs += core.step()
    errors = {o.request_id: o.error for o in outputs if o.error is not None}
    assert isinstance(errors[0], EngineError)
    assert isinstance(errors[1], RequestError)
    assert len([o for o in outputs if o.request_id == 2]) == 3
