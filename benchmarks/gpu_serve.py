"""What HTTP costs: `lmtool serve api_server` under `lmtool bench online`, beside the engine alone, on a CUDA card.

    python -m benchmarks.gpu_serve --tokenizer FOLDER [--shape llama3-8b] [--http-processes 1 4] [--clients 8]

A checkpoint of random weights is written, with a tokenizer (FOLDER's, filled up) in which each id has a text, so that
each token is an event. Then chat1000 offline, over HTTP from 256 clients, and as a Poisson process at 80 % of that.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu_load import write_workspace
from lmtool.bench.shapes import find_shape

CLIENTS_AT_ONCE = 256
PORT = 23999


def write_tokenizer(folder: Path, source: Path, vocab_size: int) -> None:
    """SOURCE's, whose vocabulary is filled up: ' tok123' for id 123."""
    stored = json.loads((source / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    used = set(vocabulary.values()) | {token["id"] for token in stored["added_tokens"]}
    for token in stored["added_tokens"]:
        token["special"] = False  # it would have no text
    vocabulary |= {f"Ġtok{i}": i for i in range(vocab_size) if i not in used}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    shutil.copy(source / "tokenizer_config.json", folder)


def lmtool(*words: object) -> list[str]:
    return [sys.executable, "-m", "lmtool", *map(str, words)]


def measured(*words: object) -> dict[str, object]:
    """The first result of a bench command."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        done = subprocess.run(lmtool(*words, "--json", file.name), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{words}: {done.stderr[-2000:]}")
        return json.loads(Path(file.name).read_text())["results"][0]


@contextmanager
def serving(model: Path, num_processes: int):
    begun = time.perf_counter()
    words = ["serve", "api_server", model, "--port", PORT, "--http-processes", num_processes, "--dtype", "float16"]
    server = subprocess.Popen(lmtool(*words))
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready")
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit("the server ended")
                time.sleep(0.1)
        print(f"  ready after {time.perf_counter() - begun:.1f} s", flush=True)
        yield server
    finally:
        server.terminate()
        server.wait(30)


def cpu_s(server: subprocess.Popen) -> dict[str, float]:
    """Seconds of each of its processes until now."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    for pid in [str(server.pid), *children]:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        name = next((w.decode().rsplit(".", 1)[-1] for w in words if b"lmtool.server" in w), "http 0")
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        found[f"{name} {pid}"] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def told(found: dict[str, object]) -> str:
    metrics = found["metrics"]
    gaps, first = metrics["inter_token_latency_s"], metrics["time_to_first_token_s"]
    return (
        f"{metrics['requests_per_s']['median']:.1f} req/s, {metrics['output_tokens_per_s']['median']:,.0f} tok/s, "
        f"first token median {1e3 * first['median']:.0f} p99 {1e3 * first['p99']:.0f} ms, between tokens median "
        f"{1e3 * gaps['median']:.2f} p99 {1e3 * gaps['p99']:.2f} ms ({gaps['p99'] / gaps['median']:.1f}x), "
        f"failures {found['failures']}, client {found['client_cpu_share']:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--http-processes", type=int, nargs="+", default=[4])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--mix", default="chat1000")
    args = parser.parse_args()
    shape = find_shape(args.shape)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / args.shape
        model.mkdir()
        begun = time.perf_counter()
        write_workspace(model, shape, None)
        write_tokenizer(model, args.tokenizer, shape.vocab_size)
        print(f"{args.shape} written in {time.perf_counter() - begun:.1f} s", flush=True)
        bench = ["bench", "offline", "--model", model, "--dtype", "float16", "--mix", args.mix, "--repeats", 1]
        offline = measured(*bench, "--warm-up", 0)["metrics"]
        rate = offline["requests_per_s"]["median"]
        print(f"offline: {rate:.1f} req/s, {offline['output_tokens_per_s']['median']:,.0f} tok/s", flush=True)
        for number in args.http_processes:
            with serving(model, number) as server:
                online = ["bench", "online", f"http://127.0.0.1:{PORT}", "--mix", args.mix, "--clients", args.clients]
                online += ["--token-ids", shape.vocab_size, "--max-concurrency", CLIENTS_AT_ONCE]
                before = cpu_s(server)
                full = measured(*online)
                after, duration_s = cpu_s(server), full["duration_s"]
                share = full["metrics"]["requests_per_s"]["median"] / rate
                print(f"{number} HTTP processes: {share:.3f} x offline; {told(full)}")
                busy = [f"{name.split()[0]} {(after[name] - before[name]) / duration_s:.0%}" for name in after]
                print("  busy: " + ", ".join(busy), flush=True)
                load = 0.8 * full["metrics"]["requests_per_s"]["median"]
                print(f"  at 80 %: {told(measured(*online, '--request-rate', f'{load:.2f}'))}", flush=True)


if __name__ == "__main__":
    main()
