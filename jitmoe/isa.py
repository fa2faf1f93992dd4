"""The one table of instruction sets: what each needs of a CPU, of the compiler and of the plan."""

from dataclasses import dataclass
from typing import Literal

IsaName = Literal["amx", "avx512_bf16", "avx512", "amx_avx2", "avx2", "ref"]
IsaChoice = Literal["auto", IsaName]

EMULATED_FEATURES = frozenset({"avx512bf16", "amx-tile", "amx-bf16"})
"""Features whose instructions the emulator executes, where ``JITMOE_EMULATE`` turns it on."""

TUNING_FLAGS = {"avx512f": "-mprefer-vector-width=512"}
"""Compiler flags that a feature brings beside its own."""


@dataclass(frozen=True)
class InstructionSet:
    """One set of kernels.

    Attributes:
        name: as in ``enum class Isa`` of shape.hpp.
        features: CPU features that its kernels use, as LLVM and the compiler flags spell them.
        m_steps: rows of a register block, ascending. Many rows fill the registers with accumulators (14 x 2 of 32
            vectors on AVX-512, 6 x 2 of 16 on AVX2). Few rows leave registers free to expand the weights in, which
            saves an expanded panel; VDPBF16PS needs no expansion. On AMX a block is one or two tiles.
        operand: dtype of a panel, the left operand of the products.
        column_step: a panel's columns are padded to a multiple of this: 32 for tiles, 2 for pairs.
        row_limits: for each kernel but the last, mean rows per active expert beyond which the next one is taken.
        few_rows: another set, whose smallest register block computes calls with the fewest rows.
        tiles: the products are those of tiles, LoRA's among them.
    """

    name: IsaName
    features: tuple[str, ...]
    m_steps: tuple[int, ...]
    operand: Literal["float32", "bfloat16"] = "float32"
    column_step: int = 1
    row_limits: tuple[int, ...] = ()
    few_rows: IsaName | None = None
    tiles: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Compiler flags, named one by one, never ``-march=native``: the same text gives the same code everywhere."""
        tuning = (flag for feature, flag in TUNING_FLAGS.items() if feature in self.features)
        return (*(f"-m{feature}" for feature in self.features), *tuning)

    @property
    def emulated_features(self) -> frozenset[str]:
        """Features of this set that the emulator executes."""
        return EMULATED_FEATURES & set(self.features)


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")

ISAS: dict[str, InstructionSet] = {
    isa.name: isa
    for isa in (
        InstructionSet(
            "amx",
            features=(*_AVX512, "avx512bf16", "amx-tile", "amx-bf16"),
            m_steps=(16, 32),
            operand="bfloat16",
            column_step=32,
            # Few rows wait for the weights to be read; AVX-512 reads them as fast and needs no tiles. With a mean of
            # up to 8 rows, hardly an expert fills more than one tile: blocks of 32 would be half empty.
            row_limits=(4, 8),
            few_rows="avx512",
            tiles=True,
        ),
        InstructionSet(
            "avx512_bf16",
            features=(*_AVX512, "avx512bf16"),
            m_steps=(14,),
            operand="bfloat16",
            column_step=2,
        ),
        InstructionSet("avx512", features=_AVX512, m_steps=(4, 14), row_limits=(4,)),
        # The same kernels beside the vectors of AVX2: so the emulator executes tiles on CPUs without AVX-512.
        InstructionSet(
            "amx_avx2",
            features=(*_AVX2, "amx-tile", "amx-bf16"),
            m_steps=(16, 32),
            operand="bfloat16",
            column_step=32,
            row_limits=(4, 8),
            few_rows="avx2",
            tiles=True,
        ),
        InstructionSet("avx2", features=_AVX2, m_steps=(3, 6), row_limits=(4,)),
        InstructionSet("ref", features=(), m_steps=(4, 14), row_limits=(4,)),
    )
}
"""Instruction sets with kernels by name, best first; ``ref`` is scalar C++ that any CPU runs."""
