"""The options for choosing tokens; `generate` and `chat` share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter, validators

from moehive.node.text.sampling import MAX_SEED, Sampling, new_seed

from .arguments import NotNegative, Positive


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen, and when the text ends."""

    temperature: NotNegative | None = None
    """0 always takes the likeliest token; higher values vary more. By default what the model recommends in its
    generation_config.json, and 0 where it recommends nothing."""

    top_k: Positive | None = None
    """Choose among this many likeliest tokens. By default what the model recommends."""

    top_p: Annotated[float | None, Parameter(validator=validators.Number(gt=0, lte=1), metavar="P")] = None
    """Choose among the likeliest tokens that together have this probability, above 0 and at most 1. By default what the
    model recommends."""

    stop: Annotated[tuple[str, ...], Parameter(metavar="TEXT", negative="", show_default=False)] = ()
    """End after this text, which is then the last that is printed; may be repeated."""

    seed: Annotated[int | None, Parameter(validator=validators.Number(gte=0, lte=MAX_SEED))] = None
    """Makes a choice repeatable. By default a new one each time, which the summary of `moehive generate` names."""

    def chosen(self, max_tokens: int) -> Sampling:
        """With a seed. Raises ConfigError for a contradiction."""
        seed = new_seed() if self.seed is None else self.seed
        sampling = Sampling(max_tokens, seed, self.temperature, self.top_k, self.top_p, self.stop)
        sampling.arguments()  # checks itself
        return sampling
