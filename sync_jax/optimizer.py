"""The learning-rate schedule and the optax transformation."""

import optax
from ml_collections import ConfigDict


def learning_rate_schedule(
    config: ConfigDict, *, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """The learning rate of each step.

    Args:
        config: `optimizer` section: learning_rate, warmup_epochs, schedule ('linear' or 'cosine'
            to zero, or 'step', which multiplies by decay_factor every decay_epochs).
        total_steps: length of the run.
        steps_per_epoch: may be fractional.

    Returns:
        A function of the step.

    Raises:
        ValueError: unknown schedule.
    """
    peak = config.learning_rate
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps - 1)
    rest = total_steps - warmup
    decay: optax.Schedule
    if config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, rest)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest)
    elif config.schedule == "step":
        # The field counts its decay epochs from the run's first step, warm-up included.
        period = max(round(config.decay_epochs * steps_per_epoch), 1)
        decay = _shifted(
            optax.exponential_decay(peak, period, config.decay_factor, staircase=True), warmup
        )
    else:
        raise ValueError(f"unknown schedule {config.schedule!r}")
    if not warmup:
        return decay
    # The first step already moves: a rate of exactly 0 would waste it.
    ramp = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([ramp, decay], [warmup])


def _shifted(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    return lambda step: schedule(step + steps)


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum and weight decay on all parameters, as the field trains.

    Args:
        config: `optimizer` section: momentum, nesterov, weight_decay.
        schedule: the learning rate of each step.

    Returns:
        The transformation. Weight decay is added to the gradient (coupled, as in PyTorch's SGD).
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    )
