"""What a feature is: dashboards, examples, labels, concepts, weights that hold on every prompt."""

from .concepts import concept_groups as concept_groups
from .concepts import label_by_prompts as label_by_prompts
from .concepts import score_concepts as score_concepts
from .dashboards import DashboardReader as DashboardReader
from .dashboards import DashboardWriter as DashboardWriter
from .dashboards import feature_number as feature_number
from .dashboards import from_feature_number as from_feature_number
from .dashboards import pack as pack
from .examples import LayerExamples as LayerExamples
from .gather import FeatureSettings as FeatureSettings
from .gather import build_features as build_features
from .gather import gather_examples as gather_examples
from .gather import name_by_tokens as name_by_tokens
from .gather import padded as padded
from .global_weights import Together as Together
from .labels import Label as Label
from .labels import Labels as Labels
from .labels import label_from_record as label_from_record
from .labels import labels_path as labels_path
from .labels import name_features as name_features
from .sizing import dashboards_take as dashboards_take
