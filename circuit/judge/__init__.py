"""How good a transcoder is: reconstruction, behaviour, controls, graph scores, faithfulness, health."""

from .behaviour import TextBatch as TextBatch
from .evaluation import LEAST_TOKENS as LEAST_TOKENS
from .evaluation import EvalSettings as EvalSettings
from .evaluation import EvalText as EvalText
from .evaluation import evaluate as evaluate
from .graph_scores import GRAPH_FIGURES as GRAPH_FIGURES
from .groups import GroupScores as GroupScores
from .groups import judge_groups as judge_groups
from .health import DENSITY_EDGES as DENSITY_EDGES
from .prompts import PromptSet as PromptSet
from .prompts import prompt_set as prompt_set
from .questions import QUESTIONS as QUESTIONS
from .questions import answered as answered
from .questions import one_of_each as one_of_each
