"""Uses an installed ercn without extras as a user of the operators would.

Argument: the README with the example to run.
"""

import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch.utils.flop_counter  # imports Triton where it is installed

before = set(sys.modules)
import ercn

new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"ercn"} and "ercn.kernels" not in sys.modules, f"import ercn also imported {sorted(new)}"
assert find_spec("timm") is None, "the training extra was installed with the operators"

import ercn.kernels
from ercn.ops import _extension, relu_affinity

assert "kernels" not in sys.modules
folder = Path(ercn.__file__).parent
assert "site-packages" in folder.parts, f"not the installed wheel: {folder}"
assert _extension.load() is None, _extension.load()
if os.environ.get("ERCN_BUILD") == "cuda":
    assert _extension.load("libercn_cuda") is None, _extension.load("libercn_cuda")

value = torch.randn(2, 3, 100, dtype=torch.float64)
feat = torch.randn(2, 16, 100, dtype=torch.float64, requires_grad=True)
out = relu_affinity(value, feat)
out.sum().backward()
torch.testing.assert_close(out, value @ torch.relu(feat.mT @ feat))
assert feat.grad.isfinite().all()

readme = Path(sys.argv[1]).read_text()
examples = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "ercn.ops" in code]
assert examples, "the README has no example of ercn.ops"
print(examples[0])
Path("example.py").write_text(examples[0])
runpy.run_path("example.py")
print(f"installed wheel: ercn {ercn.__version__} in {folder} ran an op, its gradient and the README's example")
