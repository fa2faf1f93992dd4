"""One exception for each reason a call can be refused.

Every class also derives from the built-in exception that a PyTorch user would expect, so
``except ValueError`` keeps working. Messages name what is wrong, where, and what to do.
"""

from typing import ClassVar


class JitmoeError(Exception):
    """Base of every exception that jitmoe raises on purpose.

    Attributes:
        cure: what a user does about it; the message says it for the case at hand.
    """

    cure: ClassVar[str] = ""


class ConfigError(JitmoeError, ValueError):
    """A field of :class:`~jitmoe.config.MoEConfig` has a value that makes no layer."""

    cure = "Change the field that the message names; it says what is allowed."


class SettingError(JitmoeError, ValueError):
    """A ``JITMOE_*`` environment variable holds something its type does not allow."""

    cure = "Unset the variable or give it a value of its type: see the environment variables."


class InputError(JitmoeError, ValueError):
    """A tensor given to the layer has the wrong shape, device, layout or values."""

    cure = (
        "Pass what the message asks for. A DTensor or a wrapper becomes a plain tensor with "
        "`to_local()`, `full_tensor()` or `dequantize()`."
    )


class InputTypeError(JitmoeError, TypeError):
    """A tensor given to the layer has a dtype that the contract does not name."""

    cure = (
        "Convert the tensor with `.to(...)`: x is bfloat16 or float32, ids are int64 or int32, weights "
        "float32 or bfloat16."
    )


class TransformError(JitmoeError, NotImplementedError):
    """A transform of torch.func that the experts cannot be put through."""

    cure = "Call the layer outside of the transform, or use `torch.compile` and autograd, which it supports."


class WeightsChangedError(JitmoeError, RuntimeError):
    """The frozen, packed base weights were written to after the layer was built."""

    cure = "Packed weights are frozen. Load new ones with `load_state_dict()`, or pack again."


class UnsupportedExpertsError(JitmoeError, NotImplementedError):
    """An experts module of a model computes something that jitmoe has no kernel for, or does not know."""

    cure = "`jitmoe.hf.register(unsupported='eager')` leaves such experts to transformers, with a warning."


class FrozenWeightsError(JitmoeError, RuntimeError):
    """Base weights have requires_grad=True, and a backward pass would have left them without a gradient."""

    cure = "Call `requires_grad_(False)` on the base weights; LoRA alone is trained."


class AdapterError(JitmoeError, ValueError):
    """LoRA is in a form that jitmoe does not compute, or a file of it is damaged or has another layout."""

    cure = "The message names the tensor or field and what the layout has no place for; another `--to` may have one."


class CheckpointError(JitmoeError, ValueError):
    """A checkpoint lacks tensors, or holds ones that jitmoe cannot read."""

    cure = "Complete the folder: the message names the tensors that are missing or cannot be read."


class CheckpointWriteError(JitmoeError, OSError):
    """A checkpoint cannot be written: its folder exists, the disk has too little space, or the system refuses."""

    cure = "Name a folder that does not exist yet, on a disk with room for what the message says."


class DataError(JitmoeError, ValueError):
    """A row of training data cannot be used, or the file cannot be read. Names file and line."""

    cure = "Mend the row: the message names file and line."


class TrainError(JitmoeError, RuntimeError):
    """Training cannot begin or go on: a folder lacks something, is in use, or the loss is not finite."""

    cure = "Do what the message says; `jitmoe train --resume` goes on from the newest whole checkpoint."


class PackedFileError(JitmoeError, OSError):
    """A file of packed weights is missing, damaged, of another layout or of another layer, or cannot be written."""

    cure = "The file is damaged or of another version of the layout: write it again with `layer.save_packed()`."


class CaptureError(JitmoeError, OSError):
    """A call cannot be captured in a file, or a file holds no call that can be replayed."""

    cure = "Capture the call again with this version, into a folder with room."


class PlanError(JitmoeError, RuntimeError):
    """A plan contradicts itself: two live buffers share addresses, or a size is impossible."""

    cure = "A fault in jitmoe: please report it with `jitmoe doctor --json` and the message."


class BudgetError(JitmoeError, MemoryError):
    """A layer or a call would hold more than ``memory_budget`` allows. Nothing was allocated for it."""

    cure = (
        "Its table shows what is large; `jitmoe estimate` says what recomputing, fewer tokens or smaller "
        "types would save."
    )


class IsaError(JitmoeError, RuntimeError):
    """An instruction set was asked for that this machine cannot execute."""

    cure = '`jitmoe doctor` says which sets this machine executes, and why not the others; `isa="auto"` takes the best.'


class BuildError(JitmoeError, RuntimeError):
    """A kernel could not be compiled. Names the command, the first error line and the log."""

    cure = (
        "The message has the command, the first error and the path of the log. `JITMOE_CXX` names "
        "another compiler; without one, `jitmoe cache import` brings kernels."
    )


class CacheSecurityError(JitmoeError, RuntimeError):
    """The kernel cache could be written by somebody else, so nothing is loaded from it."""

    cure = (
        "The message says which directory is in the hands of others and how to repair it; or set "
        "`JITMOE_CACHE_DIR` to a private one."
    )


class KernelError(JitmoeError, RuntimeError):
    """A compiled kernel, or a file of them, is of another version of jitmoe or damaged, or lacks a field of a call."""

    cure = "`jitmoe cache clear`, and the next use compiles again; a file of kernels is exported again by this version."


class BenchError(JitmoeError, RuntimeError):
    """A benchmark would have measured something other than what it says."""

    cure = "Change what the message names, so that the figure is that of what was asked for."


class PeerError(JitmoeError, RuntimeError):
    """Another process of a group ended, is too slow, refused its part of a call, or was set up for another layer."""

    cure = "Read the first error of that rank: it says why. A slow one needs a longer timeout of the group."


class ReplicaError(JitmoeError, RuntimeError):
    """Processes that should hold the same parameters hold different ones. Names tensors and ranks."""

    cure = "Load the same state on all ranks, and step the same optimizer on all of them."


class TraceError(JitmoeError, RuntimeError):
    """A layer in parts cannot be traced, or a report cannot be drawn: no call was traced, or matplotlib is missing."""

    cure = "Call the layer inside the `with` block, with tensor_parallel=1, and `pip install matplotlib` for pictures."
