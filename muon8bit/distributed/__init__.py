"""Training on several ranks: where tensors lie (`layout`), who orthogonalizes what (`plan`), how it gets there.

agreement    ranks agree on groups, options and gradients, or all raise
matrices     what lies on several ranks, as this rank sees it
gathering    norms of whole matrices and the verdict on all gradients: one all-gather
rounds       the second phase: parts to the owner, Newton-Schulz, parts back
transport    collectives, with their bytes counted
meeting      where ranks meet in a step, and learn of failures
watch        bounded waits inside a step, and the cause when a rank does not come
team         all of it for one optimizer
"""

from .norms import Gathering
from .param_sharding import ParamSharding, check_placements
from .rank_group import RankGroup, check_group, team_of
from .sharded_batch import ShardedBatch
from .watchdog import RanksError

__all__ = [
    "Gathering",
    "ParamSharding",
    "RankGroup",
    "RanksError",
    "ShardedBatch",
    "check_group",
    "check_placements",
    "team_of",
]
