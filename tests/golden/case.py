"""One golden case: a pair NAME.json + NAME.safetensors, which remembers what was read of it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DESCRIPTIVE = frozenset(
    {"name", "format", "kind", "made_with", "calls", "notes", "tolerance", "glossary", "tensors"}
)
"""Parts of the JSON that describe the case; every other part must be read."""


class Settings(Mapping[str, Any]):
    """A dict that knows which of its values were read, down through dicts and lists of dicts."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._path = path
        self._values = {key: self._wrap(key, value) for key, value in values.items()}
        self._read: set[str] = set()

    def _wrap(self, key: str, value: Any) -> Any:
        path = f"{self._path}{key}"
        if isinstance(value, Mapping):
            return Settings(value, f"{path}.")
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            return [Settings(item, f"{path}[{index}].") for index, item in enumerate(value)]
        return value

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self._read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def skip(self, *keys: str, because: str) -> None:
        """Counts keys as read that mean nothing to us; the reason stands in the code."""
        assert because
        for key in keys:
            assert key in self._values, f"{self._path}{key} is not there to be skipped"
        self._read.update(keys)
        for key in keys:
            if isinstance(self._values[key], Settings):
                self._values[key].skip(*self._values[key]._values, because=because)

    def unread(self) -> list[str]:
        """Paths of all values that nobody asked for."""
        left = [f"{self._path}{key}" for key in self._values if key not in self._read]
        for key, value in self._values.items():
            if key in self._read and isinstance(value, Settings):
                left += value.unread()
            elif key in self._read and isinstance(value, list):
                left += [
                    path for item in value if isinstance(item, Settings) for path in item.unread()
                ]
        return left


def distance(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|; absolute where b is all zero; 0 or inf for integers and bools."""
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if not expected.numel():
        return 0.0
    a, b = actual.detach().double(), expected.double()
    gap = float((a - b).abs().max())
    return gap / (float(b.abs().max()) or 1.0) if gap == gap else float("inf")


class Case:
    """Tensors and settings of one case, for a reader.

    A reader takes inputs with `tensor` and `tensors`, settings from `settings`, and hands results
    to `check`. `finish` fails on any result outside its bound, and on anything never looked at.
    `dtype` is float32 or float64; all floating tensors come in it. `bounds` holds the largest
    relative error of each group of keys; a reader may change it, and says why.
    """

    def __init__(self, json_file: Path, dtype: torch.dtype) -> None:
        read = json.loads(json_file.read_text())
        self.name: str = read["name"]
        self.kind: str = read["kind"]
        self.calls: list[str] = read.get("calls", [])
        self.dtype = dtype
        self.settings = Settings({k: v for k, v in read.items() if k not in DESCRIPTIVE})
        self.worst: dict[str, tuple[float, str]] = {}
        self.bounds: dict[str, float] = dict(read["tolerance"]["suggested_max_rel_to_absmax"])
        self._tensors = load_file(json_file.with_suffix(".safetensors"))
        self._read: set[str] = set()
        self._wrong: list[str] = []

    def keys(self, prefix: str = "") -> list[str]:
        """Keys below a prefix; does not count as reading."""
        return [key for key in self._tensors if key.startswith(prefix)]

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def tensor(self, key: str) -> Tensor:
        """One tensor, floats in the dtype of this run."""
        self._read.add(key)
        stored = self._tensors[key]
        return stored.to(self.dtype) if stored.is_floating_point() else stored

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors below a prefix, by the rest of their key."""
        return {key.removeprefix(prefix): self.tensor(key) for key in self.keys(prefix)}

    def check(self, key: str, actual: Tensor, *, bound: float | None = None) -> None:
        """Compares a result; the bound is that of the key's group in the JSON, unless given."""
        expected = self._tensors[key]
        self._read.add(key)
        self.check_values(key, actual, expected, bound=bound)

    def check_values(
        self, label: str, actual: Tensor, expected: Tensor, *, bound: float | None = None
    ) -> None:
        """As `check`, for numbers that stand in the JSON."""
        group = label.split("/")[0]
        bound = self.bounds.get(group, 0.0) if bound is None else bound
        found = distance(actual, expected)
        self.worst[group] = max(self.worst.get(group, (0.0, "")), (found, label))
        if found > bound:
            shapes = f"{tuple(actual.shape)} against {tuple(expected.shape)}"
            self._wrong.append(f"{label}: {found:.2e} over {bound:.0e}, shapes {shapes}")

    def finish(self) -> str:
        """Fails if anything was wrong or left over; returns the worst figures as text."""
        assert not self._wrong, f"{len(self._wrong)} results differ:\n" + "\n".join(
            self._wrong[:20]
        )
        left = [f"tensor {key}" for key in self._tensors if key not in self._read]
        left += [f"setting {path}" for path in self.settings.unread()]
        assert not left, f"{len(left)} entries were never read:\n" + "\n".join(left[:20])
        assert self.worst, "nothing was compared"
        return ", ".join(
            f"{group} {found:.1e} ({label})" for group, (found, label) in sorted(self.worst.items())
        )
