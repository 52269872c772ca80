"""Everything public of lightning_mnn.landscape with its tensors on a device, beside the same on the CPU."""

import copy
import dataclasses
from types import CodeType

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_mnn import landscape
from lightning_mnn.landscape import (
    ActivationPattern,
    Architecture,
    DistributedGroup,
    KinkDistance,
    KinkTrace,
    LossSurface,
    Network,
    NoDerivativeError,
    PiecePattern,
    ProcessGroup,
    Region,
    census,
    certify,
    certify_model,
    check_curvature,
    check_proof,
    check_stationarity,
    classify,
    curvature_directions,
    dormant_fraction,
    dormant_units,
    effective_rank,
    estimate_learning_coefficient,
    extreme_eigenvalues,
    find_minimum,
    first_order_verdicts,
    freeze_step,
    gradient_noise_scale,
    gradient_sizes,
    infer_threshold,
    input_regions,
    kink_distance,
    landscape_slice,
    local_complexity,
    local_volume,
    log_cap_measure,
    log_cone_measure,
    log_volume_lower_bound,
    loss_volume,
    merge_statistics,
    minimum_log_volume,
    network_statistics,
    planted_kink_minimum,
    planted_minimum,
    planted_model_kink_minimum,
    planted_saddle,
    polish,
    polish_model,
    principal_directions,
    random_directions,
    random_interpolators,
    rare_census,
    rare_event,
    region_log_volume,
    second_order_verdict,
    weights_freeze_step,
)
from lightning_mnn.landscape.volumes.rare_events.suboptimal import suboptimal_score, unactivated_score
from tests.simgpu.comparison import differences, placed, walk

NO_TENSORS = {
    "Census": "counts, by names",
    "KeepCurve": "counts and scales, as numbers",
    "MeanError": "numbers",
    "LogBounds": "numbers",
    "LossVolume": "numbers",
    "Stop": "an enumeration",
    "closed_form_log_volume": "a function of numbers",
    "Finding": "a code and its number",
    "FindingCode": "an enumeration",
    "Freeze": "numbers of steps",
    "Kind": "an enumeration",
    "Proportion": "counts",
    "RandomInterpolators": "estimates and weights, on the CPU",
    "RareCensus": "estimates, as numbers",
    "RareEvent": "logarithms, as numbers",
    "Reason": "a code and its numbers",
    "ReasonCode": "an enumeration",
    "ExactCoefficient": "numbers",
    "learning_coefficient": "a function of counts",
    "bounds": "functions of sizes",
    "ensemble_census": "draws its data itself, on the CPU",
    "PlantedModel": "drawn on the CPU",
    "planted_model_kink_minimum": "draws its data itself, on the CPU",
    "planted_model_minimum": "draws its data itself, on the CPU",
    "planted_model_saddle": "draws its data itself, on the CPU",
    "products_needed": "a function of sizes",
    "random_frame": "drawn on the CPU",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A calculation with its input on a device, the public names that it covers, and how close its numbers come."""

    calculate: object
    covers: tuple[str, ...]
    tolerance: float

    def names(self, result):
        """The names that the calculation mentions, and of the classes of what it returns (or names as returned)."""
        returned = {part if isinstance(part, str) else type(part).__name__ for _, part in walk(result)}
        return returned | set(mentioned(self.calculate.__code__))


def mentioned(code):
    """The names in a function's code, and in that of functions and comprehensions within."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from mentioned(constant)


CASES = {}


def case(*covers, tolerance=1e-6):
    def add(calculate):
        CASES[calculate.__name__] = Case(calculate, covers, tolerance)
        return calculate

    return add


def random_data(device, num_samples, input_dim, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs, weights, output = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((num_samples, input_dim), (width, input_dim), (width,))
    )
    labels = torch.randint(0, 2, (num_samples,), generator=g).double()
    return placed((inputs, labels, weights, output), device)


def region_of(device, num_samples, input_dim, width, seed=0, slope=0.0):
    inputs, labels, weights, _ = random_data(device, num_samples, input_dim, width, seed)
    return Region(inputs, ActivationPattern.from_preactivations(inputs @ weights.T), slope), labels, weights


def of_planted(planted, device):
    point = placed(planted, device)
    return point.hidden_weights, point.output_weights, point.inputs, point.targets


def small_model(device):
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Hardtanh(), nn.Linear(4, 1)
    return nn.Sequential(*layers).double().to(device)


@case("certify", "Certificate", "planted_minimum", "Planted")
def certificates_of_a_minimum(device):
    planted = [planted_minimum(60, 5, 4, slope) for slope in (0.0, 0.3)]
    return planted, [certify(*of_planted(p, device), slope) for p, slope in zip(planted, (0.0, 0.3), strict=True)]


@case("certify", "planted_kink_minimum", "planted_saddle", "Direction")
def certificates_on_kinks_and_of_a_saddle(device):
    kinks = planted_kink_minimum(40, 3, 4, kinks_per_unit=2)
    no_minimum = planted_kink_minimum(40, 3, 4, 0.2, kinks_per_unit=2, violated=True)
    saddle = planted_saddle(30, 4, 3)
    return [
        certify(*of_planted(kinks, device)),
        certify(*of_planted(no_minimum, device), 0.2),
        certify(*of_planted(saddle, device)),
    ]


@case("certify")
def certificates_of_replicas_with_biases(device):
    inputs, labels, weights, output = random_data(device, 60, 4, 5)
    replicas = torch.stack([weights, -weights]), torch.stack([output, output])
    biases = {"hidden_bias": torch.ones(2, 5, device=device), "output_bias": torch.full((2,), 0.5, device=device)}
    return certify(*replicas, inputs, labels, max_distance=10.0, **biases)


@case("polish", "Polished", tolerance=1e-3)
def polished_to_zero_error(device):
    inputs, labels, weights, output = random_data(device, 30, 10, 10)
    replicas = torch.stack([weights, -weights]), torch.stack([output, output])
    return [(p.certificate.kind, p.steps, p.distance) for p in polish(*replicas, inputs, labels)], polish(
        weights, output, inputs, labels
    )


@case("polish", tolerance=1e-3)
def polished_to_kinks(device):
    inputs, labels, weights, output = random_data(device, 24, 3, 4)
    found = polish(weights, output, inputs, labels, 0.2)
    return found.certificate.kind, found.certificate.mse


@case("Region", "LeastSquares")
def a_region(device):
    inputs, labels, weights, _ = random_data(device, 12, 3, 4)
    region = Region(inputs, ActivationPattern.from_preactivations(inputs @ weights.T))
    fit = region.least_squares(labels)
    return region.predict(weights), region.correlate(labels), region.gram(), region.rank(), fit, region.residual(labels)


@case("find_minimum", "Existence", "ClosedBranch", "check_proof", tolerance=1e-4)
def whether_regions_hold_a_minimum(device):
    found = []
    for seed in range(6):
        region, labels, _ = region_of(device, 7, 3, 3, seed)
        existence = find_minimum(region, labels)
        found.append((existence, check_proof(region, labels, existence)))
    assert {existence.exists for existence, _ in found} == {True, False}
    return found


@case("classify", "census")
def regions_counted(device):
    region, labels, _ = region_of(device, 8, 2, 3)
    return classify(region, labels), census(region.inputs, labels, width=3, num_regions=20)


@case("rare_census", "rare_event")
def rare_regions(device):
    inputs, labels, *_ = random_data(device, 8, 3, 5)
    few = {"particles": 30, "runs": 2, "steps": 1}
    return (
        rare_census(inputs, labels, width=5, **few),
        rare_event(unactivated_score(inputs), (3, 3), level=0.0, **few),
        rare_event(suboptimal_score(inputs, labels), (5, 3), level=1.0, **few),
    )


@case("random_interpolators", "Architecture")
def interpolators(device):
    inputs, labels, *_ = random_data(device, 8, 3, 5)
    few = {"particles": 30, "runs": 2, "steps": 1, "test_inputs": inputs, "test_targets": labels}
    network = Architecture(3, (4, 2), 0.1, bias=True)
    outputs = network.outputs(torch.ones(2, network.num_weights, dtype=inputs.dtype, device=device), inputs)
    found = random_interpolators(inputs, labels, (4,), **few)
    paths = random_interpolators(inputs, labels, (4,), moves="paths", **few)
    paths = dataclasses.replace(paths, evaluations=0)  # a device evaluates what a processor leaves out
    return outputs, random_interpolators(inputs, labels, (4, 2), negative_slope=0.1, bias=True, **few), found, paths


@case("log_cone_measure", "LogEstimate", tolerance=0.1)
def a_cone(device):
    inputs, *_ = random_data(device, 40, 5, 1)
    normals = inputs * torch.sign(inputs @ inputs[0])[:, None]
    found = log_cone_measure(normals, inputs[0], target_standard_error=0.05)
    assert found.standard_error < 0.1  # an estimate itself, and another on each device
    return found.value, log_cone_measure(torch.eye(3, device=device))


@case("region_log_volume", "RegionVolume", "log_volume_lower_bound", "log_cap_measure", tolerance=0.1)
def volume_of_a_region(device):
    region, _, weights = region_of(device, 20, 4, 4)
    sines = torch.tensor([0.3, 0.4], device=device)
    volume = region_log_volume(region, weights, target_standard_error=0.03)
    return (volume.value, volume.lower_bound, volume.units, type(volume).__name__), (
        log_volume_lower_bound(region, weights),
        log_cap_measure(sines, 4),
    )


@case("ActivationPattern", "PackedPattern", "PiecePattern")
def patterns(device):
    inputs, _, weights, _ = random_data(device, 30, 5, 13)
    one, other = (ActivationPattern.from_preactivations(inputs @ weights.T + shift) for shift in (0.0, 0.3))
    packed, beside = one.pack(), other.pack()
    pieces = PiecePattern(torch.arange(140, device=device).reshape(20, 7) % 5, 5)
    packed_pieces = pieces.pack()
    return (
        [packed, packed.unpack(), packed.flips(beside), packed.flips(beside.to("cpu")), packed.activity()],
        [one.flips(other), one.digest(), one.slopes(0.1)],
        [packed_pieces, packed_pieces.unpack_pieces(), packed_pieces.activity((1, 2)), packed_pieces.digest()],
    )


@case("local_complexity", "dormant_units", "dormant_fraction", "effective_rank", "freeze_step", "weights_freeze_step")
def vital_signs(device):
    inputs, _, weights, _ = random_data(device, 30, 5, 13)
    patterns = [
        {"1": ActivationPattern.from_preactivations((inputs + shift) @ weights.T).pack()} for shift in (0.3, -0.3, 0.0)
    ]
    activations = (inputs @ weights.T).relu()
    lengths = torch.tensor([5.0, 1.0, 0.01], device=device)
    return (
        local_complexity(patterns),
        [dormant_units(activations), dormant_fraction(activations), effective_rank(activations)],
        [freeze_step(zip((20, 10, 0), patterns, strict=True)), weights_freeze_step(torch.arange(4), lengths)],
    )


@case("GradientSizes", "gradient_sizes", "gradient_noise_scale")
def sizes_and_noise_of_gradients(device):
    inputs, labels, weights, _ = random_data(device, 30, 5, 13)
    sizes = gradient_sizes([inputs, labels], [weights])
    return (
        sizes,
        [sizes.norm, sizes.relative_norm, sizes.near_zero_fraction],
        gradient_noise_scale(inputs.square().mean(), inputs.mean().square(), 4, 16),
    )


@case(
    *("Network", "NetworkStatistics", "Layer", "network_statistics", "merge_statistics", "infer_threshold"),
    *("first_order_verdicts", "FirstOrderVerdict"),
)
def surveys(device):
    inputs, labels, weights, output = random_data(device, 30, 5, 4)
    inner = torch.ones(3, 4, dtype=torch.float64, device=device).tril()
    network = Network((weights, inner), output[:3], 0.1)
    halves = [network_statistics(network, inputs[part], labels[part], 0.5) for part in (slice(12), slice(12, None))]
    statistics = merge_statistics(halves)
    return (
        statistics,
        first_order_verdicts(statistics, 1e-3, 1e-3),
        infer_threshold(labels),
        network.preactivations(inputs),
    )


@case("ProcessGroup", "DistributedGroup")
def sums_over_a_team(device):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    inputs, *_ = random_data(device, 12, 3, 4)
    teams = ProcessGroup(), DistributedGroup(len(inputs))
    return [
        (
            t.sum(inputs),
            t.min(inputs),
            t.max(inputs),
            t.join(inputs),
            t.local_part(inputs),
            t.any([True], inputs.device),
        )
        for t in teams
    ]


@case("extreme_eigenvalues", "Spectrum", tolerance=1e-3)
def ends_of_a_spectrum(device):
    diagonal = torch.linspace(-1, 3, 100, dtype=torch.float64, device=device)
    found = extreme_eigenvalues(lambda vector: diagonal * vector, 100, device=device)
    few = torch.tensor([1.0, 1, 2, 2, 5], dtype=torch.float64, device=device)  # whose products stay among three
    return found.smallest, found.largest, found.vector.abs(), extreme_eigenvalues(lambda v: few * v, 5, device=device)


@case("Spectrum")
def a_spectrum(device):
    return extreme_eigenvalues(lambda vector: 2 * vector, 3, device=device)


@case("LossSurface", "second_order_verdict", "check_stationarity", "check_curvature", "SecondOrderVerdict")
def second_order_evidence(device):
    theta = torch.zeros(3, dtype=torch.float64, device=device, requires_grad=True)
    shape = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=device)
    found = []
    for signs in ([1.0, 1, 1], [1.0, 1, -1]):
        curvature = shape * torch.tensor(signs, dtype=torch.float64, device=device)
        surface = LossSurface([theta], lambda c=curvature: [(1.0, lambda: 1 + c @ theta.square())])
        stationarity = check_stationarity(surface, KinkDistance(), 1.0)
        found += [check_curvature(surface, stationarity), second_order_verdict(surface, KinkDistance(), 1.0)]
    return [(verdict, verdict.kind) for verdict in found]


@case("NoDerivativeError")
def a_loss_without_derivatives(device):
    theta = torch.ones(2, device=device, requires_grad=True)
    surface = LossSurface([theta], lambda: [(1.0, lambda: theta.detach().sum())])
    with pytest.raises(NoDerivativeError) as caught:
        surface.value_and_gradient()
    return type(caught.value).__name__


@case("local_volume", "LocalVolume", tolerance=0.1)
def a_local_volume(device):
    inputs, *_ = random_data(device, 30, 5, 1)
    net = small_model(device)
    found = local_volume(list(net.parameters()), [lambda: {"first": net[0](inputs) > 0}], num_draws=6)
    return found.total.sigmas, type(found).__name__


class ManyKinks(nn.Module):
    """Each kind of kink that is known of modules, and some of functions."""

    def __init__(self):
        super().__init__()
        self.conv, self.prelu, self.linear = nn.Conv2d(1, 4, 3, padding=1), nn.PReLU(4), nn.Linear(16, 6)
        kinds = nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.Softshrink, nn.Hardshrink, nn.Hardsigmoid, nn.ELU
        self.activations = nn.ModuleList([*(kind() for kind in kinds), nn.Threshold(0.1, 0.0), nn.Hardswish()])

    def forward(self, x):
        x = self.prelu(self.conv(x))
        for activation in self.activations:
            x = activation(x + 0.05)
        x = nn.functional.adaptive_max_pool2d(nn.functional.max_pool2d(x, 2), 2)
        x = self.linear(x.flatten(1))
        x = torch.maximum(x, x.flip(1)) + x.abs() + x.clamp(-0.5, 0.5)
        return x.amax(1, keepdim=True) + x.max(1).values[:, None] + x.norm(dim=1, keepdim=True)


@case("KinkTrace", "Kink", "kink_distance", "KinkDistance", tolerance=1e-3)
def kinks_of_a_module(device):
    torch.manual_seed(0)
    net = ManyKinks().double().eval().to(device)
    images = torch.linspace(-2, 2, 3 * 64, dtype=torch.float64).sin().reshape(3, 1, 8, 8).to(device)
    found = []

    def look(kink):
        found.append((type(kink).__name__, kink.name, kink.num_pieces, kink.pieces(), kink.distance()))

    def run(consume):
        with KinkTrace(net, consume):
            net(images)

    run(look)
    assert len(found) > len(net.activations)
    return found, kink_distance([run], list(net.parameters()))


@case("certify_model", "ModelCertificate", "polish_model", "PolishedModel")
def certificates_of_models(device):
    planted = planted_model_kink_minimum(30, (3, 4, 2), kinks=2, weight_decay=1e-2)
    module, inputs, targets = (
        copy.deepcopy(planted.module).to(device),
        *placed((planted.inputs, planted.targets), device),
    )
    return (
        certify_model(module, inputs, targets, weight_decay=1e-2),
        polish_model(module, inputs, targets, weight_decay=1e-2, max_steps=3),
    )


@case("estimate_learning_coefficient", "SampledCoefficient", tolerance=0.1)
def sampled_coefficients(device):
    curvatures = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=device)
    point = torch.zeros_like(curvatures)

    def loss(points):
        return (curvatures * points**2).sum(-1)

    return estimate_learning_coefficient(loss, point, inverse_temperature=1e4, chains=8, steps=200)


@case("loss_volume", "minimum_log_volume", tolerance=0.3)
def loss_volumes(device):
    curvatures = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=device)
    planted = planted_kink_minimum(12, 2, 2)
    given = [
        placed(getattr(planted, name), device) for name in ("hidden_weights", "output_weights", "inputs", "targets")
    ]
    sampled = loss_volume(
        lambda points: (curvatures * points**2).sum(-1), torch.zeros_like(curvatures), [0.1, 0.01], runs=4, steps=8
    )
    return sampled.log_volumes, minimum_log_volume(certify(*given), *given[2:], [1e-6])


@case("landscape_slice", "LandscapeSlice", "SliceKinks", "principal_directions", "random_directions")
def slices(device):
    inputs, labels, *_ = random_data(device, 12, 5, 4)
    net = small_model(device)
    here = torch.cat([part.detach().flatten() for part in net.parameters()])
    points = [here + move for move in random_directions(net, seed=1)]
    moves = principal_directions(net, points)
    options = {"trajectory": points, "resolution": 9, "kink_samples": 8, "kink_pairs": 20}
    return (
        landscape_slice(net, inputs, labels, moves, **options),
        landscape_slice(net, inputs, labels, random_directions(net, count=1), resolution=9),
    )


@case("curvature_directions", tolerance=1e-3)
def directions_of_curvature(device):
    shape = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, device=device)
    theta = torch.zeros_like(shape).requires_grad_()
    return curvature_directions(LossSurface([theta], lambda: [(1.0, lambda: shape @ theta.square())])).abs()


@case("input_regions", "InputRegions")
def regions_of_inputs(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1)).double().to(device)
    moves = torch.eye(3, dtype=torch.float64, device=device)[:2]
    return input_regions(net, moves, center=torch.ones(3, dtype=torch.float64, device=device))


@pytest.mark.parametrize("name", CASES)
def test_the_device_gives_what_the_cpu_gives(name):
    tested = CASES[name]
    expected, found = tested.calculate("cpu"), tested.calculate("cuda")
    assert differences(expected, found, tested.tolerance) == []
    assert set(tested.covers) <= tested.names(found), "a case does not touch what it says that it covers"


def test_all_that_takes_tensors_is_covered():
    covered = {name for tested in CASES.values() for name in tested.covers}
    assert covered | NO_TENSORS.keys() == set(landscape.__all__)
    assert not covered & NO_TENSORS.keys()
