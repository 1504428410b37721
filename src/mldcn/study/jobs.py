"""Runs of a study in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mldcn.errors import UserError

Job = TypeVar("Job")


def run_jobs(
    todo: Sequence[Job], run: Callable[[Job, int], str], jobs: int, say: Callable[[str], None]
) -> None:
    """Calls ``run(job, threads)`` for each job and says how it went.

    Args:
        todo: the jobs.
        run: a module's function; gives a line on how the job went.
        jobs: at the same time, each with an equal share of the cores.
        say: told of the progress, a line a time.

    Raises:
        UserError: a job's process was killed.
    """
    threads = max(1, multiprocessing.cpu_count() // jobs)
    # Processes are started afresh: a forked one would inherit the parent's thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        running = {pool.submit(run, job, threads): job for job in todo}
        try:
            for done, future in enumerate(as_completed(running), 1):
                say(f"{done} of {len(todo)}: {running[future]}: {future.result()}")
        except BrokenProcessPool:
            raise UserError(
                "a process that trained a model was killed, perhaps for want of memory; start the study again, it "
                "goes on where it was, with fewer --jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nothing new is begun


def _end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, killed for example."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # what it was writing is left as by a kill, from which a run can be resumed

    threading.Thread(target=watch, daemon=True).start()
