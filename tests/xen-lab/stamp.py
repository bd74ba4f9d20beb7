"""Writes down when each line of a Xen host's guest consoles, and of its job's phases, came, by this machine's clock:
SHARE/stamped."""

import os
import sys
import time

share = sys.argv[1]
read = {}
with open(os.path.join(share, "stamped"), "w", buffering=1, encoding="utf-8") as out:
    while True:
        consoles = os.path.join(share, "console")
        for name in [*(os.path.join("console", name) for name in os.listdir(consoles)), "phase"]:
            try:
                with open(os.path.join(share, name), "rb") as file:
                    file.seek(read.get(name, 0))
                    text = file.read()
            except FileNotFoundError:
                continue
            # Only whole lines.
            whole = text.rfind(b"\n") + 1
            read[name] = read.get(name, 0) + whole
            for line in text[:whole].decode("utf-8", "replace").splitlines():
                print(f"{time.time():.3f}\t{name}\t{line}", file=out)
        time.sleep(0.01)
