"""What happens to a model's text before it is drawn: control characters, thoughts, Markdown blocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtool.chat.blocks import BlockSplitter, parser
from lmtool.chat.escape import neutralise, without_controls
from lmtool.tokenizer.thinking import ThinkSplitter, split

# the same examples on every machine, however slow it is
MARKDOWN = st.lists(
    st.sampled_from(
        ["# head", "text", "- item", "  more", "1. one", "", "", "```", "~~~", "| a | b |", "|---|---|", "> q"]
        + ["---", "===", "    code", "<div>", "[a]: http://x", "* * *", "-", "#", "\tx"]
    ),
    max_size=14,
).map("\n".join)


# ---------------------------------------------------------------- control characters
@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    for cleaned in (neutralise(text), without_controls(text)):
        assert not [c for c in cleaned if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"]


def test_controls_are_shown_and_text_is_left_alone() -> None:
    assert neutralise("a\x1b[2Jb\r\nc\td 上海 😀") == "a␛[2Jb\nc\td 上海 😀"
    assert neutralise("\x9b31m\r\ud800") == "\ufffd31m␍\ufffd"


# ---------------------------------------------------------------- thoughts
@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("plain", "", "plain"),
        ("<think>\nhm\n</think>\n\nyes", "hm\n", "yes"),
        (" \n<think>hm</think>yes", "hm", "yes"),
        ("<think>never ends", "never ends", ""),
        ("it says <think>x</think>", "", "it says <think>x</think>"),
        ("<thin ice", "", "<thin ice"),
        ("<think>a </thin b</think>c", "a </thin b", "c"),
        ("<thi", "", "<thi"),
    ],
)
def test_thoughts_are_split_from_answers_however_they_are_cut(text: str, thought: str, answer: str) -> None:
    for size in range(1, len(text) + 1):
        splitter = ThinkSplitter()
        pieces = [p for i in range(0, len(text), size) for p in splitter.push(text[i : i + size])]
        pieces += splitter.finish()
        assert "".join(t for inside, t in pieces if inside) == thought
        assert "".join(t for inside, t in pieces if not inside) == answer
        assert splitter.num_chars == len(thought)


def test_a_prompt_may_have_opened_the_thought() -> None:
    assert split("hm</think>yes", inside=True) == ("hm", "yes")


# ---------------------------------------------------------------- blocks
def _blocks(text: str, size: int) -> list[str]:
    splitter = BlockSplitter()
    done = [block for i in range(0, len(text), size) for block in splitter.push(text[i : i + size])]
    return [*done, splitter.open_block]


@settings(max_examples=300)
@given(MARKDOWN, st.integers(1, 12))
def test_blocks_are_those_of_the_whole_text_and_lose_nothing(text: str, size: int) -> None:
    blocks = _blocks(text, size)
    assert "\n".join(blocks) == text
    whole = [token.type for token in parser().parse(text) if token.level == 0 and token.nesting >= 0]
    parts = [t.type for block in blocks for t in parser().parse(block) if t.level == 0 and t.nesting >= 0]
    assert parts == whole


def test_a_loose_list_is_one_block() -> None:
    assert _blocks("1. a\n\n   b\n\n2. c\n\nend\n", 3) == ["1. a\n\n   b\n\n2. c\n", "end\n"]


def test_a_fence_with_blank_lines_is_one_block() -> None:
    assert _blocks("```\na\n\n# b\n```\nc\n", 1) == ["```\na\n\n# b\n```", "c\n"]
