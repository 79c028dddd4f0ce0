"""Gaussian-process surrogate and acquisition: everything the width search needs, in float64.

    model = GP(x, y).fit()                       # x (n, d) in the unit box, y (n,)
    mean, variance = model.posterior(x_new)      # in y's own units
    best, value = optimize_acquisition(lambda x: ucb(*model.posterior(x), beta=0.1), 0.0, 1.0, dim=d)

One kernel (Matern-5/2, a length scale per input), one Cholesky factor, and one tensor for all
restarts of all acquisition problems. This file needs torch alone.
"""

import math
from typing import Callable

import torch
from torch import Tensor


def require(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_values(
    name: str, t: Tensor, *shape: int | None, device: torch.device | None = None, low: float = -1e100, high: float = 1e100
) -> None:
    """Raises ValueError unless t has this shape (None: any length but 0), this device and real values in [low, high]."""
    fits = t.ndim == len(shape) and all(have == want if want is not None else have > 0 for have, want in zip(t.shape, shape))
    wanted = ", ".join(">= 1" if want is None else str(want) for want in shape)
    require(fits, f"{name}: expected shape ({wanted}), got {tuple(t.shape)}")
    require(device in (None, t.device), f"{name}: expected a tensor on {device}, got one on {t.device}")
    require(not t.is_complex() and t.isfinite().all(), f"{name}: every value must be real and finite")
    require(((t >= low) & (t <= high)).all(), f"{name}: every value must lie in [{low:g}, {high:g}]")


# ------------------------------------------------------------------------------ the surrogate


def distance(u: Tensor, v: Tensor) -> Tensor:
    """sqrt(5) times the Euclidean distances (..., q, n) between u (..., q, d) and v (n, d)."""
    square = u.square().sum(-1, keepdim=True) + v.square().sum(-1) - 2 * u @ v.T
    return (5 * square.clamp_min(1e-20)).sqrt()  # the floor keeps sqrt's gradient finite where u = v


def matern52(s: Tensor) -> Tensor:
    """Matern-5/2 correlation at `distance` s between inputs divided by their length scales.

    Rasmussen & Williams (2006), eq. 4.17. By the squared Euclidean distance it changes at
    -5/6 (1 + s) exp(-s), which is finite everywhere.
    """
    return (1 + s + s.square() / 3) * torch.exp(-s)


BOX = dict(low=-1e-6, high=1 + 1e-6)  # the unit box, and rounding: far from all points a model predicts the mean


class GP:
    """Exact GP regression with constant mean, Matern-5/2 ARD kernel and Gaussian noise.

    Length scales and noise maximise the marginal likelihood with priors: the dimension-scaled
    log-normal of Hvarfner et al. (2024, eq. 6) on length scales, which keeps ARD honest when points
    are few, and a wide log-normal on the noise. Mean and output scale have closed forms given those
    (generalised least squares), so they cost nothing to search.

    Args:
        x: (n, d) inputs in the unit box.
        y: (n,) observations. They are standardised inside.
        hyper: (d + 1,) log length scales and log noise-to-signal variance to start from, say
            another GP's `.hyper` (warm start). None: the prior's mode.
    Raises ValueError for wrong shapes, no points, two devices, x outside the box, or values that are not finite or
    beyond 1e100.
    """

    def __init__(self, x: Tensor, y: Tensor, hyper: Tensor | None = None):
        require_values("x", x, None, None, **BOX)
        require_values("y", y, len(x), device=x.device)
        n, d = x.shape
        self.x, y = x.detach().double(), y.detach().double()
        self.offset, spread = y.mean(), y.std(correction=0)
        # A spread of rounding errors is no spread.
        self.scale = torch.where(spread > 1e-12 * y.abs().max(), spread, torch.ones_like(spread))
        self.z = (y - self.offset) / self.scale
        self.prior_mean = self.x.new_tensor([math.sqrt(2) + math.log(d) / 2] * d + [-6.0])
        self.prior_std = self.x.new_tensor([math.sqrt(3)] * d + [3.0])
        # Mode of a log-normal: exp(mean - std^2). The noise's prior is one on its logarithm.
        mode = self.prior_mean - self.prior_std.square()
        mode[-1] = self.prior_mean[-1]
        self.hyper = mode if hyper is None else hyper.to(self.x)
        require_values("hyper", self.hyper, d + 1)
        self.hyper = self.bounded(self.hyper)
        self._factor = None

    @staticmethod
    def bounded(hyper):
        return hyper.nan_to_num().clamp(-20, 20)  # a line search may try anything

    def _solve(self, hyper, x, z):
        """Everything that follows from one Cholesky factor of the correlation matrix of x."""
        hyper = self.bounded(hyper)
        u = x / hyper[:-1].exp()
        s = distance(u, u)
        k = matern52(s)
        k.diagonal().copy_(1 + hyper[-1].exp())
        for jitter in 10.0 ** torch.arange(-8, 3):  # the first is enough for any history, unless rounding wins
            k.diagonal().add_(jitter)
            chol, failed = torch.linalg.cholesky_ex(k)
            if not failed:
                break
        inverse = torch.cholesky_inverse(chol)
        weight = inverse.sum(1)
        mean = weight @ z / weight.sum()
        alpha = inverse @ (z - mean)
        # The output scale's mode under a weak prior, exp(-1 / v) / v (an inverse gamma): as if two points had spread 1.
        variance = ((z - mean) @ alpha + 2) / (len(z) + 2)
        return u, s, chol, inverse, mean, alpha, variance

    def _objective(self, hyper, x, z):
        """Negative log posterior of the hyperparameters, and its gradient.

        By hand, since autograd through the factorisation makes every proposal wait longer (measured by
        .github/experiments/simpler.py). With correlation matrix K, noise included, and the mean m and
        variance v at their best for it (so that only K's change counts: the envelope theorem), but for the
        priors, which follow at the end, and constants,

            value  = (n + 2) / 2 log v + 1/2 log det K,       (n + 2) v = (z - m)' K^-1 (z - m) + 2
            dvalue = 1/2 sum_ij G_ij dK_ij,                   G = K^-1 - alpha alpha' / v,  alpha = K^-1 (z - m)

        The log noise changes K's diagonal by the noise. The log of length scale k changes the squared
        distance of u_i and u_j, which are divided by it, by -2 (u_ik - u_jk)^2, and K_ij by `matern52`'s
        slope times that. With W = G * slope, multiplied out:

            dvalue / dlog length_k = -sum_ij W_ij (u_ik - u_jk)^2 = 2 (u_k' W u_k - sum_i (W 1)_i u_ik^2)
        """
        u, s, chol, inverse, mean, alpha, variance = self._solve(hyper, x, z)
        value = (len(z) + 2) / 2 * variance.log() + chol.diagonal().log().sum()
        g = inverse - torch.outer(alpha, alpha) / variance
        noise = g.diagonal().sum() / 2 * hyper[-1].exp()
        w = g * (1 + s) * torch.exp(-s) * (-5 / 6)
        w.diagonal().zero_()  # it cancels below, but for rounding
        length = 2 * ((u * (w @ u)).sum(0) - w.sum(1) @ u.square())
        # The priors, normal in the logarithms; a log-normal's density is in the length itself: hence the sum.
        gap = (hyper - self.prior_mean) / self.prior_std
        value = value + gap.square().sum() / 2 + hyper[:-1].sum()
        grad = torch.cat([length + 1, noise[None]]) + gap / self.prior_std
        return value, grad

    def fit(self, max_points: int = 300, iterations: int = 50) -> "GP":
        """Sets the hyperparameters (L-BFGS from the present ones) and returns self.

        Of more than `max_points` points, as many evenly spaced ones decide the hyperparameters; the
        posterior always uses all. Raises ValueError for a count below 1.
        """
        require(max_points >= 1 and iterations >= 1, f"max_points, iterations: at least 1, got {max_points}, {iterations}")
        n = len(self.x)
        pick = torch.linspace(0, n - 1, min(n, max_points), device=self.x.device).round().long()
        x, z = self.x[pick], self.z[pick]
        hyper = self.hyper.clone()
        search = torch.optim.LBFGS([hyper], max_iter=iterations, tolerance_change=1e-4, line_search_fn="strong_wolfe")

        def closure():
            value, hyper.grad = self._objective(hyper, x, z)
            return value

        with torch.no_grad():
            search.step(closure)
        if hyper.isfinite().all():  # else the history is beyond a fit, and the start serves
            self.hyper = self.bounded(hyper)
        self._factor = None
        return self

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (without noise) of the function at x (..., d): two tensors (...,), in y's units.

        Differentiable in x. Rasmussen & Williams (2006), eq. 2.25 and 2.26. Raises ValueError for a
        wrong shape or device, or values outside the box.
        """
        require_values("x", x, *x.shape[:-1], self.x.shape[1], device=self.x.device, **BOX)
        if self._factor is None:
            u, _, chol, _, mean, alpha, variance = self._solve(self.hyper, self.x, self.z)
            eye = torch.eye(len(u), dtype=u.dtype, device=u.device)
            # The factor's inverse (transposed) once: products serve every later call better than triangular solves.
            self._factor = u, torch.linalg.solve_triangular(chol, eye, upper=False).T, mean, alpha, variance
        u, whiten, mean, alpha, variance = self._factor
        k = matern52(distance(x.to(u) / self.hyper[:-1].exp(), u))
        left = 1 - (k @ whiten).square().sum(-1)
        return (mean + k @ alpha) * self.scale + self.offset, left.clamp_min(1e-12) * variance * self.scale**2


# ------------------------------------------------------------------------------ the acquisition


def ucb(mean: Tensor, variance: Tensor, beta: float) -> Tensor:
    """Optimistic value of an objective that is minimised: mean - sqrt(beta * variance).

    mean, variance: one shape. The upper confidence bound of the negated objective (Srinivas et al.
    2010), negated back. Raises ValueError for shapes or devices that differ, values that are not
    finite, or a negative variance or beta.
    """
    require_values("mean", mean, *mean.shape)
    require_values("variance", variance, *mean.shape, device=mean.device)
    require(beta >= 0, f"beta: must not be negative, got {beta}")
    require((variance >= 0).all(), "variance: must not be negative")
    return mean - (beta * variance).sqrt() if beta else mean  # sqrt has no gradient at 0


def chebyshev(objectives: Tensor, weights: Tensor, ideal: Tensor | float = 0.0, rho: float = 1e-6) -> Tensor:
    """Augmented Chebyshev scalarization, to be minimised: (..., k) objectives -> (...,).

    max_j w_j (f_j - z_j) + rho * sum_j w_j (f_j - z_j), with weights w (..., k) and the ideal point z
    (..., k), which no objective goes below. Every Pareto-optimal point minimises it for some w (rho 0), also
    where the front is not convex; a small rho keeps weakly optimal ones out (Steuer & Choo 1983; Joslim, section 3). Raises
    ValueError for another k or device, values that are not finite, or a negative weight or rho.
    """
    require_values("objectives", objectives, *objectives.shape)
    require_values("weights", weights, *weights.shape[:-1], *objectives.shape[-1:], device=objectives.device)
    require(rho >= 0, f"rho: must not be negative, got {rho}")
    require((weights >= 0).all(), "weights: must not be negative")
    gap = weights * (objectives - ideal)
    return gap.amax(-1) + rho * gap.sum(-1)


@torch.no_grad()
def optimize_acquisition(
    fn: Callable[[Tensor], Tensor],
    lower: float | Tensor,
    upper: float | Tensor,
    dim: int,
    batch: int = 1,
    starts: Tensor | None = None,
    raw: int = 256,
    restarts: int = 4,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimises `batch` functions over a box, all restarts of all of them as one tensor.

    `raw` uniform points and the `starts` are evaluated, the best `restarts` of each function descend
    (Adam, clamped to the box, step size falling to zero), and the best point seen is returned.

    Args:
        fn: maps (r, batch, d) to (r, batch); function b sees only x[:, b]. Differentiable.
        lower, upper: the box, floats or (d,); of sides that are not too unlike, as one learning rate serves all.
        starts: (s, d), tried for every function.
    Returns x (batch, d) and fn there (batch,).
    Raises ValueError for an empty box, a count below 1, shapes that do not fit, or starts that are not finite.
    """
    for name, value in (("dim", dim), ("batch", batch), ("raw", raw), ("restarts", restarts), ("steps", steps)):
        require(value >= 1, f"{name} must be at least 1, got {value}")
    if starts is not None:
        require_values("starts", starts, None, dim)
    device = starts.device if starts is not None else torch.as_tensor(lower).device
    # Drawn on the CPU: the same points whatever the device.
    x = torch.rand(raw, batch, dim, generator=generator, dtype=torch.float64).to(device)
    lower, upper = (torch.as_tensor(b, dtype=torch.float64, device=device) for b in (lower, upper))
    finite = (lower <= upper).all() and (upper - lower).isfinite().all()
    require(finite, f"lower, upper: expected a finite box, got {lower.tolist()} to {upper.tolist()}")
    x = lower + (upper - lower) * x
    if starts is not None:
        x = torch.cat([x, starts.double()[:, None].expand(-1, batch, -1).clamp(lower, upper)])
    value = fn(x)
    require(value.shape == x.shape[:2], f"fn: expected values of shape {tuple(x.shape[:2])}, got {tuple(value.shape)}")
    # The best `restarts` of each function: (restarts, batch).
    pick = value.nan_to_num(torch.inf).topk(min(restarts, len(x)), dim=0, largest=False).indices
    best, value = x.gather(0, pick[..., None].expand(-1, -1, dim)), value.nan_to_num(torch.inf).gather(0, pick)

    x = best.clone().requires_grad_()
    descent = torch.optim.Adam([x], betas=(0.7, 0.99))
    span = float((upper - lower).max())
    for step in range(steps):
        with torch.enable_grad():
            now = fn(x)
            (grad,) = torch.autograd.grad(now.sum(), x)
        x.grad = grad.nan_to_num()  # where fn is not finite, there is nowhere to go
        better = now < value
        best, value = torch.where(better[..., None], x, best), torch.where(better, now, value)
        # Adam's steps have the same size whatever the scale of fn (above some 1e-6); each row descends for itself.
        descent.param_groups[0]["lr"] = 0.1 * span * (1 - step / steps)
        descent.step()
        x.clamp_(lower, upper)
    winner = value.argmin(0)
    columns = torch.arange(batch, device=device)
    return best[winner, columns], value[winner, columns]
