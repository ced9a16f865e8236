"""The stages as Triton kernels.

Each file holds a group of stages: first the backend's methods, then the functions that allocate and launch.
`launch` has memory and launches, `register` makes operators, `record` replays.
"""

from ggam_fast.backends import registry

from . import flops as _flops  # noqa: F401  (registers itself)
from .cross_entropy import CrossEntropy
from .features_grad import FeaturesGrad
from .guidance import Guidance
from .layer_grads import LayerGrads
from .layers import Layers
from .pooling import Pooling
from .register import FUNCTIONS, STAGES
from .sums import Sums


class TritonBackend(Sums, Pooling, Layers, LayerGrads, CrossEntropy, Guidance, FeaturesGrad):
    """The stages as Triton kernels.  Small results are float32.  Autograd cannot differentiate the stages."""


TRITON = TritonBackend(FUNCTIONS)
registry.register("triton", TRITON, traced=TritonBackend(STAGES))
