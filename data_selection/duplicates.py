"""Copies in a pool, and texts of evaluation sets or targets in it: found, explained, left out.

To be run before anything is weighed: copies have equal weights, so that a selector takes all of them or none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .code_tokens import LANGUAGES, Lexer, code_lexer, code_shingles
from .selection import MAX_SEED, Selection, checked_int
from .shards import read_all
from .shingles import Shingles, band_rows, bands, candidate_pairs, jaccard, signatures, text_shingles
from .texts import DataSelectionError, TextSource, read_texts

Ints = NDArray[np.int64]
METHODS = ("near", "code", "exact", "none")
# Tokens a shingle. Code needs more, since names no longer tell its shingles apart.
SHINGLE = {"near": 5, "code": 8, "exact": 5, "none": 5}
# Of rows that agree in a band each is compared with so many of the earliest.
PAIRS_A_ROW = 64
ROWS_AT_ONCE = 200


@dataclass(frozen=True)
class Rules:
    """What counts as a copy; the arguments of `deduplicate`, checked."""

    method: str
    threshold: float
    shingle: int
    permutations: int
    overlap: float
    keep: str
    seed: int
    lexer: Lexer | None

    def shingles(self, texts: list[str]) -> Shingles:
        """The shingles of texts."""
        if self.lexer is not None:
            return code_shingles(texts, self.shingle, self.lexer)
        return text_shingles(texts, self.shingle)

    @property
    def near(self) -> bool:
        """Whether rows are compared beyond equality."""
        return self.method in ("near", "code")


class Rows(NamedTuple):
    """What the first reading finds out about N rows."""

    prints: NDArray[np.uint64]  # (N,) equal where the tokens are
    tokens: Ints  # (N,)
    shingled: NDArray[np.bool_]  # (N,) whether it has a shingle; code that is all comment has none
    keys: NDArray[np.uint64]  # (N, bands)
    found: dict[int, tuple[str, int, float]]  # row: the name and row of the text that is in it, and its share


class Copies(NamedTuple):
    """Which row each row is a copy of."""

    representatives: Ints  # (N,) the row itself where it is kept
    kinds: list[str | None]  # (N,)
    similarity: NDArray[np.float64]  # (N,) with the representative


def deduplicate(
    pool: TextSource,
    *,
    method: Literal["near", "code", "exact", "none"] = "near",
    threshold: float = 0.7,
    shingle: int | None = None,
    permutations: int = 128,
    language: str | None = None,
    lexer: Literal["auto", "tree-sitter", "regex"] = "auto",
    against: Mapping[str, TextSource] | None = None,
    overlap: float = 0.8,
    keep: Literal["first", "longest"] = "first",
    report_only: bool = False,
    seed: int = 0,
) -> Selection:
    """The rows of a pool that are no copies.

    A row is left out if it holds a text of `against`; else if its tokens are those of an earlier kept row (letter case
    and white space apart); else, with "near" and "code", if the Jaccard similarity of its shingles with those of an
    earlier kept row is at least `threshold`. That row is its representative: every row that is left out resembles a
    row that stays, and no chain of small steps leads further. Candidates come from MinHash bands (Broder 1997) that
    miss a pair at the threshold with a probability of at most 0.01; each candidate is then compared exactly, so that
    no row is left out by chance.

    "code" compares shingles without comments and layout, with literals and names blinded, but names within a shingle
    have to be used alike (Baker 1993): copies with all names changed are found. It does not find other programs for
    the same task; no measure of wording does.

    Memory holds some 8 bytes a row and band (256 a row by default) and the shingles of the candidates; the pool is
    read twice. An iterator is held whole.

    Args:
        pool: texts, as `texts.read_texts` takes them.
        method: "exact", "near", "code", or "none", for `against` alone.
        threshold: least Jaccard similarity of near copies, above 0 and at most 1.
        shingle: tokens a shingle; 5, for code 8.
        permutations: entries of a MinHash signature.
        language: of the code, for method "code".
        lexer: for "code": "tree-sitter" where its grammar is installed, "regex" always; "auto" the first that is there.
            They differ in details, so name one where results have to agree between machines.
        against: texts that must not be in the pool, by name (evaluation sets, the target). One is in a row if the share
            `overlap` of its distinct shingles is; one with fewer tokens than a shingle, if it is the whole row.
        overlap: above 0 and at most 1.
        keep: of copies the "first" row, or the "longest" (in tokens; of equal ones the first).
        report_only: keep all rows; the reasons say what would be left out.
        seed: of the MinHash functions.

    Returns:
        The kept rows. A reason holds `cluster`, the number of the kept row, and for one that stands for others
        `copies`, their rows. With `report_only` a copy's reason holds `copy` ("exact", "near", "code"), `cluster`, the
        kept row, and `similarity`; that of a row with a forbidden text `against` (the name), `against_row` and
        `overlap`. `details` holds the counts, and the rows left out through `against`, at most 1,000 a name.

    Raises:
        DataSelectionError: an argument is out of range, or texts cannot be read.
    """
    rules = _checked(method, threshold, shingle, permutations, language, lexer, overlap, keep, seed)
    if not isinstance(against or {}, Mapping):
        raise DataSelectionError(f"against is a {type(against).__name__}; give texts by name: {{'exam': texts}}")
    if method == "none" and not against:
        raise DataSelectionError("method='none' without against: nothing to look for; give against, or a method")
    again = None if isinstance(pool, Iterator) else pool
    pool = list(pool) if isinstance(pool, Iterator) else pool
    rows = _read(pool, rules, {name: Forbidden(name, texts, rules) for name, texts in (against or {}).items()})
    copies = _copies(pool, rows, rules)
    return _selection(again, rows, copies, rules, report_only)


def _checked(
    method: str,
    threshold: Any,
    shingle: Any,
    permutations: Any,
    language: str | None,
    lexer: str,
    overlap: Any,
    keep: str,
    seed: Any,
) -> Rules:
    if method not in METHODS:
        raise DataSelectionError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    if keep not in ("first", "longest"):
        raise DataSelectionError(f"keep={keep!r}: must be 'first' or 'longest'")
    for name, value in (("threshold", threshold), ("overlap", overlap)):
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) <= 1:
            raise DataSelectionError(f"{name}={value!r}: must be above 0 and at most 1")
    if method == "code" and language is None:
        raise DataSelectionError(f"method='code': give language, one of {', '.join(LANGUAGES)}")
    if method != "code" and language is not None:
        raise DataSelectionError(f"language={language!r} with method={method!r}: it goes with method='code'")
    return Rules(
        method,
        float(threshold),
        SHINGLE[method] if shingle is None else checked_int(shingle, "shingle", 1, 100, "5 suits text, 8 code"),
        checked_int(permutations, "permutations", 2, 4096, "128 is usual"),
        float(overlap),
        keep,
        checked_int(seed, "seed", 0, MAX_SEED, "any such number does"),
        code_lexer(language, lexer)[1] if language is not None else None,
    )


class Forbidden:
    """The shingles of texts that must not be in the pool, to be looked up.

    Args:
        name: of the texts.
        source: the texts.
        rules: how shingles are made, and which share of them is too many.
    """

    def __init__(self, name: str, source: TextSource, rules: Rules) -> None:
        texts = list(read_texts(source, f"against[{name!r}]"))
        found = rules.shingles(texts)
        owners = np.repeat(np.arange(len(texts)), found.counts)
        order = np.lexsort((owners, found.hashes))
        hashes, owners = found.hashes[order], owners[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
        self.name, self.share = name, rules.overlap
        self.owners = owners[new]
        self.sizes = np.bincount(self.owners, minlength=len(texts))  # (texts,) distinct shingles
        self.hashes, self.starts = np.unique(hashes[new], return_index=True)
        self.ends = np.append(self.starts[1:], len(self.owners)).astype(np.int64)

    def search(self, found: Shingles) -> dict[int, tuple[str, int, float]]:
        """Of each of N rows that holds a forbidden text: the name, the text's row and its share that is there; of
        several the one with the highest share."""
        if not len(self.hashes) or not len(found.hashes):
            return {}
        rows = np.repeat(np.arange(len(found.counts)), found.counts)
        places = np.minimum(np.searchsorted(self.hashes, found.hashes), len(self.hashes) - 1)
        hit = self.hashes[places] == found.hashes
        pairs = np.unique(np.stack([rows[hit], places[hit]]), axis=1)  # a shingle counts once a row
        lengths = (self.ends - self.starts)[pairs[1]]
        firsts = np.cumsum(lengths) - lengths
        at = np.arange(int(lengths.sum())) - np.repeat(firsts - self.starts[pairs[1]], lengths)
        codes, counts = np.unique(np.repeat(pairs[0], lengths) * len(self.sizes) + self.owners[at], return_counts=True)
        result: dict[int, tuple[str, int, float]] = {}
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            row, owner = divmod(code, len(self.sizes))
            share = count / int(self.sizes[owner])
            if share >= self.share and (row not in result or share > result[row][2]):
                result[row] = (self.name, owner, share)
        return result


def _read(pool: TextSource, rules: Rules, forbidden: Mapping[str, Forbidden]) -> Rows:
    """Read the pool once."""
    rows_a_band = band_rows(rules.threshold, rules.permutations)
    prints, tokens, shingled = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, bool)]
    keys = [np.empty((0, rules.permutations // rows_a_band if rules.near else 0), np.uint64)]
    hits: dict[int, tuple[str, int, float]] = {}
    first = 0
    for texts in _pieces(pool):
        known = kernels.score(texts, 1, 1, np.zeros((1, 1)))
        prints.append(known.prints)
        tokens.append(known.tokens)
        if rules.near or forbidden:
            found = rules.shingles(texts)
            if rules.near:
                shingled.append(found.counts > 0)
                keys.append(bands(signatures(found, rules.permutations, rules.seed), rows_a_band))
            for texts_of_name in forbidden.values():
                for row, hit in texts_of_name.search(found).items():
                    if first + row not in hits or hit[2] > hits[first + row][2]:
                        hits[first + row] = hit
        first += len(texts)
    if not first:
        raise DataSelectionError("the pool is empty; there is nothing to look through")
    return Rows(np.concatenate(prints), np.concatenate(tokens), np.concatenate(shingled), np.concatenate(keys), hits)


def _pieces(pool: TextSource) -> Iterator[list[str]]:
    for batch in read_all(pool, "pool"):
        texts = batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist()
        for at in range(0, len(texts), ROWS_AT_ONCE):
            yield texts[at : at + ROWS_AT_ONCE]


def _copies(pool: TextSource, rows: Rows, rules: Rules) -> Copies:
    size = len(rows.prints)
    copies = Copies(np.arange(size), [None] * size, np.ones(size))
    if rules.method == "none":
        return copies
    alive = np.ones(size, bool)
    alive[list(rows.found)] = False
    ranked = np.flatnonzero(alive)
    if rules.keep == "longest":
        ranked = ranked[np.argsort(-rows.tokens[ranked], kind="stable")]
    _, firsts, groups = np.unique(rows.prints[ranked], return_index=True, return_inverse=True)
    copies.representatives[ranked] = ranked[firsts[groups]]
    different = ranked[np.sort(firsts)]
    if rules.near:
        different = different[rows.shingled[different]]
        _merge_near(pool, rows, different, copies, rules)
    for row in ranked[copies.representatives[ranked] != ranked].tolist():
        copies.kinds[row] = copies.kinds[row] or "exact"
    # A copy of a near copy belongs to the row that was kept in the end.
    for row in ranked[copies.representatives[ranked] != ranked].tolist():
        middle = int(copies.representatives[row])
        last = int(copies.representatives[middle])
        if middle != last:
            copies.representatives[row], copies.similarity[row] = last, copies.similarity[middle]
            copies.kinds[row] = copies.kinds[middle]
    return copies


def _merge_near(pool: TextSource, rows: Rows, different: Ints, copies: Copies, rules: Rules) -> None:
    """Give each of the rows `different`, in order of rank, the most similar earlier one that is kept, if any is similar
    enough."""
    pairs = candidate_pairs(rows.keys[different], PAIRS_A_ROW)  # (P, 2) places in `different`
    similar = _compare(pool, different, pairs, rules)
    enough = similar >= rules.threshold
    kept = np.ones(len(different), bool)
    best: dict[int, tuple[float, int]] = {}
    # By the later place: when a place is reached, all places before it are settled.
    for at in np.lexsort((pairs[:, 0], pairs[:, 1])).tolist():
        earlier, later = int(pairs[at, 0]), int(pairs[at, 1])
        if enough[at] and kept[earlier] and similar[at] > best.get(later, (0.0, 0))[0]:
            best[later] = (float(similar[at]), earlier)
            kept[later] = False
    for later, (similarity, earlier) in best.items():
        row = int(different[later])
        copies.representatives[row], copies.similarity[row] = int(different[earlier]), similarity
        copies.kinds[row] = rules.method


def _compare(pool: TextSource, different: Ints, pairs: Ints, rules: Rules) -> NDArray[np.float64]:
    """(P,) the Jaccard similarities of pairs of places in `different`, from a second reading of the pool."""
    wanted = set(different[np.unique(pairs)].tolist())
    sets = dict(_shingle_sets(pool, wanted, rules))
    if set(sets) != wanted or not all(map(len, sets.values())):
        raise DataSelectionError("the pool has other rows at the second reading; pass one that stays as it is")
    similar = np.empty(len(pairs))
    edges = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1, append=-1))  # pairs are sorted by their earlier place
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        one = sets[int(different[pairs[start, 0]])]
        similar[start:stop] = jaccard(one, [sets[row] for row in different[pairs[start:stop, 1]].tolist()])
    return similar


def _shingle_sets(pool: TextSource, wanted: set[int], rules: Rules) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    first = 0
    for texts in _pieces(pool) if wanted else ():
        rows = [row for row in range(len(texts)) if first + row in wanted]
        found = rules.shingles([texts[row] for row in rows])
        for row, part in zip(rows, np.split(found.hashes, found.starts()[1:-1]), strict=False):
            yield first + row, np.unique(part)
        first += len(texts)


def _selection(pool: TextSource | None, rows: Rows, copies: Copies, rules: Rules, report_only: bool) -> Selection:
    size = len(copies.kinds)
    stands_for: dict[int, list[int]] = {}
    for row in np.flatnonzero(copies.representatives != np.arange(size)).tolist():
        stands_for.setdefault(int(copies.representatives[row]), []).append(row)
    reasons, indices = [], []
    for row, (cluster, kind) in enumerate(zip(copies.representatives.tolist(), copies.kinds, strict=True)):
        reason: dict[str, Any] = {"cluster": cluster}
        if row in rows.found:
            name, held, share = rows.found[row]
            reason = {"against": name, "against_row": held, "overlap": share}
        elif kind is not None:
            reason |= {"copy": kind, "similarity": float(copies.similarity[row])}
        elif row in stands_for:
            reason["copies"] = stands_for[row]
        if report_only or (row not in rows.found and kind is None):
            indices.append(row)
            reasons.append(reason)
    details = _details(rows, copies, stands_for) | {"report_only": report_only, "threshold": rules.threshold}
    return Selection(
        np.array(indices, np.int64), reasons, size, rules.seed, f"deduplicate-{rules.method}", pool, details
    )


def _details(rows: Rows, copies: Copies, stands_for: Mapping[int, list[int]]) -> dict[str, Any]:
    left_out = {kind: copies.kinds.count(kind) for kind in ("exact", "near", "code")}
    against: dict[str, list[int]] = {}
    for row, (name, _, _) in sorted(rows.found.items()):
        against.setdefault(name, []).append(row)
    left_out |= {f"against:{name}": len(found) for name, found in against.items()}
    return {
        "left_out": {kind: count for kind, count in left_out.items() if count},
        "clusters": len(stands_for),
        "largest_cluster": max((len(found) + 1 for found in stands_for.values()), default=0),
        "against_rows": {name: found[:1000] for name, found in against.items()},
    }
