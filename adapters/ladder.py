"""Shapes from rank one upwards: the first products are LoRA's, the later ones cover more ranks with as many numbers.

On an (m, n) layer, rung t holds A (t, n / t) and B (m / t, t). Their product has rank up to t^2, m + n parameters and
t (m + n) multiplications a token, in which t = 1 is a LoRA of rank one. The paper mixes five shapes and does not print
them. Near-LoRA shapes are also what arXiv 2602.01267 finds best for sums of equal shapes.
"""

from math import gcd


def ladder_shapes(n_out: int, n_in: int, n_shapes: int) -> list[tuple[int, int]]:
    """Choose shapes (a_out, a_in) = (t, n_in / t) of the A factors, t rising from 1 by a factor of at least two.

    t divides both sizes, and t^2 is at most the smaller one, beyond which the rank falls again. So fewer shapes than
    `n_shapes` are returned where the sizes have few common divisors; (1, n_in) always is.

    >>> ladder_shapes(192, 576, 5)
    [(1, 576), (2, 288), (4, 144), (8, 72)]
    >>> ladder_shapes(11008, 4096, 5)
    [(1, 4096), (2, 2048), (4, 1024), (8, 512), (16, 256)]
    >>> ladder_shapes(7, 13, 3)
    [(1, 13)]

    Raises:
        ValueError: a size or the number of shapes is below one.
    """
    if min(n_out, n_in, n_shapes) < 1:
        raise ValueError(f"n_out, n_in and n_shapes must be positive, got {n_out}, {n_in} and {n_shapes}")
    common, rungs = gcd(n_out, n_in), [1]
    for t in range(2, int(min(n_out, n_in) ** 0.5) + 1):
        if common % t == 0 and t >= 2 * rungs[-1]:
            rungs.append(t)
    return [(t, n_in // t) for t in rungs[:n_shapes]]
