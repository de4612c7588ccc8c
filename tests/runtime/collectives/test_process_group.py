"""Process groups: a rank that the others do not join says so."""

import pytest

from runtime.collectives.process_group import init_process_group_safely
from runtime.errors import WireError
from tests.multiprocess import free_port


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_is_left_alone_says_so(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    """The others ended before they joined: of --data that is not there, say. torch's text was all that was told."""
    port = free_port()
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(WireError) as caught:
        init_process_group_safely(1.0)
    told = f"rank {rank}, at localhost:{port}: the ranks did not all join. Expected 2 ranks within 1 s. Got "
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
