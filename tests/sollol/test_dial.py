"""What is no address is said to be none, wherever it came from: a registry that others write to, or a command line."""

import pytest
from sollol.dial import speaks_tls, who_listens
from sollol.errors import Reason, SollolError
from sollol.identity import Role
from sollol.tls import TlsFiles

from tests.certificates import authority, write_identity


@pytest.mark.parametrize(
    "address",
    ["7461", ":7461", "host", "host:", "host:x", "127.0.0.1:65536", "[::1]:99999", "a..b:7461", f"{'x' * 64}:7461"],
)
async def test_what_cannot_be_dialled_is_refused_as_no_address(address):
    with pytest.raises(SollolError) as asked:
        await speaks_tls(address)
    assert asked.value.refusal.reason is Reason.INVALID_REQUEST
    assert "HOST:PORT" in asked.value.refusal.message


async def test_an_address_that_a_stranger_wrote_ends_the_look_in_a_refusal(tmp_path):
    head = TlsFiles(write_identity(tmp_path, authority(), "head", "h"))
    with pytest.raises(SollolError) as asked:
        await who_listens("node..example:7462", head, Role.AGENT)
    assert asked.value.refusal.reason is Reason.INVALID_REQUEST
