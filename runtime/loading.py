"""Loading for runs of days: manifests that do not fit in memory, mixtures of them, the order of a run.

The paper's stage 1 reads 11,000 hours (Section 4.1), by our estimate 8.5 million utterances: as Python
objects they would take gigabytes in each process that trains, and again in each of its loaders.  So a
manifest is opened by an index, and its lines are parsed when they are asked for.  The order of a run
follows from the seed and the number of the step alone: a resumed run needs no record of what was read, and
every process knows what the others do without asking.
"""

import bisect
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from data import BatchBuilder, parse_example, window_seconds
from runtime.errors import CANNOT_BE_USED, UserError, tell, unusable
from runtime.files import write_file
from runtime.manifests import decode_entry, open_manifest, scan, starts_a_list, where_in
from runtime.processes import ignore_signals

# ---------------------------------------------------------------------------------------------
# manifests of any length

# Where an entry lies, and what its cost is made of; 24 bytes an entry
INDEX = np.dtype([("start", "i8"), ("size", "i4"), ("number", "i4"), ("characters", "i4"), ("seconds", "f4")])


class Manifest:
    """A manifest opened and not read: manifest[i] is the Example, parsed when asked for (UserError)."""

    def __init__(self, path, stage=None):
        self.path, self.stage = path, stage
        self.folder = os.path.dirname(os.path.abspath(path))
        with open_manifest(path) as f:
            self.is_list = starts_a_list(f)
            self.index = open_index(f, path)  # all that is in memory, shared by a machine's processes

    def __len__(self):
        return len(self.index)

    def where(self, i):
        return where_in(self.path, int(self.index["number"][i]), self.is_list)

    def size(self, i):
        """size_of example i, read off the index: no line is parsed."""
        return int(self.index["characters"][i]), float(self.index["seconds"][i])

    def __getitem__(self, i):
        row = self.index[i]  # raises IndexError beyond the end, which ends a loop over the examples
        with open_manifest(self.path) as f:  # anew: loader processes must not share a position in the file
            f.seek(int(row["start"]))
            entry = decode_entry(f.read(int(row["size"])), self.where(i))
        return parse_example(entry, int(i), self.where(i), self.folder, self.stage, check=False)


def open_index(f, path):
    """The index of an open manifest (n,): mapped, or built and saved for the next time.

    It lies beside the manifest or, where that cannot be written, in the temporary folder.  It has the
    manifest's time of change: with any other, even an earlier one, the manifest has been replaced.
    """
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    places = [f"{path}.index.npy", os.path.join(tempfile.gettempdir(), f"{name}.index.npy")]
    # one process builds it, the others wait and find it built; where a disk cannot lock, several may build it
    with contextlib.suppress(OSError):
        fcntl.flock(f, fcntl.LOCK_EX)
    changed = os.fstat(f.fileno()).st_mtime_ns
    for place in places:
        with contextlib.suppress(OSError, ValueError):  # none, or half of one
            index = np.lib.format.open_memmap(place, mode="r")
            is_index = index.dtype == INDEX and index.ndim == 1
            if is_index and os.stat(place).st_mtime_ns == changed:
                return index
    index = build_index(f, path)
    if not len(index):
        raise UserError(f"{path}: holds no example")

    def write(temporary):
        with open(temporary, "wb") as out:
            np.save(out, index)
        os.utime(temporary, ns=(changed, changed))

    for place in places:
        with contextlib.suppress(UserError):  # cannot be written
            write_file(place, write)
            break
    return index


def build_index(f, path):
    """The index of an open manifest, in one pass over its lines."""
    rows = ((start, len(raw), number, *largest_size(raw)) for start, number, raw in scan(f, path))
    return np.fromiter(rows, dtype=INDEX)


def largest_size(raw):
    """size_of an entry, in the stage where that is largest: one index serves all stages."""
    n_characters, seconds = 0, -1.0  # of a broken entry too: it is reported when it is read
    # stages differ in the authors' format alone
    for stage in (None, 1, 4) if b'"audio_id"' in raw else (None,):
        with contextlib.suppress(*CANNOT_BE_USED):
            example = parse_example(json.loads(raw), 0, "", "", stage, check=False)
            n, seconds = size_of(example)
            n_characters = max(n_characters, n)
    return n_characters, seconds


def path_and_share(source):
    """ "FILE" or "FILE:SHARE" -> path, share.  A file whose name looks like the latter is a file."""
    if not os.path.exists(source) and (match := re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", source)):
        return match[1], float(match[2])
    return source, 1.0


class Mixture:
    """Several manifests as one: mixture[i] is an Example of one of them, its id i.

    sources: "FILE" or "FILE:SHARE".  A share of 0.05 is a twentieth of the manifest in each epoch, another
    one each time; 2 is all of it twice, both times under the same masks.  The paper's stages 2 and 3 have a
    part of stage 1's data among theirs (Section 3.2).  `shares` are what `schedule_of` draws the epochs by.
    """

    def __init__(self, sources, stage=None):
        self.manifests, self.shares, self.first_ids = [], [], [0]
        for source in sources:
            path, share = path_and_share(source)
            if not 0 < share <= 1000:
                raise UserError(f"{source}: the share must be above 0, and 1000 at the most")
            manifest = Manifest(path, stage)
            if not round(len(manifest) * share):
                raise UserError(f"{source}: this share of {len(manifest)} examples is none of them")
            self.manifests.append(manifest)
            self.shares.append((len(manifest), share))
            self.first_ids.append(self.first_ids[-1] + len(manifest))

    def __len__(self):
        return self.first_ids[-1]

    def place(self, i):
        """The manifest that holds example i, and its place there."""
        part = bisect.bisect_right(self.first_ids, i) - 1
        return self.manifests[part], i - self.first_ids[part]

    def where(self, i):
        manifest, j = self.place(i)
        return manifest.where(j)

    def size(self, i):
        manifest, j = self.place(i)
        return manifest.size(j)

    def __getitem__(self, i):
        manifest, j = self.place(i)
        return dataclasses.replace(manifest[j], id=i)

    def read(self, ids):
        """These examples, and what is to be told (`unusable`) of those whose lines cannot be used."""
        examples, skipped = [], []
        for i in ids:
            try:
                examples.append(self[i])
            except CANNOT_BE_USED as e:
                skipped.append(unusable(i, self.where(i), e))
        return examples, skipped


def record_skipped(group, out, skipped, seen, limit, n):
    """Appends what all processes skipped, and was not seen before, to out/skipped.jsonl.

    seen: ids, kept by rank 0; each counts once, for a broken clip is met again in every epoch.  Raises
    UserError when they are more than the share `limit` of n examples, and more than one unless limit is 0.
    """
    everything = {entry["id"]: entry for entry in itertools.chain.from_iterable(group.gather(skipped))}

    def write():
        new = [entry for id, entry in everything.items() if id not in seen]
        seen.update(everything)
        try:
            with open(os.path.join(out, "skipped.jsonl"), "a", encoding="utf-8") as f:
                f.writelines(json.dumps(entry) + "\n" for entry in new)
        except OSError as e:  # a full disk: the ids are in the checkpoints as well
            tell(f"{out}/skipped.jsonl: cannot be written ({e.strerror})")
        return len(seen)

    n_unusable = group.first_only(write)
    if n_unusable > max(limit > 0, limit * n):  # a single one stops no run
        what = f"{n_unusable} of {n} examples cannot be used, more than {limit:.0%}"
        raise UserError(f"{what}: see {out}/skipped.jsonl")


# ---------------------------------------------------------------------------------------------
# examples of like cost side by side


def size_of(example):
    """Characters of an example's text, an answer's twice for its end marks; seconds of its clip or -1."""
    n_characters = len(example.question) + 2 * len(example.answer) + 2 * len(example.rejected or "")
    return n_characters, -1.0 if example.duration is None else example.duration


def cost_of(size, config):
    """About how many positions an example takes: (of text, of audio).  Nothing is tokenized or read for it.

    size: size_of the example.  Four characters are about a token, a second of audio is 12.5 semantic
    tokens (Section 3.1), and 55 stand for the fixed words of the prompt and the end marks.
    """
    n_characters, seconds = size
    if not 0 <= seconds <= window_seconds(config):  # unknown counts as the longest: memory must suffice
        seconds = window_seconds(config)
    return 55 + n_characters // 4, config.n_queries + round(12.5 * seconds)


def bucket(ids, costs, budget):
    """ids in batches of similar cost, each at most `budget` with its padding, or one example.

    costs[i]: cost_of example i.  Examples of like cost need little padding.
    An empty list gives one empty batch: a process without examples has to end the step, too.
    """
    batches, widest = [], (0, 0)
    for i in sorted(ids, key=lambda i: (sum(costs[i]), i)):
        # text and audio are padded each on its own: the longest of both may be of two examples
        wider = tuple(map(max, widest, costs[i]))
        if batches and sum(wider) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
            widest = wider
        else:
            batches.append([i])
            widest = costs[i]
    return batches or [[]]


# ---------------------------------------------------------------------------------------------
# the order of a run


def epoch_length(shares):
    """Examples in an epoch.  shares: (examples, share) of each manifest of a Mixture."""
    return sum(round(n * share) for n, share in shares)


def epoch_order(shares, seed, epoch):
    """The ids of an epoch, shuffled (n,): 68 MB for 8.5 million examples of manifests read whole.

    A share of 2.25 is the manifest twice and a quarter of it.  The quarters of four epochs make the whole:
    a walk through the manifest, in an order that is the run's, that each epoch takes up where the one
    before ended.  Drawn anew each time, some examples would never be read.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    places = torch.randperm(epoch_length(shares), generator=generator)
    if all(share == 1 for _, share in shares):
        return places  # the place of an example among all is its id
    ids, first_id = [], 0
    for part, (n, share) in enumerate(shares):
        times, rest = divmod(round(n * share), n)
        ids += [torch.arange(first_id, first_id + n)] * times
        if rest:
            walk = torch.randperm(n, generator=torch.Generator().manual_seed(seed + part))
            ids.append(first_id + walk[(epoch * rest + torch.arange(rest)) % n])
        first_id += n
    return torch.cat(ids)[places]


def schedule_of(shares, batch, seed, start=0):
    """(step, epoch, ids of the global batch) for ever, from step `start`: every example once an epoch.

    shares: (examples, share) of each manifest.  A global batch is drawn from all lengths alike, and
    micro-batches sort it: length tells corpora apart, and batches of one corpus each pull the model to
    and fro.  What is left at the end of an epoch is a batch of its own.
    """
    per_epoch = math.ceil(epoch_length(shares) / batch)
    for epoch in itertools.count(start // per_epoch):
        order = epoch_order(shares, seed, epoch)
        for step in range(max(start, epoch * per_epoch), (epoch + 1) * per_epoch):
            first = (step - epoch * per_epoch) * batch
            yield step, epoch, order[first : first + batch].tolist()


@dataclass(eq=False)
class MicroBatches(torch.utils.data.IterableDataset):
    """What one process works on, micro-batch by micro-batch: "last" ends a step.

    torch's DistributedSampler shares out single examples and begins at an epoch.  Here micro-batches are
    cut to fit the memory, and a run begins at any step.
    """

    examples: Mixture
    builder: BatchBuilder
    batch: int  # examples in a step, of all processes together
    rank: int  # of `size` processes
    size: int
    budget: int  # positions in a micro-batch
    seed: int
    start: int  # the first step
    stop: int  # the one after the last

    def plan(self):
        """(step, epoch, ids, whether the step ends here) of every micro-batch."""
        for step, epoch, ids in schedule_of(self.examples.shares, self.batch, self.seed, self.start):
            if step >= self.stop:
                return
            mine = ids[self.rank :: self.size]
            costs = {i: cost_of(self.examples.size(i), self.builder.config) for i in mine}
            parts = bucket(mine, costs, self.budget)
            for part in parts:
                yield step, epoch, part, part is parts[-1]

    def __iter__(self):
        # each loader makes the whole plan, which costs little, and works on its share of it; DataLoader
        # asks the loaders in turn, so the micro-batches arrive in the order of the plan
        first, stride = 0, 1
        if worker := torch.utils.data.get_worker_info():
            ignore_signals()
            first, stride = worker.id, worker.num_workers
        for _, epoch, ids, last in itertools.islice(self.plan(), first, None, stride):
            examples, skipped = self.examples.read(ids)
            micro = self.builder(examples, epoch)
            yield micro | {"skipped": skipped + micro["skipped"], "last": last}
