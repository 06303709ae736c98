"""Which rows each training step takes: the same for the same seed."""

import math
import random
from bisect import bisect
from itertools import accumulate, pairwise

from data import are_sentences

EPOCHS = 6  # by default
FEWEST_STEPS = 300  # by default, too: few rows get more epochs,
FEWEST_OF_SENTENCES = 600  # and more of them where answers are sentences
FEWEST_DRAWS = 1200  # aimed at, of rows to forget in a run: batches have more of few ones
WINDOW = 50  # batches within which rows are sorted by length, as group_by_length does
BY_LOSS = 0.5  # of the draws; the rest are uniform, so that no row counts more than twice
RECENT = 0.2  # how much of a side's mean is the last step's
AHEAD = 16  # batches that are drawn at a time, by the losses known then; an even number


# ----------------------------------------------------------------------------------------- a run


class Batches:
    """The batches of a run. They are asked for in their order, and told the rows' losses.

    With forget_per_batch "loss" the first epoch takes every row once, as with "share". After it
    rows that are not learned yet come more often: of the N rows of a side, row i has

        p_i = 1/2 1/N + 1/2 g_i / (g_1 + ... + g_N),    g_i = (1 - exp(-l_i)) / m

    in each draw, and counts 1 / (N p_i) in the mean. l_i is its last loss, so 1 - exp(-l_i) is what
    its answer lacks of probability 1; for an answer of one token that bounds the gradient's norm,
    but for a factor. m is the mean of that over the side's rows about then, as old losses are those
    of another prompt. So the gradient is the same in expectation, and varies less, as most rows are
    soon learned: importance sampling (Katharopoulos and Fleuret, arXiv 1803.00942).

    Where the rows to forget are so few that a run would draw fewer than FEWEST_DRAWS of them, a
    batch has more than their share, after the first epoch and up to half. L_f is the mean over a
    batch's own ones, so they hardly count more for it, and L_f varies less.
    """

    def __init__(self, examples, ways, epochs, batch_size, seed, forget_per_batch):
        """epochs None: as `epochs_of` says."""
        self.examples = examples
        self.ways = ways
        self.batch_size = batch_size
        self.seed = seed
        self.forget_per_batch = forget_per_batch
        self.rows = len(examples) // ways
        self.sides = both_sides(examples[: self.rows])
        self.hardness = [0.0] * self.rows  # g of each row, however it was asked
        self.means = {True: 1.0, False: 1.0}  # m of the rows to forget, and of the others
        self.current = self.draw(0, 0)  # batches of the epoch: indices, and a weight for each
        self.per_epoch = len(self.current)
        answers = [e for e in examples[: self.rows] if not e.forget]  # true ones
        self.epochs = epochs or epochs_of(self.per_epoch, are_sentences(answers))
        counts = shares(*map(len, self.sides), batch_size)
        self.counts = at_least(math.ceil(FEWEST_DRAWS / len(self)), counts)

    def __len__(self):
        """The steps of the run."""
        return self.epochs * self.per_epoch

    def batch(self, step):
        """A step's epoch, its indices, and what each row counts in the mean over its side."""
        epoch, n = divmod(step, self.per_epoch)
        if n == 0:
            self.current = []
        if n == len(self.current):
            self.current += self.draw(epoch, n)
        return epoch + 1, *self.current[n]

    def ahead(self, step):
        """The indices of this batch and those drawn with it, if it is the first of these."""
        n = step % self.per_epoch
        drawn = [] if n % AHEAD else self.current[n : n + AHEAD]
        return [i for indices, _ in drawn for i in indices]

    def tell(self, indices, losses):
        """The losses of a step's rows, by which later batches are drawn."""
        lacking = {i % self.rows: -math.expm1(-loss) for i, loss in zip(indices, losses)}
        for side in self.means:
            of_side = {i: x for i, x in lacking.items() if self.examples[i].forget == side}
            if of_side:
                mean = sum(of_side.values()) / len(of_side)
                self.means[side] += RECENT * (mean - self.means[side])
            for i, x in of_side.items():
                self.hardness[i] = x / max(self.means[side], 1e-6)

    def draw(self, epoch, n):
        """The epoch's batches from batch n on: all, or as many as are drawn at a time."""
        if epoch == 0 or self.forget_per_batch != "loss":
            batches = epoch_batches(
                self.examples,
                self.batch_size,
                self.seed,
                epoch,
                self.forget_per_batch,
                self.ways,
            )
            return [(indices, [1.0] * len(indices)) for indices in batches]
        rng = random.Random(f"order {self.seed} {epoch} {n}")
        counts = self.counts[n : n + AHEAD]
        batches = [[] for _ in counts]
        weights = {}
        for side, k in zip(self.sides, map(sum, zip(*counts))):
            drawn, of_side = draw_rows(side, self.hardness, k, rng)
            weights |= of_side
            batches.reverse()  # so that no batch has one more of both sides
            for place, i in enumerate(drawn):  # the same rows go to different batches
                batches[place % len(batches)].append(i)
        rng.shuffle(batches)
        step = epoch * self.per_epoch + n
        batches = asked_in_ways(batches, self.rows, self.ways, rng, step)
        return [(indices, [weights[i % self.rows] for i in indices]) for indices in batches]


def epochs_of(per_epoch, sentences):
    """How many epochs of so many batches, where the user says nothing: EPOCHS, or more if few."""
    fewest = FEWEST_OF_SENTENCES if sentences else FEWEST_STEPS
    return max(EPOCHS, math.ceil(fewest / per_epoch))


def draw_rows(rows, hardness, k, rng):
    """k of the rows, some more than once and then in a row, and {row: what it counts}.

    Systematic sampling: a row comes as often as expected, rounded up or down.
    """
    if not rows:
        return [], {}
    uniform = 1 / len(rows)
    total = sum(hardness[i] for i in rows)
    parts = [hardness[i] / total if total else uniform for i in rows]
    p = {i: (1 - BY_LOSS) * uniform + BY_LOSS * part for i, part in zip(rows, parts)}
    order = rng.sample(rows, len(rows))
    ends = list(accumulate(p[i] for i in order))
    first = rng.random()
    places = [bisect(ends, (first + j) / k * ends[-1]) for j in range(k)]
    drawn = [order[min(place, len(order) - 1)] for place in places]
    return drawn, {i: uniform / p[i] for i in rows}


# --------------------------------------------------------------------------------------- an epoch


def epoch_batches(examples, batch_size, seed, epoch, forget_per_batch=None, ways=1):
    """One epoch's batches of indices: shuffled, rows of similar length together.

    forget_per_batch None: every row once, forget and retain mixed by chance (the released code).
    "share", or "loss" in its first epoch: every row once, and each batch has its share of both
    sides. K: every retain row once, and in each batch K forget rows, which come round as often as
    needed.
    ways: examples holds the rows so many times, each time asked otherwise. A batch is of one way,
    every second one of the first.
    """
    rng = random.Random(f"order {seed} {epoch}")
    rows = len(examples) // ways
    forget, retain = both_sides(examples[:rows])
    k = forget_per_batch if isinstance(forget_per_batch, int) else 0
    if forget_per_batch in ("share", "loss"):
        counts = shares(len(forget), len(retain), batch_size)
        forget, retain = rng.sample(forget, len(forget)), rng.sample(retain, len(retain))
        batches = shared_out(forget, retain, counts, examples)
    else:
        pool = retain if k else forget + retain
        rng.shuffle(pool)
        size = batch_size - k
        pool = sort_in_windows(pool, range(0, len(pool), WINDOW * size), examples)
        batches = [pool[i : i + size] for i in range(0, len(pool), size)]
    rng.shuffle(batches)
    if k:
        add_forget_rows(batches, forget, k, rng)
    return asked_in_ways(batches, rows, ways, rng, epoch * len(batches))


def both_sides(examples):
    """The indices of the forget rows, and those of the retain rows."""
    forget = [i for i, e in enumerate(examples) if e.forget]
    retain = [i for i, e in enumerate(examples) if not e.forget]
    return forget, retain


def sort_in_windows(indices, starts, examples):
    """The indices, from each start to the next in the order of their examples' lengths."""
    ordered = []
    for start, end in zip(starts, [*starts[1:], len(indices)]):
        ordered += sorted(indices[start:end], key=lambda i: len(examples[i].ids))
    return ordered


def shares(n_forget, n_retain, batch_size):
    """How many forget and retain rows each batch of an epoch has, if each has its share of both.

    So L_f is a mean over as many rows in every step, and no batch is of one side's long rows alone.
    """
    n = n_forget + n_retain
    count = math.ceil(n / batch_size)
    ends = [(n * i // count, n_forget * i // count) for i in range(count + 1)]
    sizes = [(end - start, f_end - f_start) for (start, f_start), (end, f_end) in pairwise(ends)]
    return [(k, size - k) for size, k in sizes]


def at_least(least, counts):
    """What `shares` returns, with `least` forget rows or more in each batch, but half at most."""
    raised = []
    for k, others in counts:
        size = k + others
        k = max(k, min(least, size // 2))
        raised.append((k, size - k))
    return raised


def shared_out(forget, retain, counts, examples):
    """Batches of both sides' rows, so many of each as `shares` says, of similar length together."""
    sides = []
    for side, of_side in zip((forget, retain), zip(*counts)):
        ends = [0, *accumulate(of_side)]
        side = sort_in_windows(side, ends[:-1:WINDOW], examples)
        sides.append([side[start:end] for start, end in pairwise(ends)])
    return [part_f + part_r for part_f, part_r in zip(*sides)]


def asked_in_ways(batches, rows, ways, rng, step):
    """The batches, every second one in another way, drawn by chance. step: of the first one."""
    steps = range(step, step + len(batches))
    chosen = [rng.randrange(1, ways) if n % 2 and ways > 1 else 0 for n in steps]
    return [[i + way * rows for i in batch] for way, batch in zip(chosen, batches)]


def add_forget_rows(batches, forget, k, rng):
    """Append k forget rows to every batch, each in turn before any comes again."""
    queue = []
    for batch in batches:
        while len(queue) < k:
            queue += rng.sample(forget, len(forget))
        batch += queue[:k]
        del queue[:k]
