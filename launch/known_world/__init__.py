"""The bundled world's ground truth, beside what features and graphs say."""

from . import swap as swap
from .circuits import check_paths as check_paths
from .circuits import traced as traced
from .truth import label_features as label_features
from .truth import state_coded as state_coded
from .truth import state_features as state_features
