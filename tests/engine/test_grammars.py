"""Grammars in processes of their own, over a vocabulary of bytes: what is allowed when, and what becomes of a grammar
that is wrong, hostile, slow or dead. No model."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from lmtool.engine.constraint import Constraint
from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.grammar_process import GrammarLimits
from lmtool.engine.grammar_source import GrammarSource
from lmtool.engine.grammars import Grammars
from lmtool.errors import EngineError, LmtoolError, RequestError
from tests.processes import children, is_gone

pytest.importorskip("xgrammar")

END, SPECIAL, SIZE = 256, 257, 270  # the ids beyond are a matrix's padding
VOCABULARY = GrammarVocabulary([bytes([i]) for i in range(256)] + [b"\xff<end>", b"\xff<call>"] + [b""] * 12, [END])
WAIT_S = 150.0  # generous, as the limits: the machine is shared
LIMITS = GrammarLimits(compile_s=60.0, step_s=60.0, num_processes=4)
DIGITS = GrammarSource("regex", "[0-9]{2,3}")
HOSTILE = "root ::= root root | [a-z]"


@pytest.fixture(scope="module")
def shared() -> Iterator[Grammars]:
    made = Grammars(lambda: VOCABULARY, LIMITS)
    yield made
    made.close()


@contextlib.contextmanager
def limited(shared: Grammars, limits: GrammarLimits) -> Iterator[Grammars]:
    """Grammars of its own, forks of the process that ``shared`` has: to load the library takes seconds."""
    made = Grammars(lambda: VOCABULARY, limits)
    made._worker = shared._worker
    try:
        yield made
    finally:
        for process in made._processes:
            process.connection.close()


def heard(grammars: Grammars, *constraints: Constraint) -> None:
    """Wait until each of them may go on, or cannot."""
    until = time.monotonic() + WAIT_S
    while not all(one.error or one.allowed for one in constraints):
        grammars.poll(0.1)
        assert time.monotonic() < until, "nothing is heard of a grammar"


def allowed(constraint: Constraint) -> str:
    """What may come next, '∎' for the end, '→' for the special token."""
    assert constraint.error is None, constraint.error
    assert constraint.allowed is not None
    bits = np.unpackbits(np.frombuffer(constraint.allowed, dtype=np.uint8), bitorder="little")
    ids = np.flatnonzero(bits)
    assert ids.max() <= SPECIAL, "an id that is padding"
    return "".join({END: "∎", SPECIAL: "→"}.get(int(i), chr(i)) for i in ids)


def follow(grammars: Grammars, source: GrammarSource, text: str = "") -> Constraint:
    constraint = grammars.follow(source)
    heard(grammars, constraint)
    for letter in text.encode():
        if constraint.error is None:
            assert constraint.allows(letter), text
            constraint.advance(letter)
            heard(grammars, constraint)
    return constraint


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        (DIGITS, "", "0123456789"),
        (DIGITS, "12", "0123456789∎"),
        (DIGITS, "123", "∎"),
        (GrammarSource("ebnf", 'root ::= "yes" | "no"'), "", "ny"),
        (GrammarSource("ebnf", 'root ::= "yes" | "no"'), "y", "e"),
        (GrammarSource("ebnf", 'root ::= "\\u000a\\"" | "é"'), "", "\n\xc3"),
        (GrammarSource("schema", '{"type": "boolean"}'), "", "ft"),
        (GrammarSource("schema", '{"const": 5}'), "5", "∎"),
        (GrammarSource("tag", '{"type": "structural_tag", "format": {"type": "token", "token": 257}}'), "", "→"),
    ],
)
def test_what_may_come_next(source: GrammarSource, text: str, expected: str, shared: Grammars) -> None:
    constraint = follow(shared, source, text)
    assert allowed(constraint) == expected
    assert constraint.only_ends == (expected == "∎")
    assert constraint.stop_ids == {END}
    assert [constraint.allows(i) for i in (ord(expected[0]), -1, SIZE, 9999)] == [
        expected[0] not in "∎→",
        False,
        False,
        False,
    ]
    shared.leave(constraint)


def test_a_special_token_is_no_text_of_a_json_string(shared: Grammars) -> None:
    constraint = follow(shared, GrammarSource("schema", '{"type": "string"}'), '"a')
    assert "<" in allowed(constraint)
    assert "→" not in allowed(constraint)
    assert "∎" not in allowed(constraint)
    shared.leave(constraint)


def test_answers_of_one_grammar_share_its_process_and_nothing_else(shared: Grammars) -> None:
    answers = [shared.follow(DIGITS) for _ in range(5)]
    heard(shared, *answers)
    assert len({id(one.follower) for one in answers}) == 1
    answers[0].advance(ord("1"))
    heard(shared, answers[0])
    answers[0].advance(ord("2"))
    heard(shared, answers[0])
    assert "∎" in allowed(answers[0])
    assert all("∎" not in allowed(one) for one in answers[1:])
    for one in answers:
        shared.leave(one)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (GrammarSource("regex", "a(b"), "response_format: Regex"),
        (GrammarSource("ebnf", 'root ::= "a'), "response_format: EBNF"),
        (GrammarSource("ebnf", "word ::= [a-z]"), "response_format: .*root"),
        (GrammarSource("schema", '{"type": "thing"}'), "response_format: .*thing"),
        (GrammarSource("tag", '{"type": "structural_tag", "format": {"type": "nope"}}'), "response_format: .*"),
        (GrammarSource("ebnf", "root ::= root"), "no text fits its grammar"),
        (
            GrammarSource(
                "schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}'
            ),
            "no text fits its grammar",
        ),
        (GrammarSource("schema", '{"type": "string", "minLength": 5, "maxLength": 2}'), "response_format: "),
    ],
    ids=lambda value: value.text[:30] if isinstance(value, GrammarSource) else "",
)
def test_a_grammar_that_is_wrong_is_refused_with_the_cause(
    source: GrammarSource, message: str, shared: Grammars
) -> None:
    bystander = follow(shared, DIGITS, "1")
    constraint = follow(shared, source)
    assert isinstance(constraint.error, RequestError)
    with pytest.raises(RequestError, match=message):
        raise constraint.error
    assert "\n" not in str(constraint.error)
    assert "/cpp/" not in str(constraint.error)
    shared.leave(constraint)
    bystander.advance(ord("2"))
    heard(shared, bystander)
    assert "∎" in allowed(bystander)
    shared.leave(bystander)


def monsters() -> dict[str, GrammarSource]:
    rules = "\n".join(f"a{i} ::= [a-z]{{1,500}}" for i in range(9))
    return {
        "a long string": GrammarSource("schema", '{"type": "string", "maxLength": 100000000}'),
        "repeats in repeats": GrammarSource("regex", "(" * 500 + "a" + "){1,9}" * 500),
        "a huge enum": GrammarSource("schema", json.dumps({"enum": [f"value {i} of many" for i in range(5000)]})),
        "a huge grammar": GrammarSource(
            "ebnf", "root ::= " + "".join(f"a{i}{{1,500}} " for i in range(9)) + "\n" + rules
        ),
    }


@pytest.mark.parametrize("source", monsters().values(), ids=monsters())
def test_a_monster_ends_itself_or_works_and_nobody_else_notices(source: GrammarSource, shared: Grammars) -> None:
    bystander = shared.follow(DIGITS)
    monster = shared.follow(source)
    heard(shared, bystander)
    bystander.advance(ord("1"))
    heard(shared, bystander)
    assert allowed(bystander) == "0123456789"
    heard(shared, monster)
    assert monster.error is None or isinstance(monster.error, RequestError)
    shared.leave(monster)
    bystander.advance(ord("2"))
    heard(shared, bystander)
    assert "∎" in allowed(bystander)
    shared.leave(bystander)


def test_a_grammar_that_needs_too_much_memory(shared: Grammars) -> None:
    with limited(shared, replace(LIMITS, memory_bytes=8 << 20)) as grammars:  # the glutton needs 24 to 32
        bystander = follow(grammars, DIGITS, "1")
        glutton = follow(grammars, monsters()["a huge enum"])
        assert isinstance(glutton.error, RequestError)
        assert "needs too much memory" in str(glutton.error)
        bystander.advance(ord("2"))
        heard(grammars, bystander)
        assert "∎" in allowed(bystander)


def test_catastrophic_patterns_are_harmless(shared: Grammars) -> None:
    for pattern in ("(a+)+b", "(a|a)*b", "(a*a*)*b"):
        constraint = follow(shared, GrammarSource("regex", pattern), "a" * 40)
        assert allowed(constraint) == "ab"
        shared.leave(constraint)


def test_an_answer_that_its_grammar_cannot_follow_in_time_is_ended(shared: Grammars) -> None:
    """A grammar of one line whose ambiguity grows with each letter: in the engine's process it would stop everybody."""
    tokens = [*VOCABULARY.tokens[:SIZE], b"a" * 60]
    grammars = Grammars(lambda: GrammarVocabulary(tokens, [END]), GrammarLimits(compile_s=60.0, step_s=1.0))
    bystander, constraint = grammars.follow(DIGITS), grammars.follow(GrammarSource("ebnf", HOSTILE))
    heard(grammars, constraint)
    for _ in range(60):
        if constraint.error is None:
            constraint.advance(SIZE)
            heard(grammars, constraint)
    assert isinstance(constraint.error, RequestError)
    assert "within 1 s what may come next; make it less ambiguous" in str(constraint.error)
    heard(grammars, bystander)
    assert allowed(bystander) == "0123456789"
    grammars.close()


def processes_of(grammars: Grammars) -> list[int]:
    worker = grammars._worker._process
    assert worker is not None
    return children(worker.pid)


def test_a_process_that_dies_takes_its_own_answers_along_and_no_others(shared: Grammars) -> None:
    bystander = follow(shared, DIGITS, "1")
    before = set(processes_of(shared))
    victims = [follow(shared, GrammarSource("regex", "[xyz]{3}"), "x" * n) for n in range(3)]
    (pid,) = set(processes_of(shared)) - before
    os.kill(pid, signal.SIGKILL)
    for one in victims[:2]:
        one.advance(ord("x"))
    heard(shared, *victims[:2])
    assert all("needs too much memory, or broke xgrammar" in str(one.error) for one in victims)
    assert len({id(one.error) for one in victims}) == 3
    bystander.advance(ord("2"))
    heard(shared, bystander)
    assert "∎" in allowed(bystander)
    for one in (*victims, bystander):
        shared.leave(one)
    again = follow(shared, GrammarSource("regex", "[xyz]{3}"))
    assert allowed(again) == "xyz"
    shared.leave(again)


def test_the_process_they_come_from_is_started_again(shared: Grammars) -> None:
    running = follow(shared, DIGITS, "1")
    worker = shared._worker._process
    assert worker is not None
    worker.kill()
    worker.wait()
    running.advance(ord("2"))
    fresh = follow(shared, GrammarSource("regex", "z"))
    heard(shared, running)
    assert "∎" in allowed(running)
    assert allowed(fresh) == "z"
    for one in (running, fresh):
        shared.leave(one)


def test_grammars_are_kept_while_there_is_room_and_wait_where_there_is_none(shared: Grammars) -> None:
    with limited(shared, replace(LIMITS, num_processes=2)) as grammars:
        sources = [GrammarSource("regex", letter) for letter in "abc"]
        first, second = (follow(grammars, source) for source in sources[:2])
        third = grammars.follow(sources[2])
        aborted = grammars.follow(sources[2])
        for _ in range(3):
            assert third not in grammars.poll()
        assert third.allowed is None
        grammars.leave(aborted)
        grammars.leave(second)
        heard(grammars, third)
        assert allowed(third) == "c"
        assert allowed(first) == "a"
        grammars.leave(third)
        kept = {id(process) for process in grammars._processes}
        again = follow(grammars, sources[2])
        assert id(again.follower) in kept


def test_answers_that_go_on_together_are_heard_of_together(shared: Grammars) -> None:
    with limited(shared, LIMITS) as grammars:
        answers = [grammars.follow(GrammarSource("regex", "[ab]*")) for _ in range(3)]
        heard(grammars, *answers)
        together = 0
        for _ in range(100):
            for one in answers:
                one.advance(ord("a"))
            together += len(grammars.gather()) == 3
            heard(grammars, *answers)
        assert together > 0


def test_many_answers_of_one_grammar_are_spread_over_processes_while_there_is_room(shared: Grammars) -> None:
    with limited(shared, replace(LIMITS, num_processes=2, num_answers=3)) as grammars:
        answers = [grammars.follow(DIGITS) for _ in range(10)]
        heard(grammars, *answers)
        assert sorted(len(process.answers) for process in grammars._processes) == [5, 5]
        other = grammars.follow(GrammarSource("regex", "b"))
        for one in answers:
            one.advance(ord("7"))
        heard(grammars, *answers)
        assert other.allowed is None
        for one in answers:
            grammars.leave(one)
        heard(grammars, other)


def test_an_answer_that_ends_while_its_grammar_is_compiled_costs_nothing(shared: Grammars) -> None:
    gone = shared.follow(GrammarSource("schema", '{"type": "array"}'))
    shared.poll()
    shared.leave(gone)
    other = follow(shared, GrammarSource("schema", '{"type": "array"}'))
    assert "[" in allowed(other)
    assert gone.allowed is None
    shared.leave(other)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("no file\nof that name"), "the process that follows grammars cannot start: no file"),
        (EngineError("the tokenizer is gone"), "the tokenizer is gone"),
    ],
)
def test_a_vocabulary_that_cannot_be_made_is_told_to_each(error: Exception, message: str) -> None:
    def broken() -> GrammarVocabulary:
        raise error

    grammars = Grammars(broken)
    answers = [grammars.follow(DIGITS) for _ in range(2)]
    heard(grammars, *answers)
    for one in answers:
        assert isinstance(one.error, LmtoolError)
        assert message in str(one.error)
        assert "\n" not in str(one.error)
    grammars.close()


def test_a_vocabulary_without_an_end() -> None:
    grammars = Grammars(lambda: GrammarVocabulary([b"a", b"b"], []))
    constraint = grammars.follow(DIGITS)
    heard(grammars, constraint)
    assert "has no end of answer" in str(constraint.error)
    grammars.close()


def test_closing_ends_every_process() -> None:
    grammars = Grammars(lambda: VOCABULARY, LIMITS)
    follow(grammars, DIGITS)
    grammars.follow(GrammarSource("schema", '{"type": "string", "maxLength": 100000000}'))
    while len(pids := processes_of(grammars)) < 2:
        grammars.poll(0.1)
    grammars.close()
    until = time.monotonic() + WAIT_S
    while not all(map(is_gone, pids)):
        assert time.monotonic() < until, "a process of a grammar outlives its engine"
