"""The learning-rate schedule and the optax transformation."""

import optax
from ml_collections import ConfigDict


def learning_rate_schedule(
    config: ConfigDict, *, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """The learning rate as a function of the step.

    It rises linearly for `warmup_epochs` and then falls to zero ('linear' or 'cosine'), or is
    multiplied by `decay_factor` every `decay_epochs` ('step'). `config` is the section `optimizer`.
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
        every = optax.exponential_decay(peak, period, config.decay_factor, staircase=True)
        decay = lambda step: every(step + warmup)  # noqa: E731
    else:
        raise ValueError(f"unknown schedule {config.schedule!r}")
    if not warmup:
        return decay
    # The first step already moves: a rate of exactly 0 would waste it.
    ramp = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, as in PyTorch's SGD."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    )
