"""Where a model runs: pure decisions over reports. Start at `decision.decide`, then `filters`, then a policy."""

from sollold.placement.decision import decide
from sollold.placement.job import PlacementDefaults

__all__ = ["PlacementDefaults", "decide"]
