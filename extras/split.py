"""Split rows into a forget set and a retain set.

    python -m extras.split rows.jsonl --names FILE --out DIR [--test FILE]
    python -m extras.split rows.jsonl --regex R --out DIR [--test FILE]
    python -m extras.split rows.jsonl --clusters K [--forget-clusters I,J] --out DIR [--test FILE]

What is forgotten:

--names     rows that name someone, as whole words. FILE has one name on each line. (The paper's
            split of SST-2 matched inside words, too: "allen" in "challenging".)
--regex     rows in which the expression matches
--clusters  K-means on TF-IDF vectors of the texts, as the paper did for Yelp. The smallest cluster
            is forgotten, or those that --forget-clusters names.

Names and expressions are looked for in text and label, without regard to case. Lines are copied as
they are. Rows with equal texts stay together.
"""

import re
from pathlib import Path

from data import read_rows
from support.cli import Parser, non_empty, number, run
from support.files import check_not_inside_file, read_text, write_text

# -------------------------------------------------------------------------- what is to be forgotten


def regex_rule(expression, where):
    """A regular expression -> a function that says whether a row is to be forgotten.

    where: what a message names as the source. Raises ValueError if the expression is not one.
    """
    try:
        compiled = re.compile(expression, re.IGNORECASE)
    except re.error as e:
        raise ValueError(f"{where}: not a regular expression: {e}") from None
    return lambda row: compiled.search(f"{row.text}\n{row.label}") is not None


def names_rule(file):
    """As regex_rule, for a file of names. White space in a name stands for any white space.

    Raises ValueError if the file is empty or not UTF-8, and OSError if it cannot be read.
    """
    patterns = []
    for line in read_text(file).splitlines():
        words = [re.escape(word) for word in line.split()]
        if words:
            patterns.append(r"\s+".join(words))
    if not patterns:
        raise ValueError(f"{file}: no names in it: one on each line is expected")
    any_name = "|".join(patterns)
    return regex_rule(rf"(?<!\w)(?:{any_name})(?!\w)", file)


def clusters_rule(rows, k, to_forget, seed):
    """As regex_rule, for k clusters of the rows' texts. Another text belongs to the nearest one.

    to_forget: numbers of clusters; [] stands for the smallest one. Prints the size and the heaviest
    words of each cluster. Raises ValueError if there are not so many clusters, or no words.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ValueError("--clusters needs a package: pip install scikit-learn") from None
    texts = list(dict.fromkeys(row.key for row in rows))
    if k > len(texts):
        raise ValueError(f"--clusters {k}: there are only {len(texts)} different texts")
    if any(i >= k for i in to_forget):
        raise ValueError(f"--forget-clusters: the clusters are 0 to {k - 1}")
    vectorizer = TfidfVectorizer(stop_words="english", max_features=20_000)
    try:
        vectors = vectorizer.fit_transform(texts)  # (texts, words)
    except ValueError as e:  # only stop words
        raise ValueError(f"--clusters: {e}") from None
    means = KMeans(k, n_init=10, random_state=seed).fit(vectors)
    sizes = [sum(means.labels_ == i) for i in range(k)]
    if not to_forget:
        to_forget = [sizes.index(min(sizes))]
    words = vectorizer.get_feature_names_out()
    for i, center in enumerate(means.cluster_centers_):
        mark = " (forget)" if i in to_forget else ""
        heaviest = center.argsort()[::-1][:8]
        print(f"cluster {i}: {sizes[i]} texts{mark}: {', '.join(words[j] for j in heaviest)}")

    def is_forgotten(row):
        nearest = means.predict(vectorizer.transform([row.key]))[0]
        return int(nearest) in to_forget

    return is_forgotten


# ---------------------------------------------------------------------------------- the two sides


def split(rows, is_forgotten):
    """Rows -> rows to forget, and rows to retain. A text forgotten in one row is so in all."""
    keys = {row.key for row in rows if is_forgotten(row)}
    forget = [row for row in rows if row.key in keys]
    retain = [row for row in rows if row.key not in keys]
    return forget, retain


def check_sides(forget, retain, file):
    """Raises ValueError if all rows of the file are on one side."""
    n = len(forget) + len(retain)
    if not forget:
        raise ValueError(f"{file}: no rows to forget: none of {n} match")
    if not retain:
        raise ValueError(f"{file}: no rows to retain: all of {n} match")


def write_rows(file, rows):
    """Copy the rows' lines, with all that they hold, from the files they were read from."""
    lines = {}
    for source in {row.where.rpartition(":")[0] for row in rows}:
        with open(source, encoding="utf-8-sig", newline="\n") as f:
            for i, line in enumerate(f, 1):
                lines[f"{source}:{i}"] = line.strip() + "\n"
    write_text(file, "".join(lines[row.where] for row in rows))


# ------------------------------------------------------------------------------------ the command


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("rows", type=non_empty, help="JSON Lines")
    add("--names", type=non_empty, metavar="FILE", help="forget rows with one of these names")
    add("--regex", type=non_empty, metavar="R", help="forget rows in which this matches")
    add("--clusters", type=number(int, 2), metavar="K", help="forget a cluster of K")
    add("--forget-clusters", type=non_empty, metavar="I,J",
        help="the clusters to forget (default the smallest)")
    add("--test", type=non_empty, metavar="FILE", help="unseen rows, split in the same way")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the clusters (default 0)")
    add("--out", type=non_empty, required=True, metavar="DIR",
        help="the folder for forget.jsonl, retain.jsonl and, with --test, test_forget.jsonl and "
        "test_retain.jsonl")
    return parser


def parse(argv):
    """The options -> args, with --forget-clusters as a list of numbers."""
    args = make_parser().parse_args(argv)
    rules = [args.names, args.regex, args.clusters]
    if sum(rule is not None for rule in rules) != 1:
        raise ValueError("one of --names FILE, --regex R and --clusters K is needed")
    text = args.forget_clusters or ""
    try:
        args.forget_clusters = [int(i) for i in text.split(",") if i.strip()]
    except ValueError:
        raise ValueError(
            f"--forget-clusters {text}: numbers are expected, such as 0,3"
        ) from None
    if args.forget_clusters and not args.clusters:
        raise ValueError("--forget-clusters goes with --clusters")
    if min(args.forget_clusters, default=0) < 0:
        raise ValueError("--forget-clusters counts from 0")
    check_not_inside_file("--out", args.out)
    return args


def read_unflagged(file):
    """The rows of a file. Raises ValueError if it cannot be read twice, or is split already."""
    if Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{file}: not a file; it is read twice")
    rows = read_rows(file)
    for row in rows:
        if row.forget is not None:
            raise ValueError(
                f'{row.where}: the row says itself whether to forget it: take "forget" out to '
                "split anew"
            )
    return rows


def make_rule(args, rows):
    """What --names, --regex or --clusters asks for, as a function of a row."""
    if args.names:
        return names_rule(args.names)
    if args.regex:
        return regex_rule(args.regex, "--regex")
    return clusters_rule(rows, args.clusters, args.forget_clusters, args.seed)


def read_unseen(args, rows):
    """The rows of --test whose texts are not among `rows`; [] without --test."""
    if not args.test:
        return []
    test = read_unflagged(args.test)
    seen = {row.key for row in rows}
    unseen = [row for row in test if row.key not in seen]
    left_out = len(test) - len(unseen)
    if left_out:
        print(f"{args.test}: {left_out} rows left out: their texts are in {args.rows}, too")
    return unseen


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    rows = read_unflagged(args.rows)
    unseen = read_unseen(args, rows)
    rule = make_rule(args, rows)
    forget, retain = split(rows, rule)
    check_sides(forget, retain, args.rows)
    files = {"forget": forget, "retain": retain}
    if unseen:
        files["test_forget"], files["test_retain"] = split(unseen, rule)
    for name in files:
        if (out / f"{name}.jsonl").exists():
            raise ValueError(f"--out {out}: holds {name}.jsonl already: choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    for name, side in files.items():
        write_rows(out / f"{name}.jsonl", side)
        print(f"{out / name}.jsonl: {len(side)} rows")
    keys = [{row.key for row in side} for side in files.values()]
    texts = set().union(*keys)
    repeated = sum(map(len, keys)) - len(texts)
    print(f"{len(texts)} different texts, {repeated} of them in two files")


if __name__ == "__main__":
    run(main)
