"""The ops on DTensors of a mesh of two processes: sharded over the batch, without communication."""

import subprocess
import sys

import _ranks
import _sharded


def test_two_ranks():
    assert _ranks.run(2, _sharded.check) == [0, 0]


def test_rules_are_not_imported_without_dtensor():
    code = "import sys, ercn.ops; assert 'torch.distributed.tensor' not in sys.modules; import torch; "
    code += "x = torch.ones(1, 1, 2); ercn.ops.relu_affinity(x, x, backend='reference'); "
    code += "assert 'ercn.ops._sharding' not in sys.modules and 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rules_are_there_where_dtensor_was_imported_first():
    code = "import torch.distributed.tensor, sys, ercn.ops; from ercn.ops import _library, _sharding; "
    code += "assert _sharding._registered >= {o for o in _library.DEFINED if 'pool' in o._schema.name}"
    subprocess.run([sys.executable, "-c", code], check=True)
