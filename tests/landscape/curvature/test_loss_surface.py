import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_mnn.landscape import LossSurface, NoDerivativeError, extreme_eigenvalues
from tests.children import side_by_side
from tests.landscape.curvature.second_order_processes import work
from tests.landscape.small_models import MODELS, Checkpointed, build, cross_entropy_surface


def dense(model, inputs, labels):
    """Loss, gradient and Hessian of the mean cross-entropy, by torch's own functions on one flat vector."""
    names, values = zip(*((name, p.detach()) for name, p in model.named_parameters()), strict=True)

    def loss(flat):
        pieces = [piece.view_as(v) for piece, v in zip(flat.split([v.numel() for v in values]), values, strict=True)]
        outputs = torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (inputs,))
        return functional.cross_entropy(outputs, labels)

    flat = torch.cat([v.flatten() for v in values])
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        return float(loss(flat)), gradient, torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_agree_with_dense_autograd(name):
    model, inputs, labels = build(name)
    surface = cross_entropy_surface(model, inputs, labels)
    assert surface.size <= 500
    loss, gradient, hessian = dense(model, inputs, labels)
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    value, found = surface.value_and_gradient()
    assert abs(value - loss) <= 1e-12
    assert abs(surface.loss() - loss) <= 1e-12
    assert torch.allclose(found, gradient, rtol=0, atol=1e-12)
    vectors = torch.randn(3, surface.size, dtype=torch.float64)
    for vector in vectors:
        assert torch.allclose(surface.product(vector), hessian @ vector, rtol=1e-10, atol=1e-11)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    spectrum = extreme_eigenvalues(surface.product, surface.size, max_products=surface.size, tolerance=1e-12)
    exact = torch.linalg.eigvalsh(hessian)
    assert abs(spectrum.smallest - exact[0]) <= 1e-10
    assert abs(spectrum.largest - exact[-1]) <= 1e-10
    assert exact[0] >= spectrum.smallest - spectrum.smallest_error


def test_compiled_modules():
    model, inputs, labels = build("mlp")
    compiled = torch.compile(model, backend="aot_eager")
    compiled(inputs)
    found = cross_entropy_surface(compiled, inputs, labels)
    vector = torch.randn(found.size, dtype=torch.float64)
    plain = cross_entropy_surface(model, inputs, labels)
    assert torch.allclose(found.product(vector), plain.product(vector), rtol=1e-10, atol=1e-11)


def test_float32():
    model, inputs, labels = build("cnn", dtype=torch.float32)
    surface = cross_entropy_surface(model, inputs, labels)
    spectrum = extreme_eigenvalues(surface.product, surface.size, dtype=torch.float32, max_products=surface.size)
    hessian = dense(model.double(), inputs.double(), labels)[2]
    exact = torch.linalg.eigvalsh(hessian)
    assert abs(spectrum.smallest - exact[0]) <= spectrum.smallest_error
    assert abs(spectrum.largest - exact[-1]) <= spectrum.largest_error
    assert spectrum.largest_error <= 1e-2 * exact[-1]


@pytest.mark.slow
def test_a_larger_model_agrees_with_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    from scipy.sparse.linalg import eigsh

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 120), nn.ReLU(), nn.Linear(120, 150), nn.ReLU(), nn.Linear(150, 5)).double()
    inputs, labels = torch.randn(60, 20, dtype=torch.float64), torch.randint(5, (60,))
    surface = cross_entropy_surface(model, inputs, labels, batch_size=25)
    assert surface.size > 20_000
    data = [(inputs[rows], labels[rows]) for rows in (slice(0, 20), slice(20, 60))]
    reference = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    vector = torch.randn(surface.size, dtype=torch.float64)
    assert torch.allclose(surface.product(vector), reference @ vector, rtol=1e-9, atol=1e-12)
    spectrum = extreme_eigenvalues(surface.product, surface.size, max_products=150, tolerance=1e-5)
    smallest, largest = (
        eigsh(reference.to_scipy(), k=1, which=which, return_eigenvectors=False, tol=1e-10)[0] for which in ("SA", "LA")
    )
    assert abs(spectrum.largest - smallest) > 1e-3  # not a trivial spectrum
    assert abs(spectrum.smallest - smallest) <= min(1e-6, spectrum.smallest_error)
    assert abs(spectrum.largest - largest) <= min(1e-6, spectrum.largest_error)


def test_parameters_that_do_not_count():
    torch.manual_seed(0)
    used, frozen, unused = (torch.randn(2, requires_grad=True) for _ in range(3))
    frozen.requires_grad_(False)  # noqa: FBT003
    surface = LossSurface([frozen, used, unused], lambda: [(2.0, lambda: (used**3).sum() + frozen.sum())])
    value, gradient = surface.value_and_gradient()
    assert value == pytest.approx(2 * float((used**3).sum().detach() + frozen.sum()))
    assert torch.allclose(gradient, torch.cat([torch.zeros(2), 6 * used**2, torch.zeros(2)]))
    product = surface.product(torch.ones(6))
    assert torch.allclose(product, torch.cat([torch.zeros(2), 12 * used, torch.zeros(2)]))
    linear = LossSurface([used, unused], lambda: [(1.0, used.sum)])
    assert torch.equal(linear.product(torch.ones(4)), torch.zeros(4))


def test_parts_without_parameters_add_to_the_loss():
    theta = torch.tensor([1.0], requires_grad=True)
    surface = LossSurface([theta], lambda: [(1.0, lambda: theta.square().sum()), (1.0, lambda: torch.tensor(5.0))])
    assert surface.value_and_gradient() == (6.0, torch.tensor([2.0]))
    with torch.no_grad():  # whatever the caller's mode
        assert surface.product(torch.ones(1)) == torch.tensor([2.0])


def test_moves_are_taken_back_bit_for_bit():
    model, inputs, labels = build("mlp", dtype=torch.float32)
    surface = cross_entropy_surface(model, inputs, labels)
    before, loss = [p.clone() for p in model.parameters()], surface.loss()
    with surface.moved(torch.randn(surface.size)):
        assert surface.loss() != loss
    with pytest.raises(KeyError), surface.moved(torch.randn(surface.size) / 3):
        raise KeyError
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


def test_what_cannot_be_differentiated_says_so():
    model, inputs, labels = build("mlp")
    detached = LossSurface(list(model.parameters()), lambda: [(1.0, lambda: model(inputs).sum().detach())])
    with pytest.raises(NoDerivativeError, match="none of the parameters"):
        detached.value_and_gradient()
    once = LossSurface(list(model.parameters()), lambda: [(1.0, lambda: Once.apply(model(inputs)).square().sum())])
    once.value_and_gradient()
    with pytest.raises(NoDerivativeError, match=r"differentiated twice .*once_differentiable"):
        once.product(torch.ones(once.size, dtype=torch.float64))
    model = Checkpointed(reentrant=True).double()
    reentrant = cross_entropy_surface(model, inputs.requires_grad_(), labels)
    with pytest.raises(NoDerivativeError, match=r"reentrant checkpointing.*use_reentrant=False"):
        reentrant.value_and_gradient()
    assert torch.backends.cudnn.enabled


def test_bad_input():
    theta = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="parameters must not be empty"):
        LossSurface([], list)
    with pytest.raises(ValueError, match="a tensor twice"):
        LossSurface([theta, theta], list)
    with pytest.raises(ValueError, match=r"one dtype and one device, got .*float32.*float64"):
        LossSurface([theta, theta.detach().double()], list)
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch\.float16"):
        LossSurface([theta.detach().half()], list)
    with pytest.raises(ValueError, match=r"must be one number, got the shape \(2,\)"):
        LossSurface([theta], lambda: [(1.0, lambda: theta)]).value_and_gradient()
    with pytest.raises(ValueError, match=r"vector must have the shape \(2,\)"):
        LossSurface([theta], list).product(torch.zeros(3))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Unequal shares, and one process that alone cannot differentiate."""
    side_by_side(tmp_path, 2, work, tmp_path / "store")
    assert [(tmp_path / f"rank_{rank}" / "out.txt").read_text() for rank in range(2)] == ["same\n"] * 2
