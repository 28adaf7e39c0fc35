"""Pages of long-lived tensors: what is in them stays."""

from __future__ import annotations

import torch

from palette.training.allocator import use_huge_pages


def test_contents_stay() -> None:
    large, view = torch.arange(2**20, dtype=torch.float32), torch.arange(2**21).view(2, -1)[1]
    small, elsewhere = torch.arange(5), torch.empty(2**22, device="meta")
    use_huge_pages([large, view, small, elsewhere])
    assert torch.equal(large, torch.arange(2**20, dtype=torch.float32))
    assert torch.equal(view, torch.arange(2**20, 2**21))
    assert small.tolist() == [0, 1, 2, 3, 4]
