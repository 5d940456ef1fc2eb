"""Start the processes of a job on this machine, as torchrun does, without its own report of a failure."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

from vbp.errors import InputError, PeerError


def is_launcher(processes: int, *, disable_ddp: bool = False) -> bool:
    """Return whether this process is to start those of the job; they find WORLD_SIZE set.

    Raises:
        InputError: Something else says how many there are.
    """
    if processes > 1 and disable_ddp:
        raise InputError(
            f"disable_ddp means one plain process, got it with processes {processes}; leave one of them out"
        )
    return processes > 1 and "WORLD_SIZE" not in os.environ


def launch(processes: int, command: Sequence[str]) -> None:
    """Run a command in so many processes, and wait for them.

    They show their errors and the log of the job themselves; torchrun would add some fifty lines.

    Raises:
        SystemExit: One failed, or they were told to stop.
        PeerError: One was ended by a signal, and could not say so.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    words = ["--standalone", f"--nproc_per_node={processes}", "--no_python", *command]
    logging.disable(logging.ERROR)
    try:
        run(parse_args(words))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise PeerError(f"process {rank} of {processes} was ended by {name}") from None
        raise SystemExit(failure.exitcode) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    finally:
        logging.disable(logging.NOTSET)
