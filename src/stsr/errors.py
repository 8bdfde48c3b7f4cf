"""What a user can mend: one sentence that names the remedy."""


class StsrError(Exception):
    """Something in the data or the machine is not as needed; the message says what to do. Exit code 1."""

    exit_code = 1


class UsageError(StsrError):
    """The command was asked for something it cannot do; the message says what it can. Exit code 2."""

    exit_code = 2
