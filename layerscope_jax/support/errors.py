"""Errors of a running engine that no input caused."""


class TransferError(RuntimeError):
    """Raised when a copy that a layer waits for fails repeatedly, or does not end."""


class ReadError(ValueError):
    """Raised when an expert cannot be read from the checkpoint's files, or no longer is what it was."""
