"""The one base class that tells "the user can mend this" from "doccls is broken"."""


class UserError(ValueError):
    """Something that a user said or gave is wrong; the message says what, where, what is allowed and what to do."""


class OwnError(UserError):
    """A UserError that one process of several may meet alone (a file its machine lacks): it is told by that process."""
