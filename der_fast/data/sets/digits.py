"""The handwritten digits that ship inside scikit-learn: 1797 grey images of 8 × 8 pixels."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits as sklearn_digits

from der_fast.data.catalogue.split import held_out
from der_fast.data.memory_source import MemorySource


def load_digits(test_share: float) -> tuple[MemorySource, MemorySource]:
    """Return (train, test): uint8, 8 × 8, grey repeated into three channels, classes "0" to "9".

    The split is fixed and takes the same share of every class.

    Args:
        test_share: share of every class held out for testing.

    Raises:
        DataError: a share outside (0, 1).
    """
    bunch = sklearn_digits()
    # The grey levels run from 0 to 16.
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))
    images = grey[..., None].expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    names = [f"digits[{index:04d}]" for index in range(len(labels))]
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        members = (labels == digit).nonzero().flatten()
        test[members] = torch.tensor(held_out(str(digit), [names[index] for index in members.tolist()], test_share))
    source = MemorySource(images, labels, [str(digit) for digit in range(10)], files=names)
    return source.subset((~test).nonzero().flatten()), source.subset(test.nonzero().flatten())
