"""What each process has of a tensor, however many of them wrote it."""

import pytest
import torch

from speechllm.train.sharding import rows_of


@pytest.mark.parametrize("rows", [1, 5, 8, 12])
@pytest.mark.parametrize("written", [1, 2, 3, 8])
@pytest.mark.parametrize("processes", [1, 2, 5, 8])
def test_rows_are_shared_out_as_fsdp_does(rows, written, processes):
    whole = torch.randn(rows, 3)

    def chunks(count):
        found = list(whole.chunk(count))
        return found + [whole[:0]] * (count - len(found))

    for rank, expected in enumerate(chunks(processes)):
        assert torch.equal(rows_of(chunks(written), rank, processes), expected)
