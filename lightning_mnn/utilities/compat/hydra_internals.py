"""Private and undocumented parts of Hydra and of its submitit plugin."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_mnn.utilities.compat.missing import MissingPartError, attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hydra.core.utils import JobReturn

_LIBRARY = "hydra-core"


def result_of(returned: JobReturn) -> Any:
    """The value that a job returned, or the error that it raised: ``JobReturn._return_value``.

    The public property ``return_value`` would print and raise the error.
    """
    return attribute(returned, "_return_value", _LIBRARY)


def singletons() -> Any:
    """Hydra's state in this process, to be copied to a job's process: ``hydra.core.singleton.Singleton``."""
    return attribute(_module("hydra.core.singleton"), "Singleton.get_state", _LIBRARY)()


def set_singletons(state: Any) -> None:
    """Set Hydra's state in this process: ``hydra.core.singleton.Singleton``."""
    attribute(_module("hydra.core.singleton"), "Singleton.set_state", _LIBRARY)(state)


def split_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep: ``BasicSweeper.split_arguments`` of ``hydra._internal``.

    Raises:
        HydraException: an override cannot be parsed, or its values cannot be determined.

    >>> split_sweep(["a=1,2", "b=3"])
    [['a=1', 'b=3'], ['a=2', 'b=3']]
    """
    parser = attribute(_module("hydra.core.override_parser.overrides_parser"), "OverridesParser.create", _LIBRARY)()
    sweeper = _module("hydra._internal.core_plugins.basic_sweeper")
    split = attribute(sweeper, "BasicSweeper.split_arguments", _LIBRARY)
    (jobs,) = split(parser.parse_overrides(list(overrides)), max_batch_size=None)
    return [list(job) for job in jobs]


def replace_composition(make: Callable[[Callable[[list[str]], Any]], Callable[[list[str]], Any]]) -> None:
    """Let Hydra compose the config of each job of a sweep in another way: ``load_sweep_config`` of its loader.

    Args:
        make: returns a function of a job's overrides, given Hydra's own. Each sweep gets a function of its own.
    """
    loader = attribute(_module("hydra.core.global_hydra"), "GlobalHydra.instance", _LIBRARY)().config_loader()
    original = attribute(loader, "load_sweep_config", _LIBRARY)
    made: list[tuple[Any, Callable[[list[str]], Any]]] = []

    def load_sweep_config(master_config: Any, sweep_overrides: list[str]) -> Any:
        if not made or made[-1][0] is not master_config:
            made.append((master_config, make(partial(original, master_config))))
        return made[-1][1](list(sweep_overrides))

    loader.load_sweep_config = load_sweep_config


def value_of_override(override: str) -> Any:
    """The value that an override assigns: ``OverridesParser`` of ``hydra.core``, whose objects have a ``value()``.

    >>> value_of_override("a=[1,b]"), value_of_override("a='1'")
    ([1, 'b'], '1')
    """
    parser = attribute(_module("hydra.core.override_parser.overrides_parser"), "OverridesParser.create", _LIBRARY)()
    return attribute(parser.parse_override(override), "value", _LIBRARY)()


@contextmanager
def errors_told_by(report_error: Callable[[Exception], bool], usage: Callable[[str], NoReturn]) -> Iterator[None]:
    """A context in which Hydra's command line passes its errors to the given functions.

    It replaces ``run_and_report`` of ``hydra._internal.utils`` and ``get_args_parser`` of ``hydra.main``.

    Args:
        report_error: called with each error that Hydra would report; if it returns False, Hydra reports the error.
        usage: called with a message about wrong options (``--…``); it must end the process.
    """
    utils, main = _module("hydra._internal.utils"), _module("hydra.main")
    report = attribute(utils, "run_and_report", _LIBRARY)
    get_parser = attribute(main, "get_args_parser", _LIBRARY)

    def run_and_pass_errors(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # noqa: BLE001 (everything that Hydra would report)
            if report_error(error):
                sys.exit(1)
            return report(partial(_raise, error))

    def parser_with_usage() -> Any:
        parser = get_parser()
        parser.error = usage
        return parser

    utils.run_and_report, main.get_args_parser = run_and_pass_errors, parser_with_usage
    try:
        yield
    finally:
        utils.run_and_report, main.get_args_parser = report, get_parser


def _raise(error: Exception) -> NoReturn:
    raise error


def submitit_job() -> Any:
    """The class whose instances run one job in the process that submitit started: the plugin's launcher for SLURM.

    Raises:
        ImportError: the plugin is not installed.
    """
    importlib.import_module("hydra_plugins.hydra_submitit_launcher")
    library = "hydra-submitit-launcher"
    module = _module("hydra_plugins.hydra_submitit_launcher.submitit_launcher", library)
    return attribute(module, "SlurmLauncher", library)


def _module(name: str, library: str = _LIBRARY) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPartError(library, f"the module {name}", str(error)) from error
