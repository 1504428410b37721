"""Runs of a study in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

from mldcn.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_ready(
    ready: Callable[[], Job | None],
    run: Callable[[Job], Result],
    done: Callable[[Job, Result], None],
    jobs: int,
) -> None:
    """Calls ``run`` for jobs that may depend on each other's results, until there are no more.

    Args:
        ready: gives a job that can start now and was not given before, or None; asked again whenever one ended.
        run: a module's function, called in a process of its own.
        done: told of each result, in this process.
        jobs: at the same time.

    Raises:
        UserError: a job's process was killed.
    """
    # Processes are started afresh: a forked one would inherit the parent's thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        running: dict[Future[Result], Job] = {}
        try:
            while True:
                while len(running) < jobs and (job := ready()) is not None:
                    running[pool.submit(run, job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.result())
        except BrokenProcessPool:
            raise UserError(
                "a process that trained a model was killed, perhaps for want of memory; start the study again, it "
                "goes on where it was, with fewer --jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nothing new is begun


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
    left: Iterator[Job] = iter(todo)
    count = 0

    def done(job: Job, line: str) -> None:
        nonlocal count
        count += 1
        say(f"{count} of {len(todo)}: {job}: {line}")

    run_ready(lambda: next(left, None), _Shared(run, threads), done, jobs)


class _Shared(Generic[Job]):
    """``run`` with its share of the cores."""

    def __init__(self, run: Callable[[Job, int], str], threads: int) -> None:
        self.run, self.threads = run, threads

    def __call__(self, job: Job) -> str:
        return self.run(job, self.threads)


def _end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, killed for example."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # what it was writing is left as by a kill, from which a run can be resumed

    threading.Thread(target=watch, daemon=True).start()
