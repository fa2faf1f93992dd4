"""Several processes on torch.distributed (gloo): experts shared out, replicas compared, adapters gathered."""

from jitmoe.distributed.expert_parallel import ExpertParallel as ExpertParallel
from jitmoe.distributed.replicas import check_replicas as check_replicas
from jitmoe.distributed.state import load_lora_state_dict as load_lora_state_dict
from jitmoe.distributed.state import local_parameters as local_parameters
from jitmoe.distributed.state import lora_state_dict as lora_state_dict
from jitmoe.plan.exchange import share_of as share_of

__all__ = [
    "ExpertParallel",
    "check_replicas",
    "load_lora_state_dict",
    "local_parameters",
    "lora_state_dict",
    "share_of",
]
