"""What a run of the Xen lab came to, as a Markdown table: SHARES holds both hosts' shares."""

import re
import sys

shares, link = sys.argv[1:3]


def lines(host):
    with open(f"{shares}/{host}/stamped", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t", 2) for line in file]


def ticks(host):
    found = []
    for at, name, text in lines(host):
        tick = re.fullmatch(r"TICK (\d+) (\d+) (\d+)", text)
        if name != "phase" and tick:
            found.append((float(at), *map(int, tick.groups())))
    return found


phases = {text.split()[0]: (float(at), text) for at, name, text in lines("near") if name == "phase"}
start, end = phases["start"][0], phases["end"][0]
near, far = ticks("near"), ticks("far")
if not far:
    sys.exit("the guest never ticked at the far host")
life = near + far
for before, after in zip(life, life[1:]):
    if after[1] <= before[1] or after[2] < before[2]:
        sys.exit(f"the guest has run twice, or back in time: {before}, {after}")
gap = max(after[0] - before[0] for before, after in zip(life, life[1:]) if after[0] > start)
bad = max(tick[3] for tick in life)
with open(f"{shares}/near/info", encoding="utf-8") as file:
    info = dict(line.split(":", 1) for line in file if ":" in line)
print(f"Link: `{link}`. Hosts: Xen {info.get('xen_version', '?').strip()} under TCG, 1 CPU each. Guest: PVH, 128 MiB, 1 vCPU; its own "
      "memory checker rewrites 1 MB/s and verifies 4 MB/s.\n")
print("| engine | total s | downtime s (longest gap between two ticks of 0.1 s) | bad pages |\n|---|---|---|---|")
print(f"| `xl migrate` | {end - start:.1f} | {gap - 0.1:.2f} | {bad} |")
if bad:
    sys.exit(1)
