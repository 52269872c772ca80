"""What the train task prints on the console."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.tree import Tree

from lightning_mnn.findings import Finding
from lightning_mnn.utilities.errors import EarlyEnd
from lightning_mnn.utilities.files import relative
from lightning_mnn.verdicts import STATIONARY, Kind

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {
    Kind.DIFFERENTIABLE_MINIMUM: "a differentiable local minimum",
    Kind.KINK_MINIMUM: "a local minimum on kinks",
    Kind.SADDLE: "a saddle point",
    Kind.NOT_STATIONARY: "no verified local minimum",
    Kind.ON_KINK: "a point on kinks",
    Kind.UNDECIDED: "a point that could not be classified",
}


def config_tree(cfg: DictConfig) -> Tree:
    """The composed config as a tree, as it is now: Hydra replaces some references by values when it builds objects."""
    tree = Tree("[bold]config")
    _grow(tree, cfg)
    return tree


@rank_zero_only
def print_config(tree: Tree) -> None:
    """Print the composed config."""
    Console().print(tree)


@rank_zero_only
def print_verdict(name: str, summary: dict[str, Any], run_dir: Path, *, offline: bool) -> None:
    """Print what the run converged to, one line per fact; for replicas the range of each value."""
    table = Table.grid(padding=(0, 2))
    for label, value in _facts(summary):
        table.add_row(f"[bold]{label}", escape(value))
    console = Console()
    console.print(Panel(table, title=f"{escape(str(name))}: verdict", expand=False))
    shown = escape(str(relative(run_dir)))
    console.print(f"[bold]everything is in[/] {shown}", soft_wrap=True)
    if offline and (run_dir / "wandb").exists():
        console.print(f"[bold]to W&B with[/] wandb sync {shown}/wandb/offline-run-*", soft_wrap=True)


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = summary["kind"] if isinstance(summary["kind"], list) else [summary["kind"]]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds) if kind is not None}
    several = len(kinds) > 1
    converged = "; ".join(f"{n} × {KINDS[k]}" if several else KINDS[k] for k, n in counts.items()) or "not tested"
    if summary.get("ended_by") == EarlyEnd.INTERRUPTION:
        converged = "nothing yet: the run was interrupted"
    reason = summary.get("reason")
    if isinstance(reason, list) and len(set(reason)) == 1:
        reason = reason[0]
    facts = [
        ("converged to", converged),
        ("of the objective", _objective(summary)),
        ("because", reason if isinstance(reason, str) else None),
        ("descent leads to", _descents(summary)),
        ("advice", _advice(summary)),
        ("zero error", _span(summary.get("zero_error"))),
        ("MSE", _span(summary["mse"], ".3g")),
        ("MCE", _errors(summary)),
        ("test MSE", _span(summary.get("test_mse"), ".3g")),
        ("test MCE", _percent(summary.get("test_mce"))),
        ("distance to that minimum", _span(_of_certified(summary, "distance"), ".1e")),
        ("exact within", _span(_of_certified(summary, "radius"), ".1e")),
        ("its MSE", _span(summary.get("minimum_mse"), ".3g")),
        ("its objective", _span(summary.get("minimum_loss"), ".3g") if _objective(summary) else None),
        ("smallest growth off kinks", _span(summary.get("growth"), ".1e")),
        ("margin of its region", _span(_of_certified(summary, "margin_ratio"), ".3g")),
        ("smallest |w·x|", _span(summary.get("min_preactivation"), ".2g")),
        ("relative to ‖w‖‖x‖", _span(summary.get("relative_preactivation"), ".2g")),
        ("samples on kinks", _span(summary.get("kinks"))),
        ("rank of A∘X", _rank(summary)),
        ("log-volume of its region", _volume(summary)),
        ("regions seen", _span(summary.get("regions_visited"))),
        ("patterns froze at step", _span(summary.get("freeze_step"))),
        ("weights settled at step", _span(summary.get("weights_freeze_step"))),
        ("out of the ordinary", _findings(summary)),
        ("trained", f"{summary['epochs']} epochs, {summary['steps']} steps, {summary['seconds']:.1f} s"),
    ]
    return [(label, value) for label, value in facts if value is not None]


def _objective(summary: dict[str, Any]) -> str | None:
    """The objective, where it is not the MSE with all weights free."""
    found = summary.get("objective")
    return None if found in (None, "mse", "none") else str(found).replace("_", " ")


def _descents(summary: dict[str, Any]) -> str | None:
    """Where descent leads to, for each kind its number of replicas, and the range of their errors and distances."""
    penalised = _objective(summary) is not None and summary.get("descends_to_loss") is not None
    measure, name = ("loss", "objective") if penalised else ("mse", "MSE")
    keys = ("descends_to", *(f"descends_to_{key}" for key in (measure, "distance", "zero_error")))
    values = [_listed(summary.get(key)) for key in keys]
    found = [values for values in zip(*values, strict=False) if values[0] is not None]
    parts = []
    for kind, zero_error in dict.fromkeys((kind, zero_error) for kind, _, _, zero_error in found):
        same = [values for values in found if (values[0], values[3]) == (kind, zero_error)]
        value, distance = (_span([values[column] for values in same], ".2g") for column in (1, 2))
        error = "zero error" if zero_error else f"{name} {value}"
        text = f"{KINDS[kind]} with {error}, {distance} away"
        parts.append(f"{len(same)} × {text}" if len(_listed(summary["kind"])) > 1 else text)
    return "; ".join(parts) or None


def _advice(summary: dict[str, Any]) -> str | None:
    """The advice on all verdicts that are no minima, each once, the most frequent first."""
    found = [advice for advice in _listed(summary.get("advice")) if advice is not None]
    return "\n".join(sorted(dict.fromkeys(found), key=lambda advice: -found.count(advice))) or None


def _findings(summary: dict[str, Any]) -> str | None:
    """What is out of the ordinary in units and gradients, a sentence each; with replicas, in how many of them."""
    found = summary.get("findings") or []
    replicated = any(isinstance(part, list) for part in found)
    parts = [finding for part in found for finding in part] if replicated else found
    if replicated:
        counts = Counter((finding["code"], finding["layer"]) for finding in parts)
        lines = [
            f"{n} × {str(code).replace('_', ' ')}" + (f" in {layer}" if layer else "")
            for (code, layer), n in counts.items()
        ]
    else:
        lines = [str(Finding.from_plain(finding)) for finding in parts]
    lines += [str(Finding.from_plain(finding)) for finding in summary.get("gradient_findings") or []]
    return "\n".join(lines) or None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _of_certified(summary: dict[str, Any], key: str) -> Any:
    """A measure of the certified replicas; None if there are none."""
    kinds, values = summary["kind"], summary.get(key)
    if not isinstance(kinds, list):
        return values if kinds in STATIONARY else None
    found = [value for kind, value in zip(kinds, values or [], strict=False) if kind in STATIONARY]
    return found or None


def _span(value: Any, style: str = "") -> str | None:
    if value is None:
        return None
    values = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
    if not values:
        return None
    if isinstance(values[0], bool):
        return ("yes" if values[0] else "no") if len(values) == 1 else f"{sum(values)} of {len(values)}"
    shown = [format(extreme, style) for extreme in (min(values), max(values))]
    return " … ".join(dict.fromkeys(shown))


def _errors(summary: dict[str, Any]) -> str | None:
    if summary["wrong"] is None:
        return None
    worst = max(summary["mce"]) if isinstance(summary["mce"], list) else summary["mce"]
    return f"{100 * worst:.3g} % ({_span(summary['wrong'])} of {summary['num_samples']} wrong)"


def _percent(fraction: Any) -> str | None:
    values = fraction if isinstance(fraction, list) else [fraction]
    found = _span([100 * value for value in values if value is not None], ".3g")
    return None if found is None else f"{found} %"


def _rank(summary: dict[str, Any]) -> str | None:
    rank, cap = _span(summary.get("rank")), _span(summary.get("rank_cap"))
    if cap is None:
        return None
    if rank is None:
        rank = "not computed" if summary.get("ended_by") else "not computed at this size"
    return f"{rank}, at most {cap}, of {summary['num_samples']} samples"


def _volume(summary: dict[str, Any]) -> str | None:
    value, error = (_span(summary.get(key), ".1f") for key in ("log_volume", "log_volume_standard_error"))
    bound = _span(summary.get("log_volume_lower_bound"), ".1f")
    if value is None:
        return None if bound is None else "none, it lies on a kink" if bound == "-inf" else f"at least {bound} nats"
    return f"{value} ± {error} nats (at least {bound})"


def _grow(tree: Tree, node: DictConfig | ListConfig) -> None:
    for key, value in node.items() if isinstance(node, DictConfig) else enumerate(node):
        if isinstance(value, DictConfig):
            _grow(tree.add(f"[cyan]{escape(str(key))}"), value)
        else:
            shown = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
            tree.add(f"[cyan]{escape(str(key))}[/]: {escape(str(shown))}", highlight=True)
