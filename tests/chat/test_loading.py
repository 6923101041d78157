"""The line about a model that loads: there while it does, gone afterwards, and nowhere but on a terminal."""

import signal
import subprocess
import sys

from tests.chat.terminal import REPO, Terminal

SCRIPT = r"""
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
from lmtool.chat.loading import loading
with loading("some/[model]\x1b[2J") as tell:
    if tell:
        for what in ("loading weights", "compiling kernels", "capturing decode steps"):
            tell(what, 3, 32)
            signal.sigwait([signal.SIGUSR1])
print("answer")
"""


def test_each_part_is_said_in_one_line_that_goes_away() -> None:
    terminal = Terminal("-c", SCRIPT, PYTHONPATH=str(REPO))
    try:
        for what in ("loading weights", "compiling kernels", "capturing decode steps"):
            terminal.wait(rf"some/\[model\].*: {what} .*3/32")
            terminal.child.kill(signal.SIGUSR1)
        assert terminal.end() == 0
        assert "answer" in terminal.display
        assert "capturing" not in terminal.display
    finally:
        terminal.close()


def test_a_pipe_gets_nothing_of_it() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=REPO)
    assert (run.stdout, run.stderr) == ("answer\n", "")
