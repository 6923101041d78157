"""The text of one chat answer, as it arrives: thought, content and calls of functions told apart."""

from collections.abc import Iterable, Iterator
from typing import Any

from lmtool.server.tools_reader import CallDelta, ToolReader
from lmtool.tokenizer.thinking import ThinkSplitter

Delta = dict[str, Any]  # OpenAI's: content, reasoning_content and tool_calls, as far as there are any


class ChatReader:
    """opens_thought: the prompt has begun one. tools: reads what is no thought, where functions may be called."""

    def __init__(self, *, opens_thought: bool = False, tools: ToolReader | None = None) -> None:
        self._thoughts = ThinkSplitter(inside=opens_thought)
        self._tools = tools

    @property
    def has_called(self) -> bool:
        return self._tools is not None and self._tools.num_calls > 0

    def push(self, text: str) -> Delta:
        return self._delta(self._thoughts.push(text))

    def finish(self, text: str) -> Delta:
        """The last of it."""
        return self._delta(self._all_that_is_left(text), over=True)

    def _all_that_is_left(self, text: str) -> Iterator[tuple[bool, str]]:
        yield from self._thoughts.push(text)
        yield from self._thoughts.finish()

    def _delta(self, pieces: Iterable[tuple[bool, str]], *, over: bool = False) -> Delta:
        delta: Delta = {}
        for is_thought, text in pieces:
            if is_thought:
                _add_text(delta, "reasoning_content", text)
            elif self._tools is None:
                _add_text(delta, "content", text)
            else:
                _add(delta, self._tools.push(text))
        if over and self._tools is not None:
            _add(delta, self._tools.finish())
        return delta


def _add(delta: Delta, pieces: Iterable[str | CallDelta]) -> None:
    for piece in pieces:
        if isinstance(piece, str):
            _add_text(delta, "content", piece)
        else:
            _add_call(delta.setdefault("tool_calls", []), piece)


def _add_text(delta: Delta, name: str, text: str) -> None:
    delta[name] = delta.get(name, "") + text


def _add_call(calls: list[dict[str, Any]], piece: CallDelta) -> None:
    if piece.id is not None:
        function = {"name": piece.name, "arguments": piece.arguments}
        calls.append({"index": piece.index, "id": piece.id, "type": "function", "function": function})
    elif calls and calls[-1]["index"] == piece.index:
        calls[-1]["function"]["arguments"] += piece.arguments
    else:
        calls.append({"index": piece.index, "function": {"arguments": piece.arguments}})
