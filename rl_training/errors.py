"""The one exception that is meant for users: its message is printed as a single line."""


class UserError(ValueError):
    """Bad input from a user. The message says what is wrong, where, and how to mend it."""
