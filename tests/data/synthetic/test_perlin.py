import numpy as np
import pytest

from muvit.data.synthetic.perlin import fractal_noise


def test_gradient_noise_equals_its_definition():
    size, lattice = 24, 5.5
    noise = fractal_noise(size, (lattice,), np.random.default_rng(4))
    angle = np.random.default_rng(4).uniform(0, 2 * np.pi, (6, 6))
    gradients = np.stack([np.sin(angle), np.cos(angle)], -1)
    for y in range(size):
        for x in range(size):
            point = np.array([y + 0.5, x + 0.5]) / lattice
            expected = 0.0
            for corner in np.ndindex(2, 2):
                node = np.floor(point).astype(int) + corner
                distance = point - node
                u = 1 - np.abs(distance)
                expected += np.prod(6 * u**5 - 15 * u**4 + 10 * u**3) * (gradients[*node] @ distance)
            assert noise[y, x] == pytest.approx(np.sqrt(2) * expected, abs=1e-5)


def test_octaves_are_weighted_by_halves_and_normalised():
    rng = np.random.default_rng(1)
    single = [fractal_noise(64, (lattice,), rng) for lattice in (32.0, 16.0, 8.0)]
    together = fractal_noise(64, (32.0, 16.0, 8.0), np.random.default_rng(1))
    np.testing.assert_allclose(together, (4 * single[0] + 2 * single[1] + single[2]) / 7, atol=1e-6)
    assert np.abs(together).max() <= 1
