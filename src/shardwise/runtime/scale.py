"""The scale of the loss in fp16: gradients too small for 16 bits are made larger, and smaller again before they are used.

Micikevicius et al. 2018, "Mixed precision training", section 3.2. Scale and skipped steps are those of `torch.amp.GradScaler`: a step whose
gradients are not finite changes nothing and lowers the scale, and so many good ones in a row raise it.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.errors import LayoutError

__all__ = ["LossScale", "Scaler"]


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """initial: the first scale; growth, backoff: factors after `interval` good steps in a row, and after one that overflowed.

    Raises LayoutError for numbers with which a scale could not change as it should.
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def __post_init__(self) -> None:
        if not (self.initial >= 1 and self.growth >= 1 and 0 < self.backoff < 1 and self.interval >= 1):
            raise LayoutError(f"{self} cannot scale losses; initial, growth and interval are at least 1, backoff is between 0 and 1")


class Scaler:
    """The scale now, and how many steps have been skipped. Equal on all ranks, whose verdicts on a step are equal."""

    def __init__(self, rule: LossScale) -> None:
        self.rule, self.scale, self.skipped = rule, rule.initial, 0
        self.good = self.at_one = 0

    def judge(self, overflowed: bool) -> None:
        """Learns whether a step has overflowed, which is then skipped."""
        if overflowed:
            self.at_one = self.at_one + 1 if self.scale <= 1 else 0
            self.scale, self.good = max(1.0, self.scale * self.rule.backoff), 0
            self.skipped += 1
            return
        self.good, self.at_one = self.good + 1, 0
        if self.good == self.rule.interval:
            self.scale, self.good = self.scale * self.rule.growth, 0

    @property
    def exhausted(self) -> bool:
        """Whether steps overflow again and again although nothing is scaled."""
        return self.at_one > 1
