"""A model folder is data: a server of one that is full of traps answers, and nothing in the folder is run."""

import json
import pickle
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lmtool.checkpoint.hub import resolve_model
from lmtool.errors import TokenizerError
from lmtool.tokenizer import load_tokenizer
from lmtool.tokenizer.save import save_tokenizer
from tests.server.process import Process
from tests.server.support import smollm2_tokenizer

ESCAPES = (
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in messages.__class__.__bases__ %}{{ x.__subclasses__() }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
)


class Trap:
    """What unpickling would run."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (self.command,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trapped")
    tokenizer = smollm2_tokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(tokenizer, resolve_model("smollm2-135m"), folder)
    mark = folder / "MARK"
    code = f"open({str(mark)!r}, 'w').close()\n"
    names = ("modeling_trap", "configuration_trap", "tokenization_trap", "sitecustomize", "conftest", "lmtool", "torch")
    for name in names:
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Trap(f"touch {mark}"), file)
    maps = {
        "config.json": {"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_trap.Trap", "tokenization_trap.Trap"]},
    }
    for file, auto_map in maps.items():
        stored = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**stored, "auto_map": auto_map, "trust_remote_code": True}))
    return folder


def give_template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))


def test_nothing_of_a_folder_is_run(folder: Path) -> None:
    escape = ESCAPES[0].replace("MARK", str(folder / "MARK"))
    give_template(folder, escape)
    with Process("--model-name", folder.name, model=".", folder=folder) as server, server.client() as client:
        answer = client.post("/v1/completions", json={"model": folder.name, "prompt": "a b c", "max_tokens": 3})
        assert answer.status_code == 200
        chat = {"model": folder.name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        refused = client.post("/v1/chat/completions", json=chat)
        assert refused.status_code == 400
        assert "chat template" in refused.json()["error"]["message"]
        given = client.post("/v1/chat/completions", json={**chat, "chat_template": escape})  # none from a request
        assert given.status_code == 400
        assert "chat_template" in given.json()["error"]["message"]
        assert client.get("/ready").status_code == 200
    assert not (folder / "MARK").exists()


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_does_not_leave_its_sandbox(folder: Path, escape: str) -> None:
    give_template(folder, escape.replace("MARK", str(folder / "MARK")))
    with pytest.raises(TokenizerError, match="chat template"):
        load_tokenizer(folder).render_chat([{"role": "user", "content": "hello"}])
    assert not (folder / "MARK").exists()
