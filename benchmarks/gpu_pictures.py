"""LLaVA-1.6-7B's shape with random weights: many requests at once with a picture each, beside transformers' `generate`
with the same weights and pictures, on one card.

    python -m benchmarks.gpu_pictures [--requests 32] [--output-len 128] [--backbone vicuna|mistral] [--no-peer]

A checkpoint is written as llava-hf's are and loaded by both. What the pictures' preparation costs is timed apart.
"""

import argparse
import gc
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.core import EngineCore
from lmtool.engine.requests import place_images
from lmtool.engine.sequence import Request
from lmtool.engine.setup import load_engine
from lmtool.images.form import read_image_form
from lmtool.images.prepared import IMAGE_ID, PreparedImage

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TEXT = 24  # tokens around a picture


def config_of(backbone: str, tiny: bool) -> transformers.LlavaNextConfig:
    size = (64, 128, 2, 4) if tiny else ()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    common: dict[str, Any] = {
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        **dict(zip(names, size, strict=False)),
    }
    if backbone == "mistral":
        text: Any = transformers.MistralConfig(**{**common, "max_position_embeddings": 32768}, sliding_window=None)
    else:
        text = transformers.LlamaConfig(**common)
    small = dict(zip(names, (32, 64, 3, 2) if tiny else (1024, 4096, 24, 16), strict=True))
    vision = transformers.CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **small)
    return transformers.LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=32000, image_grid_pinpoints=PINPOINTS
    )


def random_model(config: transformers.LlavaNextConfig, device: torch.device, dtype: torch.dtype) -> Any:
    with device:
        torch.set_default_dtype(dtype)
        model = transformers.LlavaNextForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
            elif "norm" in name and name.endswith("weight"):
                weight.fill_(1)
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model.eval()


def write(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "crop_size": {"height": 336, "width": 336},
        "size": {"shortest_edge": 336},
        "image_mean": MEAN,
        "image_std": STD,
        "image_grid_pinpoints": PINPOINTS,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def prompts(count: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    texts = random.integers(10, 31000, (count, TEXT)).tolist()
    return [[*ids[: TEXT // 2], IMAGE_ID, *ids[TEXT // 2 :]] for ids in texts]


def pictures(count: int, side: int, seed: int) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def peer_run(model: Any, asked: list[list[int]], images: list[PreparedImage], num_new: int) -> tuple[float, Any]:
    """Seconds of `generate`, pixels on the device; ids."""
    device, dtype = model.device, model.dtype
    rows = [
        [i for token in ids for i in ([32000] * image.num_tokens if token == IMAGE_ID else [token])]
        for ids, image in zip(asked, images, strict=True)
    ]
    side = images[0].tile_size
    tiles = torch.stack(
        [torch.frombuffer(bytearray(i.pixels), dtype=torch.uint8).view(-1, side, side, 3) for i in images]
    )
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    ids = torch.tensor(rows, device=device)
    pixels = ((tiles.to(device) / 255 - mean) / std).permute(0, 1, 4, 2, 3).to(dtype)
    sizes = torch.tensor([image.size for image in images], device=device)
    _wait(device)
    began = time.perf_counter()
    with torch.inference_mode():
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            image_sizes=sizes,
            max_new_tokens=num_new,
            do_sample=False,
        )
    _wait(device)
    return time.perf_counter() - began, answer[:, ids.shape[1] :].tolist()


def engine_run(
    core: EngineCore, asked: list[list[int]], images: list[PreparedImage], num_new: int, show: bool
) -> tuple[float, list[list[int]]]:
    params = GenerationConfig(temperature=0.0, ignore_eos=True, max_new_tokens=num_new)
    steps = []
    real = core._executor.launch  # what each step was made of

    def launch(batch: Any) -> Any:
        steps.append(
            (len(batch.decodes), sum(len(c.token_ids) for c in batch.chunks), sum(len(c.images) for c in batch.chunks))
        )
        return real(batch)

    core._executor.launch = launch  # type: ignore[method-assign]
    began = time.perf_counter()
    for i, (ids, image) in enumerate(zip(asked, images, strict=True)):
        rows, placed = place_images(ids, [image])
        core.add(
            Request(request_id=i, prompt_ids=tuple(rows), params=params, stop_ids=frozenset(), seed=0, images=placed)
        )
    answers: list[list[int]] = [[] for _ in asked]
    marks, firsts = [], {}
    while core.has_work:
        known = len(steps)
        for output in core.step():
            if output.error is not None:
                raise output.error
            answers[output.request_id].append(output.token_id)
            firsts.setdefault(output.request_id, time.perf_counter() - began)
        if len(steps) > known:
            marks.append(time.perf_counter() - began)
    seconds = time.perf_counter() - began
    del core._executor.launch
    if show:
        first = sorted(firsts.values())
        print(f"  first token: median {first[len(first) // 2] * 1e3:.0f} ms, last {first[-1] * 1e3:.0f} ms")
        with_prompts = sum(1 for step in steps if step[1])
        most, after = max(step[1] for step in steps), seconds - marks[with_prompts - 1]
        print(
            f"  {len(steps)} steps, {with_prompts} with prompts (at most {most} tokens), then {after:.2f} s of decodes"
        )
        print(
            "  steps (decodes, prompt tokens, pictures | s):",
            *(f"({a},{b},{c}|{m:.3f})" for (a, b, c), m in list(zip(steps, marks, strict=False))[:16]),
        )
    return seconds, answers


def encode_times(tower: Any, images: list[PreparedImage], device: torch.device) -> None:
    for count in (1, 3, len(images)):
        for _ in range(2):
            _wait(device)
            began = time.perf_counter()
            with torch.inference_mode():
                tower.encode(images[:count])
            launched = time.perf_counter() - began
            _wait(device)
        whole = time.perf_counter() - began
        tiles = sum(image.num_tiles for image in images[:count])
        print(f"  tower alone: {count} pictures, {tiles} tiles: {whole * 1e3:.1f} ms, launched in {launched * 1e3:.1f}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--side", type=int, default=672)
    parser.add_argument("--backbone", default="vicuna")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--batched-tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--profile", action="store_true", help="on a card")
    parser.add_argument("--tiny", action="store_true", help="to try this script on a CPU")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        began = time.perf_counter()
        model = random_model(config_of(given.backbone, given.tiny), device, dtype)
        write(folder, model)
        print(f"LLaVA-1.6 {given.backbone}, written after {time.perf_counter() - began:.1f} s", flush=True)
        form = read_image_form(folder)
        assert form is not None
        sets = [pictures(given.requests, given.side, seed) for seed in range(2)]
        began = time.perf_counter()
        shown = [[form.prepare(one) for one in images] for images in sets]
        serial = (time.perf_counter() - began) / 2 / given.requests
        with ThreadPoolExecutor(8) as pool:
            began = time.perf_counter()
            list(pool.map(form.prepare, sets[0]))
            threads = time.perf_counter() - began
        made = f"{shown[0][0].num_tiles} tiles, {shown[0][0].num_tokens} rows"
        print(
            f"preparing a picture ({made}): {serial * 1e3:.1f} ms, all on 8 threads {threads * 1e3:.0f} ms", flush=True
        )
        asked = [prompts(given.requests, seed) for seed in range(2)]
        peer_s, peer_answers = 0.0, None
        if not given.no_peer:
            peer_run(model, asked[1][:2], shown[1][:2], 3)
            for seed in (1, 0):
                peer_s, peer_answers = peer_run(model, asked[seed], shown[seed], given.output_len)
                first_s, _ = peer_run(model, asked[seed], shown[seed], 1)
                rate = given.requests * given.output_len / peer_s
                print(
                    f"transformers: {peer_s:.2f} s, {rate:,.0f} tok/s, {first_s:.2f} s to the first token", flush=True
                )
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        ours = min(
            engine_runs(folder, device, dtype, budget, asked, shown, given, peer_answers)
            for budget in given.batched_tokens
        )
        if not given.no_peer:
            prepared, processed = threads, transformers_processing(sets[0])
            whole = (peer_s + processed) / (ours + prepared)
            print(
                f"{peer_s / ours:.2f} x transformers' generate; with its processor ({processed:.2f} s): {whole:.2f} x"
            )


def transformers_processing(images: list[Image.Image]) -> float:
    """Seconds of its image processor, as it is chosen where torchvision is not installed."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side = {"height": 336, "width": 336}
    process = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=side, image_grid_pinpoints=PINPOINTS)
    process(images[:1], return_tensors="pt")
    began = time.perf_counter()
    process(images, return_tensors="pt")
    return time.perf_counter() - began


def engine_runs(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    budget: int,
    asked: list[list[list[int]]],
    shown: list[list[PreparedImage]],
    given: argparse.Namespace,
    peer_answers: Any,
) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    cache = {"cache_gb": 90.0} if device.type == "cuda" else {"cache_gb": 1.0}
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": device.type, "max_batch_size": 64, **cache}
    loaded = load_engine(folder, EngineConfig(max_batched_tokens=budget, **settings))
    print(f"engine, at most {budget} tokens a step: {loaded.described(given.backbone)}", flush=True)
    tower = loaded.core._executor._runner.decoder.vision  # type: ignore[attr-defined]
    if budget == given.batched_tokens[0]:
        encode_times(tower, shown[0], device)
    best = float("inf")
    for seed in (1, 0):
        seconds, answers = engine_run(loaded.core, asked[seed], shown[seed], given.output_len, show=seed == 0)
        best = min(best, seconds)
        print(f"lmtool: {seconds:.2f} s, {given.requests * given.output_len / seconds:,.0f} tok/s", flush=True)
    if peer_answers is not None:
        same = sum(ours[0] == theirs[0] for ours, theirs in zip(answers, peer_answers, strict=True))
        print(f"first tokens as transformers': {same} of {given.requests}", flush=True)
    if given.profile and budget == given.batched_tokens[0]:
        profile(loaded.core, tower, asked[1], shown[1])
    loaded.core.close()
    return best


def profile(core: EngineCore, tower: Any, asked: list[list[int]], images: list[PreparedImage]) -> None:
    """Where the time of steps with pictures goes: three requests that nobody has asked before."""
    core.scheduler.blocks.prefix_caching = False
    real = tower.encode

    def encode(wanted: Any) -> Any:
        with torch.profiler.record_function("ENCODE PICTURES"):
            return real(wanted)

    tower.encode = encode
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        engine_run(core, asked[:3], images[:3], 1, show=False)
        _wait(torch.device("cuda"))
    del tower.encode
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    whole = sum(row.self_device_time_total for row in rows if not row.key.startswith("ENCODE"))
    encoding = max((row.device_time_total for row in rows if row.key == "ENCODE PICTURES"), default=0.0)
    print(f"profile of {3} prompts: {whole / 1e3:.1f} ms of kernels, pictures {encoding / 1e3:.1f} ms of them")
    for row in [row for row in rows if row.self_device_time_total][:16]:
        print(f"  {row.self_device_time_total / 1e3:8.2f} ms {row.count:5d} x {row.key[:100]}")


if __name__ == "__main__":
    main()
