"""Everything that a user can mend, as a tree; each error knows its exit code.

VggtError             1
├─ InputError         2
├─ OutputError        2
├─ WeightsError       4
├─ MemoryExceeded     5
└─ GeometryError      1
"""


class VggtError(Exception):
    """Something a user can mend; `hint` says how, `exit_code` is what the shell sees."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InputError(VggtError):
    """Nothing to read, unreadable file, wrong kind, no such device, contradicting options."""

    exit_code = 2


class OutputError(VggtError):
    """Cannot write, or exists without --overwrite."""

    exit_code = 2


class WeightsError(VggtError):
    """Unknown name, other hash, licence refused, keys or shapes that do not fit."""

    exit_code = 4


class MemoryExceeded(VggtError):
    """Out of memory after the fallback."""

    exit_code = 5


class GeometryError(VggtError):
    """Too little overlap, degenerate points, no convergence."""
