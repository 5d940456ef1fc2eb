"""The `vbp` command's door: whoever interrupts while the libraries load, which takes seconds, gets one line, too."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run `vbp.cli.main` and give its exit code."""
    try:
        from vbp.cli.main import main as command
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything began\n")
        return 128 + signal.SIGINT
    return command()


if __name__ == "__main__":
    sys.exit(main())
