"""Forms behind a thought that the chat template has begun."""

from dataclasses import replace
from functools import partial

import pytest
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.grammar_source import grammar_source
from lmtool.server.thought_form import after_thought
from lmtool.server.tools_format import HERMES
from lmtool.server.tools_grammar import tool_grammar
from lmtool.tokenizer.chat_template import ChatTemplate
from tests.server.serving import Serving
from tests.server.support import smollm2_tokenizer, tiny_engine

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"type": "json_object"}, '{"x": [1]}', "3"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, '{"a": 1}', '{"a": "x"}'),
        ({"type": "regex_schema", "regex_schema": "[0-9]+"}, "12", "x"),
        ({"type": "choice", "choice": ["yes", "no"]}, "no", "maybe"),
        ({"type": "grammar", "grammar": 'root ::= "x" | "y"'}, "y", "z"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else None,
)
def test_a_thought_is_free_and_the_answer_is_not(form, good, bad) -> None:
    grammar = xgrammar.Grammar.from_structural_tag(after_thought(form))
    for thought in ("", "so\n\nit is <b>", '{"a": 2}'):
        for gap in ("", "\n", "\n\n"):
            assert _is_grammar_accept_string(grammar, f"{thought}</think>{gap}{good}")
        assert not _is_grammar_accept_string(grammar, f"{thought}</think>{bad}")
        assert not _is_grammar_accept_string(grammar, f"{thought}{good}")


def test_calls_that_are_required_come_after_the_thought() -> None:
    form = tool_grammar([TOOL], HERMES, smollm2_tokenizer(), required=True, parallel=True)
    grammar = xgrammar.Grammar.from_structural_tag(after_thought(form))
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert _is_grammar_accept_string(grammar, f"I add.</think>\n\n{call}")
    assert not _is_grammar_accept_string(grammar, call)


def test_what_is_free_stays_free_and_what_is_malformed_is_refused_as_it_is() -> None:
    free = tool_grammar([TOOL], HERMES, smollm2_tokenizer(), required=False, parallel=True)
    for form in (None, {"type": "text"}, free, {"type": "json_schema"}, {"type": "choice", "choice": []}, {"type": 3}):
        assert after_thought(form) is form
    assert grammar_source(after_thought({"type": "json_object"})).kind == "tag"


def test_a_template_that_begins_the_thought() -> None:
    engine = tiny_engine()
    tokenizer = smollm2_tokenizer()
    engine.core.give_vocabulary(partial(GrammarVocabulary.of, tokenizer, 49152))
    with Serving(engine) as server, server.openai() as client:
        source = f"{tokenizer.chat_template}{{{{ '<think>\n' }}}}"
        server.context.tokenizer = replace(server.context.tokenizer, template=ChatTemplate(source, "a test"))
        # a random model closes its thought where nothing else is as likely
        closing = {str(token_id): 100 for token_id in tokenizer.encode("</think>", add_special=False)}
        choice = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Is it?"}],
            logit_bias=closing,
            seed=1,
            max_tokens=400,
            extra_body={"response_format": {"type": "choice", "choice": ["yes", "no"]}},
        ).choices[0]
    engine.close()
    assert choice.message.content in ("yes", "no")
    assert choice.message.reasoning_content
    assert choice.finish_reason == "stop"
