"""Which instruction set is chosen, and what is said when the best one cannot be."""

import logging

import pytest

from jitmoe import cpu
from jitmoe.config import ISAS
from jitmoe.errors import IsaError

AVX512 = frozenset(cpu.REQUIRED_FEATURES["avx512"])


@pytest.fixture
def pretend(monkeypatch):
    """Make the machine offer exactly these features."""

    def make(features):
        found = cpu.Cpu("Pretended CPU", frozenset(features))
        monkeypatch.setattr(cpu, "detect", lambda: found)
        cpu._report_fallback.cache_clear()

    yield make
    cpu._report_fallback.cache_clear()


def test_every_instruction_set_with_kernels_has_its_requirements():
    assert set(ISAS) <= set(cpu.REQUIRED_FEATURES)
    assert [isa for isa in cpu.REQUIRED_FEATURES if isa in ISAS] == list(ISAS), "both tables are best first"


def test_detect_describes_this_machine():
    found = cpu.detect()
    assert found.model
    assert any(capability.usable for capability in cpu.capabilities())


@pytest.mark.parametrize("missing", sorted(AVX512))
def test_auto_leaves_avx512_when_one_feature_is_missing(pretend, missing):
    pretend(AVX512 - {missing})
    assert cpu.resolve_isa("auto") == next(isa for isa in ISAS if missing not in cpu.REQUIRED_FEATURES[isa])
    with pytest.raises(IsaError, match=f"does not offer .*{missing}"):
        cpu.resolve_isa("avx512")


def test_auto_takes_the_best_set_that_has_kernels(pretend):
    pretend(AVX512)
    assert cpu.resolve_isa("auto") == "avx512"


def test_auto_falls_back_with_one_log_line(pretend, caplog):
    pretend(cpu.REQUIRED_FEATURES["amx"])
    with caplog.at_level(logging.INFO, logger="jitmoe"):
        chosen = {cpu.resolve_isa("auto") for _ in range(3)}
    unusable = [c.isa for c in cpu.capabilities() if not c.usable and not cpu.missing_features(c.isa, cpu.detect())]
    expected = ["amx"] if "amx" in unusable else []
    assert chosen == {next(isa for isa in ISAS if isa not in unusable)}
    assert [record.getMessage().split(" cannot")[0].split()[-1] for record in caplog.records] == expected


def test_a_cpu_without_vectors_runs_the_reference(pretend):
    pretend(())
    assert [c.isa for c in cpu.capabilities() if c.usable] == ["ref"]
    assert cpu.resolve_isa("auto") == "ref"
    assert cpu.resolve_isa("ref") == "ref"


def test_a_forced_set_without_kernels_says_so(pretend):
    pretend(cpu.REQUIRED_FEATURES["amx"])
    for isa in set(cpu.REQUIRED_FEATURES) - set(ISAS):
        with pytest.raises(IsaError, match=f"isa='{isa}' cannot be used: .*no kernels"):
            cpu.resolve_isa(isa)


def test_an_unknown_set_is_refused():
    with pytest.raises(IsaError, match="unknown instruction set 'sse9'; known are auto"):
        cpu.resolve_isa("sse9")
