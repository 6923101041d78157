"""Every error that lmtool raises on purpose.

    LmtoolError              exit code 1: something broke that should not have
    ├── InputError           exit code 2: something that was given cannot be used
    │   ├── ConfigError      a flag, a field or a configuration file
    │   ├── CheckpointError  a model folder or file
    │   ├── TokenizerError   a tokenizer or a chat template
    │   ├── RequestError     a prompt or a sampling value of one request
    │   ├── DeviceError      a device that is not there or cannot run the engine
    │   └── MemoryShortError a model or a cache that does not fit (says what was needed and what is free)
    ├── EngineError          the engine failed; the requests in that step fail with it
    │   └── RanksLost        one of its processes has ended: there is no engine any more
    └── KernelError          a kernel was called with shapes or types it does not take

A message is one line: the cause, then the fix. Each face (terminal, HTTP, Python) translates it once.
"""


class LmtoolError(Exception):
    """Base of all. ``str(error)`` is one line, ``cause: fix`` where a fix is known."""

    exit_code = 1

    def __init__(self, cause: str, fix: str | None = None) -> None:
        self.cause = cause
        self.fix = fix
        super().__init__(f"{cause}; {fix}" if fix else cause)


class InputError(LmtoolError):
    exit_code = 2


class ConfigError(InputError):
    pass


class CheckpointError(InputError):
    pass


class TokenizerError(InputError):
    pass


class RequestError(InputError):
    pass


class DeviceError(InputError):
    pass


class MemoryShortError(InputError):
    pass


class EngineError(LmtoolError):
    pass


class RanksLost(EngineError):
    pass


class KernelError(LmtoolError):
    pass


def _below(kind: type[LmtoolError]) -> list[type[LmtoolError]]:
    return [kind, *(found for one in kind.__subclasses__() for found in _below(one))]


BY_NAME = {kind.__name__: kind for kind in _below(LmtoolError)}  # for errors that cross a process's border
