# SPDX-License-Identifier: Apache-2.0
"""The one class of errors that are the user's to put right. Everything that this package refuses (a
start, a request, a file, a flag) is one of these, and whoever shows it needs no stack trace."""


class UserError(ValueError):
    """One sentence: the flag or field, its value, and what would be right.

    A ValueError, because that is what vLLM answers with status 400, and what pydantic passes on.
    """


def first_line(error: Exception) -> str:
    """What another library says about an error, without the pages that may follow."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
