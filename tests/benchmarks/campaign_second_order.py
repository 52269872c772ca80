"""How often is second-order evidence wrong? Counts of verdicts over families of points whose kinds are known.

python -m tests.benchmarks.campaign_second_order [FAMILY …]
"""

import sys
import time
from collections import Counter

import torch

from lightning_mnn.landscape import KinkDistance, second_order_verdict
from tests.benchmarks.second_order_families import MINIMA, NON_MINIMA

MINIMUM = "differentiable_minimum"


def counted(family):
    """Verdicts on a family, their reasons, and products and gradients taken."""
    kinds, reasons, costs = Counter(), [], []
    for number, (surface, reference, *kinks) in enumerate(family()):
        found = second_order_verdict(surface, *(kinks or [KinkDistance()]), reference)
        kinds[str(found.kind)] += 1
        reasons.append((number, str(found.kind), found.reason))
        costs.append(found.products + found.gradients)
    return kinds, reasons, costs


def main(chosen):
    torch.set_num_threads(1)
    wrong = missed = minima = others = 0
    for families, right in ((NON_MINIMA, False), (MINIMA, True)):
        for name, family in families.items():
            if chosen and name not in chosen:
                continue
            start = time.perf_counter()
            kinds, reasons, costs = counted(family)
            total = sum(kinds.values())
            bad = [found for found in reasons if (found[1] == MINIMUM) is not right]
            minima, others = minima + right * total, others + (not right) * total
            missed, wrong = missed + right * len(bad), wrong + (not right) * len(bad)
            spent = time.perf_counter() - start
            each = sum(costs) / max(total, 1)
            print(f"{name}: {total} points, {dict(kinds)}; {each:.0f} derivatives each; {spent:.0f} s")
            for number, kind, reason in bad[: 12 if chosen else 3]:
                print(f"    {number}: {kind}: {reason[:230]}")
    print(f"non-minima: {others}, called minimum: {wrong}; minima: {minima}, recognised: {minima - missed}")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
