#!/usr/bin/env python3
"""Runs a command while the cores are taken away for moments, as hosts do that are shared.

    scripts/steal.py [--seed N] COMMAND...

Every half second on average one core or all of them are busy for 10 to 500 ms, at a real-time priority (so it needs
root). Ends with the command's exit status.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time

# Seconds that a theft takes, and between two of them on average.
LENGTHS = [0.01, 0.03, 0.1, 0.25, 0.5]
PAUSE = 0.5
# How often all cores go at once.
ALL = 0.6


def take(cpu: int, seconds: float) -> int:
    """Keeps a core busy, in a process of its own. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.sched_setaffinity(0, {cpu})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
    finally:
        os._exit(0)


def steal(seed: int, parent: int) -> None:
    """Takes cores for moments, as long as the parent lives."""
    chance = random.Random(seed)
    cores = sorted(os.sched_getaffinity(0))
    while os.getppid() == parent:
        time.sleep(chance.expovariate(1 / PAUSE))
        taken = cores if chance.random() < ALL else [chance.choice(cores)]
        seconds = chance.choice(LENGTHS)
        for pid in [take(cpu, seconds) for cpu in taken]:
            os.waitpid(pid, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a command while the cores are taken away for moments.")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="of what is taken when")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what is run")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("a command is missing")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        parser.error("real-time priorities are not permitted here: run it as root")
    print(f"steal.py: seed {arguments.seed}", file=sys.stderr, flush=True)
    parent = os.getpid()
    thief = os.fork()
    if thief == 0:
        steal(arguments.seed, parent)
        os._exit(0)
    try:
        return subprocess.call(arguments.command)
    finally:
        os.kill(thief, signal.SIGKILL)
        os.waitpid(thief, 0)


if __name__ == "__main__":
    sys.exit(main())
