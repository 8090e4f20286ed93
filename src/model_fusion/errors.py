"""The one exception family. The command line shows these as one line and exits with 2."""


class ModelFusionError(Exception):
    """Something the user can act on: the message says what was given, what was expected, what to change."""


class InputError(ModelFusionError):
    """A value, file or recipe handed in by the user does not fit."""


class IntegrityError(ModelFusionError):
    """A saved part does not match its recorded hash or shape."""


class MissingDependencyError(ModelFusionError):
    """An optional package is needed; the message names the extra to install."""
