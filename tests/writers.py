"""Processes that hold a lock or write a file until they are killed."""

import signal
import subprocess
import sys


def other_process(code, *arguments):
    """A process that runs some code and then waits to be killed."""
    program = f"import sys, time\nfrom pathlib import Path\nfrom mldcn.files import *\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


HOLD = "with locked(Path(sys.argv[1])):\n    print('ready', flush=True)\n    time.sleep(60)"
WRITE = (
    "with atomic(Path(sys.argv[1])) as file:\n    file.write_text('half')\n"
    "    print('ready', flush=True)\n    time.sleep(60)"
)
SCRATCH = (
    "with scratch('test', Path(sys.argv[1])) as folder:\n    (folder / 'file').write_text('')\n"
    "    print('ready', flush=True)\n    time.sleep(60)"
)
