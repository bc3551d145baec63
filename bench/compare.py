"""``python -m bench --compare A.json B.json``: what B is slower at than A, by more than both runs scatter."""

from bench.results import read


def regressions(before, after):
    """Compares two results, row by row of the same op, case and variant.

    A row has got slower where its 20th percentile is above the 80th percentile of before, and faster the other way round.

    Returns:
        Three lists: slower and faster, each of (op, case, variant, ratio of medians), and missing, of (op, case, variant): rows
        that were timed before and are not now.
    """
    now = {key(row): row for row in after["rows"] if "ms" in row}
    slower, faster, missing = [], [], []
    for old in before["rows"]:
        if "ms" not in old:
            continue
        new = now.get(key(old))
        if new is None:
            missing.append(key(old))
        elif new["ms_p20"] > old["ms_p80"]:
            slower.append((*key(old), new["ms"] / old["ms"]))
        elif new["ms_p80"] < old["ms_p20"]:
            faster.append((*key(old), new["ms"] / old["ms"]))
    return slower, faster, missing


def key(row):
    """What a row is the time of."""
    return row.get("op"), row["case"], row["variant"]


def main(before, after):
    """Prints the comparison of two files or folders; returns the exit status: 1 where something got slower, else 0."""
    old, new = read(before), read(after)
    for name in ("device", "threads", "torch", "triton"):
        was, now = (one["environment"].get(name) for one in (old, new))
        if was != now:
            print(f"not the same {name}: {was}, then {now}")
    slower, faster, missing = regressions(old, new)
    for word, found in (("slower", slower), ("faster", faster)):
        for op, case, variant, ratio in sorted(found, key=lambda row: -row[-1]):
            print(f"{word:<8}{ratio:6.2f}x  {op}: {case}: {variant}")
    for row in missing:
        print(f"{'missing':<8}         {': '.join(map(str, row))}")
    print(f"{len(slower)} slower, {len(faster)} faster beyond the spread of both runs, {len(missing)} missing")
    return 1 if slower else 0
