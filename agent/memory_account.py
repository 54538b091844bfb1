"""Compares the memory of every load with what was predicted for it, and remembers the difference for the next one."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import structlog
from sollol.correction import CPU_ID, MemoryCorrection, layout_of
from sollol.errors import SollolError
from sollol.memory import device_shares
from sollol.report import CoordinatorPlan, DeviceKind, DeviceShare, Model, ModelShape

from agent.learned import Learned
from agent.supervisor.comparison import correction_between
from agent.supervisor.memory_log import Logged

log = structlog.get_logger(__name__)


class MemoryAccount:
    """Told of every coordinator that serves.

    Args:
        model_of: The model with a name; raises SollolError for others.
        learned: Gets what was found.
    """

    def __init__(self, model_of: Callable[[str], Model], learned: Learned) -> None:
        self._model_of, self._learned = model_of, learned

    async def loaded(self, plan: CoordinatorPlan, logged: Logged) -> None:
        """A model was loaded as planned, and the engine's log says this of it.

        The plan's figures may have been corrected themselves. What is learned is the error of the memory model's own.
        """
        try:
            model = self._model_of(plan.model)
        except SollolError as error:  # its file went away while it was loaded
            log.info("memory_not_compared", model=plan.model, why=error.refusal.message)
            return
        if model.shape is None:
            return
        predicted = await asyncio.to_thread(_predicted, model.shape, plan)
        correction = correction_between(predicted, logged)
        log.info("memory_compared", model=plan.model, devices=list(_rows(plan, logged)), correction=correction)
        self._learned.learn(
            MemoryCorrection(
                identity=model.identity,
                context_per_slot=plan.context_per_slot,
                parallel=plan.parallel,
                kv_type=plan.kv_type,
                ubatch=plan.ubatch,
                layout=layout_of((share.device_id, share.layers) for share in plan.shares),
                correction=correction,
            )
        )


def _predicted(shape: ModelShape, plan: CoordinatorPlan) -> tuple[DeviceShare, ...]:
    return device_shares(
        shape,
        [
            (share.device_id, DeviceKind.CPU if share.device_id == CPU_ID else DeviceKind.GPU, share.layers)
            for share in plan.shares
        ],
        context_per_slot=plan.context_per_slot,
        parallel=plan.parallel,
        kv_type=plan.kv_type,
        ubatch=plan.ubatch,
    )


def _rows(plan: CoordinatorPlan, logged: Logged) -> Iterator[dict[str, Any]]:
    for share, sizes in zip(plan.shares, logged, strict=True):
        if sizes is not None:
            predicted, found = share.total_bytes - share.margin_bytes, sizes.total(share)
            yield {
                "device": f"{share.node_id}/{share.device_id}" if share.node_id else share.device_id,
                "predicted_bytes": predicted,
                "logged_bytes": found,
                "error_percent": round(100 * (predicted - found) / found, 2),
            }
