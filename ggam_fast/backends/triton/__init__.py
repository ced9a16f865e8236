"""The stages as kernels.  A file holds a group of them: the method of the backend, then the stage with its
memory and its launches.  `launch` allocates and launches, `register` makes operators, `record` replays."""

from ggam_fast.backends import registry

from . import flops as _flops  # noqa: F401  (registers itself)
from .classifier import Classifier
from .features_grad import FeaturesGrad
from .guidance import Guidance
from .layers import Layers
from .pooling import Pooling
from .register import FUNCTIONS, STAGES
from .sums import Sums


class TritonBackend(Sums, Pooling, Layers, Classifier, Guidance, FeaturesGrad):
    """Small results are float32; none of them is differentiable by itself."""


TRITON = TritonBackend(FUNCTIONS)
registry.register("triton", TRITON, traced=TritonBackend(STAGES))
