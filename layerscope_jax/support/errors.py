"""Errors of a running engine, of a machine, or of a job of several, beside those of bad input."""


class TransferError(RuntimeError):
    """Raised when a copy that a layer waits for fails repeatedly, or does not end."""


class ReadError(ValueError):
    """Raised when an expert cannot be read from the checkpoint's files, or no longer is what it was."""


class MachineError(ValueError):
    """Raised when this machine lacks what is asked for, such as files or free memory; another may have it."""


class LostWorkers(RuntimeError):
    """Raised when a job cannot go on, because the workers that had the same rows were lost, or none is left.

    Args:
        row: the first row that they had, by its number or by its file and line; None if no worker is left.
        losses: what became of each, a sentence.

    >>> print(LostWorkers(3, ("node a: it has ended", "node b: it has ended")))
    2 workers that had row 3 were lost: node a: it has ended; node b: it has ended
    """

    def __init__(self, row: int | str | None, losses: tuple[str, ...]):
        self.row, self.losses = row, losses
        had = "" if row is None else f" that had {row if isinstance(row, str) else f'row {row}'}"
        count = "1 worker" if len(losses) == 1 else f"{len(losses)} workers"
        super().__init__(f"{count}{had} {'was' if len(losses) == 1 else 'were'} lost: {'; '.join(losses)}")
