"""What Click cannot express, translated before it sees argv: tables, and one pass over them.

    lmtool chat turbomind MODEL    → lmtool chat --backend turbomind MODEL
    lmtool chat --model MODEL      → lmtool chat MODEL
    lmtool chat --history False    → lmtool chat --no-history
    lmtool serve api_server MODEL --api-keys a b   → lmtool serve api_server MODEL --api-keys a --api-keys b

Knows words only: no command is imported and no value is judged here. (`_` for `-` is Click's own
`token_normalize_func`; this pass only has to recognise both spellings.)
"""

from collections.abc import Iterable, Iterator

# `lmtool chat turbomind MODEL` named the engine; there is one now
ENGINE_WORDS = {"turbomind": "turbomind", "pytorch": "pytorch", "torch": "pytorch"}
ENGINE_COMMANDS = {"chat"}

# commands whose MODEL may also be given as `--model MODEL`
MODEL_COMMANDS = {"chat", "convert", "inspect", "lite auto-awq", "lite calibrate", "lite eval", "serve api-server"}

# LMDeploy's flags of several values; behind MODEL only: before it nobody could tell where they end
LIST_COMMANDS = {"serve api-server"}
LIST_FLAGS = {"--api-keys", "--allow-origins", "--model-name"}

# a boolean flag -> what to say for an explicit False; None: saying nothing means False
BOOLEAN_FLAGS: dict[str, str | None] = {
    "--json": None,
    "--share": None,
    "--restful-api": None,
    "--tune": None,
    "--ignore-eos": "--no-ignore-eos",
    "--no-ignore-eos": "--ignore-eos",
    "--search-scale": None,
    "--w-sym": None,
    "--kv-sym": None,
    "--fresh": None,
    "--overwrite": None,
    "--dense": None,
    "--warm": None,
    "--allow-bin": None,
    "--verify": "--no-verify",
    "--no-verify": "--verify",
    "--check": "--no-check",
    "--no-check": "--check",
    "--show-prompt": None,
    "--double-enter": None,
    "--markdown": "--no-markdown",
    "--no-markdown": "--markdown",
    "--history": "--no-history",
    "--no-history": "--history",
    "--log-requests": None,
    "--disable-docs": None,
    "--disable-fastapi-docs": None,
    "--verbose": None,
}
TRUTH = {"true": True, "false": False}


def translate(argv: Iterable[str]) -> list[str]:
    """The same command line in the words that the commands declare. Nothing after ``--`` is touched."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    spoken = [_spelled(word) for word in words[:end] if not word.startswith("-")]
    command, with_group = "".join(spoken[:1]), " ".join(spoken[:2])
    head = list(_name_engine(words[:end], command))
    if {command, with_group} & MODEL_COMMANDS:
        head = list(_model_is_positional(head))
    if with_group in LIST_COMMANDS and _model_is_next(head):
        head = list(_one_value_each(head))
    return [*_explicit_booleans(head), *words[end:]]


def _spelled(word: str) -> str:
    return word.replace("_", "-")


def _name_engine(words: list[str], command: str) -> Iterator[str]:
    previous = ""
    for word in words:
        if command in ENGINE_COMMANDS and previous == command and word in ENGINE_WORDS:
            yield "--backend"
            yield ENGINE_WORDS[word]
        else:
            yield word
        previous = word


def _model_is_positional(words: list[str]) -> Iterator[str]:
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        if word.startswith("--model="):
            yield word.removeprefix("--model=")
        elif word != "--model" or following.startswith("-"):  # without a value: left for Click to refuse
            yield word


def _model_is_next(words: list[str]) -> bool:
    """Behind the group and its command."""
    command = [i for i, word in enumerate(words) if not word.startswith("-")][1]
    return not (words[command + 1 :] or ["-"])[0].startswith("-")


def _one_value_each(words: list[str]) -> Iterator[str]:
    flag, has_one = None, False  # the list whose values are being read
    for word in words:
        if word.startswith("-"):
            flag, has_one = (word if _spelled(word) in LIST_FLAGS else None), False
        elif flag is not None:
            if has_one:
                yield flag
            has_one = True
        yield word


def _explicit_booleans(words: list[str]) -> Iterator[str]:
    """``--flag True``, ``--flag=False``: the flag, or its opposite, alone."""
    position = 0
    while position < len(words):
        flag, equals, value = words[position].partition("=")
        position += 1
        flag = _spelled(flag)
        if flag not in BOOLEAN_FLAGS:
            yield words[position - 1]
            continue
        if not equals and position < len(words) and words[position].lower() in TRUTH:
            value = words[position]
            position += 1
        truth = TRUTH.get(value.lower(), None if equals else True)
        if truth is None:
            yield words[position - 1]  # --flag=maybe: left for Click to refuse
        elif truth:
            yield flag
        elif BOOLEAN_FLAGS[flag]:
            yield str(BOOLEAN_FLAGS[flag])
