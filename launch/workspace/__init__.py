"""What verbs work with: the job, run folders, models and text and stores opened from settings, trackers."""

from . import runs as runs
from . import tracking as tracking
from .job import Job as Job
from .job import following as following
from .job import start as start
from .processes import Process as Process
from .processes import wait_until as wait_until
from .provenance import append_error as append_error
from .provenance import device_hours as device_hours
from .provenance import provenance as provenance
from .provenance import recorded as recorded
from .sources import bundled_folder as bundled_folder
from .sources import model_settings as model_settings
from .sources import open_corpus as open_corpus
from .sources import open_model as open_model
from .sources import open_replacement as open_replacement
from .sources import open_stores as open_stores
from .sources import world_of as world_of
