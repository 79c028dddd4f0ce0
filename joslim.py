"""Joslim: joint widths and weights optimisation for slimmable networks (Chin et al., ECML-PKDD 2021).

The whole algorithm. `net.set_widths(a)` takes a configuration, (d,) float64 on the CPU, or one float for all
widths; `cost(a, relaxed=False)` maps (..., d) to (...,), a ratio to the full network's. m sub-networks a step,
tau steps a round, held_out = (x, y) images that training never sees:

    sampler = Joslim(dim=net.num_widths, cost=cost)
    for step, (x, y) in enumerate(batches):
        if step % tau == 0:                                          # a round
            if sampler.ready:
                sampler.observe(evaluate(net, sampler.widths, *held_out))   # 1. re-evaluate history
            widths = sampler.sample(m)                               # 2.-4. fit, propose, append
        optimizer.zero_grad()
        sandwich_step(net, x, y, widths, sampler.lower)              # the weights
        optimizer.step()
    losses = evaluate(net, sampler.widths, *held_out).cpu()
    for a in sampler.widths[pareto_front(losses, cost(sampler.widths))]:
        net.set_widths(a)
        calibrate_bn(net, batches_of_training_images)                # then net.eval(), and test it

`UniformWidths(dim)` in place of `Joslim`, with tau = 1, trains US-Nets ("slim"), `RandomWidths(dim)` the first half
of NAS-style two-stage methods. They are never `ready` and keep no history: the front is
then chosen among widths of your own.

This file needs torch and gp.py. `evaluate` goes by each batch's BatchNorm statistics. So BatchNorm must not track
them in training, or they would change: `models.BatchNorm2d`, or momentum 0.
"""

import math
from contextlib import contextmanager
from typing import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gp import GP, chebyshev, optimize_acquisition, require, require_values, ucb

# ------------------------------------------------------------------------------ width samplers


class RandomWidths:
    """a ~ U[lower, 1]^d, each width drawn by itself: how OFA and BigNAS train their shared weights.

    Raises ValueError for dim below 1, lower outside (0, 1], or a seed that torch's generators would shorten.
    """

    ready = False  # it does not look at losses, so nothing need be evaluated for it

    def __init__(self, dim: int, lower: float = 0.42, seed: int = 0):
        require(dim >= 1, f"dim must be at least 1, got {dim}")
        require(0 < lower <= 1, f"lower must lie in (0, 1], got {lower}")
        require(0 <= seed < 2**32, f"seed must lie in [0, 2^32), got {seed}")  # torch's generator uses the lower 32 bits only
        self.dim, self.lower = dim, lower
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, m: int, *shape: int) -> Tensor:
        require(m >= 1, f"m must be at least 1, got {m}")
        return torch.rand(m, *shape, generator=self.generator, dtype=torch.float64)

    def sample(self, m: int, keep: int | None = None) -> Tensor:
        """m configurations (m, d), float64, in [lower, 1], none of which is kept. Raises ValueError for m below 1."""
        return self.lower + (1 - self.lower) * self.rand(m, self.dim)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that later samples depend on, as tensors."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())


class UniformWidths(RandomWidths):
    """a = u * 1 with u ~ U[lower, 1], one width for the whole network: US-Nets (Yu & Huang 2019)."""

    def sample(self, m: int, keep: int | None = None) -> Tensor:
        """m configurations (m, d), float64, in [lower, 1], none of which is kept. Raises ValueError for m below 1."""
        return (self.lower + (1 - self.lower) * self.rand(m, 1)).expand(m, self.dim).clone()


class Joslim(UniformWidths):
    """Widths proposed by multi-objective Bayesian optimisation (Joslim, algorithm 2).

    Proposals are uniform widths until the history holds `num_prior`; then the full network joins it and a GP on
    the logarithm of the observed losses proposes: along a front they may span a factor of fifty, and on the losses
    themselves the worst would drown all differences between the best.

    A target cost is drawn for each proposal, that of a uniform network of width u ~ U[lower, 1], as US-Nets draws
    it. The paper minimises the scalarization of loss (weight 1 - lambda) and cost (lambda), and bisects lambda, ten
    minimisations or so, until the minimiser has that cost. If there is such a lambda, its minimiser has the least
    acquisition value among the configurations of that cost. So we minimise on the surface of that cost, once, and
    every target is met. `targeted=False` draws lambda itself.

    Args:
        dim: d, the number of widths.
        cost: maps widths a (..., d) to cost ratios (...,) to the full network's; takes `relaxed=True` for
            a version differentiable in a. Must grow with every width. One without a gradient, a lookup table say,
            serves as well: proposals then move along the acquisition's gradient alone.
        beta: weight of the GP's variance in the (optimistic) acquisition.
        ema: when a configuration is observed again, (1 - ema) * new + ema * (old + mean change of all that
            are with it), in logarithms, is kept: this averages out the noise of small batches. 0 takes the new loss.

    Attributes, both of which may be assigned:
        widths: (n, d) the history: the proposals that were kept, and the full network; float64.
        losses: (n,) their losses as last observed, positive; nan where there is none, and the GP leaves those out. What is
            below 1e-6 counts as 1e-6: losses much smaller than a cross-entropy's are to be scaled.
    """

    def __init__(
        self,
        dim: int,
        cost: Callable[..., Tensor],
        lower: float = 0.42,
        num_prior: int = 20,
        beta: float = 0.1,
        seed: int = 0,
        targeted: bool = True,
        ema: float = 0.0,
    ):
        super().__init__(dim, lower, seed)
        require(num_prior >= 1, f"num_prior must be at least 1, got {num_prior}")
        require(beta >= 0, f"beta must not be negative, got {beta}")
        require(0 <= ema < 1, f"ema must lie in [0, 1), got {ema}")
        self.cost, self.num_prior, self.beta, self.targeted, self.ema = cost, num_prior, beta, targeted, ema
        self.smooth = self.check_cost()
        self.widths = torch.empty(0, dim, dtype=torch.float64)
        self.losses = torch.empty(0, dtype=torch.float64)
        self.hyper = None  # the GP's last hyperparameters, from which the next fit starts

    def check_cost(self):
        """Whether the cost has a gradient. Raises ValueError unless it is a ratio that grows with the widths."""
        ends = torch.tensor([self.lower, 1.0], dtype=torch.float64)[:, None, None].expand(2, 1, self.dim)
        value = torch.as_tensor(self.cost(ends))
        fits = value.shape == (2, 1) and value.isfinite().all()
        require(fits, f"cost: expected finite values (2, 1) for widths {tuple(ends.shape)}, got {value.tolist()}")
        value = value[:, 0]
        ratio = 0 < value[0] <= value[1] and abs(value[1] - 1) < 1e-6
        require(ratio, f"cost: expected to grow to 1 at full width, got {value[0]:g} at lower, {value[1]:g} there")
        try:
            with torch.enable_grad():
                return self.cost(ends.clone().requires_grad_(), relaxed=True).requires_grad
        except (RuntimeError, AttributeError):  # numpy's, which takes no tensor with a gradient
            return False

    def cost_of(self, a, **relaxed):
        return torch.as_tensor(self.cost(a if self.smooth else a.detach(), **relaxed)).to(a)

    @property
    def ready(self) -> bool:
        """Whether the next proposals depend on losses: if not, the history need not be evaluated."""
        return len(self.widths) >= self.num_prior

    def observe(self, losses: Tensor, where: Tensor | None = None) -> None:
        """Renews the losses (n,) of all configurations, or of those whose indices (k,) are `where`.

        Where the weights have moved, renew all of them on few images, not some of them on many: the GP
        averages noise out, but what is stale misleads it. nan or inf marks a configuration as not
        observed. Raises ValueError for a negative loss, a wrong shape or dtype, or an index out of range.
        """
        n = len(self.widths)
        losses = torch.as_tensor(losses).detach()
        where = torch.arange(n) if where is None else torch.as_tensor(where).cpu()
        usable = not losses.is_complex() and where.dtype == torch.int64
        require(usable, f"losses, where: expected real values and int64, got {losses.dtype} and {where.dtype}")
        fits = losses.ndim == 1 and losses.shape == where.shape
        require(fits, f"losses: expected shape {tuple(where.shape)}, got {tuple(losses.shape)}")
        inside = ((where >= 0) & (where < n)).all()
        require(inside, f"where: expected indices from 0 to {n - 1}")
        require(not (losses < 0).any(), "losses: must not be negative, as no cross-entropy is")
        where, new = where.to(self.losses.device), losses.to(self.losses)
        change = self.log(new) - self.log(self.losses[where])
        again = change.isfinite()
        if again.any():  # in logarithms, (1 - ema) * new + ema * (old + mean change) = new - ema * (change - mean change)
            new = torch.where(again, new * (-self.ema * (change - change[again].mean())).exp(), new)
        self.losses = self.losses.index_copy(0, where, new)

    def sample(self, m: int, keep: int | None = None) -> Tensor:
        """Proposes m configurations (m, d); the first `keep`, by default all, join the history, their losses nan.

        Raises ValueError for m below 1 or keep outside [1, m].
        """
        keep = m if keep is None else keep
        require(m >= 1, f"m must be at least 1, got {m}")
        require(1 <= keep <= m, f"keep must lie in [1, {m}], got {keep}")
        new = self.propose(m) if self.ready else super().sample(m)
        added = new[:keep]
        if len(self.widths) < self.num_prior <= len(self.widths) + keep:
            added = torch.cat([added, torch.ones(1, self.dim, dtype=new.dtype)])
        self.widths = torch.cat([self.widths, added.to(self.widths)])
        self.losses = torch.cat([self.losses, self.losses.new_full((len(added),), math.nan)])
        return new

    @torch.no_grad()
    def propose(self, m: int) -> Tensor:
        """m configurations (m, d) from a GP on the history.

        Raises ValueError if `widths` and `losses` do not fit together, a width is outside [lower, 1] or no loss is finite.
        """
        require_values("widths", self.widths, None, self.dim)
        inside = ((self.widths >= self.lower - 1e-6) & (self.widths <= 1 + 1e-6)).all()
        require(inside, f"widths: expected values in [{self.lower:g}, 1]")
        fits = self.losses.shape == self.widths.shape[:1] and self.losses.device == self.widths.device
        require(fits, f"losses: expected shape ({len(self.widths)},) on {self.widths.device}, "
                      f"got {tuple(self.losses.shape)} on {self.losses.device}")  # fmt: skip
        known = self.losses.isfinite()
        require(known.any(), "losses: none is finite; observe() the history's losses before sample(), unless training diverged")
        widths = self.widths[known].double()
        losses = self.log(self.losses[known])
        model = GP(self.unit(widths), losses, self.hyper).fit()
        self.hyper = model.hyper
        near = widths[shortlist(self.losses[known], self.cost_of(widths), 50)]  # where good ones are: starts

        def acquisition(a):  # by the field's name an upper bound; of a loss, which is to be small, the lower one
            return ucb(*model.posterior(self.unit(a)), self.beta)

        if self.targeted:
            # One u from each m-th part of [lower, 1]: uniform, and proposals of a round differ.
            part = torch.randperm(m, generator=self.generator)
            u = self.lower + (1 - self.lower) * ((part + self.rand(m)) / m).to(widths)
            target = self.cost_of(u[:, None].expand(m, self.dim))
            best = self.minimize(lambda a: acquisition(self.project_to_cost(a, target)), m, near)
            return self.project_to_cost(best, target)

        # Lambda uniform. The log loss is scaled to [0, 1] over what is known (where the optimistic estimate goes below
        # that, the cost decides); the cost is a ratio already.
        weight = self.rand(m).to(widths)
        weights = torch.stack([1 - weight, weight], -1)
        low, high = losses.aminmax()

        def scalarized(a):
            loss = (acquisition(a) - low) / (high - low).clamp_min(1e-12)
            return chebyshev(torch.stack([loss, self.cost_of(a, relaxed=True)], -1), weights)

        return self.minimize(scalarized, m, near)

    def minimize(self, fn, m, starts):
        raw = 256 if self.lower < 1 else 1
        return optimize_acquisition(fn, self.lower, 1.0, self.dim, m, starts, raw, generator=self.generator)[0]

    def project_to_cost(self, a: Tensor, target: Tensor) -> Tensor:
        """Widens or narrows all layers of a (..., m, d) alike, within the box, until they cost target (m,).

        By one shift s for each configuration. Differentiable in a, so that minimising fn(project_to_cost(a)) over the box
        is minimising fn on the surface of that cost: where s solves C(clip(a + s)) = target, the implicit function
        theorem gives

            ds/da = -grad C / (1' grad C),        grad C the gradient of C(clip(a + s)) in a.

        Eight bisections come near s. The Newton step from there, -(C - target) / (1' grad C), leaves an error of
        second order, and its own gradient is that very expression: it carries value and gradient. (Only a cost
        without gradient is bisected to the end, which takes longer: .github/experiments/simpler.py.)
        """
        with torch.no_grad():
            low, high = (torch.full_like(a[..., :1], s * (1 - self.lower)) for s in (-1, 1))
            for _ in range(8 if self.smooth else 40):  # the cost grows with the shift
                shift = (low + high) / 2
                cost = self.cost_of(self.box(a + shift), relaxed=True)
                below = (cost < target if self.smooth else cost <= target)[..., None]
                low, high = torch.where(below, shift, low), torch.where(below, high, shift)
        if not self.smooth:  # of a cost with steps, the widest that does not cost more
            return self.box(a + low)
        with torch.enable_grad():
            shift.requires_grad_()
            excess = self.cost(self.box(a + shift), relaxed=True) - target
            (slope,) = torch.autograd.grad(excess.sum(), shift, retain_graph=a.requires_grad)  # 1' grad C
        excess = excess if a.requires_grad else excess.detach()
        newton = -excess[..., None] / slope.clamp_min(1e-9)
        return self.box(a + (shift.detach() + newton).clamp(low, high))

    def box(self, a: Tensor) -> Tensor:
        return a.clamp(self.lower, 1)

    @staticmethod
    def log(losses):
        return losses.clamp_min(1e-6).log()  # float32 rounds a cross-entropy below that

    def unit(self, a):
        return ((a - self.lower) / max(1 - self.lower, 1e-9)).clamp(0, 1)  # but for rounding, they lie there

    def state_dict(self) -> dict[str, Tensor]:
        hyper = {} if self.hyper is None else {"hyper": self.hyper}
        return super().state_dict() | {"widths": self.widths, "losses": self.losses} | hyper

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.widths, self.losses, self.hyper = state["widths"], state["losses"], state.get("hyper")


# ------------------------------------------------------------------------------ weights


def sandwich_step(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    widths: Iterable[Tensor],
    lower: float = 0.42,
    label_smoothing: float = 0.0,
    amp: bool = False,
    scale: float = 1.0,
    distill: bool = True,
) -> Tensor:
    """Adds up the gradients of one step: sandwich rule with in-place distillation (US-Nets, section 3).

    The full network learns from the labels; each of `widths` and the smallest network (`lower`
    everywhere) from the full network's softmax. Clearing gradients before and stepping the optimiser
    after are the caller's, and so is the all-reduce: one, whatever the number of widths.

    Args:
        x, y: images (b, c, h, w) and class indices (b,).
        widths: configurations, each (d,).
        label_smoothing: for those that learn from the labels.
        amp: bfloat16 autocast in the forward passes.
        scale: multiplies the loss before backward, 1 / k for one of k parts of a batch.
        distill: False lets all networks learn from the labels: for trainings too short for the full
            network to have much to teach.
    Returns the losses (len(widths) + 2,), detached, on x's device: full, widths, smallest. Distilled ones are
    cross-entropies with the full network's softmax. Widths stay at the smallest.
    Raises ValueError for x and y that do not fit together, x of another device or dtype than the network, or one
    configuration (d,) instead of several. Values of x and y are not looked at: on a GPU that would mean waiting for it.
    """
    _require_batch(net, widths, x, y, amp)
    require(0 <= label_smoothing < 1, f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    require(math.isfinite(scale), f"scale must be finite, got {scale}")

    def backward(a, target, smoothing=0.0):
        net.set_widths(a)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = net(x)
            loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        (loss * scale).backward()  # now, so that one pass's activations are free before the next
        losses.append(loss.detach())
        return logits.detach()

    losses = []
    soft = backward(1.0, y, label_smoothing).float().softmax(1)
    target = (soft,) if distill else (y, label_smoothing)
    for a in (*widths, lower):
        backward(a, *target)
    return torch.stack(losses)


def _require_images(net, x, amp=False):
    like = next(net.parameters(), x)
    require(x.device == like.device, f"x: expected on {like.device}, where the network is; got on {x.device}")
    usable = x.is_floating_point() and len(x) > 0
    require(usable, f"x: expected at least one image, of floating point; got {tuple(x.shape)}, {x.dtype}")
    require(amp or x.dtype == like.dtype, f"x: expected {like.dtype}, as the network's weights are; got {x.dtype}")


def _require_batch(net, widths, x, y, amp):
    several = not isinstance(widths, Tensor) or widths.ndim == 2
    require(several, "widths: expected configurations (m, d); put one alone in a list")
    _require_images(net, x, amp)
    fits = y.shape == x.shape[:1] and y.dtype == torch.int64 and y.device == x.device
    require(
        fits, f"y: expected class indices ({len(x)},), int64, on {x.device}; got {tuple(y.shape)}, {y.dtype}, on {y.device}"
    )


@contextmanager
def _batch_statistics(net):
    """Within the block BatchNorm goes by the batch's statistics, and all else is as in eval(): dropout is off. Then every
    module is in its own mode again."""
    modes = [(m, m.training) for m in net.modules()]
    for m, _ in modes:
        m.training = isinstance(m, nn.modules.batchnorm._NormBase)
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@torch.no_grad()
def evaluate(net: nn.Module, widths: Iterable[Tensor], x: Tensor, y: Tensor, amp: bool = False) -> Tensor:
    """Cross-entropy (n,) at each configuration on one batch, with that batch's BatchNorm statistics.

    Weights and running statistics stay as they are (`models.BatchNorm2d` does not track in
    training); the widths stay at the last configuration. Raises ValueError as `sandwich_step`.
    """
    _require_batch(net, widths, x, y, amp)
    losses = []
    with _batch_statistics(net):
        for a in widths:
            net.set_widths(a)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                logits = net(x)
            losses.append(F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y))
    return torch.stack(losses) if losses else x.new_zeros(0)


@torch.no_grad()
def calibrate_bn(net: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Sets every BatchNorm's running statistics for the configuration now set.

    Cumulative average over the batches' means and (unbiased) variances, each batch counting alike; right for norms that
    are called once in a forward pass, as `models.Slimmable` requires. A batch is images x (b, c, h, w), or begins with
    them, as a loader's (x, y) does.
    Raises ValueError if there is no batch, or x is of another device or dtype than the network. Whatever is
    raised, the statistics are then as they were.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    momenta, before = [m.momentum for m in norms], [dict(m.named_buffers(recurse=False)) for m in norms]
    for m, buffers in zip(norms, before):
        for name, b in buffers.items():  # new ones: another network, process or thread may hold the old
            setattr(m, name, b.clone())
        m.reset_running_stats()
    count = 0
    try:
        with _batch_statistics(net):
            for count, batch in enumerate(batches, 1):
                x = batch if isinstance(batch, Tensor) else batch[0]
                _require_images(net, x)
                for m in norms:
                    m.momentum = 1 / count
                net(x)
        require(count > 0, "batches: at least one is needed to calibrate BatchNorm")
    except BaseException:
        for m, buffers in zip(norms, before):
            for name, b in buffers.items():
                setattr(m, name, b)
        raise
    finally:  # a momentum left behind would let training write the statistics
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum


class Replay:
    """fn(x, y, widths) -> a tensor; where a GPU does it again and again with the same widths, as one CUDA graph.

    Kernels of small networks, or of few images, end sooner than Python launches the next: a graph, recorded once, launches
    all. What else fn leaves, the gradients, stays where the recording put it, and nothing else may replace it: let fn clear the
    gradients itself, step the optimiser outside of it, and have one Replay for a network.
    """

    def __init__(self, fn):
        self.fn, self.widths, self.seen, self.graph, self.records = fn, None, 0, None, True

    def __call__(self, x, y, widths):
        if x.device.type != "cuda" or not self.records:
            return self.fn(x, y, widths)
        kind = x.shape, x.dtype, y.shape, y.dtype
        if self.widths is None or kind != self.kind or not torch.equal(widths, self.widths):
            self.widths, self.kind, self.seen, self.graph = widths.clone(), kind, 0, None
        self.seen += 1
        if self.seen < 4:  # fewer steps do not pay for a recording, and cuDNN must have made its plans
            return self.fn(x, y, widths)
        if not self.graph:
            self.inputs, graph = (x.clone(), y.clone()), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be pinning images
                    self.losses = self.fn(*self.inputs, widths)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:  # of a network of one's own that looks at values, say: it goes without
                self.records = False
                return self(x, y, widths)
            self.graph = graph
        for kept, new in zip(self.inputs, (x, y)):
            kept.copy_(new)
        self.graph.replay()
        return self.losses.clone()


# ------------------------------------------------------------------------------ the front


def pareto_front(loss: Tensor, cost: Tensor) -> Tensor:
    """Indices (k,) of the non-dominated among (loss, cost) pairs (n,), both minimised, by rising cost.

    Of equal pairs the first is kept. A loss that is nan or inf is never on the front. Raises
    ValueError for shapes that differ or a cost that is not finite.
    """
    _require_pairs(loss, cost)
    loss = loss.double().nan_to_num(torch.inf, torch.inf)  # double: also of whole numbers, such as counts of errors
    order = loss.argsort(stable=True)
    order = order[cost[order].argsort(stable=True)]
    ranked = loss[order]
    cheaper_best = F.pad(ranked.cummin(0).values[:-1], (1, 0), value=torch.inf)[: len(ranked)]
    return order[ranked < cheaper_best]


def _require_pairs(loss, cost):
    usable = loss.ndim == 1 and not loss.is_complex()
    require(usable, f"loss: expected shape (n,), real, got {tuple(loss.shape)}, {loss.dtype}")
    require_values("cost", cost, len(loss), device=loss.device)


def shortlist(loss: Tensor, cost: Tensor, k: int) -> Tensor:
    """Indices of the at least k (of all n, where k > n) that lie nearest the front.

    Whole fronts are taken one after the other, each of what the earlier ones left. Those whose loss
    is nan or infinite come first: nothing is known against them. Raises ValueError as `pareto_front`.
    """
    _require_pairs(loss, cost)
    require(k >= 1, f"k must be at least 1, got {k}")
    chosen = (~loss.isfinite()).nonzero()[:, 0]
    left = loss.isfinite().nonzero()[:, 0]
    while len(chosen) < k and len(left):
        front = pareto_front(loss[left], cost[left])
        chosen = torch.cat([chosen, left[front]])
        keep = torch.ones(len(left), dtype=torch.bool, device=left.device)
        keep[front] = False
        left = left[keep]
    return chosen


def thin(front: Tensor, cost: Tensor, size: int) -> Tensor:
    """At most `size` of a front's indices (k,), the nearest to evenly spaced logarithms of their cost (n,), ends included."""
    if len(front) <= size:
        return front
    rise = cost[front].double().log()  # half the cost is as much of a step to a small device as to a large one
    grid = torch.linspace(rise[0], rise[-1], size, dtype=rise.dtype)
    return front[(rise - grid[:, None]).abs().argmin(1).unique()]


def front_area(loss: Tensor, cost: Tensor, low: float | None = None, high: float = 1.0) -> float:
    """Area under the front: the integral over budgets in [low, high] of the least loss within each.

    loss, cost: (n,). `low` defaults to the smallest cost; below that no configuration fits the
    budget, so a lower `low` raises ValueError, as does one above `high`, or no finite loss. Only areas over
    the same budgets compare.
    """
    front = pareto_front(loss, cost)
    require(len(front) > 0, "loss: none is finite")
    loss, cost = loss[front].double(), cost[front].double()
    low = cost[0].item() if low is None else low
    cheapest = cost[0].item()
    enough = low >= cheapest * (1 - 1e-6)  # a cost in float32 is no nearer to its decimals
    require(enough, f"low: no configuration costs as little as {low:g}; the cheapest costs {cheapest:g}")
    require(low <= high, f"low, high: expected low <= high, got {low:g} and {high:g}")
    edges = torch.cat([cost, cost.new_tensor([high])]).clamp(low, high)
    return (loss * edges.diff()).sum().item()
