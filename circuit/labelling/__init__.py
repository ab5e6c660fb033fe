"""What a feature is called, by machine, and what the name is worth beside controls."""

from .evidence import View as View
from .explain import load_prompts as load_prompts
from .explanations import read_explanations as read_explanations
from .explanations import write_explanations as write_explanations
from .judges import AnswerFile as AnswerFile
from .judges import Budget as Budget
from .judges import EndpointJudge as EndpointJudge
from .judges import LocalJudge as LocalJudge
from .study import LabelSettings as LabelSettings
from .study import Study as Study
from .study import against_truth as against_truth
from .study import explain_by_judge as explain_by_judge
from .study import explain_by_tokens as explain_by_tokens
from .study import study as study
