"""torch.distributed's collectives over MPI: a Python ProcessGroup whose calls run, in order, in one thread per process.

Tensors' memory is handed to MPI as it is, without pickling. Types that MPI cannot add (bfloat16, float16, float8) are reduced in
float32 and rounded once, bool as uint8; what is only moved (broadcast, gather, scatter) travels as bytes, whatever its type.
GPU memory goes to MPI directly where the library was built for CUDA, else through pinned host memory (not measured).
"""

# mypy: disable-error-code="override,assignment"
# torch declares overloads with other arguments, which it never calls on a group that is written in Python.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from gptoughts.engine.distributed.mpi_worker import MPIWork, Worker
from gptoughts.errors import RunError

BACKEND = "mpi4py"
"""Name of the backend in torch; "mpi" is the one that only builds of torch from source have."""
OPERATIONS = {
    "SUM": "SUM", "AVG": "SUM", "PREMUL_SUM": "SUM", "MAX": "MAX", "MIN": "MIN",
    "PRODUCT": "PROD", "BAND": "BAND", "BOR": "BOR", "BXOR": "BXOR",
}  # fmt: skip
"""torch's reductions, and MPI's that they are made of: AVG divides the sum, PREMUL_SUM multiplies before."""


class Buffers:
    """Hand tensors to MPI: on the host or in memory that MPI can read, contiguous, and of a type that MPI knows."""

    def __init__(self, mpi: Any, cuda_aware: bool) -> None:
        self._mpi, self._aware = mpi, cuda_aware
        self._types = {
            torch.float32: mpi.FLOAT, torch.float64: mpi.DOUBLE, torch.uint8: mpi.UINT8_T, torch.int8: mpi.INT8_T,
            torch.int16: mpi.INT16_T, torch.int32: mpi.INT32_T, torch.int64: mpi.INT64_T,
        }  # fmt: skip

    def numbers(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself, or a copy in a place and type that MPI can reduce."""
        if tensor.dtype in self._types:
            return self.readable(tensor)
        if tensor.dtype == torch.bool:
            return self.readable(tensor.to(torch.uint8))
        if tensor.is_floating_point():
            return self.readable(tensor.to(torch.float32))
        raise RunError(f"--collectives mpi: no reduction of {tensor.dtype}", fix="--collectives gloo")

    def readable(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself, or a contiguous copy where MPI can read it."""
        if tensor.is_cuda and not self._aware:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        return tensor.contiguous()

    def counted(self, tensor: Tensor) -> list[Any]:
        """Return memory and type of elements, for reductions; MPI takes all of it."""
        return [self._memory(tensor), self._types[tensor.dtype]]

    def raw(self, tensor: Tensor) -> list[Any]:
        """Return memory and type as bytes, for what is only moved."""
        return [self._memory(tensor), self._mpi.BYTE]

    def _memory(self, tensor: Tensor) -> Any:
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()  # MPI does not wait for conversions
        return self._mpi.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def overlap(first: Tensor, second: Tensor) -> bool:
    """Return whether two contiguous tensors share memory, which MPI forbids for input and output."""
    begins = [one.data_ptr() for one in (first, second)]
    ends = [one.data_ptr() + one.numel() * one.element_size() for one in (first, second)]
    return max(begins) < min(ends)


def return_to(target: Tensor, used: Tensor) -> None:
    """Copy what MPI wrote into the tensor, if it wrote into a copy."""
    if used.data_ptr() != target.data_ptr() or used.dtype != target.dtype or not target.is_contiguous():
        target.copy_(used.view(target.shape))


def each(function: Callable[..., None], *columns: Sequence[Any]) -> None:
    """Call the function with each row of the columns."""
    for row in zip(*columns, strict=True):
        function(*row)


class MPIGroup(dist.ProcessGroup):
    """A process group over one MPI communicator. torch calls the methods by these names; `opts` are torch's records."""

    def __init__(self, mpi: Any, comm: Any, worker: Worker, name: str, cuda_aware: bool) -> None:
        rank, size = comm.Get_rank(), comm.Get_size()  # MPI: this process's rank in the group, and the group's size
        super().__init__(rank, size)  # type: ignore[call-arg]  # the constructor of Python groups
        self._mpi, self._comm, self._worker, self._name, self._desc = mpi, comm, worker, name, ""
        self._rank, self._size = rank, size
        self._buffers = Buffers(mpi, cuda_aware)

    # --- what torch asks of a group

    def getBackendName(self) -> str:
        """Return the name of the backend."""
        return BACKEND

    def getRank(self) -> int:
        """Return this process's rank in the group."""
        return self._rank

    def getSize(self) -> int:
        """Return the number of ranks."""
        return self._size

    def getGroupName(self) -> str:
        """Return the name that torch finds the group by."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """Take the name that torch gives."""
        self._name = name

    def getGroupDesc(self) -> str:
        """Return the description of the group."""
        return self._desc

    def setGroupDesc(self, description: str) -> None:
        """Take the description that torch gives."""
        self._desc = description

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)
    rank, size, name = getRank, getSize, getBackendName

    def shutdown(self) -> None:
        """Nothing to do: communicators end with MPI, when the process does."""

    # --- reductions

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> MPIWork:
        """Reduce each tensor over the ranks, in place."""
        return self._queue("all_reduce", tensors, lambda: each(lambda tensor: self._allreduce(tensor, opts), tensors))

    allreduce_coalesced = allreduce

    def _allreduce(self, tensor: Tensor, opts: Any) -> None:
        used, operation, finish = self._prepared(tensor, opts)
        # MPI: reduces the tensor over all ranks; every rank has the result
        self._comm.Allreduce(self._mpi.IN_PLACE, self._buffers.counted(used), op=operation)
        finish(used, tensor)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> MPIWork:
        """Reduce each tensor to the root rank, in place there."""
        return self._queue("reduce", tensors, lambda: each(lambda tensor: self._reduce(tensor, opts), tensors))

    def _reduce(self, tensor: Tensor, opts: Any) -> None:
        used, operation, finish = self._prepared(tensor, opts)
        buffer = self._buffers.counted(used)
        first = opts.rootRank == self._rank
        # MPI: reduces the tensor over all ranks; only the root has the result
        self._comm.Reduce(self._mpi.IN_PLACE if first else buffer, buffer if first else None, operation, opts.rootRank)
        if first:
            finish(used, tensor)

    def reduce_scatter_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> MPIWork:
        """Reduce each input over the ranks; each rank gets its part, in `outputs`."""
        return self._queue(
            "reduce_scatter", outputs, lambda: each(lambda out, given: self._reduce_scatter(out, given, opts), outputs, inputs)
        )

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> MPIWork:
        """Reduce the input over the ranks; each rank gets its part."""
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> MPIWork:
        """Reduce a list of inputs, one per rank; each rank gets its own."""
        return self.reduce_scatter_single_coalesced(outputs, [torch.stack(list(parts)) for parts in inputs], opts)

    def _reduce_scatter(self, output: Tensor, given: Tensor, opts: Any) -> None:
        used, operation, finish = self._prepared(given, opts)
        direct = output.dtype == used.dtype and output.device == used.device and output.is_contiguous()
        result = output if direct and not overlap(output, used) else used.new_empty(output.numel())
        # MPI: reduces the input over all ranks; each rank gets the block of its number
        self._comm.Reduce_scatter_block(self._buffers.counted(used), self._buffers.counted(result), op=operation)
        finish(result, output)

    def _prepared(self, tensor: Tensor, opts: Any) -> tuple[Tensor, Any, Callable[[Tensor, Tensor], None]]:
        """Return the tensor as MPI takes it, MPI's operation, and what brings the result into the target."""
        given: Any = dist.ReduceOp(dist.ReduceOp.SUM) if opts is None else opts.reduceOp
        kind, used, size = given.op.name, self._buffers.numbers(tensor), self._size
        if kind not in OPERATIONS or (kind in ("AVG", "PREMUL_SUM") and not tensor.is_floating_point()):
            raise RunError(f"--collectives mpi: no {kind} of {tensor.dtype}", fix="--collectives gloo")
        if kind == "PREMUL_SUM":
            used = used * given.__getstate__()[1]  # the factor, which torch shows nowhere else

        def finish(result: Tensor, target: Tensor) -> None:
            if kind == "AVG":
                result.div_(size)
            return_to(target, result)

        return used, getattr(self._mpi, OPERATIONS[kind]), finish

    # --- movements

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> MPIWork:
        """Copy each tensor of the root rank to all."""
        return self._queue("broadcast", tensors, lambda: each(lambda tensor: self._broadcast(tensor, opts.rootRank), tensors))

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        used = self._buffers.readable(tensor)
        self._comm.Bcast(self._buffers.raw(used), root)  # MPI: copies the tensor of the root to all ranks
        return_to(tensor, used)

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> MPIWork:
        """Concatenate each input of all ranks, in `outputs`."""
        return self._queue("all_gather", outputs, lambda: each(self._all_gather, outputs, inputs))

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> MPIWork:
        """Concatenate the inputs of all ranks."""
        return self.all_gather_single_coalesced([output], [given], opts)

    _allgather_base = all_gather_single

    def _all_gather(self, output: Tensor, given: Tensor) -> None:
        used, source = self._buffers.readable(output), self._buffers.readable(given)
        own = used.data_ptr() + self._rank * source.numel() * source.element_size()
        if source.data_ptr() != own and overlap(used, source):
            source = source.clone()
        # FSDP2 gathers from the rank's own part of the output.
        sent = self._mpi.IN_PLACE if source.data_ptr() == own else self._buffers.raw(source)
        self._comm.Allgather(sent, self._buffers.raw(used))  # MPI: concatenates the inputs of all ranks, on all ranks
        return_to(output, used)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> MPIWork:
        """Gather the input of every rank into a list of tensors."""

        def job() -> None:
            for parts, given in zip(outputs, inputs, strict=True):
                whole = given.new_empty(self._size, *given.shape)
                self._all_gather(whole, given)
                for part, row in zip(parts, whole, strict=True):
                    part.copy_(row)

        return self._queue("all_gather", inputs, job, [list(parts) for parts in outputs])

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MPIWork:
        """Gather the input of every rank into a list of tensors of the root rank."""

        def job() -> None:
            source, root = self._buffers.readable(inputs[0]), opts.rootRank
            whole = source.new_empty(self._size, *source.shape) if root == self._rank else None
            target = None if whole is None else self._buffers.raw(whole)
            self._comm.Gather(self._buffers.raw(source), target, root)  # MPI: concatenates the inputs of all ranks on the root
            for part, row in zip(outputs[0], whole, strict=True) if whole is not None else ():
                part.copy_(row)

        return self._queue("gather", inputs, job)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> MPIWork:
        """Give each rank its tensor of the root's list."""

        def job() -> None:
            root, used = opts.rootRank, self._buffers.readable(outputs[0])
            whole = self._buffers.readable(torch.stack(list(inputs[0]))) if root == self._rank else None
            source = None if whole is None else self._buffers.raw(whole)
            self._comm.Scatter(source, self._buffers.raw(used), root)  # MPI: each rank gets its part of the root's tensor
            return_to(outputs[0], used)

        return self._queue("scatter", outputs, job)

    def all_to_all_single(
        self, output: Tensor, given: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> MPIWork:
        """Send each rank its rows of `given`; without sizes all parts are equal."""

        def job() -> None:
            used, source = self._buffers.readable(output), self._buffers.readable(given)
            source = source.clone() if overlap(used, source) else source
            sides = [(source, input_sizes), (used, output_sizes)]
            sent, got = ([self._buffers.raw(part)[0], self._bytes(part, rows), self._mpi.BYTE] for part, rows in sides)
            self._comm.Alltoallv(sent, got)  # MPI: every rank sends every rank its part
            return_to(output, used)

        return self._queue("all_to_all", [output], job)

    alltoall_base = all_to_all_single

    def _bytes(self, tensor: Tensor, rows: Sequence[int]) -> list[int]:
        """Return the bytes of each rank's part."""
        total = tensor.numel() * tensor.element_size()
        if not rows:
            return [total // self._size] * self._size
        return [total // max(1, tensor.shape[0]) * count for count in rows]

    def barrier(self, opts: Any = None) -> MPIWork:
        """Wait for every rank."""
        return self._queue("barrier", [], self._comm.Barrier)  # MPI: returns when every rank has come here

    # --- the thread

    def _queue(self, name: str, tensors: Sequence[Tensor], job: Callable[[], Any], result: Any = None) -> MPIWork:
        """Queue a collective that writes `tensors`, after what their GPU has to do before. Profilers see `mpi:name`."""
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        ready = torch.cuda.current_stream(device).record_event() if device else None
        value = list(tensors) if result is None else result

        def run() -> Any:
            with torch.no_grad():
                if ready is not None:
                    ready.synchronize()
                job()
                if device is not None:
                    torch.cuda.current_stream(device).synchronize()  # copies back end before anybody waits no longer
            return value

        with record_function(f"mpi:{name}"):
            return MPIWork(self._worker.run(run, device))
