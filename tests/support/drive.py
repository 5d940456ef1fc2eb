"""Run a job from a config.json under any launcher, with a fault on request: `drive.py CONFIG [STAGE RANK KIND]`.

STAGE is calibration, evaluation or training; KIND is error, exit (dies without an error), once (dies so in the first
attempt of torchrun), or hang.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vbp.cost.timing
import vbp.recipes.measure
import vbp.statistics.evidence
from vbp import RunConfig, Trainer
from vbp.cli.main import guarded
from vbp.recipes.run import run


def fail(kind: str) -> None:
    """Fail as asked."""
    if kind == "error":
        raise ValueError("the image fell over")
    if kind == "hang":
        time.sleep(600)
    if kind == "exit" or os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def install(stage: str, rank: str, kind: str) -> None:
    """Let one process fail in a stage: in training at the third step of the second epoch."""
    if os.environ.get("RANK", "0") != rank:
        return

    def failing(function: Callable[..., Any], good: int = 0) -> Callable[..., Any]:
        calls = itertools.count()

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) >= good:
                fail(kind)
            return function(*arguments, **keywords)

        return wrapped

    if stage == "calibration":
        vbp.statistics.evidence.collect_statistics = failing(vbp.statistics.evidence.collect_statistics)  # type: ignore[attr-defined]
    elif stage == "evaluation":
        # Not the first: until they have met once, the others may still be reading the model.
        vbp.recipes.measure.evaluate = failing(vbp.recipes.measure.evaluate, good=1)  # type: ignore[attr-defined]
    else:
        real = Trainer.train_epoch

        def train_epoch(trainer: Trainer, loader: Any, epoch: int, *rest: Any, after_step: Any, **more: Any) -> Any:
            def after() -> None:
                after_step()
                if epoch == 2 and trainer.batches_done == 3:
                    fail(kind)

            return real(trainer, loader, epoch, *rest, after_step=after, **more)

        Trainer.train_epoch = train_epoch  # type: ignore[method-assign]


if __name__ == "__main__":
    vbp.cost.timing.TURN_S = 0.005  # how exact times are is no part of the tests
    config = RunConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    if len(sys.argv) > 2:
        install(*sys.argv[2:])
    sys.exit(guarded(lambda: [run(config)].clear()))
