"""One family of errors for everything a user can mend.

A message states what is wrong (both values), where it came from and what to do. The command line
prints it without a traceback and exits non-zero. Our own bugs are `assert`s and keep theirs.
Knows nothing of the rest of the package; costs nothing.
"""


class AltiplanoError(ValueError):
    """Something the user can mend; the message says how."""


class ConfigError(AltiplanoError):
    """The YAML or an override is wrong."""


class DataError(AltiplanoError):
    """A corpus or a record cannot be used."""


class ArtifactError(AltiplanoError):
    """An artifact is missing, half-written, truncated or edited."""


class MismatchError(AltiplanoError):
    """Two parts that do not belong together were about to be combined."""


class ModelError(AltiplanoError):
    """A model directory cannot be used (not Llama-like, pickle only, unreadable)."""


class TrainingError(AltiplanoError):
    """A training run stopped because going on would be useless."""


class MemoryShortageError(TrainingError):
    """A worker ran out of memory."""


class ServeError(AltiplanoError):
    """The service cannot start or cannot be reached."""
