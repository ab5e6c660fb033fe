"""Where metrics go besides `metrics.jsonl`: Weights & Biases, offline unless told otherwise, and TensorBoard.

Both are Accelerate's trackers, made listeners of a training (`train.run.Tracker`): opened once its first step is known,
and gone on with where a run is resumed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import UserError, check_choice

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class WandbSettings:
    """Weights & Biases."""

    mode: str = "offline"
    """offline (kept in the run's folder; `wandb sync` sends it), online, or disabled."""

    project: str = "crosslace"
    """The project that the run belongs to."""

    entity: str | None = None
    """The user or team; the account's own where not given."""

    name: str | None = None
    """The run's name; the folder's where not given."""

    def __post_init__(self) -> None:
        check_choice("wandb.mode", self.mode, MODES)


@dataclass(frozen=True)
class TensorBoardSettings:
    """TensorBoard."""

    on: bool = False
    """Also write the metrics as event files, to `tensorboard/` in the run's folder."""


class WandbTracker:
    """Passes metrics on to Weights & Biases; a resumed run goes on as the same one."""

    def __init__(self, settings: WandbSettings, folder: Path, config: dict[str, Any]) -> None:
        self.settings, self.folder, self.config = settings, folder, config
        self.tracker: Any = None

    def resume(self, state: dict[str, Any]) -> None:
        """Open the run: a new one, or the one whose id the checkpoint kept."""
        import wandb
        from accelerate.tracking import WandBTracker
        from wandb.errors import Error

        online = self.settings.mode == "online"
        try:
            self.tracker = WandBTracker(
                self.settings.project,
                entity=self.settings.entity,
                name=self.settings.name or self.folder.name,
                id=state.get("id"),
                resume="allow" if online else None,
                dir=str(self.folder),
                mode="online" if online else "offline",
                config=self.config,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, reinit="create_new"),
            )
            self.tracker.start()
        except Error as error:
            raise UserError(
                f"Weights & Biases could not be reached ({error}); use wandb.mode=offline, or log in with `wandb login`"
            ) from error

    def log(self, step: int, values: dict[str, float], histograms: dict[str, "Tensor"]) -> None:
        """Send one line of metrics."""
        import wandb

        drawn = {name: wandb.Histogram(tensor.tolist()) for name, tensor in histograms.items()}
        self.tracker.log({**values, **drawn}, step=step)

    def state(self) -> dict[str, Any]:
        """What resuming needs: the run's id."""
        return {"id": self.tracker.run.id}

    def close(self, summary: dict[str, float]) -> None:
        """Keep the last figures, and end."""
        self.tracker.run.summary.update(summary)
        self.tracker.finish()


class TensorBoardTracker:
    """Writes metrics as TensorBoard's events; what a run logged after its last checkpoint is hidden when it goes on."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config, self.step = folder, config, 0
        self.tracker: Any = None

    def resume(self, state: dict[str, Any]) -> None:
        """Open a new file of events, from the checkpoint's step on."""
        from accelerate import tracking

        self.step = state.get("step", 0)
        self.tracker = tracking.TensorBoardTracker("tensorboard", self.folder, purge_step=self.step + 1)
        try:
            self.tracker.start()
        except ModuleNotFoundError as error:
            raise UserError("tensorboard=true needs a package: pip install tensorboard") from error
        self.tracker.log({"settings": f"```\n{json.dumps(self.config, indent=2)}\n```"}, step=self.step)

    def log(self, step: int, values: dict[str, float], histograms: dict[str, "Tensor"]) -> None:
        """Write one line of metrics."""
        self.step = step
        for name, tensor in histograms.items():
            self.tracker.writer.add_histogram(name, tensor, step)
        self.tracker.log(values, step=step)

    def state(self) -> dict[str, Any]:
        """What resuming needs: how far this came."""
        return {"step": self.step}

    def close(self, summary: dict[str, float]) -> None:
        """Keep the last figures, and end."""
        self.tracker.log({f"last/{name}": value for name, value in summary.items()}, step=self.step)
        self.tracker.finish()


def trackers(wandb: WandbSettings, tensorboard: TensorBoardSettings, folder: Path, config: dict[str, Any]) -> list[Any]:
    """The trackers that the settings ask for."""
    found: list[Any] = [] if wandb.mode == "disabled" else [WandbTracker(wandb, folder, config)]
    return found + ([TensorBoardTracker(folder, config)] if tensorboard.on else [])
