"""build_data.py, which rows: an order that the rows' own text gives, splits, and what no extract holds."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

SEED = "lora2qlora"  # another seed gives another choice of rows
Row = tuple[str, str]  # (input, target)


def shuffled(items: Iterable, key: Callable = str) -> list:
    """Items in an order that depends on nothing but their own text and SEED."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{SEED} {key(item)}".encode()).digest())


def quotas(counts: Counter, size: int) -> Counter:
    """How many of `size` rows each class gets: its share (largest remainders), and at least one."""
    exact = {label: size * count / counts.total() for label, count in counts.items()}
    quota = Counter({label: max(1, int(share)) for label, share in exact.items()})
    by_remainder = sorted(exact, key=lambda label: (quota[label] - exact[label], label))
    quota.update(by_remainder[: max(0, size - quota.total())])
    return quota


def split_rows(
    rows: Iterable[Row], sizes: tuple[int, int, int], stratum: Callable, group: Callable
) -> dict[str, list[Row]]:
    """Fill test, validation and train in turn, each class to its quota, each group as a whole.

    Raises ValueError where the rows do not suffice.
    """
    rows, groups = list(rows), defaultdict(list)
    for row in rows:
        groups[group(row)].append(row)
    counts = Counter(stratum(row) for row in rows)
    wanted = dict(zip(("train", "validation", "test"), sizes, strict=True))
    room = {split: quotas(counts, wanted[split]) for split in ("test", "validation", "train")}
    chosen = {split: [] for split in wanted}
    for key in shuffled(groups):
        need = Counter(stratum(row) for row in groups[key])
        for split in room:
            if need <= room[split]:
                room[split] -= need
                chosen[split] += groups[key]
                break
    for split, size in wanted.items():
        if len(chosen[split]) != size:
            raise ValueError(f"{split} needs {size} rows, the source gives {len(chosen[split])}")
    return {split: shuffled(chosen[split]) for split in wanted}


def normalised(text: str) -> str:
    """Words in small letters without punctuation: two texts with the same ones are duplicates."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# No extract holds explicit or insulting text: nobody wants it on a classroom's screen.
UNWANTED = re.compile(
    r"(?i)\b(\w*porn\w*|x{3,}|(bi|homo|hetero)?sex\w*|nud(e|ity)|naked|cum|cum{2,}\w*|puss(y|ies)|penis\w*|horny"
    r"|slut\w*|whor(e|ing)\w*|\w*fuck\w*|\w*shit\w*|cunts?|cocks?|dicks?|tits|boobs?|breasts?|erotic\w*|orgasm\w*"
    r"|teens?|lesbian\w*|incest\w*|rap(e|es|ed|ists?|ing)|hardcore|erections?|adult|bitch\w*|assholes?|nigg\w+"
    r"|fag\w*|prostitut\w+|slurs?|derogatory|disparag\w+|ragheads?)\b"
)
