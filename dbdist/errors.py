"""Mistakes that a user can make, each in one sentence; they end a command with exit code 2."""


class UserError(Exception):
    """Something outside the code is wrong.

    The message says what is wrong, what is allowed and what to do.
    """


class ConfigError(UserError):
    """A configuration value, or a combination of values, that cannot be honoured."""


class TopologyError(UserError):
    """The number of processes does not fit blocks, replicas and coordinator."""


class DataError(UserError):
    """A dataset that is missing, damaged or of another form than its name says."""


class CheckpointError(UserError):
    """A checkpoint or weights file that is missing, damaged or of another model."""


class OtherModelError(CheckpointError):
    """A checkpoint that is whole, but of another model than the configuration's."""


class Fault(Exception):
    """A run that cannot go on, through no mistake of its user.

    The message says which rank, block and step are at fault; entry points turn it into exit code 1.
    """
