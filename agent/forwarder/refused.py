"""Why somebody who came to a forwarder was sent away: one word each, for its log and its status."""

BUSY = "busy"
STRANGER = "stranger"  # comes from an address that is not allowed
OTHER_USER = "other_user"
SILENT = "silent"  # did not say in time who it is
HUNG_UP = "hung_up"
NO_TLS = "no_tls"
WRONG_ROLE = "wrong_role"
WRONG_NODE = "wrong_node"
WRONG_POOL = "wrong_pool"
WRONG_SECRET = "wrong_secret"  # noqa: S105 - a word for the log


class RefusedError(Exception):
    """Raised by an opening; `who` is what is known of the peer, such as the name in its certificate."""

    def __init__(self, why: str, who: str = "") -> None:
        super().__init__(f"{why} ({who})" if who else why)
        self.why, self.who = why, who
