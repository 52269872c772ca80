import copy
import inspect
import itertools
import math

import pytest
import torch

from lightning_mnn.model.optim import Adam, build_optimizer, build_schedule


def weights():
    return [torch.nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("lbfgs", torch.optim.LBFGS),
        ("AdamW", torch.optim.AdamW),
        ("RMSprop", torch.optim.RMSprop),
    ],
)
def test_optimizers_by_name(name, kind):
    optimizer = build_optimizer(weights(), {"name": name, "lr": 0.25})
    assert isinstance(optimizer, kind)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"amsgrad": True},
        pytest.param(
            {"weight_decay": 0.5, "decoupled_weight_decay": True},
            marks=pytest.mark.skipif(
                "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters,
                reason="Adam of this torch has no decoupled_weight_decay",
            ),
        ),
        {"fused": False},
        {"fused": None},
    ],
)
def test_adam_takes_torchs_steps(options):
    options = {"lr": 0.01, "betas": (0.8, 0.95), "fused": True} | options

    def steps(kind, number, state=None):
        optimizer = kind(own := [torch.nn.Parameter(torch.linspace(-1, 1, 5)), *weights()], **options)
        if state is not None:
            optimizer.load_state_dict(state)
        for k in range(number):
            for parameter in own:
                parameter.grad = torch.sin(3 * parameter.detach() + k)
            optimizer.step()
        return own, optimizer.state_dict()

    ours, state = steps(Adam, 7)
    theirs, _ = steps(torch.optim.Adam, 7)
    resumed = [steps(kind, 3, copy.deepcopy(state))[0] for kind in (Adam, torch.optim.Adam)]
    for one, other in zip([*ours, *resumed[0]], [*theirs, *resumed[1]], strict=True):
        assert torch.equal(one, other)


def test_adam_runs_hooks_once_a_step_and_takes_an_empty_group():
    torch.optim.Adam(weights())  # after which torch's own step has hooks, too
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([{"params": [parameter]}, {"params": []}], lr=0.1, fused=True)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    parameter.grad = torch.ones(2)
    for _ in range(3):
        optimizer.step()
    assert len(calls) == 3


def test_adam_passes_over_weights_without_a_gradient_and_heeds_a_closure():
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([one, two], lr=0.1, fused=True)
    one.grad = torch.ones(2)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(two, torch.ones(2))
    assert (one < 1).all()
    assert optimizer.step(lambda: 3.0) == 3.0


def test_betas_of_a_config_are_a_list():
    assert build_optimizer(weights(), {"name": "adam", "betas": [0.8, 0.9]}).defaults["betas"] == (0.8, 0.9)


def rates(options, steps=1000):
    optimizer = build_optimizer(weights(), {"name": "sgd", "lr": 2.0})
    schedule = build_schedule(optimizer, options, steps)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_exponential_tail_is_that_of_figure_5_2():
    found = rates({"name": "exponential_tail", "hold": 0.5, "final_factor": 1e-4})
    assert set(found[:501]) == {2.0}
    assert found[750] == pytest.approx(2e-2)
    assert found[1000] == pytest.approx(2e-4)
    ratios = [b / a for a, b in itertools.pairwise(found[501:])]
    assert max(ratios) == pytest.approx(min(ratios))


def test_one_cycle():
    found = rates({"name": "one_cycle", "warmup": 0.2, "start_factor": 0.1, "final_factor": 0.01})
    assert found[0] == pytest.approx(0.2)
    assert found[100] == pytest.approx(1.1)
    assert max(found) == found[200] == pytest.approx(2.0)
    assert found[600] == pytest.approx(2 * (0.01 + 0.99 * (1 + math.cos(math.pi / 2)) / 2))
    assert found[1000] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "newton"}, "optimizer.name must be one of adadelta, adafactor, adagrad, adam, .* got 'newton'"),
        ({"name": "sparseadam"}, "optimizer.name must be one of"),
        ({"name": "rprop", "etas": [0.5]}, r"optimizer.etas must be two numbers, got \[0.5\]: as \[0.5, 1.2\]"),
        ({"name": "rprop", "etas": [0.5, 0.9]}, "optimizer is refused by torch: Invalid eta values"),
        ({"lr": 1.0}, "got None"),
        ({"name": "sgd", "beta": 1}, "optimizer.beta is no argument of sgd, got 1: leave it out; it has lr, momentum"),
        ({"name": "adam", "lr": "abc"}, "optimizer.lr must be a number, at least 0, got 'abc'"),
        ({"name": "adam", "lr": None}, "optimizer.lr must be a number, at least 0, got None"),
        ({"name": "adam", "betas": 0.9}, "optimizer.betas must be two numbers, at least 0 and below 1, got 0.9: as"),
        ({"name": "adam", "betas": [0.9, 1]}, "optimizer.betas must be a number, at least 0 and below 1, got 1"),
        ({"name": "adam", "fused": "maybe"}, "optimizer.fused must be true or false, got 'maybe'"),
        ({"name": "lbfgs", "max_iter": 1.5}, "optimizer.max_iter must be at least 1 and a whole number, got 1.5"),
        ({"name": "lbfgs", "line_search_fn": "wolfe"}, "optimizer.line_search_fn must be one of null, strong_wolfe"),
        ({"name": "sgd", "nesterov": True}, "optimizer.nesterov needs a momentum above 0, and no dampening, got True"),
    ],
)
def test_bad_optimizers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(weights(), options)


def test_parameters_without_a_gradient_are_left_out():
    frozen, trained = torch.nn.Parameter(torch.zeros(3), requires_grad=False), weights()[0]
    assert build_optimizer([frozen, trained], {"name": "sgd"}).param_groups[0]["params"] == [trained]


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"name": "CosineAnnealingLR"}, 0.0),  # its length is the run's
        ({"name": "cosineannealinglr", "T_max": 1000, "eta_min": 0.5}, 0.5),
        ({"name": "StepLR", "step_size": 400, "gamma": 0.5}, 0.5),
        ({"name": "OneCycleLR", "final_div_factor": 1.0}, 2.0 / 25),  # its largest rate is the optimiser's
    ],
)
def test_schedules_of_torch_by_name(options, last):
    optimizer = build_optimizer(weights(), {"name": "sgd", "lr": 2.0})
    schedule = build_schedule(optimizer, options, 1000)
    for _ in range(999):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"name": "cosine"}, 10, "schedule.name must be one of"),
        ({"name": "ReduceLROnPlateau"}, 10, "schedule.name must be one of"),
        ({"name": "CosineAnnealingLR"}, math.inf, "needs the length of the run"),
        ({"name": "StepLR"}, 10, "schedule is refused by torch: .*step_size"),
        ({"name": "LambdaLR"}, 10, "schedule.name must be one of"),
        ({"name": "one_cycle"}, math.inf, "needs the length of the run"),
        ({"name": "one_cycle", "wamup": 0.1}, 10, "schedule.wamup is no argument of one_cycle, got 0.1: leave it out"),
        ({"name": "one_cycle", "warmup": 1.0}, 10, "warmup must be a number, at least 0 and below 1, got 1.0"),
        ({"name": "exponential_tail", "hold": 1.5}, 10, "hold must be a number, at least 0 and below 1, got 1.5"),
    ],
)
def test_bad_schedules_are_named(options, steps, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(build_optimizer(weights(), {"name": "sgd"}), options, steps)
    assert build_schedule(build_optimizer(weights(), {"name": "sgd"}), {"name": "constant"}, math.inf) is None
