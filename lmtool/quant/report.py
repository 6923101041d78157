"""lmtool-quality.json for people: the same as Markdown tables and a picture. Computes nothing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmtool.checkpoint.writer import write_json
from lmtool.quant.output import QUALITY

MARKDOWN, PICTURE = "lmtool-quality.md", "lmtool-quality.png"
_PLAIN, _OURS = "#999999", "#1f77b4"
Quality = Mapping[str, Any]


def write_report(work_dir: Path, quality: Quality, *, picture: bool) -> None:
    """The JSON, the Markdown, and where ``picture`` the PNG (needs matplotlib)."""
    write_json(work_dir / QUALITY, quality)
    (work_dir / MARKDOWN).write_text(markdown(quality, picture=picture), encoding="utf-8")
    if picture:
        draw(quality, work_dir / PICTURE)


def clear_model(work_dir: Path) -> None:
    """Remove a model that was written here, and what was reported of it; nothing where there was none."""
    if not (work_dir / QUALITY).exists():
        return
    weights = [*work_dir.glob("*.safetensors"), *work_dir.glob("*.safetensors.index.json")]
    # config.json first: from there on the folder is no model; the quality last: it says that all this is ours
    for file in (work_dir / "config.json", *weights, work_dir / MARKDOWN, work_dir / PICTURE, work_dir / QUALITY):
        file.unlink(missing_ok=True)


def markdown(quality: Quality, *, picture: bool) -> str:
    parts = [
        f"# {Path(quality['model']).name} at {quality['bits_per_weight']:.2f} bits a weight",
        _table(("", ""), _facts(quality)),
    ]
    if quality["evaluation"]:
        parts += ["## What it lost", _table(("", "value", "± standard error"), _losses(quality["evaluation"]))]
    if picture:
        parts += [f"![error per layer; perplexity]({PICTURE})"]
    errors = list(_errors(quality))
    if errors:
        heading = ("layer", "linears", "plain rounding", quality["method"], "ratio")
        parts += [
            "## Error of each product",
            "Squared error of the output on the calibration text, as a share of the output's energy.",
            _table(heading, errors),
        ]
    if quality["fallbacks"]:
        rows = ((entry["linear"], entry["reason"]) for entry in quality["fallbacks"])
        parts += ["## Rounded plainly after all", _table(("linear", "why"), rows)]
    if quality["skipped"]:
        parts += ["## Left as they were", "\n".join(f"* {name}" for name in quality["skipped"])]
    return "\n\n".join(parts) + "\n"


def _facts(quality: Quality) -> Iterable[tuple[str, str]]:
    yield "method", quality["method"]
    zero = "a fixed zero point" if quality["symmetric"] else "zero points"
    yield "weights", f"{quality['bits']} bits with {zero} in groups of {quality['group_size']}"
    yield "format", {"awq": "AWQ", "gptq": "GPTQ"}[quality["format"]]
    if quality["head_bits"] == 8:
        yield "output head", "int8, a scale for each row: lmtool's own"
    if "vision_bytes" in quality:
        yield "vision tower and projector", f"as they were, {quality['vision_bytes'] / 1e6:,.1f} MB"
    text = quality["calibration"]
    yield (
        "calibration text",
        f"{text['dataset']}, {text['samples']} × {text['seqlen']} tokens ({text['ids']})" if text else "none",
    )
    run = quality.get("run")
    if run:
        yield "time", f"{run['seconds']:,.0f} s, {run['cpu_seconds']:,.0f} s of CPU, for {run['num_blocks']} blocks"
        yield "peak memory", f"{run['peak_memory_bytes'] / 1e9:.2f} GB"
    yield "rounded plainly", f"{len(quality['fallbacks'])} linears"
    yield "lmtool", quality["lmtool"]


def _losses(found: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    yield _row(f"perplexity, original ({found['original_weights']})", found["original_perplexity"], "{:.3f}")
    yield _row(f"perplexity, quantized ({found['weights']})", found["perplexity"], "{:.3f}")
    yield _row("KL to the original, nats a token", found["kl"], "{:.4f}")
    yield _row("loss less the original's, nats a token", found["delta_nll"], "{:.4f}")
    yield _row("same likeliest token", found["top1_agreement"], "{:.2%}")
    yield "text", f"{found['text']['name']}, {found['num_windows']} × {found['window_len']} tokens", ""


def _row(name: str, figure: Mapping[str, Any], form: str) -> tuple[str, str, str]:
    error = figure["stderr"]
    return name, form.format(figure["value"]), "–" if error is None else form.format(error)


def _errors(quality: Quality) -> Iterable[tuple[str, str, str, str, str]]:
    for layer in quality["layers"]:
        for entry in layer["linears"]:
            if entry["error"] is not None:
                plain, error = entry["error_plain"], entry["error"]
                names = ", ".join(name.split(".")[-1] for name in entry["names"])
                ratio = f"{error / plain:.2f}" if plain else "–"
                yield str(layer["layer"]), names, f"{plain:.3%}", f"{error:.3%}", ratio


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def draw(quality: Quality, path: Path) -> None:
    """Error per layer, mean over its products; perplexity of the original and the quantized with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    errors, perplexity = figure.subplots(1, 2, width_ratios=(3, 1))
    layers = [
        (layer["layer"], [entry for entry in layer["linears"] if entry["error"] is not None])
        for layer in quality["layers"]
    ]
    for key, name, colour in (("error_plain", "plain rounding", _PLAIN), ("error", quality["method"], _OURS)):
        points = [(i, 100 * sum(e[key] for e in entries) / len(entries)) for i, entries in layers if entries]
        if points:
            errors.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=name)
    errors.set(xlabel="layer", ylabel="error of its products, % of their energy", ylim=(0, None))
    if errors.lines:
        errors.legend(frameon=False)
    else:
        errors.text(0.5, 0.5, "nothing was calibrated", ha="center", transform=errors.transAxes)
    found = quality["evaluation"]
    if found:
        figures = [found["original_perplexity"], found["perplexity"]]
        values, spread = [f["value"] for f in figures], [f["stderr"] or 0.0 for f in figures]
        bars = perplexity.bar(("original", "quantized"), values, yerr=spread, color=(_PLAIN, _OURS), capsize=4)
        perplexity.bar_label(bars, fmt="%.2f", label_type="center", color="white")
        perplexity.set(ylabel="perplexity")
    else:
        perplexity.set_axis_off()
        perplexity.text(0.5, 0.5, "not evaluated", ha="center", transform=perplexity.transAxes)
    figure.savefig(path, format="png", dpi=120)
