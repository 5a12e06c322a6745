"""Runs a real pipeline on tensors without data, and records what memory it would take and give back on a GPU.

Tensors that depend on a weight are on the meta device: a shape and no data. Small tensors that do not (token ids,
masks, timesteps) stay real, so that code which reads values works unchanged.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from pytest_vram.measure.allocator import MIB, ROUNDING, Event, rounded

aten = torch.ops.aten
CPU, META = torch.device("cpu"), torch.device("meta")
KEEP_VALUES = 1 << 20  # tensors of at most so many elements, made of no weight, stay real
# What PyTorch takes for cuBLAS at the first matrix product (CublasHandlePool.cpp): :4096:8 KiB from Hopper on, and
# :4096:2:16:8 KiB on older GPUs.
CUBLAS_WORKSPACE = 32 * MIB
OLDER_CUBLAS_WORKSPACE = (4096 * 2 + 16 * 8) << 10
HOPPER = 9.0
MATMULS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._scaled_mm.default}
MATMULS |= {aten.linear.default, aten.matmul.default}  # which are taken apart before, but in `KERNELS`
# Matrix products that come as one operator and call none of those above; rows of the first argument are multiplied.
OTHER_MATMULS = {
    "aten::_weight_int4pack_mm",
    "bitsandbytes::int8_mixed_scaled_mm",
    "bitsandbytes::int8_scaled_mm",
}
SHAPE_FROM_VALUES = {"aten::nonzero", "aten::masked_select", "aten::unique_consecutive", "aten::_unique2"}

FUSED_4BIT_ROWS = 4  # _GEMM_4BIT_CUSTOM_FLOOR_M of bitsandbytes 0.50; of some shapes it fuses up to 1536

Block = tuple[int, int]  # number, bytes


def as_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same shape, strides and dtype, with a storage of its own."""
    made: torch.Tensor = aten.empty_strided.default(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
    return made


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else as_meta(tensor)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _format(tensor: torch.Tensor) -> torch.memory_format:
    """The memory format that its strides suggest, as ATen's `suggest_memory_format` has it."""
    suggested: torch.memory_format = torch._prims_common.suggest_memory_format(tensor)
    return suggested


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, torch.Tensor))


def _substitute(change: Callable[[torch.Tensor], torch.Tensor], args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """The arguments with `change` applied to their tensors and devices set to meta; they nest one list deep."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(v) for v in value]
        if isinstance(value, torch.Tensor):
            return change(value)
        return META if isinstance(value, torch.device) else value

    return [one(a) for a in args], {k: one(v) for k, v in kwargs.items()}


def _with_strides_kept(func: Any, args: Any, out: Any) -> Any:
    """An elementwise operator on one tensor and numbers keeps the tensor's strides; on meta PyTorch makes the stride of
    a dimension of size 1 anew. Convolutions read their memory format from the strides: on a GPU what follows the VAE's
    mid block is NCHW for a batch of 1, and NHWC for more images.
    """
    if torch.Tag.pointwise not in func.tags or not isinstance(out, torch.Tensor):
        return out
    operands = [t for t in _tensors_in(args) if t.dim()]
    if len(operands) != 1 or operands[0].shape != out.shape:
        return out
    strides = operands[0].stride()
    changed = {size for size, old, new in zip(out.shape, strides, out.stride(), strict=True) if old != new}
    if changed != {1}:
        return out
    return aten.empty_strided.default(out.shape, strides, dtype=out.dtype, device=META)


class Trace(TorchDispatchMode):
    """Executes operators on meta and real tensors mixed, and records the births and deaths of storages as events."""

    def __init__(self, capability: float = HOPPER, gpu: int = 0) -> None:
        """`capability` is the GPU's compute capability; `gpu` is which one it is, where a case takes several."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.capability, self.gpu = capability, gpu
        self._cublas_workspace = CUBLAS_WORKSPACE if capability >= HOPPER else OLDER_CUBLAS_WORKSPACE
        self.events: list[Event] = []
        self.count = self.live = self.peak = 0
        self._storages: dict[int, Any] = {}
        self._blocks: dict[int, Block] = {}
        self._on_host: set[int] = set()
        self._shapes: dict[Any, Any] = {}
        self._used_cublas = False
        self._host = False
        self.flops: dict[str, float] = {}  # floating-point operations of matrix products and convolutions, by phase
        self._phase = "load"

    # What is recorded

    def malloc(self, size: int) -> Block:
        """A block of `size` bytes is taken."""
        self.count += 1
        self.events.append((self.count, size))
        self.live += rounded(size, ROUNDING)
        self.peak = max(self.peak, self.live)
        return self.count, size

    def free(self, block: Block) -> None:
        """A block is given back."""
        self.events.append((-block[0], 0))
        self.live -= rounded(block[1], ROUNDING)

    def empty_cache(self) -> None:
        """The pipeline empties the allocator's cache."""
        self.events.append((0, "empty_cache"))

    @contextmanager
    def side_stream(self, number: int) -> Iterator[None]:
        """What comes meanwhile comes by this stream, beside the one that computes."""
        self.events.append((0, f"stream:{number}"))
        try:
            yield
        finally:
            self.events.append((0, "stream:0"))

    def enter(self, phase: str) -> None:
        """A phase begins."""
        self.events.append((0, f"enter:{phase}"))
        self._phase = phase

    def compute(self, multiplications: float) -> None:
        """So many pairs of numbers are multiplied and added."""
        self.flops[self._phase] = self.flops.get(self._phase, 0.0) + 2 * multiplications

    @contextmanager
    def host(self) -> Iterator[None]:
        """What is computed meanwhile is computed on the host: what it makes takes nothing on the GPU."""
        self._host = True
        try:
            yield
        finally:
            self._host = False

    def on_host(self, tensor: torch.Tensor) -> None:
        """From now on this tensor's storage takes nothing on the GPU, nor does a copy of it."""
        key = self._known(tensor)
        self._on_host.add(key)
        if block := self._blocks.pop(key, None):
            self.free(block)

    def arrive(self, tensor: torch.Tensor) -> None:
        """This tensor's storage comes to the GPU."""
        key = self._known(tensor)
        self._on_host.discard(key)
        if key not in self._blocks and tensor.untyped_storage().nbytes():
            self._blocks[key] = self.malloc(tensor.untyped_storage().nbytes())

    def track(self, tensor: torch.Tensor) -> None:
        """A storage that is not known yet is on the GPU from now until it is collected."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self.arrive(tensor)

    def _known(self, tensor: torch.Tensor) -> int:
        """The key of the tensor's storage, whose block goes when it is collected."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata

        def dead(_: Any) -> None:
            del self._storages[key]
            self._on_host.discard(key)
            if block := self._blocks.pop(key, None):
                self.free(block)

        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, dead)
        return key

    # How operators run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a quantized tensor holds nothing itself: it calls operators on its parts
        if (kernel := KERNELS.get(func._schema.name)) and any(t.is_meta for t in _tensors_in(args)):
            with self:
                out = kernel(*args, **(kwargs or {}))
            if func._schema.name in OTHER_MATMULS:
                product = next(_tensors_in(out if isinstance(out, tuple) else (out,)))
                self.compute(product.numel() * args[0].shape[-1])
            return out
        if self._host:
            out = self._run(func, args, kwargs or {})
            for tensor in _tensors_in((out,)):
                if tensor.untyped_storage()._cdata not in self._storages:
                    self.on_host(tensor)
            return out
        if func is aten.convolution.default and any(t.is_meta for t in _tensors_in(args)):
            return self._convolution(func, args, kwargs or {})
        out = self._run(func, args, kwargs or {})
        if func is aten._to_copy.default and args[0].untyped_storage()._cdata in self._on_host:
            self.on_host(out)
        for tensor in _tensors_in((out,)):
            self.track(tensor)
        if func in MATMULS:
            factor = args[1] if func in (aten.addmm.default, aten.baddbmm.default) else args[0]
            self.compute(out.numel() * factor.shape[-1])
            if not self._used_cublas:
                self._used_cublas = True
                self.malloc(self._cublas_workspace)
        return out

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """As ATen calls cuDNN: input, output and weight dense and of one memory format, in this order, copied where
        they are not; then an optional workspace: copies of the three in NHWC, unless they are in it already.
        """
        sample, weight = _on_meta(args[0]), _on_meta(args[1])
        nhwc = {4: torch.channels_last, 5: torch.channels_last_3d}.get(sample.dim(), torch.contiguous_format)
        wanted = nhwc if nhwc in (_format(sample), _format(weight)) else torch.contiguous_format
        copies = [] if sample.is_contiguous(memory_format=wanted) else [self.malloc(_nbytes(sample))]
        inferred = self._run(func, args, kwargs)
        out: torch.Tensor = inferred
        transposed = args[6]
        self.compute((sample if transposed else out).numel() * weight[0].numel())
        if not inferred.is_contiguous(memory_format=wanted):
            out = aten.empty.memory_format(inferred.shape, dtype=inferred.dtype, device=META, memory_format=wanted)
        self.track(out)
        if not weight.is_contiguous(memory_format=wanted):
            copies.append(self.malloc(_nbytes(weight)))
        if wanted is torch.contiguous_format and any(size > 1 for size in weight.shape[2:]):  # 1x1 is a matrix product
            copies_of_two = _nbytes(sample) + _nbytes(weight) + ROUNDING
            smaller = (copies_of_two,) if out.dtype == torch.float32 else ()
            self.events.append((0, (copies_of_two + _nbytes(out), *smaller)))
        for copy in copies:
            self.free(copy)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(_tensors_in((*args, *kwargs.values())))
        if not any(t.is_meta for t in tensors):
            return self._run_real(func, args, kwargs)
        name = func._schema.name
        if name == "aten::_local_scalar_dense":  # .item(): isnan().any() and the like
            return False if tensors[0].dtype == torch.bool else 0.0 if tensors[0].is_floating_point() else 0
        if name == "aten::equal":
            return args[0].shape == args[1].shape
        if name == "aten::bincount":  # routing of a mixture of experts: one expert gets every token
            return torch.tensor([args[0].numel()])
        if name in SHAPE_FROM_VALUES:
            args, kwargs = _substitute(lambda t: torch.ones(t.shape, dtype=t.dtype), args, kwargs)
            return func(*args, **kwargs)
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor):  # in place: no storage is born
            return kwargs.get("out", args[0])
        if name == "aten::index":
            return func(_on_meta(args[0]), self._indices(args[1]))
        if kwargs.get("device") or not all(t.is_meta for t in tensors):  # mixed: the values no longer matter
            args, kwargs = _substitute(_on_meta, args, kwargs)
        return self._infer(func, args, kwargs)

    @staticmethod
    def _indices(indices: Any) -> list[Any]:
        """A mask selects as many elements as it really has, or all of them where it is not known."""
        out: list[Any] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                mask = torch.ones(index.shape, dtype=torch.bool) if index.is_meta else index
                out += [as_meta(i) for i in mask.nonzero(as_tuple=True)]
            else:
                out.append(index if index is None else _on_meta(index))
        return out

    def _run_real(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Real in, or nothing: real out, unless it is large (noise, masks of N by N tokens, tables of positions)."""
        if not func.is_view and not func._schema.is_mutable:
            try:
                out = self._infer(func, *_substitute(as_meta, args, kwargs))
            except (NotImplementedError, RuntimeError):
                out = None  # the shape depends on the values
            if isinstance(out, torch.Tensor) and out.numel() > KEEP_VALUES:
                return out
        return func(*args, **({**kwargs, "device": CPU} if kwargs.get("device") else kwargs))

    def _infer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result on meta. PyTorch's Python meta kernels take 0.2 ms: layers repeat, so shapes are remembered."""

        def key(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.shape, value.stride(), value.dtype
            if isinstance(value, (list, tuple)):
                return tuple(key(v) for v in value)
            return type(value), value

        known = None
        if not (func.is_view or func._schema.is_mutable):
            known = (func, *map(key, args), *((k, key(v)) for k, v in kwargs.items()))
        if self._shapes.get(known):
            kind, shapes = self._shapes[known]
            made = [aten.empty_strided.default(s, st, dtype=d, device=META) for s, st, d in shapes]
            return made[0] if kind is torch.Tensor else kind(made)
        out = _with_strides_kept(func, args, func(*args, **kwargs))
        outs = out if isinstance(out, (list, tuple)) else [out]
        given = {t.untyped_storage()._cdata for t in _tensors_in(args)}
        if known and all(
            isinstance(t, torch.Tensor)
            and t.untyped_storage()._cdata not in given
            and t.untyped_storage().nbytes() == _nbytes(t)
            for t in outs
        ):
            self._shapes[known] = type(out), [(t.shape, t.stride(), t.dtype) for t in outs]
        return out


# Kernels that come as one operator, as what they allocate; where a file is named, its operators are repeated.


def _safe_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """aten/src/ATen/native/SoftMax.cpp: a mask of all scores says which rows have nothing to attend to."""
    out = torch.softmax(scores, dim, dtype)
    scores.eq(-torch.inf)
    return out


def _int4_matmul(sample: torch.Tensor, weight: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """PyTorch's own function for meta tensors wants fake ones (2.13)."""
    return sample.new_empty(sample.shape[0], scales.shape[1])


def _bnb_4bit_matmul(
    sample: torch.Tensor, weight: Any, shape: list[int], absmax: Any, block: int, kind: str, bias: Any = None, **_: Any
) -> torch.Tensor:
    """bitsandbytes/backends/cuda/ops.py: many rows are multiplied with the weight in their own dtype."""
    if sample.numel() // sample.shape[-1] <= FUSED_4BIT_ROWS:
        return sample.new_empty((*sample.shape[:-1], shape[0]))
    return torch.nn.functional.linear(sample, sample.new_empty(shape), bias)


def _bnb_int8_quantize(sample: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor | None, ...]:
    """bitsandbytes/backends/cuda/ops.py, where no activation is an outlier."""
    scales = sample.new_empty(sample.numel() // sample.shape[-1], dtype=torch.float32)
    quantized = torch.empty_like(sample, dtype=torch.int8)
    if not threshold:
        return quantized, scales, None
    sample.abs() >= threshold  # noqa: B015
    return quantized, scales, sample.new_empty(0, dtype=torch.int64)


def _bnb_int8_matmul(
    sample: torch.Tensor, weight: torch.Tensor, rows: Any, columns: Any, bias: Any = None, dtype: Any = None
) -> torch.Tensor:
    """bitsandbytes/backends/default/ops.py and cuda/ops.py: the product in int32, in float16, and in `dtype`."""
    product = sample.new_empty((*sample.shape[:-1], weight.shape[0]), dtype=torch.int32)
    return torch.empty_like(product, dtype=torch.float16).to(dtype or torch.float16)


def _bnb_int8_mixed_matmul(sample: torch.Tensor, quantized: torch.Tensor, weight: torch.Tensor, *_: Any) -> Any:
    return _bnb_int8_matmul(quantized, weight, None, None, dtype=sample.dtype), sample.new_empty(0)


def _quanto_quantize(base: torch.Tensor, dtype: torch.dtype, axis: int | None, scale: torch.Tensor) -> torch.Tensor:
    """optimum/quanto/library/quantize.py"""
    data = base / scale
    data = torch.round(data)
    return torch.clamp(data, min=-128, max=127).to(dtype)


def _quanto_matmul(sample: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """optimum/quanto/library/qbytes_mm.py"""
    weight = scales * weight
    return torch.matmul(sample, weight.t())


KERNELS: dict[str, Callable[..., Any]] = {
    "aten::_safe_softmax": _safe_softmax,
    "aten::_weight_int4pack_mm": _int4_matmul,
    "bitsandbytes::gemm_4bit": _bnb_4bit_matmul,
    "bitsandbytes::int8_mixed_scaled_mm": _bnb_int8_mixed_matmul,
    "bitsandbytes::int8_scaled_mm": _bnb_int8_matmul,
    "bitsandbytes::int8_vectorwise_quant": _bnb_int8_quantize,
    "quanto::qbytes_mm": _quanto_matmul,
    "quanto::quantize_symmetric": _quanto_quantize,
}


def _is_fused(operands: Iterable[Any]) -> bool:
    """Whether attention may take a fused kernel: not under `sdpa_kernel(SDPBackend.MATH)`, nor where the last dimension
    of an operand or the mask is not dense (sdp_utils_cpp.h), as it is not of the position biases of T5."""
    cuda = torch.backends.cuda
    enabled = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
    return bool(enabled) and all(tensor.stride(-1) == 1 for tensor in _tensors_in(operands))


class OneDevice(TorchFunctionMode):
    """The pipeline sees one device: a move is a cast or nothing. Attention takes a fused kernel's memory.

    `compute` is told of what a fused kernel multiplies."""

    compute: Callable[[float], None] = staticmethod(lambda multiplications: None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            rest = [a.dtype if isinstance(a, torch.Tensor) else a for a in (*args[1:], kwargs.get("other"))]
            dtype = next((a for a in rest if isinstance(a, torch.dtype)), kwargs.get("dtype"))
            kwargs = {k: v for k, v in kwargs.items() if k in ("copy", "memory_format")}
            if dtype is not None or kwargs:
                return func(args[0], dtype=dtype or args[0].dtype, **kwargs)
            return args[0]
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return args[0]
        if func in (torch.tensor, torch.as_tensor):  # on meta it would drop the values
            kwargs.pop("device", None)
        if func in (torch.Tensor.numpy, torch.Tensor.tolist) and args[0].is_meta:
            return func(torch.zeros(args[0].shape, dtype=args[0].dtype))
        if func is torch.nn.functional.scaled_dot_product_attention:
            if _is_fused((*args, *kwargs.values())):
                return self._attention(*args, **kwargs)
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        *batch, heads, length, _channels = query.shape  # fused kernels write (batch, length, heads, channels)
        self.compute(query.numel() * key.shape[-2] * 2)
        shape = (*batch, length, heads, value.shape[-1])
        return torch.empty(shape, dtype=query.dtype, device=META).transpose(-2, -3)
