"""What `inspect` found, as tables for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dino_adapters.contracts import Table
from dino_adapters.data.audit import Inspection

MOST_ROWS = 20


def as_tables(found: Inspection) -> Iterator[Table]:
    """An overview, the class table, and what is broken or double."""
    yield _overview(found)
    if found.classes:
        yield _counts("Classes", "class", found.classes)
    if found.unreadable:
        yield Table(
            f"Files that cannot be used: {len(found.unreadable)}",
            ("file", "why"),
            found.unreadable[:MOST_ROWS],
            _more(len(found.unreadable), all_kept=True),
        )
    if found.exact:
        yield Table(
            f"Sets of equal files: {found.exact_count}",
            ("first", "equal to"),
            tuple((keys[0], ", ".join(keys[1:])) for keys in found.exact),
            _more(found.exact_count, len(found.exact)),
        )
    if found.near:
        more = _more(found.near_count, len(found.near))
        yield Table(
            f"Pairs that look alike: {found.near_count}",
            ("one", "other"),
            found.near,
            f"{more} Method: {found.near_method}.".strip(),
        )


def _overview(found: Inspection) -> Table:
    rows = [("images", f"{found.count:,}")]
    if found.unreadable:
        rows.append(("of these unusable", f"{len(found.unreadable):,}"))
    rows.append(("sizes (width x height)", _listed(dict(found.sizes))))
    rows.append(
        ("shorter side", f"{found.smallest_side} px at least, median {found.median_side:g} px")
    )
    rows.append(("number type", _listed(found.dtypes)))
    rows.append(("bands", _listed(found.bands)))
    for dtype, (low, high) in found.ranges.items():
        rows.append((f"values ({dtype})", f"{low:g} to {high:g}"))
    if found.invalid_share:
        rows.append(("pixels without data", f"{100 * found.invalid_share:.1f} %"))
    if found.classes:
        rows.append(("classes", str(len(found.classes))))
        rows.append(("without a label", f"{found.unlabelled:,}"))
    rows.append(("groups", str(found.groups) if found.groups else "none given"))
    rows += [("note", notice) for notice in found.notices]
    return Table(found.source, ("", "found"), tuple(rows))


def _counts(title: str, name: str, counts: Mapping[str, int]) -> Table:
    rows = tuple((key, f"{count:,}") for key, count in list(counts.items())[:MOST_ROWS])
    return Table(title, (name, "images"), rows, _more(len(counts), all_kept=True))


def _listed(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{name}: {count:,}" for name, count in counts.items())


def _more(total: int, shown: int = MOST_ROWS, *, all_kept: bool = False) -> str:
    if total <= shown:
        return ""
    return f"And {total - shown:,} more{'; --json lists them all' if all_kept else ''}."
