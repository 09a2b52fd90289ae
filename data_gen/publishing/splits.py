"""Which image-mask pairs train, val and test get: the paper's counts, and no case in two of them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from data_gen.core.items import Item
from medisee.records.records import SPLITS, Split

PAPER_COUNTS: dict[Split, int] = {"train": 10_129, "val": 1_257, "test": 1_266}  # of image-mask pairs, section 3


def split_items(items: Iterable[Item], seed: int = 0) -> dict[Split, list[Item]]:
    """Splits items by case; the items of each split are in the order of their ids.

    Where there are as many items as in the paper or more, the splits have the paper's counts, and the excess is left
    out, from the most frequent categories first. Where there are fewer, they have the paper's proportions. A case
    is never cut between splits, so counts are as near as whole cases allow. Val and test take only cases whose
    categories all occur in another case, while there are two such cases, so that training sees what is asked later;
    each gets at least one case when there are three. The same items and seed give the same splits, in any order.
    """
    cases = _cases(items, seed)
    total = sum(map(len, cases))
    whole = sum(PAPER_COUNTS.values())
    is_enough = total >= whole
    wanted = {split: count if is_enough else round(total * count / whole) for split, count in PAPER_COUNTS.items()}
    free = _may_be_held_out(cases) if len(cases) >= 3 else []
    taken: dict[Split, list[list[Item]]] = {}
    later: dict[Split, int] = {"test": 1, "val": 0}
    for split, others in later.items():
        # Leave a case for those that come after.
        chosen = _nearest_sum([len(case) for case in free[: len(free) - others]], max(1, wanted[split]))
        taken[split] = [free[index] for index in sorted(chosen)]
        free = [case for index, case in enumerate(free) if index not in chosen]
    held_out = {id(case) for chosen in taken.values() for case in chosen}
    taken["train"] = [case for case in cases if id(case) not in held_out]
    most = wanted if is_enough else dict.fromkeys(SPLITS, total)
    return {split: _trim([item for case in taken[split] for item in case], most[split], seed) for split in SPLITS}


def _cases(items: Iterable[Item], seed: int) -> list[list[Item]]:
    """Groups items by source and case, in the order of a hash."""
    groups: defaultdict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        groups[item.source, item.case].append(item)
    return [groups[key] for key in sorted(groups, key=lambda key: _rank(seed, "\n".join(key)))]


def _may_be_held_out(cases: list[list[Item]]) -> list[list[Item]]:
    categories = [{item.category for item in case} for case in cases]
    left = Counter(category for case in categories for category in case)
    free = []
    for case, of_case in zip(cases, categories, strict=True):
        if all(left[category] > 1 for category in of_case):
            left.subtract(of_case)
            free.append(case)
    return free if len(free) >= 2 else cases[:-1]


def _nearest_sum(sizes: Sequence[int], wanted: int) -> set[int]:
    """Returns the places of sizes whose sum is as near to `wanted` as possible, early places first; never none."""
    if not sizes:
        return set()
    # Bit s of reachable[n] says that some of the first n sizes sum to s.
    limit = (1 << (max(2 * wanted, min(sizes)) + 1)) - 1
    reachable = [1]
    for size in sizes:
        reachable.append(reachable[-1] | reachable[-1] << size & limit)
    bits = reachable[-1]
    total = min((s for s in range(1, bits.bit_length()) if bits >> s & 1), key=lambda s: (abs(s - wanted), s))
    chosen: set[int] = set()
    for place in range(len(sizes), 0, -1):
        if not reachable[place - 1] >> total & 1:
            chosen.add(place - 1)
            total -= sizes[place - 1]
    return chosen


def _trim(items: list[Item], most: int, seed: int) -> list[Item]:
    """Returns at most `most` items by id; what goes is of the most frequent categories."""
    seen: Counter[str] = Counter()
    places: dict[str, int] = {}
    ranked = sorted(items, key=lambda item: _rank(seed, item.id))
    for item in ranked:
        places[item.id] = seen[item.category]
        seen[item.category] += 1
    kept = sorted(ranked, key=lambda item: places[item.id])[:most]
    return sorted(kept, key=lambda item: item.id)


def _rank(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).hexdigest()
