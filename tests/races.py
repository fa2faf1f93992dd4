"""Passes of small layers on several threads under ThreadSanitizer: see `make races`.

The callbacks that gather rows and add them to tokens are compiled by Numba, and what they touch is not seen.
"""

import sys

import torch
from helpers import build_kernels, case_named, layer_of, usable_isas
from yardstick import make_inputs, results_of_layer

CASES = ("ragged_65", "small", "gpt_oss", "no_lora")


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    calls = 0
    for isa in ("ref", *usable_isas()[:1]):
        build_kernels([case_named(name) for name in CASES], [isa])
        for name in CASES:
            inputs = make_inputs(case_named(name))
            for recompute in (False, True):
                layer = layer_of(inputs, isa, recompute=recompute)
                for _ in range(5):
                    results_of_layer(layer, inputs)
                    calls += 1
    print(f"{calls} calls with backward on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
