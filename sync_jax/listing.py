"""The listing that --mode=methods prints: methods, scores and backbones with their options."""

from collections.abc import Mapping

from sync_jax.methods import METHODS
from sync_jax.models import BACKBONES
from sync_jax.options import Option
from sync_jax.scores import SCORES


def describe() -> str:
    """Lists every method, score and backbone, with default, bounds and help of each option."""
    lines = ["Methods (--config.method=NAME; hyperparameters: --config.loss.NAME=VALUE)"]
    for name, method in METHODS.items():
        summary = (method.objective.__doc__ or "").partition("\n")[0]
        lines.append(f"  {name}: {summary} Score: {SCORES[method.score].label}.")
        lines += _options(method.hyperparameters)
    lines.append("Scores (reported wherever the network has the outputs)")
    for name, score in SCORES.items():
        lines.append(f"  {name} ({score.label}): from {', '.join(score.needs)}")
    lines.append("Backbones (--config.model.name=NAME; options: --config.model.NAME=VALUE)")
    for name, backbone in BACKBONES.items():
        lines += [f"  {name}", *_options(backbone.options)]
    lines.append("Yours: package.module:NAME in place of a name; see docs/methods.md.")
    return "\n".join(lines)


def _options(options: Mapping[str, Option]) -> list[str]:
    lines = []
    for name, option in options.items():
        bounds = option.described()
        notes = "; ".join(x for x in (bounds, option.help) if x)
        lines.append(f"    {name} = {option.default!r}{f'  ({notes})' if notes else ''}")
    return lines
