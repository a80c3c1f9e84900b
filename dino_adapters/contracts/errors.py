"""The error tree. Every message is a sentence: what was found, what was expected, what to do.

DinoAdaptersError                       exit code
├── RecipeError(ValueError)                     2
├── UnknownNameError(LookupError)               2
├── RunFolderError(FileExistsError)             2
├── DataError(ValueError)                       3
│   ├── UnreadableFileError
│   ├── UnitsError
│   └── SplitLeakError
├── WeightsError(ValueError)                    4
├── MissingLibraryError(ImportError)            5
├── ShapeError(ValueError)                      6
├── NotFittedError(ValueError)                  6
├── TrainingStopped(RuntimeError)               7
│   ├── NotFiniteError
│   ├── CollapseError
│   └── Preempted                              75
└── CheckpointError(RuntimeError)               8
    └── DiskFullError
"""


class DinoAdaptersError(Exception):
    """Root of all errors of this package; `exit_code` is what the command line returns."""

    exit_code = 1


class RecipeError(DinoAdaptersError, ValueError):
    """A recipe, an override or a command's argument is wrong."""

    exit_code = 2


class UnknownNameError(DinoAdaptersError, LookupError):
    """A name that no registry, catalogue or class table holds."""

    exit_code = 2

    def __str__(self) -> str:
        """The sentence as written: `LookupError` subclasses may quote it."""
        return str(self.args[0]) if self.args else ""


class RunFolderError(DinoAdaptersError, FileExistsError):
    """A run folder that already holds a run, or that another process writes to."""

    exit_code = 2


class DataError(DinoAdaptersError, ValueError):
    """Images, tables or labels that cannot be used as they are."""

    exit_code = 3


class UnreadableFileError(DataError):
    """One file that could not be decoded; collectors skip it, count it and name it."""


class UnitsError(DataError):
    """Bands, value ranges or units that are unknown or do not fit the network."""


class SplitLeakError(DataError):
    """The same image or group in two parts of a split."""


class WeightsError(DinoAdaptersError, ValueError):
    """Weights that cannot be read, or do not fit the network."""

    exit_code = 4


class MissingLibraryError(DinoAdaptersError, ImportError):
    """An optional library is absent; the message holds the install command."""

    exit_code = 5


class ShapeError(DinoAdaptersError, ValueError):
    """A tensor of the wrong shape."""

    exit_code = 6


class NotFittedError(DinoAdaptersError, ValueError):
    """A head was asked to predict before it was fitted."""

    exit_code = 6


class TrainingStopped(DinoAdaptersError, RuntimeError):
    """Training was stopped on purpose; nothing was applied after the reason arose."""

    exit_code = 7


class NotFiniteError(TrainingStopped):
    """A loss or gradient is NaN or infinite."""


class CollapseError(TrainingStopped):
    """All images get the same embedding."""


class Preempted(TrainingStopped):
    """The job was told to end (SIGTERM) and saved its state; the same command goes on.

    75 is EX_TEMPFAIL of sysexits.h: clusters can be told to queue a job again on it.
    """

    exit_code = 75


class CheckpointError(DinoAdaptersError, RuntimeError):
    """A checkpoint that is missing, damaged or of another run."""

    exit_code = 8


class DiskFullError(CheckpointError):
    """No room for a checkpoint; nothing of it is left, and earlier ones are whole."""
