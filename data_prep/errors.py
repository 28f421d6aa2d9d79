"""The error that is raised on purpose for what the user can cure."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user, or a state of files and machines that the user can cure; its text is the message.

    Where a program has begun its work, any other ValueError is a defect of the program and reported with its traceback.
    """
