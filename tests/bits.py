"""Digests of everything that the layer computes and writes, to hold two commits against each other, bit for bit.

    python tests/bits.py record FILE     at one commit
    python tests/bits.py compare FILE    at the other; exit status 1 where a bit differs

Results and gradients of every case of the yardstick on every register block of every instruction set that runs here,
AMX in the emulator (JITMOE_EMULATE=1), and the files of packed weights. The machine must be the same: sets that one of
the two could not run are named.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from helpers import bits, build_kernels, config_of, layer_of
from yardstick import CASES, make_inputs, results_of_layer

from jitmoe import MoELayer

GROUPED = ("small", "medium", "ragged_65")
"""Cases that are also computed with many rows, which are cut into groups and segments."""

OPTIONS = ({}, {"recompute": True}, {"batch_invariant": True})


def digests(isa: str) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of each result and file of ``isa``."""
    build_kernels(CASES, [isa])
    for case in CASES:
        inputs = make_inputs(case)
        for options in OPTIONS:
            layer = layer_of(inputs, isa, **options)
            for name, result in results_of_layer(layer, inputs).items():
                yield f"{isa}/{case}/{'+'.join(options) or 'plain'}/{name}", digest(bits(result).numpy().tobytes())
        yield f"{isa}/{case}/packed", packed_digest(layer)
    for case in CASES:
        if case.name in GROUPED:
            inputs = make_inputs(replace(case, tokens=700))
            for name, result in results_of_layer(layer_of(inputs, isa), inputs).items():
                yield f"{isa}/{case}/700 tokens/{name}", digest(bits(result).numpy().tobytes())


def packed_digest(layer: MoELayer) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed"
        layer.save_packed(path)
        return digest(path.read_bytes())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def usable() -> list[str]:
    from jitmoe.errors import IsaError
    from jitmoe.isa import ISAS

    found = []
    for isa in ISAS:
        try:
            inputs = make_inputs(CASES[0])
            MoELayer(config_of(CASES[0], isa), inputs.gate_proj, inputs.up_proj, inputs.down_proj)
            found.append(isa)
        except IsaError as error:
            print(f"{isa}: {error}", file=sys.stderr)
    return found


def main(command: str, file: str) -> int:
    torch.set_num_threads(2)
    found = dict(entry for isa in usable() for entry in digests(isa))
    path = Path(file)
    if command == "record":
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{len(found)} digests in {path}")
        return 0
    before = json.loads(path.read_text(encoding="utf-8"))
    other = sorted(name for name in before.keys() & found.keys() if before[name] != found[name])
    alone = sorted({name.split("/")[0] for name in before.keys() ^ found.keys()})
    print("\n".join(f"differs: {name}" for name in other))
    print(f"{len(before.keys() & found.keys())} compared, {len(other)} differ; on one side alone: {alone or 'none'}")
    return 1 if other or not found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
