"""`python -m lmtool` and the console script `lmtool`."""

import sys


def main() -> int:
    try:
        from lmtool.cli import main as run

        return run()
    except KeyboardInterrupt:  # while modules are still being imported: later ones are the command line's own
        return 130


if __name__ == "__main__":
    sys.exit(main())
