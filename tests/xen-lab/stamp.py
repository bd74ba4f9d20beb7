"""Writes down when each line of a Xen host's guest consoles came, by this machine's clock: SHARE/stamped."""

import os
import sys
import time

share = sys.argv[1]
read = {}
with open(os.path.join(share, "stamped"), "w", buffering=1, encoding="utf-8") as out:
    while True:
        names = [os.path.join("console", name) for name in os.listdir(os.path.join(share, "console"))]
        for name in [*names, "phase"]:
            try:
                with open(os.path.join(share, name), "rb") as file:
                    file.seek(read.get(name, 0))
                    text = file.read()
            except FileNotFoundError:
                continue
            # Only whole lines; the phase's file is written anew each time.
            whole = text.rfind(b"\n") + 1
            if name == "phase":
                known = read.get("phase text")
                with open(os.path.join(share, name), "rb") as file:
                    text = file.read()
                if text == known or not text.endswith(b"\n"):
                    continue
                read["phase text"] = text
                whole = len(text)
            else:
                read[name] = read.get(name, 0) + whole
            for line in text[:whole].decode("utf-8", "replace").splitlines():
                print(f"{time.time():.3f}\t{name}\t{line}", file=out)
        time.sleep(0.01)
