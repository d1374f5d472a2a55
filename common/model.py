"""The model: what the server releases is a prior, what a device keeps is a posterior.

theta_i = beta + U w_i + b_i. The released `SharedModel` is the prior
theta_i ~ N(beta + U w, .), w ~ N(0, I), so U carries the scale of w; b_i has at most `sparsity`
nonzeros of prior variance `b_variance`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedModel:
    """The prior that the server releases: everybody may see it.

    Attributes:
        beta: `d`, the mean of theta.
        U: `d x r`, the directions in which users differ; columns carry the scale of w, they are not orthonormal.
        b_variance: Prior variance of a nonzero of b, in units of theta squared.
        noise_variance: Variance of an example's noise, in units of y squared; 1 for the logistic family.
    """

    beta: Array
    U: Array
    b_variance: float
    noise_variance: float

    @property
    def dimension(self) -> int:
        """Number of features d."""
        return int(self.U.shape[0])

    @property
    def rank(self) -> int:
        """Number of columns r of U."""
        return int(self.U.shape[1])

    def gauge(self) -> tuple[Array, Array]:
        """Orthonormal directions and singular values of U: the reporting gauge, and the papers' U."""
        left, values, _ = np.linalg.svd(self.U, full_matrices=False)
        return left, values


@dataclass(frozen=True, kw_only=True, eq=False)
class PersonalState:
    """The posteriors of n users: it stays on the device and has no encoder.

    Attributes:
        w: `n x r`, posterior means.
        support: `n x k` int64, features on which b is nonzero, -1 where unused.
        b: `n x k`, posterior means on the support, 0 where unused.
        scale: `n`, the personal variance tau of w ~ N(0, tau I).
        precision: `n x (r+k) x (r+k)`, joint posterior precision of (w, b); unused coordinates keep their prior.
        theta: `n x d`, beta + U w + b.
    """

    w: Array
    support: IntArray
    b: Array
    scale: Array
    precision: Array
    theta: Array
