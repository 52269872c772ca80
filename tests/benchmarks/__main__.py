"""``make bench [ARGS="training"]``: run the benchmarks, or those named."""

import importlib
import pkgutil
import sys
from pathlib import Path

names = sys.argv[1:] or sorted(
    m.name.removeprefix("bench_") for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name != "__main__"
)
for name in names:
    print(f"== {name}")
    importlib.import_module(f"tests.benchmarks.bench_{name}").main()
