"""Random generators of a process from which jobs are forked: each job must get random numbers of its own.

A generator that the program seeds when it is imported is in the same state in all jobs, forked or not. All others start
from a random state, which forked jobs would share.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from importlib.machinery import ModuleSpec


class Generators:
    """The random generators of this process, as they were before the program could seed them."""

    def __init__(self) -> None:
        self._unseeded: list[Any] = []  # that modules have made for themselves
        self._seeded_python = False
        self._first_numpy: Any = None
        self._first_torch: int | None = None
        self._undo: Callable[[], None] = lambda: None

    def note_python(self) -> None:
        """Python's own generator is seeded."""
        self._seeded_python = True

    def note_numpy(self, module: Any) -> None:
        """NumPy has just been imported."""
        self._first_numpy = module.get_state()
        make = module.default_rng

        def default_rng(*args: Any, **kwargs: Any) -> Any:
            generator = make(*args, **kwargs)
            if all(value is None for value in (*args, *kwargs.values())):
                self._unseeded.append(generator)
            return generator

        module.default_rng = default_rng
        self._undo = lambda: setattr(module, "default_rng", make)

    def note_torch(self, module: Any) -> None:
        """``torch`` has just been imported."""
        self._first_torch = module.initial_seed()

    def end(self) -> None:
        """Note nothing any more."""
        self._undo()

    def renew(self, states: Mapping[str, Any]) -> None:
        """In a forked job: continue generators that the program has seeded, and seed the others.

        Python seeds its own generator after a fork by itself.

        Args:
            states: what :meth:`seeded` returned.
        """
        if "random" in states:
            random.setstate(states["random"])
        numpy, torch = (sys.modules.get(name) for name in ("numpy.random", "torch"))
        if numpy is not None:
            numpy.set_state(states["numpy"]) if "numpy" in states else numpy.seed()
        for generator in self._unseeded:
            generator.bit_generator.state = sys.modules["numpy.random"].default_rng().bit_generator.state
        if torch is not None:
            torch.set_rng_state(states["torch"]) if "torch" in states else torch.default_generator.seed()

    def seeded(self) -> dict[str, Any]:
        """The states of the generators that have been seeded since."""
        found: dict[str, Any] = {"random": random.getstate()} if self._seeded_python else {}
        numpy, torch = (sys.modules.get(name) for name in ("numpy.random", "torch"))
        if numpy is not None and self._first_numpy is not None:
            state = numpy.get_state()
            if any(str(one) != str(other) for one, other in zip(state, self._first_numpy, strict=True)):
                found["numpy"] = state
        if torch is not None and self._first_torch not in (None, torch.initial_seed()):
            found["torch"] = torch.get_rng_state()
        return found


@contextmanager
def watched_generators() -> Iterator[Generators]:
    """A context of imports in which it is noted what they do to random generators."""
    generators = Generators()
    seed = random.seed

    def noted_seed(*args: Any, **kwargs: Any) -> None:
        if any(value is not None for value in (*args[:1], kwargs.get("a"))):
            generators.note_python()
        seed(*args, **kwargs)

    random.seed = noted_seed
    finder = _WhenImported({"numpy.random": generators.note_numpy, "torch": generators.note_torch})
    sys.meta_path.insert(0, finder)
    try:
        yield generators
    finally:
        sys.meta_path.remove(finder)
        random.seed = seed
        generators.end()


class _WhenImported:
    """A finder of modules that calls a function with a module when that has been imported."""

    def __init__(self, calls: Mapping[str, Callable[[Any], None]]) -> None:
        self._calls = dict(calls)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        """Called by Python's import."""
        call = self._calls.pop(name, None)
        spec = None if call is None else importlib.util.find_spec(name)
        loader = None if spec is None else spec.loader
        if call is None or loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_call(module: Any) -> None:
            execute(module)
            call(module)

        loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
