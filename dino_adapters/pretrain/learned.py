"""What a run has chosen by: it is never judged on that, whatever labels come later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from dino_adapters.pretrain.labelled import LEAST_QUERIES, TOO_FEW, LabelledSet
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.files import json_digest, write_json

NEVER = -1


def without_learned(
    labelled: LabelledSet, path: Path, step: int, notices: Notices
) -> tuple[LabelledSet | None, int]:
    """Takes groups out of the queries that earlier looks of the run chose by, and notes today's.

    When labels are added to a run that goes on, all are dealt anew, and images that chose reading
    size or best look could become queries. What is noted are digests, no names.

    Args:
        labelled: as dealt from today's labels.
        path: where the run notes what it chose by.
        step: steps that are done.
        notices: counts what is left out.

    Returns:
        The set, None where too few queries are left; and the step after which looks are of these
        labels, -1 for all of them.
    """
    held = {"digest": labelled.digest, "since": NEVER, "groups": []}
    if step > 0 and path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
    learned = set(held["groups"])
    kept = tuple(k for k in labelled.queries if json_digest(labelled.groups[k]) not in learned)
    since = held["since"] if held["digest"] == labelled.digest else step
    learned |= {json_digest(labelled.groups[key]) for key in labelled.gallery}
    write_json(path, {"digest": labelled.digest, "since": since, "groups": sorted(learned)})
    if dropped := len(labelled.queries) - len(kept):
        what = "labelled images not judged on, as the run chose by them before labels were added"
        notices.add(what, count=dropped)
    if len(kept) < LEAST_QUERIES:
        notices.add(f"{TOO_FEW}: {len(kept)} are left to judge on, {LEAST_QUERIES} are needed")
        return None, since
    return replace(labelled, queries=kept) if dropped else labelled, since
