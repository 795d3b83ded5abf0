"""The ops: one contract, one Python function and one reference (reference.py) each.

In what measures, the set axis comes first, `[S, N, D]`, and all sets are one call; attention and Transformer blocks
take tokens. All are compiled from csrc/, where wrong tensors are refused, once; arguments.py makes tensors and numbers
of what Python gives. What is wrong arrives as ValueError or TypeError, what takes more memory than there is as
MemoryError. Results do not depend on the number of threads, bit for bit.
"""

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.is_file():
    raise ImportError(
        "clmfast's compiled ops are missing. Build them with `pip install .`, or in a checkout with `pip install -e .` "
        "or `python setup.py build_ext --inplace`"
    )
torch.ops.load_library(_LIBRARY)

from clmfast.ops import forks as forks  # noqa: E402  for what it does to a child of a fork
from clmfast.ops.attention import attention, packed_attention  # noqa: E402  the library comes first: these modules add to what it registers
from clmfast.ops.block import BlockWeights, attention_block, mlp_block, transformer_blocks  # noqa: E402
from clmfast.ops.capture import capture_rows  # noqa: E402
from clmfast.ops.derivatives import composed  # noqa: E402
from clmfast.ops.kmeans import KMeans, kmeans  # noqa: E402
from clmfast.ops.kmeans_search import Partitions, SearchMemory, kmeans_search, search_memory  # noqa: E402
from clmfast.ops.knn import KNN, knn  # noqa: E402
from clmfast.ops.partition import PartitionScores, adjusted_rand, partition_scores  # noqa: E402
from clmfast.ops.separation import separation  # noqa: E402
from clmfast.ops.votes import label_shares, majority_vote  # noqa: E402

__all__ = [
    "KNN",
    "BlockWeights",
    "KMeans",
    "PartitionScores",
    "Partitions",
    "SearchMemory",
    "adjusted_rand",
    "attention",
    "attention_block",
    "capture_rows",
    "composed",
    "kmeans",
    "kmeans_search",
    "knn",
    "label_shares",
    "majority_vote",
    "mlp_block",
    "packed_attention",
    "partition_scores",
    "search_memory",
    "separation",
    "transformer_blocks",
]
