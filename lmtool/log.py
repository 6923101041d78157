"""Logging: one handler on stderr, set up once by the command line and by nobody else.

Knows no command. A library must not configure logging when imported, so nothing happens at module scope.
"""

import logging

ROOT = "lmtool"


class _OneLine(logging.Formatter):
    """``lmtool: warning: message``: the shape that errors have as well."""

    def format(self, record: logging.LogRecord) -> str:
        origin = f" {record.name}:" if record.levelno <= logging.DEBUG else ""
        line = f"lmtool: {record.levelname.lower()}:{origin} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def setup() -> None:
    """Send the package's warnings to stderr, as it is now: a second call begins afresh."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    logger.propagate = False


def be_verbose() -> None:
    """Show debug messages too, and tell `is_verbose` that tracebacks are wanted."""
    logging.getLogger(ROOT).setLevel(logging.DEBUG)


def is_verbose() -> bool:
    return logging.getLogger(ROOT).isEnabledFor(logging.DEBUG)
