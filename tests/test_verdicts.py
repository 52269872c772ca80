"""Kinds, codes of reasons and their sentences: complete, used, documented, and compared by nobody as text."""

import ast
import math
import re
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

import pytest
import torch

from lightning_mnn import landscape
from lightning_mnn.advice import ADVICE, advice_on
from lightning_mnn.callbacks.evidence.first_order import FirstOrderTier
from lightning_mnn.callbacks.evidence.second_order import SecondOrderTier
from lightning_mnn.figures.style import KINDS as KINDS_OF_FIGURES
from lightning_mnn.landscape import (
    ActivationPattern,
    Kind,
    KinkDistance,
    LossSurface,
    ReasonCode,
    Region,
    certify,
    find_minimum,
    first_order_verdicts,
    planted_kink_minimum,
    planted_minimum,
    planted_saddle,
    polish,
    second_order_verdict,
)
from lightning_mnn.runs.console import KINDS as KINDS_OF_CONSOLE
from lightning_mnn.verdicts import SENTENCES, Class, Ended, Reason, class_of
from tests.documented import page

PACKAGE = Path(landscape.__file__).parent.parent
SOURCES = {str(path): path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "verdicts.py"}
CODES = {code.name for code in ReasonCode}


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def certified(w=((0.5,),), z=(1.0,), x=((1.0,), (2.0,), (-1.0,)), y=(0.5, 1.0, 1.0)):
    return certify(float64(w), float64(z), float64(x), float64(y))


def planted(draw):
    torch.manual_seed(0)
    found = draw(20, 4, 3)
    return certify(found.hidden_weights, found.output_weights, found.inputs, found.targets)


def polished(max_steps):
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randint(2, (30,)).double()
    return polish(torch.randn(3, 4), torch.randn(3), x, y, max_steps=max_steps).certificate


def first_order(stationarity, sine, depth=1):
    statistics = SimpleNamespace(
        stationarity=float64([stationarity]), smallest_sine=float64([sine]), layers=[None] * depth
    )
    return first_order_verdicts(statistics, 1e-6, 1e-3)[0]


def second_order(loss, start=(0.0, 0.0), kinks=KinkDistance(), **options):  # noqa: B008 (frozen)
    theta = float64(start).requires_grad_()
    return second_order_verdict(LossSurface([theta], lambda: [(1.0, lambda: loss(theta))]), kinks, 1.0, **options)


def exists(x=((1.0, 0.0), (0.0, 1.0)), active=((1, 0), (1, 1)), y=(1.0, -1.0), **options):
    return find_minimum(Region(float64(x), ActivationPattern(torch.tensor(active) > 0)), float64(y), **options)


def without_step(*, reads):
    return FirstOrderTier(None, None, 1e-3, "why", reads=reads).findings()[0]


def with_gradients(relative, *, full_batch):
    tier = FirstOrderTier(None, None, 1e-3, "why")
    tier.gradient_norm, tier.reference, vars(tier)["_full_batch_steps"] = relative, 1.0, full_batch
    return tier.findings()[0]


def run_out():
    tier = SecondOrderTier(None, None, 1e-3, 1e-3, 9)
    tier.verdict = landscape.check_stationarity(*_flat_surface(), KinkDistance(), 1.0)
    tier.run_out("a check took too long")
    return tier.findings()[0]


def _flat_surface():
    theta = float64([0.0]).requires_grad_()
    return [LossSurface([theta], lambda: [(1.0, lambda: 1 + 0 * theta[0])])]


ON_KINK = KinkDistance(units=9, count=1, nearest=0.0, relative=0.0, layer="relu", spacing=2.0**-52)

CASES = {  # what gives each code; the kind, or whether a minimum exists
    ReasonCode.CERTIFIED: (lambda: certified(((0.5001,),)), Kind.DIFFERENTIABLE_MINIMUM),
    ReasonCode.CERTIFIED_ON_KINKS: (lambda: planted(planted_kink_minimum), Kind.KINK_MINIMUM),
    ReasonCode.ZERO_ERROR: (lambda: certified(y=(0.5, 1.0, 0.0)), Kind.DIFFERENTIABLE_MINIMUM),
    ReasonCode.FORCE_ON_INACTIVE_UNIT: (lambda: planted(planted_saddle), Kind.SADDLE),
    ReasonCode.TOO_FAR: (lambda: certified(((0.6,),)), Kind.NOT_STATIONARY),
    ReasonCode.OUTSIDE_REGION: (lambda: certified(y=(-1.0, -1.0, 0.0)), Kind.NOT_STATIONARY),
    ReasonCode.GRADIENT_ON_INACTIVE_UNIT: (
        lambda: certified(((1.0,), (-1.0,)), (0.5, 0.0)),
        Kind.NOT_STATIONARY,
    ),
    ReasonCode.UNEVEN_INPUTS: (
        lambda: certified(((1.0, 1.0),), x=((1.0, 1e-14), (2.0, 0.0), (1.0, 1e-14)), y=(1.0, 2.5, 1.3)),
        Kind.NOT_STATIONARY,
    ),
    ReasonCode.FIRST_ORDER_TESTS_PASSED: (lambda: first_order(1e-9, 0.1), Kind.DIFFERENTIABLE_MINIMUM),
    ReasonCode.NECESSARY_CONDITIONS_ONLY: (lambda: first_order(1e-9, 0.1, depth=2), Kind.DIFFERENTIABLE_MINIMUM),
    ReasonCode.STATIONARITY_ABOVE_TOLERANCE: (lambda: first_order(math.nan, 0.1), Kind.NOT_STATIONARY),
    ReasonCode.PREACTIVATION_BELOW_TOLERANCE: (lambda: first_order(1e-9, 1e-5), Kind.NOT_STATIONARY),
    ReasonCode.NO_STEP_YET: (lambda: without_step(reads=True), Kind.UNDECIDED),
    ReasonCode.NO_GRADIENT_SEEN: (lambda: without_step(reads=False), Kind.UNDECIDED),
    ReasonCode.STEP_GRADIENT_ABOVE_TOLERANCE: (lambda: with_gradients(0.1, full_batch=True), Kind.NOT_STATIONARY),
    ReasonCode.STEP_GRADIENT_SMALL: (lambda: with_gradients(1e-6, full_batch=True), Kind.UNDECIDED),
    ReasonCode.STEP_GRADIENT_OF_MINI_BATCH: (lambda: with_gradients(0.1, full_batch=False), Kind.UNDECIDED),
    ReasonCode.GRADIENT_ABOVE_TOLERANCE: (lambda: second_order(lambda t: t[0]), Kind.NOT_STATIONARY),
    ReasonCode.NOT_FINITE: (lambda: second_order(lambda t: t[0] * math.nan), Kind.NOT_STATIONARY),
    ReasonCode.ONE_SIDED: (
        lambda: second_order(lambda t: 1 + (t[0] - 1).abs() + 0 * t[1], (1.0, 0.0), ON_KINK),
        Kind.ON_KINK,
    ),
    ReasonCode.HESSIAN_ZERO: (lambda: second_order(lambda t: 1 + 0 * t[0]), Kind.UNDECIDED),
    ReasonCode.NEGATIVE_CURVATURE: (lambda: second_order(lambda t: 1 + t[0] ** 2 - t[1] ** 2), Kind.SADDLE),
    ReasonCode.MORE_PRODUCTS_FOR_SIGN: (
        lambda: second_order(lambda t: 1 + t[0] ** 2 - 1e-3 * t[1].clamp(-1e-9, 1e-9) ** 2),
        Kind.UNDECIDED,
    ),
    ReasonCode.STRICT_MINIMUM: (lambda: second_order(lambda t: 1 + (t**2).sum()), Kind.DIFFERENTIABLE_MINIMUM),
    ReasonCode.FLAT_MINIMUM: (
        lambda: second_order(lambda t: 1 + (t.prod() - 1) ** 2, start=(2.0, 0.5)),
        Kind.DIFFERENTIABLE_MINIMUM,
    ),
    ReasonCode.DEGENERATE_DESCENT: (lambda: second_order(lambda t: 1 + t[0] ** 2 - t[1] ** 4), Kind.SADDLE),
    ReasonCode.FLAT_DIRECTIONS_UNEXPLAINED: (
        lambda: second_order(lambda t: 1 + t[0] ** 2 + t[1] ** 4),
        Kind.UNDECIDED,
    ),
    ReasonCode.QUADRATIC_MODEL_WRONG: (
        lambda: second_order(lambda t: t[0] ** 2 + torch.exp(-t[1]), start=(0.0, 9.0)),
        Kind.UNDECIDED,
    ),
    ReasonCode.NEWTON_STEP_GAINS: (
        lambda: second_order(lambda t: 1e-6 * (1 + (t[0] - 0.1) ** 2 + t[1] ** 2)),
        Kind.UNDECIDED,
    ),
    ReasonCode.NEWTON_STEP_FAR: (
        lambda: second_order(lambda t: 100 + t[0] ** 2 + 0.004 * (t[1] - 0.1) ** 2),
        Kind.UNDECIDED,
    ),
    ReasonCode.CURVATURE_VARIES: (
        lambda: second_order(lambda t: (t.prod() - 1.0001) ** 2, start=(2.0, 0.5)),
        Kind.UNDECIDED,
    ),
    ReasonCode.TIME_LIMIT: (run_out, Kind.UNDECIDED),
    ReasonCode.MINIMUM_FOUND: (exists, True),
    ReasonCode.NO_MINIMUM: (lambda: exists(output_signs=[1, 1]), False),
    ReasonCode.REGION_EMPTY: (
        lambda: exists(x=((1.0, 0.0), (-1.0, 0.0)), active=((1, 0), (1, 1))),
        False,
    ),
    ReasonCode.REGION_TOO_LARGE: (
        lambda: exists(torch.eye(300).tolist(), torch.ones(300, 20).tolist(), [1.0] * 300, threshold=0.5),
        None,
    ),
    ReasonCode.INPUT_TOO_SHORT: (lambda: exists(x=((1.0, 0.0), (1e-17, 1e-17)), active=((1,), (1,))), None),
    ReasonCode.RANK_IN_DOUBT: (lambda: exists(x=((1.0, 0.0), (1.0, 1e-12)), active=((1,), (1,))), None),
    ReasonCode.TOO_MANY_BRANCHES: (lambda: exists(max_nodes=0), None),
    ReasonCode.NOT_CHECKED: (lambda: SecondOrderTier(None, None, 1e-3, 1e-3, 9).findings()[0], Kind.UNDECIDED),
}


@pytest.mark.parametrize("code", CASES, ids=str)
def test_a_code_is_given_with_its_kind_and_its_sentence(code):
    calculate, verdict = CASES[code]
    found = calculate()
    assert (found.reason_code, getattr(found, "kind", getattr(found, "exists", None))) == (code, verdict)
    start = SENTENCES[code].partition("{")[0]
    assert found.reason.startswith(start)
    assert "{" not in found.reason


OF_MINIMA = {
    *(ReasonCode.MODEL_CERTIFIED, ReasonCode.MODEL_FITS),  # codes that come with no other kind
    *(ReasonCode.CERTIFIED, ReasonCode.CERTIFIED_ON_KINKS, ReasonCode.ZERO_ERROR, ReasonCode.FIRST_ORDER_TESTS_PASSED),
    *(ReasonCode.NECESSARY_CONDITIONS_ONLY, ReasonCode.STRICT_MINIMUM, ReasonCode.FLAT_MINIMUM, ReasonCode.ZERO_LOSS),
}
NO_VERDICTS = {  # codes of facts beside the one that decided, and of minima in a region, of sampled chains
    *(ReasonCode.NO_KINK, ReasonCode.NEAREST_KINK, ReasonCode.UNITS_ON_KINKS, ReasonCode.COARSE_PREACTIVATIONS),
    *(ReasonCode.SIDES_COMPARED, ReasonCode.SIDES_NOT_COMPARED, ReasonCode.EIGENVALUES, ReasonCode.NEWTON_DISTANCE),
    *(ReasonCode.KINKS_NOT_EVALUABLE,),
    *(ReasonCode.KINK_CONDITIONS, ReasonCode.KINKS_TOO_MANY, ReasonCode.KINKS_OF_OTHER_FUNCTIONS),
    *(
        ReasonCode.NOT_A_PROOF,
        ReasonCode.MINIMUM_FOUND,
        ReasonCode.NO_MINIMUM,
        ReasonCode.REGION_EMPTY,
    ),
    *(ReasonCode.REGION_TOO_LARGE, ReasonCode.INPUT_TOO_SHORT, ReasonCode.RANK_IN_DOUBT, ReasonCode.FIT_IN_DOUBT),
    *(ReasonCode.PATTERN_IN_DOUBT, ReasonCode.TOO_MANY_BRANCHES, ReasonCode.BRANCHES_IN_DOUBT),
    *(ReasonCode.CHAINS_AGREE, ReasonCode.CHAINS_DIVERGED, ReasonCode.LOWER_LOSS_FOUND, ReasonCode.MOVES_REJECTED),
    *(ReasonCode.CHAINS_DRIFT, ReasonCode.CHAINS_DISAGREE, ReasonCode.TOO_FEW_SAMPLES, ReasonCode.STEP_TOO_LARGE),
}


def test_every_code_of_a_verdict_that_is_no_minimum_has_its_advice_in_one_documented_line():
    assert ADVICE.keys() == set(ReasonCode) - OF_MINIMA - NO_VERDICTS
    text = page("explanation/evidence.md")
    for code, advice in ADVICE.items():
        assert re.fullmatch(r"[^.\n]{5,140}", advice), code
        assert any(advice in line and f"`{code}`" in line for line in text.splitlines()), code


@pytest.mark.parametrize("code", [code for code, (_, verdict) in CASES.items() if isinstance(verdict, Kind)], ids=str)
def test_advice_is_given_on_what_is_no_minimum(code):
    verdict = CASES[code][1]
    assert (advice_on(verdict, code) is None) == verdict.is_minimum == (code in OF_MINIMA)


CERTIFIED_CLASSES = {
    (Kind.DIFFERENTIABLE_MINIMUM, True): Class.GLOBAL,
    (Kind.KINK_MINIMUM, True): Class.GLOBAL,
    (Kind.DIFFERENTIABLE_MINIMUM, False): Class.SUBOPTIMAL,
    (Kind.KINK_MINIMUM, False): Class.KINK,
}


@pytest.mark.parametrize("zero_error", [True, False])
@pytest.mark.parametrize("kind", Kind)
def test_each_kind_has_its_class_at_the_weights_or_ahead(kind, zero_error):
    known = CERTIFIED_CLASSES.get((kind, zero_error), Class.NOT_TOLD)
    here = {"kind": str(kind), "zero_error": zero_error, "evidence": "certificate"}
    assert class_of(here) == Ended(known)
    assert class_of(here | {"evidence": "second_order"}) == Ended(Class.NOT_TOLD)
    before = {"kind": "not_stationary", "zero_error": False}
    ahead = {"descends_to": str(kind), "descends_to_zero_error": zero_error}
    assert class_of(before | ahead) == Ended(known, ahead=known is not Class.NOT_TOLD)
    if kind.is_minimum:  # what is reached counts
        assert class_of(here | {"descends_to": "kink_minimum", "descends_to_zero_error": True}) == Ended(known)


def test_minima_of_different_origin_have_the_same_code():
    assert planted(planted_minimum).reason_code == polished(None).reason_code.partition("_on_kinks")[0]
    assert polished(0).reason_code == ReasonCode.OUTSIDE_REGION


def test_every_code_has_a_sentence_and_is_documented():
    assert SENTENCES.keys() == set(ReasonCode)
    assert {str(code) for code in ReasonCode} == {name.lower() for name in CODES}
    text = page("explanation/evidence.md")
    assert [code for code in ReasonCode if f"`{code}`" not in text] == []


def test_every_kind_has_its_words_in_figures_and_on_the_console():
    assert KINDS_OF_FIGURES.keys() == {*Kind, None}
    assert KINDS_OF_CONSOLE.keys() == set(Kind)
    for kind in Kind:
        assert f"`{kind}`" in page("explanation/evidence.md")


def test_the_former_kinds_are_the_same_members():
    with pytest.warns(DeprecationWarning, match="SecondOrderKind is now Kind"):
        former = landscape.SecondOrderKind
    assert former.MINIMUM is Kind.DIFFERENTIABLE_MINIMUM
    assert list(Kind) == [  # as in summary.json
        *("differentiable_minimum", "kink_minimum", "saddle", "not_stationary", "on_kink", "undecided"),
    ]


def fields(code):
    return {name for _, name, _, _ in Formatter().parse(SENTENCES[code]) if name is not None}


def calls_with_a_code(source):
    """The calls that give a code, with the names of the values of its sentence, where all are given by name."""
    return [
        (node.args[0].attr, {keyword.arg for keyword in node.keywords})
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("of", "_undecided")
        and node.args
        and isinstance(node.args[0], ast.Attribute)
        and node.args[0].attr in CODES
        and all(keyword.arg for keyword in node.keywords)
    ]


def test_every_code_is_used_and_gets_the_values_of_its_sentence():
    users = [text for text in SOURCES.values() if "ReasonCode." in text]
    assert {code for text in users for code in re.findall(r"ReasonCode\.([A-Z_]+)", text)} == CODES
    calls = [call for text in users for call in calls_with_a_code(text)]
    assert len(calls) > 40
    assert [(code, given) for code, given in calls if not given >= fields(ReasonCode[code])] == []


def test_a_reason_is_the_sentences_of_its_facts():
    fact = Reason.of(ReasonCode.NEWTON_DISTANCE, distance=1e-3, gain=0.5)
    reason = Reason.of(ReasonCode.QUADRATIC_MODEL_WRONG, fact, gain=1e-6, loss=2.0, misfit=0.25)
    assert str(reason) == (
        "a Newton step would gain 1.0e-06 of the loss of 2.0e+00, but along it the quadratic model is wrong: the "
        "gradient is off by 25%; 1.0e-03 of the weights away by Newton's method, which gains 5.0e-01"
    )
    with pytest.raises(KeyError, match="flips"):
        str(Reason.of(ReasonCode.OUTSIDE_REGION))


KIND_AS_TEXT = re.compile(
    r'"(differentiable_minimum|kink_minimum|not_stationary|on_kink)"|([!=]=|\bin) [(\[]?"(saddle|undecided)"'
)
_REASON = r"(\.reason\b|\[.reason.\])"
REASON_COMPARED = re.compile(rf"{_REASON} ([!=]=|in\b)|([!=]=|\bin) [\w.]+{_REASON}|{_REASON}\.(starts|ends)with")


def test_no_other_module_writes_a_kind_as_text_or_compares_a_reason():
    assert [path for path, text in SOURCES.items() if KIND_AS_TEXT.search(text) or REASON_COMPARED.search(text)] == []


@pytest.mark.parametrize("line", ['kind == "saddle"', 'kind in ("undecided",)', '{"kind": "not_stationary"}'])
def test_a_kind_as_text_is_found(line):
    assert KIND_AS_TEXT.search(line)


@pytest.mark.parametrize(
    "line", ['"kinks" in found.reason', 'found["reason"] == text', 'summary["reason"].startswith("training")']
)
def test_a_compared_reason_is_found(line):
    assert REASON_COMPARED.search(line)
