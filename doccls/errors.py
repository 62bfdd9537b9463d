"""The base class of what the user can mend, and the two errors that another attempt may not meet."""


class UserError(ValueError):
    """Something that a user said or gave is wrong; the message says what, where, what is allowed and what to do."""


class RankLocalError(UserError):
    """A UserError that one process of several may meet alone (a file its machine lacks): it is told by that process."""


class PortTakenError(UserError):
    """Another process listens where the ranks were to meet. The launcher, which chose the port, chooses another."""


class DownloadError(OSError):
    """The network failed, several times. No UserError: the launcher starts the fold again."""
