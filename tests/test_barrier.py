"""The barrier between the steps of a pass: nobody goes on before all are there, spinning or asleep, and all wake up."""

from pathlib import Path

import pytest
from helpers import run_python
from test_back_end import compile_text

DRIVER = """
#include <unistd.h>

#include "barrier.hpp"

// Rounds in which a thread found that another one was not there yet; every `pause`-th round one thread comes late, so
// that the others fall asleep.
extern "C" long jitmoe_rounds(int threads, long rounds, long pause) {
  jitmoe::Barrier barrier;
  std::atomic<long> reached[64] = {}, wrong{0};
#pragma omp parallel num_threads(threads)
  {
    const int own = omp_get_thread_num();
    for (long round = 1; round <= rounds; ++round) {
      if (round % pause == 0 && round / pause % threads == own) usleep(300);
      reached[own].store(round, std::memory_order_relaxed);
      barrier.wait();
      for (int other = 0; other < omp_get_num_threads(); ++other)
        if (reached[other].load(std::memory_order_relaxed) < round) wrong.fetch_add(1);
    }
  }
  return wrong.load();
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_text(DRIVER, "ref", tmp_path_factory.mktemp("barrier"))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_all_are_there(library: Path, threads: int) -> None:
    """In a process of its own, which is ended if it hangs."""
    program = f"""
import ctypes
rounds = ctypes.CDLL({str(library)!r}).jitmoe_rounds
rounds.argtypes, rounds.restype = [ctypes.c_int, ctypes.c_long, ctypes.c_long], ctypes.c_long
print(rounds({threads}, 3000, 50))
"""
    assert run_python(program, timeout=60).strip() == "0"
