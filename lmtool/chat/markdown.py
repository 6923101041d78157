"""How Markdown looks in the chat: Rich's, with text that can be copied and nothing that hides.

Code has its fences and no padding, headings are on the left, links show their address. Knows no terminal.
"""

from typing import Any, ClassVar

from markdown_it.token import Token
from rich import markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.syntax import Syntax
from rich.text import Text

from lmtool.chat.blocks import parser
from lmtool.chat.escape import neutralise

_CODE_THEME = "ansi_dark"  # the terminal's own sixteen colours, on its own background


class _Code(markdown.CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        label = "" if self.lexer_name == "text" else self.lexer_name
        yield Text(f"```{label}", style="dim")
        # a lexer may drop blank lines around the code; the code itself is shown as it is
        yield Syntax(
            str(self.text).rstrip("\n"),
            self.lexer_name,
            theme=self.theme,
            word_wrap=True,
            background_color="default",
        )
        yield Text("```", style="dim")


class _Heading(markdown.Heading):
    LEVEL_ALIGN: ClassVar[Any] = dict.fromkeys(markdown.Heading.LEVEL_ALIGN, "left")


class ChatMarkdown(markdown.Markdown):
    elements: ClassVar[Any] = {
        **markdown.Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme=_CODE_THEME, hyperlinks=False)
        self.markup = text
        self.parsed = parser().parse(text)
        _adapt(self.parsed)


def _adapt(tokens: list[Token]) -> None:
    """Line breaks stay, because models do not wrap their lines; control characters are shown.

    The latter after Markdown has been understood, because that can produce them (``<http://x/%1b[2J>``).
    """
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        token.content = neutralise(token.content)
        token.attrs = {k: neutralise(v) if isinstance(v, str) else v for k, v in token.attrs.items()}
        _adapt(token.children or [])
