"""The processes that train one model together: who they are, what they tell each other, how they share the work.

The only module that knows torch.distributed. A run of one process has ``Ranks()``, whose every answer is its own. The rest of
the program is written as for one process: ranks compute different rows of a step and agree on everything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from smalllm.config import UserError

PATIENCE = timedelta(minutes=5)
"""How long a rank waits in an exchange for one that is alive and silent. One that is dead is noticed at once."""
LONG_JOB = timedelta(days=2)
"""How long the others wait while one rank prepares data."""
LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|process ?group|timed out", re.IGNORECASE)
"""What torch says when an exchange fails; besides its DistError and kin, since gloo's errors have no class of their own."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its ranks."""


class RankLost(UserError):
    """Another rank is gone or hangs. The last checkpoint is good, and the run can be started again at once."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: to be tried again


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run: ``rank`` of ``world``, and ``local`` of the ``local_world`` on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    store: Any = None
    restarted: bool = False
    """Whether torchrun has started these ranks anew after it lost one."""

    @property
    def lone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this rank writes, speaks and decides."""
        return self.rank == 0

    # ── telling each other: every rank must come to these calls in the same order ──

    def sum(self, *values: float) -> list[float]:
        """Sums over ranks, the same bits everywhere."""
        return self._reduced(values, "SUM")

    def most(self, *values: float) -> list[float]:
        """The largest over ranks."""
        return self._reduced(values, "MAX")

    def tell(self, value: Any) -> Any:
        """What the first rank passes (JSON), at all ranks."""
        if self.lone:
            return value
        data = json.dumps(value).encode() if self.first else b""
        size = int(self.sum(len(data))[0])
        return json.loads(self._bytes(data, size))

    def gather(self, value: Any) -> list[Any]:
        """What every rank passes (JSON), in their order, at all ranks."""
        if self.lone:
            return [value]
        data = json.dumps(value).encode()
        sizes = [int(size) for size in self.sum(*(len(data) if rank == self.rank else 0 for rank in range(self.world)))]
        return [json.loads(self._bytes(data, size, source)) for source, size in enumerate(sizes)]

    def tensors(self, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The first rank's tensors (CPU) at all ranks, one after the other."""
        if self.lone:
            return dict(given or {})
        import torch.distributed as dist

        header = [(name, list(value.shape), str(value.dtype)) for name, value in (given or {}).items()]
        received = {}
        for name, shape, dtype in self.tell(header):
            here = (
                given[name].contiguous()
                if given
                else torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            )
            dist.broadcast(here, src=0)
            received[name] = here
        return received

    def must_agree(self, facts: Mapping[str, Any]) -> None:
        """UserError at every rank when a fact (JSON) is not the same at all of them; it gives both values."""
        everyone = self.gather(facts)
        for rank, theirs in enumerate(everyone):
            for name in everyone[0] | theirs:
                mine, other = everyone[0].get(name), theirs.get(name)
                if mine != other:
                    raise UserError(
                        f"the ranks of this run disagree about {name}: rank 0 has {mine!r}, rank {rank} has {other!r};"
                        " start all of them with the same command, version and data"
                    )

    @contextmanager
    def one_by_one(self, job: str) -> Iterator[None]:
        """Rank 0 goes first, then the first rank of every other machine, then the rest, who find the work done. For jobs of
        minutes, such as preparing data: nobody's patience counts meanwhile."""
        if self.lone:
            yield
            return
        if not self.first:
            self.store.wait([f"{job}/0"], LONG_JOB)
            if self.local:
                machine = self.rank - self.local
                self.store.wait([f"{job}/{machine}"], LONG_JOB)
        yield
        self.store.set(f"{job}/{self.rank}", b"done")

    @contextmanager
    def heard_once(self) -> Iterator[None]:
        """An error that several ranks have is told by one of them."""
        try:
            yield
        except UserError as error:
            key = type(error).__name__ if isinstance(error, RankLost) else str(error)
            with contextlib.suppress(Exception):  # the store may have gone with the first rank
                error.said = not self.lone and self.store.add(f"said/{key[:200]}", 1) > 1
            raise

    @contextmanager
    def watched(self) -> Iterator[None]:
        """An exchange that fails because another rank is gone becomes a RankLost."""
        try:
            yield
        except RuntimeError as error:
            if self.lone or not (type(error).__name__.startswith("Dist") or LOST.search(str(error))):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.world} lost the others ({_short(error)}); what ended them stands above. The last"
                " checkpoint is whole: the same command goes on from it"
            ) from error

    def _reduced(self, values: Sequence[float], operation: str) -> list[float]:
        if self.lone:
            return list(values)
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op=getattr(dist.ReduceOp, operation))
        return [float(number) for number in numbers.tolist()]

    def _bytes(self, data: bytes, size: int, source: int = 0) -> bytes:
        import torch.distributed as dist

        room = torch.frombuffer(bytearray(data if self.rank == source else size), dtype=torch.uint8)
        dist.broadcast(room, src=source)
        return room.numpy().tobytes()

    # ── sharing the work ──

    def shared(self, loss: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over ranks as they come out of its backward pass (DDP, Li et al.,
        arXiv 2006.15704). Parameters keep their names."""
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():  # newer versions call the argument otherwise
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(loss, broadcast_buffers=False, gradient_as_bucket_view=True)

    @contextmanager
    def micro_batch(self, loss: Any, model: Any, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged in the last one of a step only."""
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or not hasattr(loss, "no_sync") else loss.no_sync():
            yield

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Leave each rank a part of every parameter, gradient and optimizer state, and gather a block's weights when it
        computes (FSDP2, Zhao et al., arXiv 2304.11277)."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (self.world,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "hidden")

    def exchange(self, pieces: Tensor) -> Tensor:
        """Equal parts [n, ...] of every rank, one after the other: [n x world, ...]."""
        if self.lone:
            return pieces
        import torch.distributed as dist

        everyone = pieces.new_empty(pieces.shape[0] * self.world, *pieces.shape[1:])
        dist.all_gather_into_tensor(everyone, pieces.contiguous())
        return everyone

    def rows_of(self, parameter: Tensor) -> tuple[int, int]:
        """First and end of the rows of a parameter that this rank holds: all, or a chunk as ``torch.chunk`` makes them."""
        rows = parameter.shape[0]
        if not is_sharded(parameter):
            return 0, rows
        chunk = -(-rows // self.world)
        return min(self.rank * chunk, rows), min((self.rank + 1) * chunk, rows)

    def part_of(self, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's rows of a whole tensor, as ``like`` is divided; all of it where ``like`` is not."""
        return whole[slice(*self.rows_of(like))] if whole.dim() else whole

    def whole(self, part: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``part_of``; all ranks get it."""
        if not is_sharded(like) or not part.dim():
            return part
        from torch.distributed.tensor import DTensor

        assert isinstance(like, DTensor)
        together: Tensor = DTensor.from_local(
            part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
        ).full_tensor()
        return together


ALONE = Ranks()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a whole one, all."""
    part: Any = tensor  # a DTensor has to_local; naming it here would import what a lone run does not need
    return part.to_local() if is_sharded(tensor) else tensor


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights of a sharded model are whole at every rank meanwhile, so that ranks may do different things with it."""
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def is_first() -> bool:
    """Whether this process is the first rank of its run, or alone: the one who prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, as its environment variables tell; ``Ranks()`` when nobody did. Exchanges of tensors on
    the CPU go over gloo, of those on a GPU over NCCL. UserError when the others do not come."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if absent := [name for name in ENVIRONMENT if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']} is set and {', '.join(absent)} not: start ranks with torchrun or --gpus, or"
            " unset WORLD_SIZE"
        )
    numbers = {name: int(os.environ[name]) for name in ENVIRONMENT[:4]}
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers["LOCAL_RANK"] % torch.cuda.device_count())
    try:
        store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
        attempt = f"smalllm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{world}"
        store = PrefixStore(attempt, store)  # torchrun's store outlives the ranks, and holds what the dead ones said
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {numbers['RANK']} of {numbers['WORLD_SIZE']} cannot meet the others ({_short(error)}); check that every machine"
            " runs the same torchrun command and reaches the address of --rdzv-endpoint"
        ) from error
    try:
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        ranks = Ranks(rank, world, numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"], store, restarted)
        with ranks.heard_once(), ranks.watched():
            yield ranks
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()  # after an error the others may be gone, and waiting for them helps nobody


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", lines[0])[:160] if lines else type(error).__name__


# ── starting them ──


RESTARTS = 3
"""Times that ranks are started again after one was lost."""


def launch(
    first: Sequence[str], again: Sequence[str], processes: int, note: Callable[[str], None], restarts: int = RESTARTS
) -> int:
    """Run ``python -m smalllm FIRST`` as so many ranks on this machine under torchrun's elastic agent; the exit code of the
    first rank that ended badly, or 0. After the loss of a rank (a signal, an exchange that failed) all are started with the
    arguments ``again``, and the run goes on from its last checkpoint; after an error with a sentence they are not."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    for attempt in range(restarts + 1):
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"smalllm-{os.getpid()}-{attempt}", rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
        )  # fmt: skip
        began = time.monotonic()
        try:
            elastic_launch(config, sys.executable)("-m", "smalllm", *(again if attempt else first))
            return 0
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode
            if (
                code > 0 and code != RankLost.exit_code
            ) or attempt == restarts:  # it has said why, or was asked to stop
                return code if code > 0 else 128 - code
            note(
                f"rank {rank} ended with {_ending(code)} after {time.monotonic() - began:.0f} s; starting all {processes} again"
                f" ({attempt + 1} of {restarts} times)"
            )
    return 1


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _quiet() -> None:
    """The agent's own words are for those who debug it."""
    import logging

    for name in ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
