"""Errors that are nobody's input: what runs failed."""


class TransferError(RuntimeError):
    """A copy that a layer was waiting for failed, also when tried again, or does not end."""
