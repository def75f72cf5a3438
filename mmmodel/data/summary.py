"""What a run reads of its samples and what it leaves out, in a few lines for the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from mmmodel.data import shards
from mmmodel.data.concepts import SPLITS
from mmmodel.data.loader import ShardDataset
from mmmodel.limits import listed

SHOWN = 8  # kinds of members, at most


def lines(
    dataset: ShardDataset,
    members: Mapping[str, Sequence[str]],
    read: Mapping[str, set[int]],
    full: Mapping[str, tuple[int, str]],
) -> Iterator[str]:
    """members: modality -> its extensions.  read: modality -> numbers of the entries from which it was read.

    full: modality -> how many are as long as its front end lets them be, and how long that is.
    """
    entries = dataset.entries
    some = set().union(*read.values())
    splits = Counter(entries[i].split for i in some)
    names = [*(name for name in SPLITS if name in splits), *sorted(set(splits) - set(SPLITS))]
    yield f"{len(some)} samples: {', '.join(f'{name} {splits[name]}' for name in names)}"
    parts = []
    for name, extensions in members.items():
        lost = sum(entry.member(extensions) is not None for entry in entries) - len(read[name])
        parts.append(f"{name} {len(read[name])}" + (f" ({lost} left out, broken or blank)" if lost else ""))
    yield f"they hold {', '.join(parts)}"
    if cut := [f"{name} {count} ({limit})" for name, (count, limit) in full.items() if count]:
        yield f"at the limit where longer ones are cut: {', '.join(cut)}"
    if dataset.others:
        yield f"left out: {dataset.others} samples of other languages or splits"
    if len(some) < len(entries):
        yield f"left out: {len(entries) - len(some)} samples with nothing to read"
    if bare := sum("json" in entry.members and not entry.meta for entry in entries):
        yield f"{bare} KEY.json are empty or do not read: their samples are of train"
    if archives := shards.unread(dataset.path):
        yield f"not read: {listed(archives, shards.SHOWN)}"
    unread = Counter()
    dotted = []
    for entry in entries:
        used = {next((e for e in extensions if e in entry.members), "") for extensions in members.values()}
        for extension in entry.members.keys() - used - {"json"}:
            if "." in extension:
                dotted.append(f"{entry.key}.{extension}")
            else:
                unread[extension] += 1
    if unread:
        kinds = sorted(unread, key=lambda name: (-unread[name], name))[:SHOWN]
        yield f"files that nobody reads: {', '.join(f'{name} {unread[name]}' for name in kinds)}"
    if dotted:
        yield f"files that nobody reads: {len(dotted)} such as {dotted[0]}: a key ends at the first dot of the name"
    if others := [f"{name} {splits[name]}" for name in names if name not in SPLITS]:
        yield f"splits that are read only where they are named: {', '.join(others)}"
