"""From a model to parameter groups: which parameters are whose, and why."""

from .groups import param_groups
from .layer_groups import Piece, matrix_pieces, pieces_of
from .rules import Route
from .scaling import Scaling
from .table import ParamGroups

__all__ = ["ParamGroups", "Piece", "Route", "Scaling", "matrix_pieces", "param_groups", "pieces_of"]
