"""What is to be done after a step of every block."""

from dataclasses import dataclass

from dbdist.config.config import Config


@dataclass(frozen=True)
class Due:
    """What is to be done after one step."""

    check: bool
    """Compare the weights that several ranks hold."""
    save: bool
    evaluate: bool
    record: bool


def due_after(step: int, max_steps: int, config: Config) -> Due:
    """What the configuration asks for after this step."""
    is_last = step == max_steps
    is_eval = (is_last or _is_due(step, config.eval.every_steps)) and config.is_joint
    is_save = is_last or _is_due(step, config.checkpoint.every_steps)
    is_log = _is_due(step, config.train.log_every) or step == 1
    return Due(
        check=_is_due(step, config.parallel.check_every),
        save=is_save,
        evaluate=is_eval,
        record=is_eval or is_save or is_log,
    )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
