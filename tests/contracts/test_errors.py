"""Every error has a code, a root and the builtin that a caller expects."""

import builtins

import pytest

from dino_adapters import contracts
from dino_adapters.contracts import DinoAdaptersError

KINDS = [
    kind
    for name in contracts.__all__
    if isinstance(kind := getattr(contracts, name), type)
    and issubclass(kind, DinoAdaptersError)
    and kind is not DinoAdaptersError
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_codes_roots_and_words(kind):
    assert kind.exit_code in (*range(2, 9), contracts.Preempted.exit_code)
    assert any(base.__module__ == builtins.__name__ for base in kind.__mro__[1:-3])
    assert str(kind("There is no 'x'. Did you mean 'y'?")) == "There is no 'x'. Did you mean 'y'?"


def test_codes_are_those_that_are_documented():
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    assert codes["RecipeError"] == codes["UnknownNameError"] == 2
    assert codes["DataError"] == codes["UnitsError"] == 3
    assert codes["WeightsError"] == 4
    assert codes["MissingLibraryError"] == 5
    assert codes["ShapeError"] == 6
    assert codes["NotFiniteError"] == 7
    assert codes["CheckpointError"] == 8
