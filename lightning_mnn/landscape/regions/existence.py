"""Does a region contain a differentiable local minimum?

The minima of a region are the flat weights w̃ of the affine least-squares set S_A = {w̃ : G Gᵀ w̃ = G y} whose rows are
w̃_i = z_i w_i with w_i in the open cone C_i = {w : σ_ni x_n·w > 0 for all x_n ≠ 0}. Here σ_ni is 1 where unit i is
active on sample n and −1 elsewhere. A minimum exists if and only if no C_i is empty and, for some signs s in
{−1, 0, 1}^d1, S_A intersects Π s_i C_i (0·C = {0}). For given signs this is a linear problem: the maximum t* of
min s_i σ_ni x̂_n·w̃_i over S_A, with x̂_n = x_n/‖x_n‖, must be positive. Over all signs it is a branch-and-bound search,
in which rows without a decided sign are free.

Branches decide s_i = ±1 only. A branch is closed by a dual that bounds t*. If the dual shows t* < 0, the closures of
the cones do not intersect S_A either, so the branches with zeros in place of its signs are closed too. If t* = 0, the
rows with a positive weight in the dual can only be zero, all of them: one branch remains.

Shapes: N samples, N' of them not zero, d0 inputs, d1 hidden units, k dimensions of S_A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.labels import infer_threshold, wrong
from lightning_mnn.landscape.pattern import ActivationPattern
from lightning_mnn.landscape.regions.branch_cover import covered
from lightning_mnn.landscape.regions.gordan import alternatives
from lightning_mnn.landscape.regions.region import Region, khatri_rao
from lightning_mnn.landscape.units import unit_exponent
from lightning_mnn.verdicts import Reason, ReasonCode, Reasoned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Signs = NDArray[np.int8]

_EXCLUDED_MARGIN = 2 * tolerances.MAX_DUAL_ERROR_RATIO  # closed branches exclude larger s_i σ_ni x̂_n·w̃_i / ‖w̃‖
_MAX_INEQUALITY_ENTRIES = 20_000_000  # entries of the largest dense matrix of inequalities, N·d1 × d0·d1
_FREE_SIGN = 2  # code for the sign of a row that is not decided


@dataclass(frozen=True)
class ClosedBranch:
    """A dual (λ, μ) of signs that admit no minimum: Σ_n λ_ni s_i σ_ni x̂_n + (G μ)_i = 0 for every row with s_i ≠ 0.

    With ŷ = y − e*, S_A satisfies Σ λ_ni s_i σ_ni x̂_n·w̃_i = −μ·ŷ. At a minimum with these signs the left side is
    positive. Therefore −μ·ŷ < 0 shows that no minimum has these signs, or zeros in their place. And −μ·ŷ = 0 shows that
    no minimum has these signs, nor zeros in their place unless every row with a λ_ni > 0 is zero. If no row has a
    sign, λ shows instead that a cone is empty: Σ_n λ_ni σ_ni x̂_n = 0.

    Attributes:
        signs: s_i, 1, −1 or 0; None where the row is free.
        multipliers: λ ≥ 0, (N, d1) on the CPU, 0 where s_i is not ±1.
        functional: μ, (N,) on the CPU.
    """

    signs: tuple[int | None, ...]
    multipliers: Tensor
    functional: Tensor


@dataclass(frozen=True)
class Existence(Reasoned):
    """Whether a region contains a differentiable local minimum.

    ``zero_error``, ``mse`` and ``mce`` are those of every such minimum of the region; they are known even if there is
    none.

    Attributes:
        exists: True with a point, False with a proof, None where neither was found. A proof covers minima whose margin,
            as defined below, is above ``excluded_margin``; floats cannot decide about smaller margins.
        because: the fact that decided: ``reason_code`` is its code, ``reason`` its sentence.
        zero_error: e* = 0 up to rounding: the paper's global minimum.
        mse: ‖e*‖²/N.
        mce: fraction of misclassified samples; None where the targets are not two labels.
        output_signs: the given signs; None if they were free.
        margin: of the point, min s_i σ_ni x_n·w̃_i / (‖x_n‖‖w̃‖) over the rows with s_i ≠ 0 (1 where there is none).
        hidden_weights: W of the point, (d1, d0), on the device of the region's inputs.
        output_weights: z of the point, (d1,), on the same device: |z_i| = ‖w_i‖, or z_i = 0 and ‖w_i‖ = 1.
        excluded_margin: for a proof of absence, 2e-9: no minimum has a larger margin. (Where predictions alone exclude
            the zeros of a branch: no minimum has ‖w̃‖ below 1e9 times the smallest ‖w̃‖ of S_A.)
        proof: for a proof of absence, closed branches that together cover all signs, or the given ones.
    """

    exists: bool | None
    because: Reason
    zero_error: bool
    mse: float
    mce: float | None
    output_signs: tuple[int, ...] | None = None
    margin: float | None = None
    excluded_margin: float | None = None
    hidden_weights: Tensor | None = None
    output_weights: Tensor | None = None
    proof: tuple[ClosedBranch, ...] = ()


def find_minimum(
    region: Region,
    targets: Tensor,
    output_signs: Tensor | Sequence[float] | None = None,
    *,
    threshold: float | None = None,
    max_nodes: int = 100_000,
) -> Existence | list[Existence]:
    """Find a differentiable local minimum of a region, or a proof that it contains none.

    In units of the smallest ‖w̃‖ of S_A, a branch is open if a point has margins t > 1e-7, and closed by a dual that
    shows t* ≤ 1e-9; in between it is undecided. A point that is found is tested in the form in which it is returned: it
    must be on the right side of every kink by more than rounding, with ‖G e‖ ≤ 1e-10 ‖G‖_F ‖y‖. Inputs and targets are
    scaled by their own size, so the result does not depend on either scale.

    Args:
        region: the region, of one network or R.
        targets: y, (..., N).
        output_signs: the signs of z, (..., d1), as any real numbers with these signs; None if they are free.
        threshold: decision threshold of the classification error; None infers it from the labels.
        max_nodes: largest number of branches; above it the answer is undecided.

    Returns:
        The verdict; with a leading replica axis, a list of R.

    Raises:
        ValueError: an argument does not fit the region or is not finite, or all targets are 1 without a threshold.

    >>> region = Region(torch.eye(2), ActivationPattern(torch.tensor([[True, False], [True, True]])))
    >>> find_minimum(region, torch.tensor([1.0, -1.0])).output_weights.sign().tolist()
    [1.0, -1.0]
    >>> absent = find_minimum(region, torch.tensor([1.0, -1.0]), output_signs=[1, 1])
    >>> absent.exists, absent.mse, check_proof(region, torch.tensor([1.0, -1.0]), absent)
    (False, 0.0, True)
    """
    inputs, active = region.inputs, region.pattern.active
    signs = None if output_signs is None else torch.as_tensor(output_signs, device=inputs.device).detach()
    sizes = {"inputs": (inputs, inputs.shape[-1]), "targets": (targets, active.shape[-2])}
    sizes |= {} if signs is None else {"output_signs": (signs, active.shape[-1])}
    for name, (value, size) in sizes.items():
        if value.shape[-1:] != (size,):
            raise ValueError(f"{name} must have shape (..., {size}), got {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {value[~value.isfinite()][0].item()}")
    parts = [(inputs, 2), (active, 2), (targets, 1), *([] if signs is None else [(signs, 1)])]
    leading = np.broadcast_shapes(*(tuple(part.shape[: part.ndim - rank]) for part, rank in parts))
    if not leading:
        return _find(region, targets, signs, _threshold(targets, threshold), max_nodes)
    spread = [part.expand(*leading, *part.shape[part.ndim - rank :]).flatten(0, -rank - 1) for part, rank in parts]
    networks = [
        (Region(x, ActivationPattern(a), region.negative_slope), *rest) for x, a, *rest in zip(*spread, strict=True)
    ]
    thresholds = [_threshold(y, threshold) for _, y, *_ in networks]
    return [
        _find(alone, y, s[0] if s else None, t, max_nodes)
        for (alone, y, *s), t in zip(networks, thresholds, strict=True)
    ]


def _threshold(targets: Tensor, threshold: float | None) -> float | None:
    return infer_threshold(targets) if threshold is None else threshold


def check_proof(region: Region, targets: Tensor, existence: Existence) -> bool:
    """Whether a proof of absence is valid: each dual is correct, and together they cover all signs, or the given ones.

    Args:
        region: the region of one network.
        targets: y, (N,).
        existence: a verdict on it.
    """
    width = region.pattern.active.shape[-1]
    given = (_FREE_SIGN,) * width if existence.output_signs is None else existence.output_signs
    if existence.exists is not False or not existence.proof or len(given) != width:
        return False
    model = _Model(region, targets)
    checked = [model.check_dual(branch) for branch in existence.proof]
    strict, support = np.array([each for each, _ in checked]), np.array([rows for _, rows in checked])
    if model.doubt or not (strict | support.any(1)).all():
        return False
    signs = np.array([[_FREE_SIGN if sign is None else sign for sign in branch.signs] for branch in existence.proof])
    return covered(np.array(given), signs, strict, support) > 0


def _find(
    region: Region, targets: Tensor, output_signs: Tensor | None, threshold: float | None, max_nodes: int
) -> Existence:
    targets = targets.detach().to(region.inputs)
    (num_samples, width), dim = region.pattern.active.shape, region.inputs.shape[-1]
    size = num_samples * dim * width**2
    model = _Model(region, targets) if size <= _MAX_INEQUALITY_ENTRIES else None
    unit = 2.0 ** unit_exponent(float(targets.abs().max())) if model is None else model.target_unit
    scaled = region.residual(targets) / unit if model is None else torch.from_numpy(model.residual).to(targets)
    rounding = 8 * max(num_samples, dim * width) * tolerances.FLOAT64_EPS * float((targets / unit).norm())
    given = None if output_signs is None else output_signs.sign().cpu().numpy().astype(np.int8)
    too_large = Reason.of(ReasonCode.REGION_TOO_LARGE, size=size, limit=_MAX_INEQUALITY_ENTRIES)
    doubt = too_large if model is None else model.doubt
    verdict = Existence(
        exists=None,
        because=doubt or Reason.of(ReasonCode.NOT_CHECKED),
        zero_error=float(scaled.norm()) <= rounding,
        mse=float(scaled.square().mean()) * unit * unit,
        mce=None if threshold is None else float(wrong(targets - unit * scaled, targets, threshold).double().mean()),
        output_signs=None if given is None else tuple(given.tolist()),
    )
    if model is None or doubt is not None:
        return verdict
    for unit, interior in enumerate(model.interiors):
        if isinstance(interior, ClosedBranch):
            because = Reason.of(ReasonCode.REGION_EMPTY, unit=unit)
            return replace(verdict, exists=False, because=because, excluded_margin=_EXCLUDED_MARGIN, proof=(interior,))
    search = _Search(model, given)
    outcome = search.run(max_nodes)
    if isinstance(outcome, Reason):
        return replace(verdict, because=outcome)
    if outcome is None:
        signs, proof = "any" if given is None else "these", tuple(search.closed)
        because = Reason.of(ReasonCode.NO_MINIMUM, signs=signs, margin=_EXCLUDED_MARGIN, branches=len(proof))
        return replace(verdict, exists=False, because=because, excluded_margin=_EXCLUDED_MARGIN, proof=proof)
    hidden, output, margin = outcome
    return replace(
        verdict,
        exists=True,
        because=Reason.of(ReasonCode.MINIMUM_FOUND, margin=margin),
        margin=margin,
        hidden_weights=torch.from_numpy(model.weight_unit * hidden).to(targets),
        output_weights=torch.from_numpy(model.weight_unit * output).to(targets),
    )


@dataclass(frozen=True)
class _Fit:
    """S_A with some rows fixed at zero, w̃ = w̃0 + Z a.

    Attributes:
        gap: the part of ŷ that the other rows cannot fit, (N,); zero if such a w̃ exists.
        point: w̃0, the smallest, (d1, d0).
        directions: Z, orthonormal, (d1, d0, k).
        margins: σ_ni x̂_n·v_i of the columns v of Z and then of w̃0, (d1, N', k + 1).
        functional_map: the map c ↦ μ with G μ = −c on the other rows, (N, d1·d0).
    """

    gap: Array
    point: Array
    directions: Array
    margins: Array
    functional_map: Array


class _Model:
    """The linear model and the cones of one region, in units of the smallest ‖w̃‖ of S_A.

    Inputs and targets have their own units (``input_unit``, ``target_unit``), and so have points (``weight_unit``, for
    both W and z).
    """

    def __init__(self, region: Region, targets: Tensor) -> None:
        of_inputs, of_targets = (unit_exponent(float(part.detach().abs().max())) for part in (region.inputs, targets))
        of_targets += (of_targets - of_inputs) % 2  # the square root of their ratio must be a power of two
        self.input_unit, self.target_unit = 2.0**of_inputs, 2.0**of_targets
        self.weight_unit = 2.0 ** ((of_targets - of_inputs) // 2)
        inputs = region.inputs.detach() / self.input_unit
        self.inputs, self.slopes = inputs.cpu().numpy(), region.slopes.cpu().numpy()
        self.targets: Array = targets.detach().cpu().numpy().astype(np.float64) / self.target_unit
        self.features: Array = khatri_rao(region.slopes, inputs).cpu().numpy()
        self.lengths = np.linalg.norm(self.inputs, axis=1)
        self.used: Bools = self.lengths > 0
        self.sides = np.where(region.pattern.active.cpu().numpy(), 1.0, -1.0)
        directions = self.inputs[self.used] / self.lengths[self.used, None]
        self.facets: Array = self.sides[self.used].T[:, :, None] * directions  # σ_ni x̂_n, (d1, N', d0)
        smallest = self.lengths[(self.inputs != 0).any(1)].min(initial=np.inf) / (self.lengths.max() or 1)
        self.doubt: Reason | None = None
        if smallest < tolerances.MIN_INPUT_LENGTH_RATIO:
            self.doubt = Reason.of(ReasonCode.INPUT_TOO_SHORT, relative=smallest)
        self.fits: dict[bytes, _Fit] = {}
        left, values, _, rank = self._decompose(self.features)
        left, values = left[:, :rank], values[:rank]
        coordinates = left.T @ self.targets
        residual = self.targets - left @ coordinates
        self.residual: Array = residual - left @ (left.T @ residual)
        if rank and values[-1] < tolerances.MIN_NONZERO_SINGULAR_RATIO * values[0]:
            self.doubt = Reason.of(ReasonCode.RANK_IN_DOUBT, relative=float(values[-1] / values[0]))
        size, length = float(np.linalg.norm(coordinates)), float(np.linalg.norm(self.targets))
        if size <= tolerances.MAX_ZERO_RATIO * length:
            coordinates[:] = 0
        elif size <= tolerances.MAX_DUAL_ERROR_RATIO * length:
            self.doubt = Reason.of(ReasonCode.FIT_IN_DOUBT, relative=size / length)
        self.scale = float(np.linalg.norm(coordinates / values)) or length / (np.linalg.norm(self.features) or 1) or 1.0
        self.prediction: Array = left @ coordinates / self.scale  # ŷ
        self.interiors = [self._interior(unit) for unit in range(len(self.facets))]

    @staticmethod
    def _decompose(features: Array) -> tuple[Array, Array, Array, int]:
        left, values, right = np.linalg.svd(features, full_matrices=features.shape[0] < features.shape[1])
        rank = int((values > max(features.shape) * tolerances.FLOAT64_EPS * values.max(initial=0)).sum())
        return left, values, right, rank

    def _interior(self, unit: int) -> Array | ClosedBranch:
        """A point of a unit's cone with margins of at least 1, or the proof that the cone is empty."""
        if not self.used.any():
            return np.ones(self.inputs.shape[1])
        everywhere = np.zeros(self.facets.shape[:2])
        nothing = np.full(len(self.facets), _FREE_SIGN, dtype=np.int8)
        for point, multipliers in alternatives(self.facets[unit]):
            smallest = float((self.facets[unit] @ point).min())
            if smallest > tolerances.MIN_OPEN_MARGIN * np.linalg.norm(point):
                return point / smallest
            everywhere[unit] = multipliers
            branch = self.branch(nothing, everywhere, np.zeros(len(self.targets)))
            if self.check_dual(branch)[0]:
                return branch
        self.doubt = Reason.of(ReasonCode.PATTERN_IN_DOUBT, unit=unit)
        return point

    def fit(self, nonzero: Bools) -> _Fit:
        """S_A with the other rows fixed at zero."""
        key = nonzero.tobytes()
        if key not in self.fits:
            columns = np.repeat(nonzero, self.inputs.shape[1])
            left, values, right, rank = self._decompose(self.features[:, columns])
            left, values = left[:, :rank], values[:rank]
            coordinates = left.T @ self.prediction
            gap = self.prediction - left @ coordinates
            gap -= left @ (left.T @ gap)
            if np.linalg.norm(gap) <= tolerances.MAX_ZERO_RATIO * np.linalg.norm(self.prediction):
                gap[:] = 0
            basis = np.zeros((columns.size, right.shape[0] - rank + 1))
            basis[columns] = np.column_stack([right[rank:].T, right[:rank].T @ (coordinates / values)])
            basis = basis.reshape(*self.facets.shape[::2], -1)
            functional_map = np.zeros((len(gap), columns.size))
            functional_map[:, columns] = -(left / values) @ right[:rank]
            self.fits[key] = _Fit(gap, basis[..., -1], basis[..., :-1], self.facets @ basis, functional_map)
        return self.fits[key]

    def margins(self, flat: Array) -> Array:
        """σ_ni x̂_n·w̃_i, (d1, N')."""
        return (self.facets @ flat[:, :, None])[..., 0]

    def branch(self, signs: Signs, multipliers: Array, functional: Array) -> ClosedBranch:
        """A branch with a dual from multipliers (d1, N'); it is closed if :meth:`check_dual` confirms the dual."""
        spread = np.zeros(self.slopes.shape)
        spread[self.used] = multipliers.T
        named = tuple(None if sign == _FREE_SIGN else int(sign) for sign in signs)
        return ClosedBranch(named, torch.from_numpy(spread), torch.from_numpy(functional / self.input_unit))

    def check_dual(self, branch: ClosedBranch) -> tuple[bool, Bools]:
        """What a dual proves, tested up to rounding.

        Returns:
            Whether no minimum has the branch's signs, even with zeros in their place; and the rows that rule out the
            signs as long as one of these rows is not zero.
        """
        multipliers, functional = branch.multipliers.cpu().numpy(), branch.functional.cpu().numpy() * self.input_unit
        signs = np.array([_FREE_SIGN if sign is None else sign for sign in branch.signs])
        nothing = np.zeros(len(self.facets), dtype=bool)
        fitting = (multipliers.shape, functional.shape) == (self.slopes.shape, self.targets.shape)
        if not fitting or signs.shape != nothing.shape or not (multipliers >= 0).all():
            return False, nothing
        weights, totals = multipliers[self.used].T, multipliers[self.used].sum(0)
        pulls = (weights[:, None, :] @ self.facets)[:, 0]
        if (signs == _FREE_SIGN).all():
            empty = (totals > 0) & (np.linalg.norm(pulls, axis=1) <= tolerances.MAX_DUAL_ERROR_RATIO * totals)
            return bool(empty.any()), nothing
        decided = np.abs(signs) == 1
        if totals[~decided].any():
            return False, nothing
        off = np.where(decided, signs, 0)[:, None] * pulls + (functional @ self.features).reshape(pulls.shape)
        error, value = float(np.linalg.norm(off[signs != 0])), -float(functional @ self.prediction)
        size = float(np.linalg.norm(functional)) * float(np.linalg.norm(self.prediction))
        rounding = tolerances.MAX_ZERO_RATIO * size
        strict = value < -rounding and error <= tolerances.MAX_DUAL_ERROR_RATIO * -value
        return strict, (totals > 0) & (max(error, value) <= tolerances.MAX_DUAL_ERROR_RATIO * totals)

    def is_minimum(self, hidden: Array, output: Array) -> bool:
        """Whether a point lies in the region beyond rounding, and G e = 0 up to a tolerance."""
        preactivations = self.inputs @ hidden.T
        sizes = self.lengths[:, None] * np.linalg.norm(hidden, axis=1)
        rounding = (self.inputs.shape[1] + 4) * tolerances.FLOAT64_EPS * sizes
        inside = (self.sides * preactivations > rounding)[self.used].all()
        residual = self.targets - (self.slopes * preactivations) @ output
        size, gradient = np.linalg.norm(self.features), np.linalg.norm(residual @ self.features)
        reach = np.linalg.norm(self.targets) or size * np.linalg.norm(hidden * output[:, None])
        return bool(inside and gradient <= tolerances.MAX_STATIONARITY * size * reach)


class _Search:
    """Depth-first search over the signs of the rows of w̃."""

    def __init__(self, model: _Model, output_signs: Signs | None) -> None:
        width = len(model.facets)
        self.model, self.given = model, output_signs is not None
        self.root: Signs = np.full(width, _FREE_SIGN, dtype=np.int8) if output_signs is None else output_signs
        self.closed: list[ClosedBranch] = []
        # C − C is the whole space: two units with one pattern have any sum, so their signs need no branches.
        labels = np.unique(model.sides[model.used], axis=1, return_inverse=True)[1]
        groups = [] if self.given else [np.flatnonzero(labels == label) for label in range(width)]
        self.groups = [units for units in groups if len(units) > 1]
        self.settled: Bools = np.isin(np.arange(width), [unit for units in self.groups for unit in units])

    def run(self, max_nodes: int) -> tuple[Array, Array, float] | Reason | None:
        """A minimum (W, z, margin); None if the closed branches prove that there is none; or why it is undecided."""
        stack, nodes, undecided = [self.root], 0, 0
        while stack:
            if nodes == max_nodes:
                return Reason.of(ReasonCode.TOO_MANY_BRANCHES, limit=max_nodes)
            nodes += 1
            signs = stack.pop()
            outcome = self.relax(signs)
            if isinstance(outcome, ClosedBranch):
                self.closed.append(outcome)
                strict, support = self.model.check_dual(outcome)
                if not (strict or self.given):
                    stack.append(np.where(support, 0, signs).astype(np.int8))
                continue
            children = [] if outcome is None else self.children(signs, outcome)
            stack += children
            if outcome is not None and not children:
                found = self.point(signs, outcome)
                if found is not None:
                    return found
            undecided += not children
        return Reason.of(ReasonCode.BRANCHES_IN_DOUBT, branches=undecided) if undecided else None

    def relax(self, signs: Signs) -> Array | ClosedBranch | None:
        """A point of S_A with the decided rows in their cones and the others free, or the dual; None if undecided."""
        model, fit, decided = self.model, self.model.fit(signs != 0), np.abs(signs) == 1
        weights: Array = np.zeros(model.facets.shape[:2])
        if fit.gap.any():
            branch = model.branch(signs, weights, fit.gap)
            return branch if model.check_dual(branch)[0] else None
        # The set w̃0 + Z a becomes a cone with a factor of w̃0 as the last coordinate, which must be positive.
        last = np.eye(fit.margins.shape[2])[-1:]
        rows = (signs[decided, None, None] * fit.margins[decided]).reshape(-1, last.size)
        for point, multipliers in alternatives(np.concatenate([last, rows])):
            rounding = tolerances.MAX_ZERO_RATIO * np.linalg.norm(point)  # of the rows
            smallest = max(tolerances.MIN_OPEN_MARGIN * point[-1], rounding)
            if point[-1] > 0 and (rows @ point > smallest).all():
                return np.asarray(fit.point + fit.directions @ (point[:-1] / point[-1]))
            weights[decided] = multipliers[1:].reshape(-1, weights.shape[1])
            pulls = np.where(decided, signs, 0)[:, None] * (weights[:, None, :] @ model.facets)[:, 0]
            branch = model.branch(signs, weights, fit.functional_map @ pulls.ravel())
            strict, support = model.check_dual(branch)
            if strict or support.any():
                return branch
        return None

    def children(self, signs: Signs, flat: Array) -> list[Signs]:
        """The two branches of the most violated row, the better one last; none if every row is in its cone or zero."""
        margins = self.model.margins(flat)
        plus, minus = margins.min(1, initial=1), (-margins).min(1, initial=1)
        open_rows = (signs == _FREE_SIGN) & ~self.settled & (np.linalg.norm(flat, axis=1) > tolerances.MAX_ZERO_RATIO)
        violations = np.where(open_rows, tolerances.MIN_OPEN_MARGIN - np.maximum(plus, minus), 0)
        row = int(violations.argmax())
        if violations[row] <= 0:
            return []
        better = 1 if plus[row] >= minus[row] else -1
        return [np.where(np.arange(len(signs)) == row, sign, signs).astype(np.int8) for sign in (-better, better)]

    def point(self, signs: Signs, flat: Array) -> tuple[Array, Array, float] | None:
        """W, z and the margin from flat weights with rows in their cones or zero, if they are a minimum."""
        model, interiors = self.model, np.array(self.model.interiors)
        nonzero = np.linalg.norm(flat, axis=1) > tolerances.MAX_ZERO_RATIO
        sides = np.where(model.margins(flat).min(1, initial=1) > 0, 1, -1) * nonzero
        signs = np.where((signs == _FREE_SIGN) & ~self.settled, sides, signs).astype(np.int8)
        centred = self.relax(signs)
        flat = centred.copy() if isinstance(centred, np.ndarray) else flat
        for first, second, *others in self.groups:
            total = flat[[first, second, *others]].sum(0)
            reach = np.linalg.norm(total) - (model.facets[first] @ total).min(initial=0)
            flat[second] = -(reach or 1) * interiors[second]
            flat[first], flat[others] = total - flat[second], 0
            signs[first], signs[second], signs[others] = 1, -1, 0
        if not model.used.any():
            flat = interiors
        flat = np.where(signs[:, None] == 0, 0, flat)
        size = np.linalg.norm(flat) or 1.0
        margin = float((signs[:, None] * model.margins(flat))[signs != 0].min(initial=size) / size)
        output = signs * np.sqrt(model.scale * np.linalg.norm(flat, axis=1))
        hidden = model.scale * flat / np.where(signs, output, 1)[:, None]
        hidden[signs == 0] = (interiors / np.linalg.norm(interiors, axis=1, keepdims=True))[signs == 0]
        return (hidden, output, margin) if model.is_minimum(hidden, output) else None
