"""Which models and prompts `lmtool bench kv` runs: found, read and cut before anything is measured."""

from pathlib import Path

from lmtool.bench.kv_table import Subject
from lmtool.bench.shapes import find_shape
from lmtool.bench.workloads import static
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.hub import resolve_model
from lmtool.engine.device import choose_device
from lmtool.errors import ConfigError, InputError
from lmtool.models.loader import read_model_config
from lmtool.tokenizer import load_tokenizer

_MOST_PROMPTS = 16
_OWN_PROMPTS = 3  # where none were given


def subject_of(
    model: str | None,
    quantized: str | None,
    shape: str | None,
    group_size: int,
    context: int,
    output_len: int,
    device: str,
    dtype: str,
) -> tuple[Subject, str]:
    """And the dtype of the rows whose weights are numbers. Raises what finding a model does, and ConfigError."""
    path = str(resolve_model(model)) if model is not None else None
    four_bits = str(resolve_model(quantized)) if quantized is not None else None
    on_cpu = choose_device(device).type == "cpu"
    dense_dtype = "float32" if on_cpu and dtype == "auto" else dtype
    if path is not None and four_bits is None and on_cpu and _is_four_bits(path):
        four_bits = path  # in numbers it is the same weights
    if four_bits is not None and not _is_four_bits(four_bits):
        raise ConfigError(f"--quantized {quantized} holds no 4-bit weights", "make them with `lmtool lite auto_awq`")
    if four_bits is not None and on_cpu and dtype != "auto":
        raise ConfigError(f"--dtype is {dtype!r}, 4-bit weights on a CPU choose it themselves", "leave --dtype out")
    if shape is not None:
        find_shape(shape)
        if on_cpu:
            raise ConfigError("--shape's 4-bit row is for a GPU", "give a --model")
    subject = Subject(
        model=path,
        quantized=four_bits,
        shape=shape,
        group_size=group_size,
        context=context,
        output_len=output_len,
    )
    return subject, dense_dtype


def _is_four_bits(path: str) -> bool:
    checkpoint = open_checkpoint(Path(path))
    try:
        return any(checkpoint.dtype(name) in ("q4_0", "q4_1", "int4") for name in checkpoint.names())
    finally:
        checkpoint.close()


def read_prompts(subject: Subject, file: Path | None) -> list[list[int]]:
    """Token ids; a prompt that is too long for the context keeps its end. Raises InputError for a file without any."""
    room = subject.context - subject.output_len
    if subject.shape is not None:
        return [list(static(1, room, subject.output_len).prompts(find_shape(subject.shape).vocab_size, 0)[0])]
    assert subject.model is not None
    checkpoint = open_checkpoint(Path(subject.model))
    try:
        longest = read_model_config(checkpoint.config).max_positions
    finally:
        checkpoint.close()
    if subject.context > longest:
        raise ConfigError(f"--context is {subject.context}, the model's is {longest}", "give a smaller one")
    tokenizer = load_tokenizer(Path(subject.model))
    if file is None:
        from pydoc_data.topics import topics

        ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special=False)
        return [ids[i * room : (i + 1) * room] for i in range(_OWN_PROMPTS)]
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {file} cannot be read: {error}", "give a UTF-8 text file") from error
    if not lines:
        raise InputError(f"--prompts {file} holds no prompt", "write one on each line")
    if len(lines) > _MOST_PROMPTS:
        raise InputError(f"--prompts {file} holds {len(lines)} prompts", f"give {_MOST_PROMPTS} or fewer")
    return [tokenizer.chat_ids([{"role": "user", "content": line}])[-room:] for line in lines]
