"""Which text is calibrated on: what was typed, else what `lite calibrate` took in this work dir, else the defaults."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lmtool.quant.options import CalibrationOptions


def with_earlier(work_dir: Path, model: Path, typed: Mapping[str, Any]) -> "CalibrationOptions":
    """typed: fields of `CalibrationOptions`. What is taken from the work dir is said on stderr."""
    from lmtool.quant.calibrate import calibrated_with
    from lmtool.quant.options import CalibrationOptions

    earlier = calibrated_with(work_dir, model)
    if earlier is None:
        return CalibrationOptions(**typed)
    chosen = CalibrationOptions(**asdict(earlier) | dict(typed))
    text = f"{earlier.dataset}, {earlier.samples} × {earlier.seqlen} tokens"
    if _text(chosen) == _text(earlier):
        note = f"the text is that of `lite calibrate` in this work dir ({text}); what the search needs is gathered anew"
    else:
        note = f"`lite calibrate` took another text in this work dir ({text}): it is not used"
    if chosen.samples:
        typer.echo(note, err=True)
    return chosen


def _text(options: "CalibrationOptions") -> tuple[object, ...]:
    return options.dataset, options.samples, options.seqlen, options.seed
