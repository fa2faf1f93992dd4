"""Which tests hold which fault: rows 1 to 28 by name, kinds A to T by the marker ``field``. Run it to run them all.

python tests/faults.py [PYTEST OPTION ...]
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent

KINDS = "ABCDEFGHIJKLMNOPQRST"

ROWS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "live buffers share addresses",
        (
            "test_memory.py::test_placed_buffers_never_share_while_alive",
            "test_memory.py::test_a_shortened_lifetime_is_caught",
            "test_checked.py::test_every_life_shorter_by_a_step_is_caught",
            "test_checked.py::test_a_write_beside_a_buffer_hits_a_canary",
            "test_faults_values.py::test_nan_in_the_scratch",
        ),
    ),
    2: (
        "size explosion",
        (
            "test_budget.py::test_the_largest_sizes_do_not_overflow",
            "test_budget.py::TestLimit::test_the_ancestors_explosion_is_refused",
            "test_plan.py::test_impossible_sizes_are_refused_by_name_and_value",
        ),
    ),
    3: (
        "real out-of-memory",
        (
            "test_faults_memory.py::test_torch_has_no_memory_for_its_part",
            "test_faults_memory.py::test_the_system_has_no_memory",
        ),
    ),
    4: ("bad expert ids", ("test_faults_inputs.py::test_refused_by_name_and_clean",)),
    5: ("odd routings", ("test_faults_inputs.py::TestOddRoutings",)),
    6: (
        "NaN or infinity in one token",
        ("test_faults_values.py::test_a_value_that_is_not_finite_stays_with_its_token",),
    ),
    7: (
        "NaN in experts that nobody chose, and in padding",
        (
            "test_faults_values.py::test_nan_in_experts_that_nobody_chose",
            "test_faults_values.py::test_nan_in_the_padding_of_the_weights",
        ),
    ),
    8: ("odd routing weights", ("test_faults_inputs.py::TestOddRoutingWeights",)),
    9: (
        "ragged sizes",
        (
            "test_faults_memory.py::test_no_byte_beyond_any_tensor_is_touched",
            "test_faults_memory.py::test_packing_touches_nothing_beyond",
        ),
    ),
    10: (
        "odd tensors",
        (
            "test_faults_inputs.py::test_refused_by_name_and_clean",
            "test_faults_inputs.py::test_odd_strides_are_right",
            "test_faults_inputs.py::test_expanded_inputs",
            "test_layer.py::TestCopiesAndCasts",
        ),
    ),
    11: (
        "parameters changed behind our back",
        ("test_autograd.py::TestChangedBehindOurBack", "test_pack.py::TestSeal"),
    ),
    12: (
        "autograd in every order",
        (
            "test_autograd.py::test_backwards_in_reverse",
            "test_autograd.py::test_accumulation",
            "test_autograd.py::test_retained_graph_gives_the_same_twice",
            "test_autograd.py::test_checkpoint",
            "test_autograd.py::test_no_grad_saves_nothing",
            "test_autograd.py::test_hooks_see_gradients_and_can_change_them",
            "test_fuzz_calls.py::test_sequences_of_calls",
        ),
    ),
    13: (
        "saved x changed in place",
        ("test_autograd.py::TestChangedBehindOurBack::test_an_input_changed_before_backward_is_torchs_version_error",),
    ),
    14: (
        "compiler trouble",
        (
            "test_toolchain.py::TestMisbehaviour",
            "test_build.py::TestCompilerTrouble",
            "test_faults_cache.py::test_no_room_at_every_step_of_publishing",
            "test_faults_cache.py::test_a_real_disk_that_is_full",
        ),
    ),
    15: (
        "cold start of many processes",
        (
            "test_build.py::TestManyProcesses",
            "test_faults_cache.py::test_a_cold_start_of_real_processes",
            "test_faults_cache.py::test_who_compiles_is_killed_and_the_others_go_on",
        ),
    ),
    16: ("damaged cache", ("test_build.py::TestDamage",)),
    17: ("stale cache", ("test_build.py::TestKey",)),
    18: ("hostile cache directory", ("test_build.py::TestHostileDirectory", "test_field_cache.py::TestCodeOfOthers")),
    19: (
        "awkward cache directory",
        (
            "test_build.py::TestAwkwardDirectory",
            "test_faults_cache.py::test_a_real_file_system_that_keeps_nothing",
            "test_faults_cache.py::test_a_real_file_system_that_is_read_only_and_warm",
        ),
    ),
    20: (
        "an instruction set that cannot be used",
        (
            "test_cpu.py::test_auto_falls_back_with_one_log_line",
            "test_cpu.py::test_amx_that_only_the_feature_bits_promise",
            "test_cpu.py::test_a_kernel_that_cannot_run_is_not_loaded",
        ),
    ),
    21: ("small alternate signal stack", ("test_cpu.py::test_a_small_signal_stack_is_named",)),
    22: ("tile configuration lost", ("test_amx.py::test_another_library_loads_its_own_configuration",)),
    23: ("fork after first use", ("test_threads.py::TestFork",)),
    24: (
        "threads of every kind",
        (
            "test_threads.py::test_python_threads_in_one_layer",
            "test_threads.py::test_same_bits_in_a_fresh_process",
            "test_threads.py::test_same_bits_for_any_number_of_threads_and_every_run",
        ),
    ),
    25: (
        "interrupted in the middle",
        (
            "test_faults_memory.py::test_interrupted_at_every_phase",
            "test_interrupts.py::test_interrupted_at_random_moments",
        ),
    ),
    26: ("extreme numbers", ("test_faults_values.py::TestExtremes",)),
    27: (
        "NUMA restrictions",
        (
            "test_tensor_parallel.py::TestNodes",
            "test_tensor_parallel.py::test_topologies",
            "test_tensor_parallel.py::TestCut",
        ),
    ),
    28: (
        "killed while saving; loaded elsewhere",
        (
            "test_packed_file.py::TestSaving::test_killed_at_every_step_the_file_is_the_old_one_or_the_new_one",
            "test_layer.py::TestState",
        ),
    ),
}
"""What happens, and the tests that inject it; a row without tests is a gap."""

GAPS: dict[int, str] = {}
"""Why a row has no test."""


def marked() -> dict[str, list[str]]:
    """Tests and classes of tests that hold each kind, by the marker."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for path in sorted(TESTS.glob("test_*.py")):
        for name, kind in _marks(ast.parse(path.read_text(encoding="utf-8"))):
            found[kind].append(f"{path.name}::{name}")
    return found


def _marks(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.field":
                yield node.name, ast.literal_eval(decorator.args[0])


def summary() -> str:
    """How many rows and which kinds have tests."""
    rows, kinds = sum(bool(tests) for _, tests in ROWS.values()), marked()
    missing = [f"row {row}: {why}" for row, why in GAPS.items()] + [f"kind {k}" for k in KINDS if not kinds[k]]
    held = "".join(kind for kind in KINDS if kinds[kind])
    return f"{rows} of {len(ROWS)} rows, kinds {held}" + (f"; without a test: {'; '.join(missing)}" if missing else "")


def main(options: list[str]) -> int:
    """Run them all; the exit status of pytest."""
    import pytest

    tests = dict.fromkeys(test for _, held in ROWS.values() for test in held)
    tests |= dict.fromkeys(test for held in marked().values() for test in held)
    status = int(pytest.main([*options, *(str(TESTS / test) for test in tests)]))
    print(f"{'all pass' if status == 0 else 'FAILED'}: {summary()}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
