"""Streaming text equals decoding everything at once, for any ids and any cut of them into pushes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtool.engine.detokenizer import Detokenizer

PIECES = [bytes((byte,)) for byte in range(256)] + [
    b" the",
    "é".encode(),
    "日本".encode(),
    "🙂".encode()[:2],
    b"<|end|>",
]
SPECIAL = len(PIECES) - 1


class Bytes:
    """A real, if small, vocabulary: every byte, a few words, half an emoji and one special token."""

    def __init__(self, strips_leading_space: bool = False) -> None:
        self.strips_leading_space = strips_leading_space

    def token_bytes(self, token_id: int) -> bytes:
        return PIECES[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id == SPECIAL

    def decode(self, ids: list[int], skip_special: bool) -> str:
        data = b"".join(PIECES[i] for i in ids if not (skip_special and i == SPECIAL))
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")


def ids_of(text: str) -> list[int]:
    return list(text.encode())


any_ids = st.lists(st.integers(0, len(PIECES) - 1), max_size=60)
texts_of_few_letters = st.text(alphabet="ab🙂", max_size=40)
stops = st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=6), max_size=3).map(tuple)
cuts = st.lists(st.integers(1, 4), max_size=60)


def pushes(ids: list[int], sizes: list[int]) -> list[list[int]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(ids[start : start + size])
        start += size
    return [*parts, ids[start:]]


@given(ids=any_ids, sizes=cuts, strips=st.booleans(), skip_special=st.booleans())
def test_pushes_and_flush_are_the_decoded_whole(
    ids: list[int], sizes: list[int], strips: bool, skip_special: bool
) -> None:
    tokenizer = Bytes(strips)
    detokenizer = Detokenizer(tokenizer, (), skip_special)
    text = "".join(detokenizer.push(part) for part in pushes(ids, sizes))
    assert text + detokenizer.flush() == tokenizer.decode(ids, skip_special)
    assert not detokenizer.stopped


@given(text=texts_of_few_letters, stop=stops, sizes=cuts)
def test_text_ends_where_a_stop_string_is_first_complete(text: str, stop: tuple[str, ...], sizes: list[int]) -> None:
    found = [(text.find(s) + len(s), -len(s)) for s in stop if s in text]
    expected = text
    if found:
        end, minus_len = min(found)
        expected = text[: end + minus_len]
    detokenizer = Detokenizer(Bytes(), stop, True)
    shown = ""
    for part in pushes(ids_of(text), sizes):
        shown += detokenizer.push(part)
        assert expected.startswith(shown)  # nothing is ever shown that has to be taken back
    shown += detokenizer.flush()
    assert shown == expected
    assert detokenizer.stopped == bool(found)


def test_half_a_character_waits() -> None:
    detokenizer = Detokenizer(Bytes())
    first, *middle, last = ids_of("🙂")
    assert detokenizer.push([first]) == ""
    assert detokenizer.push(middle) == ""
    assert detokenizer.push([last]) == "🙂"
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_only_what_may_become_a_stop_string_is_held() -> None:
    detokenizer = Detokenizer(Bytes(), ("\nUser:",))
    assert detokenizer.push(ids_of("hello\nUs")) == "hello"
    assert detokenizer.push(ids_of("ed")) == "\nUsed"
    assert detokenizer.push(ids_of(" \nUser")) == " "
    assert detokenizer.push(ids_of(": and more")) == ""
    assert detokenizer.stopped
    assert detokenizer.push(ids_of("never shown")) == ""
    assert detokenizer.flush() == ""


def test_what_is_held_at_the_end_is_shown() -> None:
    detokenizer = Detokenizer(Bytes(), ("</s>",))
    assert detokenizer.push(ids_of("a <")) == "a "
    assert detokenizer.flush() == "<"
    assert not detokenizer.stopped


def test_a_stop_string_may_end_in_the_broken_character_of_the_flush() -> None:
    detokenizer = Detokenizer(Bytes(), ("b\ufffd",))
    assert detokenizer.push([*ids_of("ab"), 0xF0]) == "a"
    assert detokenizer.flush() == ""
    assert detokenizer.stopped


def test_special_tokens_are_hidden_or_shown() -> None:
    ids = [*ids_of("a"), SPECIAL, *ids_of("b")]
    assert Detokenizer(Bytes(), (), True).push(ids) == "ab"
    assert Detokenizer(Bytes(), (), False).push(ids) == "a<|end|>b"


@pytest.mark.parametrize("length", [1, 1000, 100_000])
def test_a_stop_string_may_be_of_any_length(length: int) -> None:
    stop = "ab" * length + "!"
    detokenizer = Detokenizer(Bytes(), (stop,))
    ids = ids_of("ab" + stop + "x")
    shown = "".join(detokenizer.push([token_id]) for token_id in ids[:50])
    shown += detokenizer.push(ids[50:])
    assert detokenizer.stopped
    assert shown + detokenizer.flush() == "ab"
