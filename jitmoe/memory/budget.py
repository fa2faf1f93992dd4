"""Holds a layer and its calls to ``memory_budget`` before anything is allocated."""

from functools import lru_cache

from jitmoe.config import MoEConfig
from jitmoe.errors import BudgetError
from jitmoe.memory.plan import MemoryPlan, plan_call, plan_layer
from jitmoe.plan.shapes import KernelPlan
from jitmoe.text import size


def check_layer(config: MoEConfig) -> None:
    """Refuse a layer whose weights and parameters alone exceed ``config.memory_budget``.

    Raises:
        BudgetError: they exceed it; the message has the table of the plan.
    """
    if config.memory_budget is not None:
        _refuse_over(plan_layer(config), "the weights and parameters of the layer take")


def check_call(kernels: KernelPlan, tokens: int, threads: int, training: bool, x_dtype: str) -> None:
    """Refuse a call that under the worst routing exceeds the budget of its config.

    The worst routing counts, whatever the routing at hand: a training run whose first call passes is not refused later.

    Args:
        kernels: those that the call may take, and the config.
        tokens: T.
        threads: of the call.
        training: forward and backward; else forward alone.
        x_dtype: "bfloat16" or "float32", of x.

    Raises:
        BudgetError: the call exceeds the budget; the message has the table of the plan.
    """
    if kernels.config.memory_budget is not None:
        _check_call(kernels, tokens, threads, training, x_dtype)


@lru_cache(maxsize=64)
def _check_call(kernels: KernelPlan, tokens: int, threads: int, training: bool, x_dtype: str) -> None:
    plan = plan_call(kernels, tokens, threads, training, x_dtype)
    _refuse_over(plan, f"the layer with this call of {tokens} tokens takes")


def _refuse_over(plan: MemoryPlan, what: str) -> None:
    budget = plan.config.memory_budget
    assert budget is not None
    if plan.nbytes > budget:
        raise BudgetError(
            f"{what} {plan.nbytes} bytes ({size(plan.nbytes)}), and memory_budget is {budget} ({size(budget)}): raise "
            "it, or take fewer tokens a call, recompute=True, a lower lora_rank or lora_dtype='bfloat16'. "
            f"print(jitmoe.MemoryPlan.of(config, tokens)) shows every buffer.\n{plan.summary()}"
        )
