"""The exception that is meant for users, whose message is printed as a single line; and what others
say, as one line.
"""


class UserError(ValueError):
    """Bad input from a user. The message says what is wrong, where, and how to mend it."""


class ResumableError(UserError):
    """Something outside stopped the work (a full disk, another process that died): what is finished
    is kept.
    """


class ShareDone(Exception):
    """Raised in a helping process when its share of the work is done: the first process goes on and
    writes the results.
    """


def first_line(error: BaseException) -> str:
    """What an error says, cut after its first line; the error's own name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
