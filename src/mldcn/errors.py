"""The one kind of error that a user can mend; the command line prints it without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something in the user's input is wrong; the message names the place and the remedy."""


class DiskFullError(UserError):
    """There is no room to write a file; with room again the same command goes on."""


class BrokeDownError(UserError):
    """Training broke down more often than it is taken back for."""
