"""What a user may set for `lite auto_awq` and `lite calibrate`, checked once. Messages name the flag."""

import re
from dataclasses import dataclass

from lmtool.config import DTYPES
from lmtool.errors import ConfigError
from lmtool.quant.grid import Levels

METHODS = ("rtn", "smooth", "awq", "gptq", "best")
GROUP_SIZES = (32, 64, 128)
SELF = "self"
HUB_DATASETS = ("c4", "ptb", "wikitext2", "pileval")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """Which text the statistics come from.

    dataset     a file or a folder of txt, jsonl or json; 'self': what the model samples; or a hub's data set
    samples     sequences; 0: no calibration
    seqlen      tokens of each
    batch_size  sequences in one product
    seed        which stretches of the text are taken
    """

    dataset: str = SELF
    samples: int = 64
    seqlen: int = 512
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.samples >= 0, "calib-samples", self.samples, "0 (plain rounding) or more")
        _check(2 <= self.seqlen <= 1 << 20, "calib-seqlen", self.seqlen, "2 tokens or more")
        _check(1 <= self.batch_size <= 4096, "batch-size", self.batch_size, "1 to 4096 sequences")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2**63 - 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantOptions:
    """How a model's matrices become codes.

    method      'rtn' plain rounding; 'smooth' fixed smoothing; 'awq' scale and clip search; 'gptq' error feedback
                alone; 'best' AWQ's scales and clipped grids, then GPTQ's rounding
    bits        4, or 8
    symmetric   the zero point is the middle level in every group
    group_size  weights that share a scale and a zero
    head_bits   8: the output head's codes are int8, a scale for each row (lmtool's own); 16: it stays as it is
    skip        regular expressions; a linear whose name one of them is found in stays as it is
    dtype       of what is not quantized: 'auto' keeps a half-precision source's own
    """

    method: str = "best"
    bits: int = 4
    symmetric: bool = False
    group_size: int = 128
    head_bits: int = 16
    skip: tuple[str, ...] = ()
    dtype: str = "auto"

    def __post_init__(self) -> None:
        _check(self.method in METHODS, "method", self.method, "one of " + ", ".join(METHODS))
        _check(self.bits in (4, 8), "w-bits", self.bits, "4 or 8")
        _check(self.head_bits in (8, 16), "head-bits", self.head_bits, "8 or 16 (as it is)")
        _check(self.group_size in GROUP_SIZES, "w-group-size", self.group_size, "32, 64 or 128")
        _check(self.dtype in DTYPES[:3], "dtype", self.dtype, "one of " + ", ".join(DTYPES[:3]))
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"--skip {pattern!r}: {error}", "give a regular expression, such as down_proj"
                ) from None

    @property
    def searches(self) -> bool:
        """Whether calibration text is needed at all."""
        return self.method != "rtn"

    @property
    def levels(self) -> Levels:
        return Levels(self.group_size, self.bits, self.symmetric)

    @property
    def format(self) -> str:
        """Whose files can say it: AWQ's 4 bits with zero points, else GPTQ's."""
        return "awq" if self.bits == 4 and not self.symmetric else "gptq"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user may not expect of the files, a line each."""
        lacking = [f"{self.bits} bits"] if self.bits != 4 else []
        lacking += ["a fixed zero point"] if self.symmetric else []
        notes = [f"written in GPTQ's format: AWQ's cannot say {' and '.join(lacking)}"] if lacking else []
        return (
            (*notes, "the output head is written as int8, which only lmtool reads")
            if self.head_bits == 8
            else (*notes,)
        )

    @property
    def bits_per_weight(self) -> float:
        """With what each group stores beside its codes: a float16 scale and a zero point."""
        return self.bits + (16 + self.bits) / self.group_size


def check_sizes(options: QuantOptions, in_features: dict[str, int], out_features: dict[str, int]) -> None:
    """name → size of every matrix that is quantized. Raises ConfigError with the group sizes that work."""
    group_size, in_word = options.group_size, 32 // options.bits
    wrong = {name: size for name, size in in_features.items() if size % group_size}
    if wrong:
        name, size = next(iter(wrong.items()))
        fits = [g for g in GROUP_SIZES if all(s % g == 0 for s in in_features.values())]
        raise ConfigError(
            f"--w-group-size {group_size} does not divide the {size} inputs of {name}",
            f"give --w-group-size {' or '.join(map(str, fits))}" if fits else f"keep it out with --skip {name}",
        )
    for name, size in out_features.items():
        if size % in_word:
            raise ConfigError(
                f"{name} has {size} outputs, which do not fill words of {in_word} codes",
                f"keep it out with --skip {name}",
            )


def _check(ok: bool, flag: str, value: object, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"--{flag} is {value!r}", f"give {wanted}")
