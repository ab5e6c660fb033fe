"""Language models and their families: loading, where layers and norms stand, attention sinks."""

from .attention_sinks import SITES_LOOKED_AT as SITES_LOOKED_AT
from .attention_sinks import SinkRule as SinkRule
from .attention_sinks import check_sinks as check_sinks
from .attention_sinks import described as described
from .attention_sinks import row_norms as row_norms
from .families import Affine as Affine
from .families import LayerParts as LayerParts
from .families import MlpWeights as MlpWeights
from .families import Norm as Norm
from .families import find_family as find_family
from .input_norms import InputNorms as InputNorms
from .language_model import SITES as SITES
from .language_model import Captured as Captured
from .language_model import LanguageModel as LanguageModel
from .language_model import ModelSettings as ModelSettings
from .language_model import begin_with as begin_with
from .language_model import load_model as load_model
from .language_model import token_names as token_names
from .queries import QueriesAndKeys as QueriesAndKeys
from .queries import listen as listen
