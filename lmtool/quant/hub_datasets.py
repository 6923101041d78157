"""Data sets by the names that other tools know, through Hugging Face's `datasets`. They need a network once."""

from collections.abc import Iterator

from lmtool.errors import ConfigError

# name → repository, configuration, split, column, data files
_SOURCES: dict[str, tuple[str, str | None, str, str, str | None]] = {
    "c4": ("allenai/c4", None, "train", "text", "en/c4-train.00000-of-01024.json.gz"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "train", "sentence", None),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", None),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation", "text", None),
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
    repository, configuration, split, column, files = _SOURCES[name]
    try:
        rows = datasets.load_dataset(repository, configuration, split=split, data_files=files, streaming=True)
        taken = 0
        for row in rows:
            if row[column].strip():
                yield row[column]
                taken += len(row[column])
            if taken >= num_characters:
                return
    except Exception as error:  # whatever the library and what is below it raise without a network
        raise ConfigError(
            f"--calib-dataset {name} cannot be read from the hub ({type(error).__name__})", instead
        ) from error
