"""One exception for each reason a call can be refused.

Every class also derives from the built-in exception that a PyTorch user would expect, so
``except ValueError`` keeps working. Messages name what is wrong, where, and what to do.
"""


class JitmoeError(Exception):
    """Base of every exception that jitmoe raises on purpose."""


class ConfigError(JitmoeError, ValueError):
    """A field of :class:`~jitmoe.config.MoEConfig` has a value that makes no layer."""


class SettingError(JitmoeError, ValueError):
    """A ``JITMOE_*`` environment variable holds something its type does not allow."""


class InputError(JitmoeError, ValueError):
    """A tensor given to the layer has the wrong shape, device, layout or values."""


class InputTypeError(JitmoeError, TypeError):
    """A tensor given to the layer has a dtype that the contract does not name."""


class TransformError(JitmoeError, NotImplementedError):
    """A transform of torch.func that the experts cannot be put through."""


class WeightsChangedError(JitmoeError, RuntimeError):
    """The frozen, packed base weights were written to after the layer was built."""


class UnsupportedExpertsError(JitmoeError, NotImplementedError):
    """An experts module of a model computes something that jitmoe has no kernel for, or does not know."""


class FrozenWeightsError(JitmoeError, RuntimeError):
    """Base weights have requires_grad=True, and a backward pass would have left them without a gradient."""


class AdapterError(JitmoeError, ValueError):
    """LoRA is in a form that jitmoe does not compute, or a file of it is damaged or has another layout."""


class CheckpointError(JitmoeError, ValueError):
    """A checkpoint lacks tensors, or holds ones that jitmoe cannot read."""


class DataError(JitmoeError, ValueError):
    """A row of training data cannot be used, or the file cannot be read. Names file and line."""


class TrainError(JitmoeError, RuntimeError):
    """Training cannot begin or go on: a folder lacks something, is in use, or the loss is not finite."""


class PackedFileError(JitmoeError, OSError):
    """A file of packed weights is missing, damaged, of another layout or of another layer, or cannot be written."""


class CaptureError(JitmoeError, OSError):
    """A call cannot be captured in a file, or a file holds no call that can be replayed."""


class PlanError(JitmoeError, RuntimeError):
    """A plan contradicts itself: two live buffers share addresses, or a size is impossible."""


class BudgetError(JitmoeError, MemoryError):
    """A layer or a call would hold more than ``memory_budget`` allows. Nothing was allocated for it."""


class IsaError(JitmoeError, RuntimeError):
    """An instruction set was asked for that this machine cannot execute."""


class BuildError(JitmoeError, RuntimeError):
    """A kernel could not be compiled. Names the command, the first error line and the log."""


class CacheSecurityError(JitmoeError, RuntimeError):
    """The kernel cache could be written by somebody else, so nothing is loaded from it."""


class KernelError(JitmoeError, RuntimeError):
    """A compiled kernel, or a file of them, is of another version of jitmoe or damaged, or lacks a field of a call."""


class BenchError(JitmoeError, RuntimeError):
    """A benchmark would have measured something other than what it says."""


class TraceError(JitmoeError, RuntimeError):
    """The report of a trace cannot be drawn: no call was traced, or matplotlib is missing."""
