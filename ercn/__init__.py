"""ERCN: fused affinity and attention-pooling operators, and weakly supervised grading of diabetic retinopathy.

Importing it needs torch and numpy only. ``ercn.ops`` holds the operators; models, data and training need
``pip install 'ercn[train]'``.
"""

__version__ = "0.1.0"

from ercn import ops

__all__ = ["__version__", "ops"]
