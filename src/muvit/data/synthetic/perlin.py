"""Fractal gradient noise (Perlin's), for smooth random fields."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def fractal_noise(size: int, lattices: tuple[float, ...], rng: np.random.Generator) -> FloatArray:
    """Sum of octaves of gradient noise with weights 1, 1/2, 1/4, ..., divided by the sum of the weights.

    Args:
        size: height and width in pixels.
        lattices: lattice spacing of each octave in pixels.
        rng: source of the gradients.

    Returns:
        float32 (size, size), within about [-1, 1].
    """
    weights = 0.5 ** np.arange(len(lattices))
    total = np.zeros((size, size), dtype=np.float32)
    for weight, lattice in zip(weights / weights.sum(), lattices, strict=True):
        total += np.float32(weight) * _gradient_noise(size, lattice, rng)
    return total


def _gradient_noise(size: int, lattice: float, rng: np.random.Generator) -> FloatArray:
    """Perlin's gradient noise with unit gradients and quintic fade, scaled by sqrt(2), at the pixel centres.

    The value at (y, x) is the sum over the four corners of its lattice cell of ``f(y) f(x) (g_y d_y + g_x d_x)`` with
    fade ``f``, gradient ``g`` and distance ``d`` to the corner. Each of the two terms separates into y and x, so it is
    two interpolations of the small array of gradients, first along y and then along x.
    """
    position = (np.arange(size) + 0.5) / lattice
    corner = position.astype(np.int64)
    distance = position - corner
    fade = distance**3 * (distance * (6 * distance - 15) + 10)
    # weights of the lower and the upper corner, without and with the distance to that corner
    plain = np.stack([1 - fade, fade]).astype(np.float32)
    sloped = np.stack([(1 - fade) * distance, fade * (distance - 1)]).astype(np.float32)

    def spread(gradients: FloatArray, along_y: FloatArray, along_x: FloatArray) -> FloatArray:
        rows = along_y[0, :, None] * gradients[corner] + along_y[1, :, None] * gradients[corner + 1]
        # transposed, so that a whole row is copied per pixel column; the caller transposes back once
        columns = np.ascontiguousarray(rows.T)
        return along_x[0, :, None] * columns[corner] + along_x[1, :, None] * columns[corner + 1]

    angle = rng.uniform(0, 2 * np.pi, (int(corner[-1]) + 2,) * 2)
    noise = spread(np.sin(angle).astype(np.float32), sloped, plain)
    noise += spread(np.cos(angle).astype(np.float32), plain, sloped)
    return np.float32(np.sqrt(2)) * noise.T
