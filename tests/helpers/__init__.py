"""What tests share. Whatever imports it, programs that tests start among them, runs under the same conditions.

``DNR_TEST_THREADS`` (1 by default, since several workers share the cores) and ``DNR_TEST_SEED`` (0; added to every
seed) run the same tests under other conditions (`test_processors`).
"""

import os

THREADS = os.environ.setdefault("DNR_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = THREADS  # also of the programs that tests start

import torch  # noqa: E402

torch.set_num_threads(int(THREADS))
if shift := int(os.environ.get("DNR_TEST_SEED", "0")):
    drawn = torch.manual_seed

    class Shifted(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + shift)

    torch.manual_seed = lambda seed: drawn(seed + shift)
    torch.Generator = Shifted  # type: ignore[misc]
