"""A model passes through a little memory, whatever its size; and what a workspace costs to load."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from lmtool.checkpoint.tensor_file import TensorFile
from lmtool.models.registry import family
from tests.quant.models import SIZES, tiny_folder

HIDDEN, INNER, LAYERS = 1024, 4096, 16

# the peak of a conversion over what the process held before it, in bytes (Linux: 5 resets the peak)
MEASURE = """
import sys
from pathlib import Path
from lmtool.convert.job import Job
from lmtool.convert.to_workspace import convert

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key + ":"))

def run(model):
    convert(Job(source=Path(model), name=model, destination=Path(model + " made")))

run(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run(sys.argv[2])
print(status("VmHWM") - before)
"""


def large_folder(path: Path) -> Path:
    """Half a gigabyte of bfloat16 noise in two shards."""
    tiny_folder(path, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1)
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").unlink()
    noise = torch.randn(INNER, HIDDEN).mul_(0.02).bfloat16()
    key_value = HIDDEN // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    rows = {"q_proj": HIDDEN, "k_proj": key_value, "v_proj": key_value, "o_proj": HIDDEN, "gate": INNER, "up": INNER}
    names = family(config).NAMES
    for shard in range(2):
        with TensorFile(path / f"model-{shard}.safetensors", 400) as file:
            for ours, theirs in names.items():
                if "bias" in ours or ours.endswith(("q_norm", "k_norm")) or ours == "head.weight":
                    continue
                layers = range(shard, LAYERS, 2) if "{i}" in ours else range(1 - shard)
                for name in (name.format(i=i) for i in layers for name in theirs):
                    if "norm" in ours:
                        tensor = noise[0] + 1
                    elif "down" in ours:
                        tensor = noise.t()
                    elif ours == "embed":
                        tensor = noise[: config["vocab_size"]]
                    else:
                        tensor = noise[: next(count for key, count in rows.items() if key in name)]
                    file.add(name, tensor)
    return path


def test_a_conversion_holds_little_more_than_its_largest_tensor(tmp_path: Path) -> None:
    small, large = tiny_folder(tmp_path / "small"), large_folder(tmp_path / "large")
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    largest = 2 * INNER * HIDDEN * 2  # gate and up, as the engine has them
    assert size > 20 * largest
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # the comparison of logits holds one layer as float32 and what it is made of: of the other gigabyte that is the part
    # which grows with a model's layers, and it is a quarter of this model
    layer = 4 * (4 * HIDDEN * HIDDEN + 3 * INNER * HIDDEN)
    assert size > 3 * (1.3 * largest + 2 * layer)
    assert grown < 1.3 * largest + 2 * layer
