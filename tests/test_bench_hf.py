"""What the bench says of transformers and PEFT: peers on the same values, and the memory of loading."""

import pytest
import torch

from jitmoe.bench.loading import WAYS, loading_table, measure_loading
from jitmoe.bench.peers import PEERS
from jitmoe.oracle.data import batches, make_base, make_lora
from jitmoe.oracle.workloads import Workload

pytest.importorskip("peft", reason="peft is not installed: pip install 'jitmoe[hf]'")


def test_peft_and_peft_on_jitmoe_compute_the_same_of_the_same_values() -> None:
    workload = Workload("small", experts=5, hidden=48, intermediate=32, top_k=2, rank=4, tokens=16)
    generator = torch.Generator().manual_seed(0)
    base = make_base(workload, generator)
    lora = make_lora(workload, generator)
    batch = next(batches(workload, generator))
    results = []
    for name in ("peft", "peft-jitmoe"):
        contender = PEERS[name].build(workload, base, lora, 2.0)
        assert contender.comparable == "peft" and len(contender.parameters) == 4
        results.append(contender.call(batch.x, batch.topk_ids, batch.weights).double())
    difference = (results[0] - results[1]).norm() / results[0].norm()
    bare = PEERS["transformers"].build(workload, base, None, 0.0).call(batch.x, batch.topk_ids, batch.weights)
    assert difference < 0.02 < (results[0] - bare.double()).norm() / results[0].norm(), "LoRA has a say"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_loading_two_gigabytes_takes_a_tenth_more_at_most() -> None:
    found = {loading.way: loading for loading in measure_loading(2.0, torch.get_num_threads())}
    assert list(found) == list(WAYS)
    print(loading_table(list(found.values())))
    for way in ("jitmoe.hf.from_pretrained", "jitmoe.hf.from_pretrained, packed= mapped"):
        assert found[way].peak <= 1.1 * found[way].model, way
