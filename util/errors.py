"""The one exception that stands for a mistake of the user's, not of the program's."""


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: flag or file, what was found, what was expected."""
