"""What every RPC of the agent ends in: its answer, or a status that says why not."""

import functools
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import grpc.aio
import structlog
from sollol.channels import refusal_abort
from sollol.errors import Reason, Refusal, SollolError

log = structlog.get_logger()

_Rpc = Callable[[Any, Any, Any], Coroutine[Any, Any, Any]]


def guarded(rpc: _Rpc) -> Any:
    """Turn what an RPC raises into the call's status; nothing it raises is lost or logged twice."""

    @functools.wraps(rpc)
    async def call(self: Any, request: Any, context: Any) -> Any:
        try:
            return await rpc(self, request, context)
        except grpc.aio.AbortError:
            raise
        except SollolError as error:
            await refusal_abort(context, error.refusal)
        except grpc.aio.BaseError as error:
            log.info("call_lost", rpc=rpc.__name__, error=str(error))
            raise
        except Exception:
            log.exception("rpc_failed", rpc=rpc.__name__)
            message = f"the agent failed in {rpc.__name__}; its log says why"
            await refusal_abort(context, Refusal(reason=Reason.INTERNAL, message=message))

    return call


def told_by_head(refusal: Refusal) -> NoReturn:
    """A head does not take this agent in: its word goes into our log, and back as the call's status."""
    log.error("refused_by_head", reason=refusal.reason, message=refusal.message)
    raise SollolError(refusal)
