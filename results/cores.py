"""A pool for jobs that are programs: on a CPU each has a core of its own, on a GPU one runs at a time.

On a CPU, two jobs with a core each take less time than the same two one after the other, on both cores.
"""
import concurrent.futures
import os
import queue

import torch


def results_of(function, jobs):
    """Yield function(*job) for each of the jobs, in the order in which they end.

    If one raises, the pool drops those that have not started, waits for those that run, and raises it here.
    """
    pool = new_pool()
    try:
        futures = [pool.submit(function, *job) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def new_pool():
    """Threads that start programs: one for a GPU, else one for each core."""
    if torch.cuda.is_available():
        return concurrent.futures.ThreadPoolExecutor(1)
    free = queue.SimpleQueue()
    for core in os.sched_getaffinity(0):
        free.put(core)

    def take_a_core():
        os.sched_setaffinity(0, {free.get()})  # of this thread; the programs that it starts inherit it

    return concurrent.futures.ThreadPoolExecutor(free.qsize(), initializer=take_a_core)
