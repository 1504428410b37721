"""The same work in several threads at the same time."""

import threading


def in_threads(work, count=4):
    """Calls ``work(number)`` in so many threads; returns when all have ended."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
