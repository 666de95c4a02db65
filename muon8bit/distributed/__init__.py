"""Training on several ranks: where tensors lie, who orthogonalizes what, how it gets there.

param_sharding   where a parameter, its state and its matrices lie
matrix_sharding  where the parts of one matrix lie
assignment       who orthogonalizes what, and what that moves: pure functions of shapes
sharded_batch    matrices that lie on several ranks, as this rank sees them
norms            norms of whole matrices and the check of all gradients: one all-gather
exchange         the second phase: parts to the owner, Newton-Schulz, parts back
consistency      where ranks wait for each other in a step, agree, and learn of failures
collectives      all-gathers and all-to-alls
watchdog         bounded waits inside a step, and the cause when a rank does not come
rank_group       all of it for one optimizer
"""

from .norms import Gathering
from .param_sharding import ParamSharding, check_placements
from .rank_group import RankGroup, check_group, rank_group_of
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
    "rank_group_of",
]
