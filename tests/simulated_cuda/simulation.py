"""A simulated CUDA device: tensors that compute on the CPU and say that they are on ``cuda:0``.

To be imported before torch computes anything, in a process of its own that has ``device.cpp`` as LD_PRELOAD: it changes
torch for good. Autograd, autocast and Python see a CUDA device. What a real one refuses, operands on two devices,
raises; what it does not show is recorded: operators that launch kernels, and where the host waits for the device.
Attention, which has one kernel on CUDA, is written out and counted as one. Speed, memory, streams and the rounding of
CUDA's kernels are not simulated.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
import torch.utils._foreach_utils
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
SIZE_DEPENDS_ON_DATA = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"_to_copy", "copy_"}
VIEWS = "view _unsafe_view _reshape_alias transpose t permute expand slice select diagonal unsqueeze squeeze unfold"
OTHER_VIEWS = "detach alias split split_with_sizes unbind as_strided lift_fresh resolve_conj set_ _local_scalar_dense"
ALLOCATIONS = "empty empty_like empty_strided new_empty new_empty_strided"
NO_KERNEL = {*VIEWS.split(), *OTHER_VIEWS.split(), *ALLOCATIONS.split()}


class Record:
    """What happened on the device since the record was last taken."""

    def __init__(self) -> None:
        self.launches, self.waits = Counter[str](), Counter[str]()
        self.paused = False

    def take(self) -> dict[str, Any]:
        """The number of operators that launched kernels, and how often the host waited, by reason and place."""
        taken = {"launches": self.launches.total(), "waits": dict(self.waits)}
        self.launches, self.waits = Counter[str](), Counter[str]()
        return taken

    def launch(self, operator: str) -> None:
        if not self.paused and operator not in NO_KERNEL:
            self.launches[operator] += 1

    def wait(self, reason: str) -> None:
        if not self.paused:
            stack = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
            own = [frame for frame in stack if "clusterns_ray/" in frame.filename]
            place = (own or stack)[-1]
            self.waits[f"{reason}, {'/'.join(place.filename.split('/')[-2:])}:{place.lineno}"] += 1

    @contextmanager
    def pause(self):
        """Record nothing of what is done within."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


record = Record()


class CudaTensor(torch.Tensor):
    """A tensor on the simulated device; its values are in ``on_cpu``."""

    on_cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor, requires_grad: bool = False) -> CudaTensor:
        with torch._C._DisableTorchDispatch():
            shape = torch.empty_strided(on_cpu.shape, on_cpu.stride(), dtype=on_cpu.dtype, device="meta")
            made = torch.Tensor._make_subclass(
                cls, shape, requires_grad, dispatch_device=True, device_for_backend_keys=CUDA
            )
        made.on_cpu = on_cpu
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        record.wait("it is written to a file")
        return self.on_cpu.detach().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.on_cpu})"

    def tolist(self) -> Any:
        record.wait("tolist")
        return self.on_cpu.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        record.wait("it is copied to the host")
        return self.on_cpu.detach().numpy()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> Any:
        return self.on_cpu.untyped_storage()


def is_cuda(value: Any) -> bool:
    return isinstance(value, CudaTensor) or (isinstance(value, torch.device) and value.type == "cuda")


def leaves_of(value: Any) -> list[Any]:
    """What lists, tuples and dictionaries hold; torch's own functions for it would take most of the time."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for item in value for leaf in leaves_of(item)]


def mapped(function: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, item) for item in value])
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return function(value)


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operator with operands or a result on the simulated device."""
    if func is torch.ops.prim.device.default:
        return CUDA
    name = func._schema.name.split("::")[1]
    leaves = leaves_of((args, kwargs))
    on_device = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
    on_host = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, CudaTensor)]
    device = kwargs.get("device")
    result_on_device = bool(on_device) if device is None else torch.device(device).type == "cuda"
    if name in COPIES:
        _record_copy(name, args, kwargs, result_on_device)
    elif on_device:
        for operand in on_host:
            if operand.dim() and name in INDEXING:
                record.wait("an index is on the host")
            elif operand.dim():
                raise RuntimeError(f"{func}: Expected all tensors to be on the same device (cuda:0 and cpu)")
        if name == "_local_scalar_dense":
            record.wait("a number is read")
        if name in SIZE_DEPENDS_ON_DATA or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            record.wait(f"the size of {name} depends on data")
        if name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in leaves_of(args[1]) if x is not None):
            record.wait("an index is boolean")

    def to_host(value: Any) -> Any:
        if isinstance(value, CudaTensor):
            return value.on_cpu
        return torch.device("cpu") if is_cuda(value) else value

    host_args, host_kwargs = mapped(to_host, (args, kwargs))
    if "pin_memory" in host_kwargs:
        host_kwargs["pin_memory"] = False
    result = func(*host_args, **host_kwargs)
    if result_on_device:
        record.launch(name)
    same = {id(tensor.on_cpu): tensor for tensor in on_device} | {id(tensor): tensor for tensor in on_host}

    def to_device(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, CudaTensor):
            return value
        if id(value) in same:
            return same[id(value)]
        return CudaTensor(value) if result_on_device else value

    with torch._C._DisableTorchDispatch():
        return mapped(to_device, result)


def _record_copy(name: str, args: tuple, kwargs: dict, result_on_device: bool) -> None:
    source = args[1] if name == "copy_" else args[0]
    to_device = isinstance(args[0], CudaTensor) if name == "copy_" else result_on_device
    waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
    if isinstance(source, CudaTensor) and not to_device:
        record.wait("it is copied to the host")
    elif to_device and not isinstance(source, CudaTensor) and (waits or not is_pinned(source)):
        record.wait("what is copied to the device is not pinned" if not is_pinned(source) else "a copy that blocks")


pinned: dict[int, torch.Tensor] = {}


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    return tensor.untyped_storage().data_ptr() in pinned


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    copy = tensor.clone()
    return pinned.setdefault(copy.untyped_storage().data_ptr(), copy)  # kept, so that no other tensor has its address


class Operators(TorchDispatchMode):
    """Sends operators that make tensors on the device, of which no operand is there, to :func:`run`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return run(func, args, kwargs) if any(map(is_cuda, leaves_of((args, kwargs)))) else func(*args, **kwargs)


class Functions(TorchFunctionMode):
    """Functions of torch that would ask for a device below the operators."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], CudaTensor):
            return _attention(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            with torch._C.DisableTorchFunction():
                made = func(*args, **{name: value for name, value in kwargs.items() if name != "device"})
            return made if isinstance(made, CudaTensor) else made.to(CUDA)
        return func(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    return _Attention.apply(query, key, value, attn_mask, dropout_p, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attn_mask, dropout_p, scale):
        with record.pause(), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            operands = [x.detach().requires_grad_() for x in (query, key, value)]
            q, k, v = operands
            scores = (q @ k.transpose(-2, -1)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
            if attn_mask is not None:
                boolean = attn_mask.dtype == torch.bool
                scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
            weights = torch.softmax(scores, -1).to(v.dtype)
            out = (torch.native_dropout(weights, dropout_p, True)[0] if dropout_p else weights) @ v
        record.launch("attention")
        ctx.graph = out, operands
        return out.detach()

    @staticmethod
    def backward(ctx, *gradients):
        with record.pause(), torch.autocast("cuda", enabled=False):
            wanted = torch.autograd.grad(*ctx.graph, gradients[0])
        record.launch("attention backward")
        return *wanted, None, None, None


class _NoGrad(torch.no_grad):
    """In place of inference_mode, in which tensors cannot be wrapped."""

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


@contextmanager
def simulated():
    """Within it, in this thread and in those that it starts, ``cuda`` is the simulated device."""
    start = threading.Thread.run

    def run_thread(thread: threading.Thread) -> None:
        with Operators(), Functions():
            start(thread)

    threading.Thread.run = run_thread
    try:
        with Operators(), Functions():
            yield
    finally:
        threading.Thread.run = start


torch.inference_mode = _NoGrad
torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin_memory, is_pinned
torch.utils._foreach_utils._foreach_supported_types.append(CudaTensor)
_compatible = torch._has_compatible_shallow_copy_type
torch._has_compatible_shallow_copy_type = lambda a, b: (
    isinstance(a, CudaTensor) == isinstance(b, CudaTensor) and _compatible(a, b)
)
for _name, _answer in {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "_is_in_bad_fork": False,
    "_lazy_init": None,
    "current_device": 0,
    "device_count": 1,
    "get_device_name": "simulated",
    "get_device_properties": type("Properties", (), {"multi_processor_count": 1, "name": "simulated"}),
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
    "manual_seed": None,
    "manual_seed_all": None,
    "synchronize": None,
    "empty_cache": None,
}.items():
    setattr(torch.cuda, _name, lambda *_, _answer=_answer, **__: _answer)
