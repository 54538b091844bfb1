"""A user's program: stubs made from our protos, grpcio and protobuf, and nothing of SOLLOL's. Run with `python -I -S`.

Arguments: directory of the stubs, site-packages, address of the head, model. Prints one JSON object.
"""

import importlib.util
import json
import sys

STUBS, PACKAGES, HEAD, MODEL = sys.argv[1:]
sys.path[:0] = [STUBS]
sys.path.append(PACKAGES)  # without -S an editable install's .pth would bring our packages along

import grpc  # noqa: E402 - after sys.path is made
from sollol.v1 import inference_pb2, inference_pb2_grpc  # noqa: E402


def main() -> None:
    # A directory without code, such as the units that an editable install lays down, has no origin.
    found = {name: importlib.util.find_spec(name) for name in ("sollold", "agent", "sollol.client")}
    ours = [name for name, spec in found.items() if spec is not None and spec.origin is not None]
    request = inference_pb2.ChatRequest(
        model=MODEL,
        messages=[inference_pb2.Message(role="user", content="Who are you?")],
        sampling=inference_pb2.Sampling(temperature=0, max_tokens=60),
    )
    with grpc.insecure_channel(HEAD) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        responses = stub.Chat(request, timeout=30)
        pieces = [response.piece for response in responses if response.WhichOneof("event") == "piece"]
    last = pieces[-1]
    answer = {
        "ours": ours,
        "stubs": inference_pb2.__file__,
        "text": "".join(piece.text for piece in pieces),
        "pieces": len(pieces),
        "finish_reason": last.finish_reason,
        "completion_tokens": last.usage.completion_tokens,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
