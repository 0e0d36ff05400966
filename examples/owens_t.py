"""A SciPy function with gradients: Owen's T, a part of the skew normal distribution.

T(h, a) = 1/(2 pi) times the integral of exp(-h^2 (1 + t^2) / 2) / (1 + t^2) for t from 0 to a.
D. B. Owen, "Tables for Computing Bivariate Normal Probabilities", 1956.
"""

import numpy as np
from scipy import special

import ops


def gradient(grad, h, a):
    to_h = -np.exp(-(h**2) / 2) * special.erf(a * h / np.sqrt(2)) / np.sqrt(8 * np.pi)
    to_a = np.exp(-(h**2) * (1 + a**2) / 2) / (2 * np.pi * (1 + a**2))
    return grad * to_h, grad * to_a


owens_t = ops.from_numpy(special.owens_t, gradient, name="owens_t")
