"""DeepSpeed ZeRO inside a block: what it splits, it splits among the block's copies.

That is the optimizer state (stage 1), gradients (2) and weights (3), optionally in host memory. The
settings are a standard DeepSpeed JSON file, less what the run's configuration says already.
DeepSpeed sees one data-parallel group, the block's copies; the block's number never reaches it.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from dbdist.errors import ConfigError
from dbdist.parallel.engines import split
from dbdist.parallel.engines.engine import BuildOptimizer, Traffic, num_bytes
from dbdist.parallel.optimizer_state import State
from dbdist.parallel.topology import Topology
from dbdist.tensors import Named, buffers_of, complete, trained_of


class Zero:
    """A block under `deepspeed.initialize`; see `engine.Engine`."""

    def __init__(
        self,
        block: nn.Module,
        topology: Topology,
        build_optimizer: BuildOptimizer,
        settings: Mapping[str, Any],
    ) -> None:
        """settings: of `settings`."""
        deepspeed = _import_deepspeed(topology)
        copies = _Copies(topology)
        _confine(deepspeed, copies.get_data_parallel_group())
        self._block = block
        self._stage: int = settings["zero_optimization"]["stage"]
        self.split = split.ZERO[self._stage]
        self._trained = trained_of(block)
        _check_dtypes(self._trained, self._stage)
        self._client = build_optimizer(self._trained.values())
        # Before stage 3 takes the block apart.
        self._traffic = Traffic(topology, block, self.split)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=block,
                optimizer=self._client,
                config=dict(settings),
                mpu=copies,
                dist_init_required=False,
            )
        except ValidationError as error:  # before anything is built
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"parallel.deepspeed_config: DeepSpeed refuses {key}: {first['msg']}"
            ) from None
        self.module: nn.Module = self._engine
        self._zero: Any = self._engine.optimizer
        self._tools: Any = deepspeed.utils
        self._zero_module: Any = deepspeed.zero

    @property
    def optimizer(self) -> Optimizer:
        return self._zero

    @property
    def num_stepped_bytes(self) -> int:
        return num_bytes(self._flats())

    def accumulate(self, is_last: bool) -> AbstractContextManager[Any]:
        if is_last or self._stage > 1:
            self._traffic.count()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            # DeepSpeed has no call for counting the rows of a batch that are done; between batches
            # its step does that alone; held by test_clipping_takes_in_the_block_….
            self._engine.step()

    def zero_grad(self) -> None:
        """DeepSpeed frees gradients in its step."""

    def grad_norm(self) -> Tensor:
        if self._stage < 3:
            norms = torch.as_tensor(self._zero.scaled_global_norm()).reshape(1)
        else:
            norms = torch.stack([torch.as_tensor(n) for n in self._zero._get_norm_groups()])
        # DeepSpeed has no call for a norm that is not finite: it gives -1; held by
        # test_every_engine_skips_on_all_replicas_what_is_bad_on_one.
        return torch.linalg.vector_norm(torch.where(norms < 0, math.nan, norms))

    def step(self, scale: Tensor) -> None:
        # DeepSpeed has no call for a given scale: it divides by max(1, (its norm + 1e-6) /
        # clip_grad), which this clip_grad makes 1 / scale; held by test_clipping_takes_in_the_….
        factor = scale.item()
        self._zero.clip_grad = 0.0
        if factor < 1 or math.isnan(factor):
            self._zero.clip_grad = (self.grad_norm().item() + 1e-6) * factor
        self._engine.step()

    def skip(self) -> None:
        # DeepSpeed has no call for dropping a step: it drops one whose norm is not finite, so its
        # norm is for once; held by test_every_engine_skips_on_all_replicas_what_is_bad_on_one.
        name, infinite = "scaled_global_norm", torch.tensor(math.inf)
        norm: Any = infinite
        if self._stage == 3:
            name, norm = "_get_norm_groups", [infinite]
        setattr(self._zero, name, lambda: norm)
        try:
            self._engine.step()
        finally:
            delattr(self._zero, name)

    def shard(self, parameter: nn.Parameter) -> Tensor:
        assert self._stage < 3, "stage 3 keeps no average"
        return parameter.detach()

    def whole(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        return shard

    def cut(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        return whole

    def weights(self) -> dict[str, Tensor]:
        get = self._tools.safe_get_full_fp32_param
        # DeepSpeed has no call for weights that it does not train: stage 3 gathers them, lower ones
        # leave them whole; held by test_frozen_tied_and_buffered_tensors_go_through_every_engine.
        gathered = self._zero_module.GatheredParameters if self._stage == 3 else nullcontext
        found: dict[str, Tensor] = {}
        for name, p in self._block.named_parameters():
            if p.requires_grad:
                found[name] = get(p).to(p.dtype)
            else:
                with gathered(p):
                    found[name] = p.detach().clone()
        return found | buffers_of(self._block)

    @torch.no_grad()
    def set_weights(self, weights: Named) -> None:
        own = dict(self._block.named_parameters()) | buffers_of(self._block)
        for name, whole in complete(weights, own):
            tensor, value = own[name], whole.to(self._engine.device)
            is_trained = name in self._trained
            if hasattr(tensor, "ds_tensor"):
                shard = self._shard_of(tensor, value)
                if is_trained:
                    self._tools.safe_set_local_fp32_param(tensor, shard)
                getattr(tensor, "ds_tensor").copy_(shard)  # noqa: B009
            else:
                tensor.copy_(value)
                if is_trained:
                    self._tools.safe_set_full_fp32_param(tensor, value)

    def optimizer_state(self) -> State:
        flats = self._flats()
        if not all(self._client.state.get(flat) for flat in flats):
            return {}
        if self._stage < 3 and len(flats) > 1:
            # DeepSpeed has no call for linking several groups' states: it links them all after the
            # first group's first step, when the others have none; held by
            # test_frozen_tied_and_buffered_tensors_go_through_every_engine.
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
        first = self._client.state[flats[0]]
        kinds = [k for k, t in first.items() if torch.is_tensor(t) and t.shape == flats[0].shape]
        get = self._tools.safe_get_full_optimizer_state
        return {
            name: {"step": first["step"].clone(), **{kind: get(p, kind) for kind in kinds}}
            for name, p in self._trained.items()
        }

    @torch.no_grad()
    def set_optimizer_state(self, state: State) -> None:
        if not state:
            return
        any_state = next(iter(state.values()))
        kinds = [kind for kind in any_state if kind != "step"]
        for flat in self._flats():
            step = any_state["step"].to(flat.device if self._is_fused else "cpu", copy=True)
            own = {kind: torch.zeros_like(flat) for kind in kinds}
            self._client.state[flat].update({"step": step, **own})
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._trained.items():
            for kind in kinds:
                value = state[name][kind].to(self._engine.device, torch.float32)
                if self._stage < 3:
                    self._tools.safe_set_full_optimizer_state(parameter, value, kind)
                else:
                    shard = self._shard_of(parameter, value)
                    self._tools.safe_set_local_optimizer_state(parameter, shard, kind)

    @property
    def _is_fused(self) -> bool:
        return bool(self._client.defaults.get("fused"))

    def _flats(self) -> list[Tensor]:
        """The flat fp32 vectors that the optimizer steps on this rank."""
        if self._stage < 3:
            return self._zero.single_partition_of_fp32_groups
        return self._zero.fp32_partitioned_groups_flat

    def _shard_of(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's shard of a whole tensor in stage 3, which pads the last ones with zeros."""
        size, rank = parameter.ds_tensor.numel(), self._zero._get_param_partition_rank(parameter)
        flat = value.reshape(-1)[rank * size : (rank + 1) * size]
        return nn.functional.pad(flat, (0, size - flat.numel()))


def _check_dtypes(trained: Mapping[str, nn.Parameter], stage: int) -> None:
    """Raises ConfigError where DeepSpeed would fail an assertion without a name."""
    usual = Counter(p.dtype for p in trained.values()).most_common(1)[0][0]
    for name, parameter in trained.items():
        if stage == 3 and parameter.dtype != usual:
            raise ConfigError(
                f"DeepSpeed stage 3 trains parameters of one dtype: {name} is {parameter.dtype} "
                f"among {usual}; freeze it, or use stage 1 or 2, ddp or fsdp"
            )


class _Copies:
    """What DeepSpeed asks of a model-parallel unit.

    It sees a model in one piece and the block's copies. Its rank in the model is 0 on every block:
    with another one DeepSpeed silently stops clipping.
    """

    def __init__(self, topology: Topology) -> None:
        self._copies = topology.own_group()
        self._alone = topology.group_of_one()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._copies

    def get_data_parallel_world_size(self) -> int:
        return self._copies.size()

    def get_data_parallel_rank(self) -> int:
        return self._copies.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def _import_deepspeed(topology: Topology) -> Any:
    """DeepSpeed, quiet and for this rank's device."""
    topology.tell_environment()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed  # late: it takes seconds, and most runs do without

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if topology.device.type == "cpu":
        # DeepSpeed has no call for leaving out its own all-reduce within a host, which it compiles
        # for a minute at first use; held by the time that every engine's test takes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _confine(deepspeed: Any, copies: dist.ProcessGroup) -> None:
    """Makes this block's copies the whole world for DeepSpeed.

    Stage 3 compares and broadcasts its order of layers from rank 0 of the world: other blocks have
    other layers, and a dedicated coordinator has none and never answers.
    """
    # DeepSpeed has no call for another world than torch's: a subclass of its backend translates;
    # held by test_deepspeed_takes_a_blocks_copies_for_the_whole_world.
    deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)
    backend = deepspeed.comm.comm.cdb
    plain: Any = getattr(type(backend), "plain", type(backend))

    def is_world(group: Any) -> bool:
        return group is None or group is dist.group.WORLD

    class OneBlock(plain):
        def broadcast(
            self, tensor: Tensor, src: int, group: Any = None, async_op: bool = False
        ) -> Any:
            if is_world(group):
                group, src = copies, dist.get_global_rank(copies, src)
            return super().broadcast(tensor, src, group, async_op)

        def all_reduce(
            self,
            tensor: Tensor,
            op: Any = dist.ReduceOp.SUM,
            group: Any = None,
            async_op: bool = False,
        ) -> Any:
            group = copies if is_world(group) else group
            return super().all_reduce(tensor, op, group, async_op)

        def barrier(self, group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
            return super().barrier(copies if is_world(group) else group, async_op, device_ids)

        def get_rank(self, group: Any = None) -> int:
            return super().get_rank(copies if is_world(group) else group)

        def get_world_size(self, group: Any = None) -> int:
            return super().get_world_size(copies if is_world(group) else group)

    setattr(OneBlock, "plain", plain)  # noqa: B010
    backend.__class__ = OneBlock
