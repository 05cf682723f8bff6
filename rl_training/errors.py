"""The one exception that is meant for users: its message is printed as a single line."""


class UserError(ValueError):
    """Bad input from a user. The message says what is wrong, where, and how to mend it."""


class ResumableError(UserError):
    """Something outside stopped the work (a full disk, another process that died): what is finished is kept."""


class ShareDone(Exception):
    """Raised in a helping process when its share of the work is done: the first process goes on and writes the results."""
