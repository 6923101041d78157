"""Data sets by the names that other tools know, through Hugging Face's `datasets`. They need a network once."""

from collections.abc import Iterator
from dataclasses import dataclass

from lmtool.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a data set lies: files without a configuration, or the configuration's own."""

    repository: str
    column: str
    split: str = "train"
    configuration: str | None = None
    files: str | None = None
    revision: str | None = None


_SOURCES = {
    "c4": _Source("allenai/c4", "text", files="en/c4-train.00000-of-01024.json.gz"),
    # its main branch holds a loading script, which `datasets` no longer runs; the hub itself converts to Parquet
    "ptb": _Source(
        "ptb-text-only/ptb_text_only",
        "sentence",
        files="penn_treebank/train/*.parquet",
        revision="refs/convert/parquet",
    ),
    "wikitext2": _Source("Salesforce/wikitext", "text", configuration="wikitext-2-raw-v1"),
    "pileval": _Source("mit-han-lab/pile-val-backup", "text", split="validation"),
}


def hub_texts(name: str, num_characters: int) -> Iterator[str]:
    """Documents of a data set by its short name, in its order, until there are ``num_characters``.

    Raises ConfigError where `datasets` is not installed or the hub is not reached.
    """
    instead = "give --calib-dataset self, or a FILE of text"
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"--calib-dataset {name} needs the library datasets", f"pip install 'lmtool[lite]', or {instead}"
        ) from None
    source = _SOURCES[name]
    try:
        rows = datasets.load_dataset(
            source.repository,
            source.configuration,
            split=source.split,
            # under the split's name: files alone would all be called train
            data_files={source.split: source.files} if source.files else None,
            revision=source.revision,
            streaming=True,
        )
        taken = 0
        for row in rows:
            if row[source.column].strip():
                yield row[source.column]
                taken += len(row[source.column])
            if taken >= num_characters:
                return
    except Exception as error:  # whatever the library and what is below it raise without a network
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(f"--calib-dataset {name} cannot be read from the hub ({reason})", instead) from error
