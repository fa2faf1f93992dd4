"""Which instruction set is chosen, and what is said when the best one cannot be."""

import errno
import logging
import re
import signal

import pytest

from jitmoe.errors import IsaError
from jitmoe.isa import ISAS
from jitmoe.jit import capability, cpu, kernels, programs
from jitmoe.plan.shapes import Shape

AVX512 = frozenset(ISAS["avx512"].features)


@pytest.fixture
def pretend(monkeypatch):
    """Make the machine offer exactly these features."""

    def make(features):
        found = cpu.Cpu("Pretended CPU", frozenset(features))
        monkeypatch.setattr(cpu, "detect", lambda: found)
        capability._report_fallback.cache_clear()

    monkeypatch.delenv("JITMOE_EMULATE", raising=False)
    yield make
    capability._report_fallback.cache_clear()


def test_detect_describes_this_machine():
    found = cpu.detect()
    assert found.model
    assert any(found.usable for found in capability.capabilities())


@pytest.mark.parametrize("missing", sorted(AVX512))
def test_auto_leaves_avx512_when_one_feature_is_missing(pretend, missing):
    pretend(AVX512 - {missing})
    assert capability.resolve_isa("auto") == next(
        isa for isa, found in ISAS.items() if missing not in found.features and not found.tiles
    )
    with pytest.raises(IsaError, match=f"does not offer .*{missing}"):
        capability.resolve_isa("avx512")


def test_auto_takes_the_best_set_that_has_kernels(pretend):
    pretend(AVX512)
    assert capability.resolve_isa("auto") == "avx512"


@pytest.mark.parametrize(
    "fault",
    [
        "CPUID reports no palette of tiles",
        programs.tile_permission_fault(errno.ENOSPC),
        programs.tile_permission_fault(errno.EPERM),
        programs.tile_test_fault(signal.SIGILL),
        programs.tile_test_fault(-1),
    ],
)
def test_auto_falls_back_with_one_log_line(pretend, monkeypatch, caplog, fault):
    pretend(ISAS["amx"].features)
    monkeypatch.setattr(programs, "check_tiles", lambda isa: fault)
    with caplog.at_level(logging.INFO, logger="jitmoe"):
        assert {capability.resolve_isa("auto") for _ in range(3)} == {"avx512_bf16"}
    assert [record.getMessage() for record in caplog.records] == [f"using avx512_bf16: amx cannot be used ({fault})"]
    with pytest.raises(IsaError, match="isa='amx' cannot be used: " + re.escape(fault)):
        capability.resolve_isa("amx")


def test_all_checks_passed(pretend, monkeypatch):
    pretend(ISAS["amx"].features)
    monkeypatch.setattr(programs, "check_tiles", lambda isa: None)
    assert capability.resolve_isa("auto") == capability.describe("amx") == "amx"


def test_a_small_signal_stack_is_named():
    assert "sigaltstack" in programs.tile_permission_fault(errno.ENOSPC)
    assert programs.tile_permission_fault(0) is None and programs.tile_test_fault(0) is None


@pytest.mark.skipif(not cpu.missing_features("amx", cpu.detect()), reason="this CPU has AMX")
def test_amx_that_only_the_feature_bits_promise(pretend):
    """The real check, on a CPU without tiles."""
    pretend(ISAS["amx"].features)
    with pytest.raises(IsaError, match="isa='amx' cannot be used: CPUID reports no palette of tiles"):
        capability.resolve_isa("amx")


@pytest.mark.isa("avx2")
def test_a_kernel_that_cannot_run_is_not_loaded(pretend):
    pretend(())
    with pytest.raises(IsaError, match="isa='avx2' cannot be used"):
        kernels.load(Shape("avx2", 32, 32, 0, 6, False))


class TestEmulation:
    """What is said and chosen; the emulator itself runs in test_amx.py."""

    @pytest.fixture(autouse=True)
    def no_handler(self, monkeypatch):
        monkeypatch.setattr(programs, "install_emulator", lambda _: None)

    def test_emulated_features_count_as_there(self, pretend, monkeypatch):
        pretend(AVX512)
        monkeypatch.setenv("JITMOE_EMULATE", "1")
        found = {entry.isa: entry for entry in capability.capabilities()}
        for isa in ("amx", "avx512_bf16"):
            assert found[isa].usable and found[isa].emulated
            assert found[isa].reason.startswith("emulated (JITMOE_EMULATE=1)")
            assert capability.describe(isa) == f"{isa} (emulated)"
        assert capability.describe("avx512") == "avx512"
        assert capability.resolve_isa("auto") == "amx"

    def test_what_the_cpu_has_is_not_emulated(self, pretend, monkeypatch):
        pretend(ISAS["avx512_bf16"].features)
        monkeypatch.setenv("JITMOE_EMULATE", "1")
        assert capability.describe("avx512_bf16") == "avx512_bf16"

    def test_amx_that_the_kernel_refuses_is_emulated(self, pretend, monkeypatch):
        pretend(ISAS["amx"].features)
        monkeypatch.setattr(programs, "check_tiles", lambda isa: programs.tile_permission_fault(errno.ENOSPC))
        monkeypatch.setenv("JITMOE_EMULATE", "1")
        assert capability.describe("amx") == "amx (emulated)"

    @pytest.mark.parametrize(("features", "emulated"), [((), []), (ISAS["avx2"].features, ["amx_avx2"])])
    def test_vectors_are_not_emulated(self, pretend, monkeypatch, features, emulated):
        pretend(features)
        monkeypatch.setenv("JITMOE_EMULATE", "1")
        assert [found.isa for found in capability.capabilities() if found.emulated] == emulated

    @pytest.mark.parametrize("off", ["", "0"])
    def test_off(self, pretend, monkeypatch, off):
        pretend(AVX512)
        monkeypatch.setenv("JITMOE_EMULATE", off)
        with pytest.raises(IsaError, match="does not offer avx512bf16"):
            capability.resolve_isa("avx512_bf16")

    def test_another_emulator_that_is_not_there(self, pretend, monkeypatch, tmp_path):
        monkeypatch.undo()
        pretend(AVX512)
        monkeypatch.setenv("JITMOE_EMULATE", str(tmp_path / "missing.so"))
        with pytest.raises(IsaError, match=r"does not offer .*, and the emulator .*missing.so cannot be loaded"):
            capability.resolve_isa("amx")
        assert capability.resolve_isa("auto") == "avx512"


def test_a_cpu_without_vectors_runs_the_reference(pretend):
    pretend(())
    assert [c.isa for c in capability.capabilities() if c.usable] == ["ref"]
    assert capability.resolve_isa("auto") == "ref"
    assert capability.resolve_isa("ref") == "ref"


def test_an_unknown_set_is_refused():
    with pytest.raises(IsaError, match="unknown instruction set 'sse9'; known are auto"):
        capability.resolve_isa("sse9")
