"""MQTT topics of a cluster, each built in one place, and which topics an answer may go to. Pure."""

ROOT = "sollol/v1"
ONLINE, OFFLINE = b"online", b"offline"
TOPIC_MAX_BYTES = 1024


class Topics:
    """Everything below `sollol/v1/<cluster>`.

    Args:
        cluster: The cluster's name; heads and agents must agree on it.
    """

    def __init__(self, cluster: str) -> None:
        self._base = f"{ROOT}/{level(cluster)}"

    def node_status(self, node_id: str) -> str:
        return f"{self._base}/node/{level(node_id)}/status"

    def node_state(self, node_id: str) -> str:
        return f"{self._base}/node/{level(node_id)}/state"

    def pool_state(self, pool_id: str) -> str:
        return f"{self._base}/pool/{level(pool_id)}/state"

    def head_status(self, head_id: str) -> str:
        return f"{self._base}/head/{level(head_id)}/status"

    def event(self) -> str:
        return f"{self._base}/event"

    def generate(self) -> str:
        return f"{self._base}/generate"

    def cancel(self) -> str:
        return f"{self._base}/generate/cancel"


def level(text: str) -> str:
    """`text` as one level of a topic: what would end the level, match others or be illegal is written as %XX."""
    return "".join(
        "".join(f"%{byte:02X}" for byte in each.encode(errors="replace")) if each in "/+#%" or _illegal(each) else each
        for each in text
    )


def problem_with_response_topic(topic: str, discovery_prefix: str) -> str | None:
    """Why a head must not publish an answer there, None when it may.

    A head has rights at the broker that the asker may lack: it is not to be made to write state, configuration of Home
    Assistant or requests.
    """
    if not topic:
        return "the request names no response topic"
    if len(topic.encode(errors="replace")) > TOPIC_MAX_BYTES:
        return f"the response topic is longer than {TOPIC_MAX_BYTES} bytes"
    if any(each in "+#" or _illegal(each) for each in topic):
        return "the response topic has wildcards or characters that no topic may have"
    for reserved in ("$", f"{ROOT}/", f"{discovery_prefix}/"):
        if topic.startswith(reserved) or topic == reserved.rstrip("/"):
            return f"the response topic is below {reserved}, which is not for answers"
    return None


def _illegal(character: str) -> bool:
    code = ord(character)
    return code < 0x20 or 0x7F <= code <= 0x9F or 0xD800 <= code <= 0xDFFF
