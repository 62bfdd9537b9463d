"""The base class of errors that the user can fix, and the errors that the launcher handles by class."""


class UserError(ValueError):
    """An error in the user's input; the message says what is wrong, where, what is allowed and what to do."""


class RankLocalError(UserError):
    """A UserError that a single rank may hit (a file missing on its machine), so that rank itself reports it."""


class PortTakenError(UserError):
    """The rendezvous port is in use by another process. The launcher, which chose the port, chooses another."""


class DownloadError(OSError):
    """The network failed several times. Not a UserError: the launcher retries the fold."""
