"""A chat in a process of its own with a scripted model, for the tests that drive a real pseudo-terminal.

What the question contains decides the answer; a word is a token. `endless` streams until it is stopped.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmtool.chat import repl
from lmtool.chat.backend import Delta, Message
from lmtool.chat.history import prepare_history
from lmtool.chat.session import Session
from lmtool.chat.settings import Settings
from lmtool.config import GenerationConfig
from lmtool.errors import EngineError

MARKDOWN = """# Title

Some **bold** text with `code` and <b>tags</b>.

1. first

   still first
2. second

```python
def f(x):

    return x
```

| name | value |
|------|-------|
| a    | 1     |
| b    | 22    |

The end.
"""
ANSWERS = {
    "markdown": MARKDOWN,
    "evil": "\x1b]0;owned\x07\x1b[2J\x1b[31mred <http://x.org/%1b%5b2J> done",
    "think": "<think>\nfirst this, then that\n</think>\n\nthe answer is 42",
    "elsewhere": "![look](http://pictures.example.org/?said=secret) that was it",
    "poem": "roses are red\nviolets are blue",
    "tall": "```text\n" + "".join(f"line {i}\n" for i in range(60)) + "```\n",
}


ROWS = 10  # of each picture


def _said(message: Message) -> tuple[str, int]:
    """The text, and how many pictures stand before it."""
    content = message["content"]
    if isinstance(content, str):
        return content, 0
    *pictures, last = content
    assert all(part["image_url"]["url"].startswith("data:image/") for part in pictures)
    return last["text"], len(pictures)


class FakeBackend:
    description = "fake model · cpu"

    def __init__(self, session_len: int, takes_pictures: bool | None = False) -> None:
        self.session_len = session_len
        self.takes_pictures = takes_pictures
        self._seen: set[str] = set()
        self._num_answers = 0

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(text.split()) + ROWS * num_pictures for text, num_pictures in map(_said, messages))

    def render(self, messages: Sequence[Message]) -> str:
        return "".join(f"<|{message['role']}|>{_said(message)[0]}" for message in messages) + "<|assistant|>"

    def opens_thought(self, messages: Sequence[Message]) -> bool:
        return False

    def stream(self, messages: Sequence[Message], config: GenerationConfig) -> Iterator[Delta]:
        question, num_pictures = _said(messages[-1])
        if num_pictures:
            question += f" with {num_pictures} pictures"
        num_prompt = self.count_tokens(messages)
        num_cached = self.count_tokens([m for m in messages if _said(m)[0] in self._seen])
        self._num_answers += 1
        if "broken" in question:
            raise EngineError("the engine stopped", "start again")
        for number, piece in enumerate(self._pieces(question, config), 1):
            yield Delta(
                text=piece,
                num_prompt_tokens=num_prompt,
                num_cached_tokens=num_cached,
                num_generated_tokens=number,
            )
            if number == config.max_new_tokens:
                yield Delta(text="", finish_reason="length", num_prompt_tokens=num_prompt, num_generated_tokens=number)
                return
        self._seen.update(_said(message)[0] for message in messages)

    def _pieces(self, question: str, config: GenerationConfig) -> Iterator[str]:
        if "endless" in question or "slow" in question:
            for number in itertools.count() if "endless" in question else range(100):
                yield f"word{number} "
                time.sleep(0.005)  # the pace of a model, not a wait for anything
            return
        for key, answer in ANSWERS.items():
            if key in question:
                yield from (answer[i : i + 3] for i in range(0, len(answer), 3))
                return
        lines = question.count("\n") + 1
        words = f"answer {self._num_answers} to {question!r} in {lines} lines at {config.temperature}"
        yield from (word + " " for word in words.split(" "))

    def close(self) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--history", type=Path)
    parser.add_argument("--double-enter", action="store_true")
    parser.add_argument("--session-len", type=int, default=1000)
    parser.add_argument("--no-markdown", action="store_true")
    parser.add_argument("--takes-pictures", action="store_true")
    given = parser.parse_args()
    options = repl.ReplOptions(
        history=given.history and prepare_history(given.history), double_enter=given.double_enter
    )
    settings = Settings(GenerationConfig(), markdown=not given.no_markdown)
    return repl.run(FakeBackend(given.session_len, given.takes_pictures), Session(), settings, options)


if __name__ == "__main__":
    sys.exit(main())
