"""Split rows into a forget set and a retain set.

    python split.py rows.jsonl --names FILE | --regex R | --clusters K [--test rows.jsonl] --out DIR

--names: rows that name someone, a name a line in FILE, as whole words (the paper's split of SST-2 matched inside
words, too: "allen" in "challenging"). --regex: rows in which the expression is found. Both look at text and label,
without regard to case. --clusters: K-means on TF-IDF vectors of the texts, as the paper did for Yelp; the smallest
cluster is forgotten, or those that --forget-clusters names. Lines are copied as they are; equal texts stay together.
"""

import re
from pathlib import Path

from cli import Parser, filled, number, run
from data import read_rows
from files import write_whole


def find_regex(expression, where):
    """-> a function: whether a row is to be forgotten. Raises ValueError for what is no regular expression."""
    try:
        compiled = re.compile(expression, re.IGNORECASE)
    except re.error as e:
        raise ValueError(f"{where}: no regular expression: {e}") from None
    return lambda row: compiled.search(f"{row.text}\n{row.label}") is not None


def find_names(file):
    """As find_regex, for a file of names; white space in a name stands for any."""
    try:
        names = [line.split() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 (byte {e.start})") from None
    if not names:
        raise ValueError(f"{file}: no names in it, one a line is expected")
    one_of = "|".join(r"\s+".join(map(re.escape, words)) for words in names)
    return find_regex(rf"(?<!\w)(?:{one_of})(?!\w)", file)


def find_clusters(rows, k, chosen, seed):
    """As find_regex, for clusters of these rows' texts; others go to the nearest. Prints what each cluster holds."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ValueError("--clusters needs a package: pip install scikit-learn") from None
    texts = list(dict.fromkeys(row.key for row in rows))
    if k > len(texts):
        raise ValueError(f"--clusters {k}: there are only {len(texts)} different texts")
    if any(i >= k for i in chosen):
        raise ValueError(f"--forget-clusters: the clusters are 0 to {k - 1}")
    vectorizer = TfidfVectorizer(stop_words="english", max_features=20_000)
    try:
        vectors = vectorizer.fit_transform(texts)
    except ValueError as e:  # nothing but stop words
        raise ValueError(f"--clusters: {e}") from None
    means = KMeans(k, n_init=10, random_state=seed).fit(vectors)
    sizes, words = [sum(means.labels_ == i) for i in range(k)], vectorizer.get_feature_names_out()
    chosen = chosen or [min(range(k), key=lambda i: sizes[i])]
    for i, center in enumerate(means.cluster_centers_):
        top = ", ".join(words[j] for j in center.argsort()[::-1][:8])
        print(f"cluster {i}: {sizes[i]} texts{' (forget)' * (i in chosen)}: {top}")
    return lambda row: int(means.predict(vectorizer.transform([row.key]))[0]) in chosen


def split(rows, find):
    """-> rows to forget and rows to retain; a text that `find` finds in one row is forgotten in all."""
    found = {row.key for row in rows if find(row)}
    return [row for row in rows if row.key in found], [row for row in rows if row.key not in found]


def write_rows(file, rows):
    """Copy the rows' lines, whatever else they hold, from where they were read."""
    lines = {}
    for source in {row.where.rpartition(":")[0] for row in rows}:
        lines |= {f"{source}:{i}": line for i, line in enumerate(open(source, encoding="utf-8-sig", newline="\n"), 1)}
    write_whole(file, lambda temporary: temporary.write_text(
        "".join(lines[row.where].strip() + "\n" for row in rows), encoding="utf-8"))


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("rows", type=filled, help="JSON Lines")
    parser.add_argument("--names", type=filled, metavar="FILE", help="forget rows with one of these names")
    parser.add_argument("--regex", type=filled, metavar="R", help="forget rows in which this is found")
    parser.add_argument("--clusters", type=number(int, 2), metavar="K", help="forget a cluster of K")
    parser.add_argument("--forget-clusters", type=filled, metavar="I,J", help="these (default the smallest)")
    parser.add_argument("--test", type=filled, metavar="FILE", help="unseen rows, split in the same way")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the clusters (default 0)")
    parser.add_argument("--out", type=filled, required=True, metavar="DIR", help="gets forget.jsonl, retain.jsonl, ...")
    args = parser.parse_args(argv)
    if sum(how is not None for how in (args.names, args.regex, args.clusters)) != 1:
        raise ValueError("one of --names FILE, --regex R and --clusters K is needed")
    try:
        chosen = [int(i) for i in (args.forget_clusters or "").split(",") if i.strip()]
    except ValueError:
        raise ValueError(f"--forget-clusters {args.forget_clusters}: numbers are expected, such as 0,3") from None
    if chosen and not args.clusters or min(chosen, default=0) < 0:
        raise ValueError("--forget-clusters goes with --clusters, and counts from 0")
    for file in filter(None, (args.rows, args.test)):
        if Path(file).exists() and not Path(file).is_file():
            raise ValueError(f"{file}: a file is needed, which is read twice")
    rows, out = read_rows(args.rows), Path(args.out)
    test = read_rows(args.test) if args.test else []
    if flagged := next((row for row in rows + test if row.forget is not None), None):
        raise ValueError(f'{flagged.where}: says itself whether to forget it: take "forget" out to split anew')
    find = (find_names(args.names) if args.names else find_regex(args.regex, "--regex") if args.regex
            else find_clusters(rows, args.clusters, chosen, args.seed))
    seen = {row.key for row in rows}
    unseen = [row for row in test if row.key not in seen]
    if len(unseen) < len(test):
        print(f"{args.test}: {len(test) - len(unseen)} rows left out: their texts are in {args.rows}, too")
    sides = dict(zip(("forget", "retain"), split(rows, find)))
    for name, side in sides.items():
        if not side:
            raise ValueError(f"{args.rows}: no rows to {name}: {'all' if name == 'retain' else 'none'} of "
                             f"{len(rows)} are found")
    if unseen:
        sides |= dict(zip(("test_forget", "test_retain"), split(unseen, find)))
    if there := [name for name in sides if (out / f"{name}.jsonl").exists()]:
        raise ValueError(f"--out {out}: holds {there[0]}.jsonl already: choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    keys = [{row.key for row in side} for side in sides.values()]
    for name, side in sides.items():
        write_rows(out / f"{name}.jsonl", side)
        print(f"{out / name}.jsonl: {len(side)} rows")
    texts = set().union(*keys)
    print(f"{len(texts)} different texts, {sum(map(len, keys)) - len(texts)} of them in two files")


if __name__ == "__main__":
    run(main)
