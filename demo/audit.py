"""Counts what a run consumed, from its own samples/ and the shards' indexes, for every epoch that is complete.

    python demo/audit.py RUN PACKED

Of a step that was done twice, the highest attempt counts. Ends with status 1 if a sample was repeated or skipped.
"""

import json
import sys
from collections import Counter
from pathlib import Path


def packed_keys(packed: Path) -> list[str]:
    """The key of every sample, from the .idx beside each shard."""
    lines = [line for index in sorted(packed.glob("*.idx")) for line in index.read_text().splitlines()[1:]]
    members = [Path(line.split()[3]) for line in lines]
    return [str(member.with_name(member.name.split(".")[0])) for member in members]


def consumed_keys(run: Path) -> dict[int, Counter[str]]:
    """How often each key was used, by epoch."""
    rows = [
        json.loads(line) for file in (run / "samples").glob("*.jsonl") for line in file.open() if line.endswith("}\n")
    ]
    newest: dict[int, int] = {}
    for row in rows:
        newest[row["step"]] = max(row["attempt"], newest.get(row["step"], 0))
    epochs: dict[int, Counter[str]] = {}
    for row in rows:
        if row["attempt"] == newest[row["step"]]:
            for epoch, key in zip(row["epochs"], row["keys"], strict=True):
                epochs.setdefault(epoch, Counter())[key] += 1
    return epochs


def main(run: Path, packed: Path) -> int:
    keys, epochs = set(packed_keys(packed)), consumed_keys(run)
    complete = sorted(epochs)[:-1]  # the last batch reaches into an epoch that is not finished
    faults = 0
    for epoch in complete:
        used = epochs[epoch]
        repeated, skipped = sum(used.values()) - len(used), len(keys - set(used))
        faults += repeated + skipped + len(set(used) - keys)
        line = f"{len(keys & set(used)):,} of {len(keys):,} samples, {repeated} repeated, {skipped} skipped"
        if epoch == complete[0] or repeated or skipped:
            print(f"epoch {epoch}: {line}")
    summary = "all like the first" if not faults else "NOT all as they should be"
    print(f"{len(complete)} complete epochs were counted, {summary}")
    return 1 if faults or not complete else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
