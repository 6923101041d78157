"""Control characters in a model's text are shown, never obeyed: a model must not drive the user's terminal.

Covers C0 (ESC, BEL, CR, backspace …), DEL and C1 (8-bit CSI, OSC …), from which every escape sequence begins.
"""

_KEPT = "\n\t"
# ESC becomes ␛ and so on (Unicode "control pictures"); C1 has no pictures
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}
_VISIBLE |= {0x7F: "\u2421"}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_VISIBLE |= {0x2028: "\n", 0x2029: "\n"}  # line and paragraph separator: what a terminal does with them varies
# a lone surrogate cannot be encoded: writing it would end the program
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_NOTHING = dict.fromkeys(code for code in _VISIBLE if code < 0xA0)


def neutralise(text: str) -> str:
    """The text with every control character but newline and tab made visible. ``\\r\\n`` is a newline."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def without_controls(text: str) -> str:
    """The text without them: for text that is laid out already, where a visible one would move what follows."""
    return text.translate(_NOTHING)
