"""What a run of the Xen lab came to, as Markdown: SHARES holds both hosts' shares. Fails if a guest has run twice, or
back in time, has found a wrong page, or is not where it should be."""

import json
import re
import sys

shares, link = sys.argv[1:3]
TICK = 0.1
failures = []


def lines(host):
    with open(f"{shares}/{host}/stamped", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t", 2) for line in file]


stamped = {host: lines(host) for host in ("near", "far")}


def ticks(host, guest):
    """Time, number, operations and bad pages of each tick."""
    found = []
    for at, name, text in stamped[host]:
        tick = re.fullmatch(r"TICK (\d+) (\d+) (\d+)", text)
        if name.startswith("console/") and re.search(rf"\b{guest}(--\w+)?\.log$", name) and tick:
            found.append((float(at), *map(int, tick.groups())))
    return found


def report(guest, side):
    try:
        with open(f"{shares}/{'near' if side == 'send' else 'far'}/{guest}.{side}.json", encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def wrong(guest, what):
    failures.append(f"{guest}: {what}")


def show(value, form="{:.2f}"):
    return "–" if value is None else form.format(value)


def check_devices(guest):
    """The guest's disk and network: right everywhere, and in use at both hosts."""
    for host in ("near", "far"):
        texts = [text for _, name, text in stamped[host] if re.search(rf"console/.*\b{guest}(--\w+)?\.log$", name)]
        disks = [tuple(map(int, text.split()[3:])) for text in texts if re.fullmatch(r"DISK xvda( \d+){5}", text)]
        answers = [int(text.split()[1]) for text in texts if re.fullmatch(r"NET \d+", text)]
        # Operations, sweeps, bad blocks, errors.
        if len(disks) < 2 or disks[-1][0] <= disks[0][0] or any(disk[2:] != (0, 0) for disk in disks):
            wrong(guest, f"its disk at the {host} host: {disks[-1:]}")
        if len(answers) < 2 or answers[-1] <= answers[0]:
            wrong(guest, f"its network at the {host} host: {answers[-1:]}")


phases = {}
for at, name, text in stamped["near"]:
    if name == "phase":
        word, guest, *rest = text.split()
        phases.setdefault(guest, {})[word] = (float(at), rest)
with open(f"{shares}/near/info", encoding="utf-8") as file:
    info = {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in file if ":" in line)}
with open(f"{shares}/near/moves", encoding="utf-8") as file:
    moves = dict(line.split(None, 1) for line in file if line.strip())

rows = []
for guest, way in moves.items():
    phase = phases.get(guest, {})
    if "end" not in phase or "failed" in phase:
        wrong(guest, f"`{way.strip()}` failed; see near/job.log and its logs")
        continue
    start, end = phase["start"][0], phase["end"][0]
    near, far = ticks("near", guest), ticks("far", guest)
    life = near + far
    for before, after in zip(life, life[1:]):
        if after[1] <= before[1] or after[2] < before[2]:
            wrong(guest, f"has run twice, or back in time: {before}, {after}")
    bad = max(tick[3] for tick in life)
    if bad:
        wrong(guest, f"{bad} bad pages")
    if way.startswith("devices"):
        check_devices(guest)
    stays = way.split()[0] in ("cut", "resolve")
    if stays == bool(far):
        wrong(guest, "runs at the wrong host")
        continue
    gaps = [after[0] - before[0] - TICK for before, after in zip(life, life[1:]) if after[0] > start]
    send, recv = report(guest, "send"), report(guest, "recv")
    # A pager that was killed leaves no report; what its follower says is of its own time.
    faults = ((recv or send).get("faults") or {}).get("network")
    median = (recv.get("faults") or {}).get("p50_ms")
    rtt = (send.get("link") or {}).get("min_rtt_ms")
    rows.append(
        [
            f"`{way.strip()}`",
            f"{end - start:.1f}",
            show(max(gaps)),
            show((send.get("downtime") or {}).get("total")),
            show(faults, "{}"),
            show(median / rtt if median and rtt and faults else None),
            str(bad),
            "near" if stays else "far",
        ]
    )

print(f"Link: `{link}`. Hosts: Xen {info.get('xen_version', '?')} under TCG, 1 CPU each. Guest: PVH, 128 MiB, 1 vCPU; its own")
print("memory checker rewrites 1 MB/s of 48 MiB and verifies 8 MB/s, and says how it fares ten times a second.\n")
print("| moved by | total s | longest gap between two ticks s | downtime it claims s | network faults | median fault ÷ RTT | bad pages | runs at |")
print("|---|---|---|---|---|---|---|---|")
for row in rows:
    print("| " + " | ".join(row) + " |")
for failure in failures:
    print(f"\n**Failed**: {failure}")
if failures or len(rows) != len(moves):
    sys.exit(1)
