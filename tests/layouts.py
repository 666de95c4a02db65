"""The same values in other strides."""


def laid_out(matrix, layout):
    """The same values in other strides: "rows" (contiguous), "columns" (transposed) or "sliced" (both strides odd)."""
    if layout == "columns":
        return matrix.t().contiguous().t()
    if layout == "sliced":
        wide = matrix.new_full((matrix.shape[0] * 2, matrix.shape[1] * 3 + 1), 7.0)
        wide[1::2, 1::3] = matrix
        return wide[1::2, 1::3]
    return matrix.contiguous()
