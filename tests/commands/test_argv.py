"""The pass over argv: each line of the course's two generations, in our words."""

from typing import Any

import pytest

from lmtool import cli
from lmtool.argv import BOOLEAN_FLAGS, MODEL_COMMANDS, translate


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("chat turbomind ./model --model-name llama2", "chat --backend turbomind ./model --model-name llama2"),
        ("chat torch m", "chat --backend pytorch m"),
        ("chat pytorch m", "chat --backend pytorch m"),
        ("chat ./turbomind", "chat ./turbomind"),
        ("chat m turbomind", "chat m turbomind"),
        ("list turbomind", "list turbomind"),
        ("chat --model m", "chat m"),
        ("chat --model=m --seed 1", "chat m --seed 1"),
        ("chat --model", "chat --model"),
        ("chat --model --seed 1", "chat --model --seed 1"),
        ("other --model m", "other --model m"),
        ("lite auto_awq --model m --w_bits 4", "lite auto_awq m --w_bits 4"),
        ("lite other --model m", "lite other --model m"),
        ("lite auto-awq m --search_scale True --w_sym False", "lite auto-awq m --search-scale"),
        ("chat --show_prompt True", "chat --show-prompt"),
        ("chat --show-prompt False", "chat"),
        ("chat --show-prompt=true m", "chat --show-prompt m"),
        ("chat --history False m", "chat --no-history m"),
        ("chat --no_history false", "chat --history"),
        ("chat --json m", "chat --json m"),
        ("chat --json=maybe", "chat --json=maybe"),
        ("chat -- --model True", "chat -- --model True"),
        ("serve api_server m --api-keys a b --tp 1", "serve api_server m --api-keys a --api-keys b --tp 1"),
        ("-v serve api-server m --api_keys a b", "-v serve api-server m --api_keys a --api_keys b"),
        ("serve api_server m --api-keys=a --port 1", "serve api_server m --api-keys=a --port 1"),
        ("serve api_server --api-keys a m", "serve api_server --api-keys a m"),
        ("serve api_server --model m --api-keys a b", "serve api_server m --api-keys a --api-keys b"),
        ("serve api_server", "serve api_server"),
        ("", ""),
    ],
)
def test_translations(given: str, meant: str) -> None:
    assert translate(given.split()) == meant.split()


def _commands(group: Any, path: str = "") -> dict[str, Any]:
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found.update(_commands(command, f"{path}{name} "))
        else:
            found[path + name] = command
    return found


def test_the_table_knows_every_boolean_flag_and_its_opposite() -> None:
    for name, command in _commands(cli.build()).items():
        for param in command.params:
            if not getattr(param, "is_bool_flag", False) or param.name == "help":
                continue
            for flag, opposite in [*zip(param.opts, param.secondary_opts or [None], strict=False)]:
                if flag.startswith("--"):
                    assert BOOLEAN_FLAGS.get(flag, "missing") == opposite, f"{name} {flag}"


def test_commands_that_take_model_as_a_flag_have_it_as_an_argument() -> None:
    commands = _commands(cli.build())
    for name in MODEL_COMMANDS:
        arguments = [param.name for param in commands[name].params if param.param_type_name == "argument"]
        assert arguments in (["model"], ["name_and_model"]), name
