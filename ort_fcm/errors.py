"""The one exception of this package."""

from __future__ import annotations


class FcmError(Exception):
    """Bad input or a failed check. The message is one sentence that names the file or node and the cause."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
