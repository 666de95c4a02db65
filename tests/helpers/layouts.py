"""The same values in other strides."""


def laid_out(matrices, layout):
    """Return the same values, of a matrix or a stack of them, in other strides.

    "rows": contiguous; "columns": every matrix transposed; "sliced": both strides odd; "row piece", "column piece":
    rows, or columns, out of larger matrices. What lies between is 7.
    """
    *count, rows, cols = matrices.shape
    if layout == "columns":
        return matrices.mT.contiguous().mT
    sizes, where = {
        "rows": ((rows, cols), (slice(None), slice(None))),
        "sliced": ((rows * 2, cols * 3 + 1), (slice(1, None, 2), slice(1, None, 3))),
        "row piece": ((rows + 3, cols), (slice(2, 2 + rows), slice(None))),
        "column piece": ((rows, cols + 5), (slice(None), slice(3, 3 + cols))),
    }[layout]
    view = matrices.new_full((*count, *sizes), 7)[(..., *where)]
    return view.copy_(matrices)
