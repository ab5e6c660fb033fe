"""Where metrics go besides `metrics.jsonl`: Weights & Biases, offline unless told otherwise."""

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


class WandbTracker:
    """Passes metrics on to Weights & Biases; a resumed run goes on as the same one (see `train.run.Tracker`)."""

    def __init__(self, settings: WandbSettings, folder: Path, config: dict[str, Any]) -> None:
        self.settings, self.folder, self.config = settings, folder, config
        self.run: Any = None

    def resume(self, state: dict[str, Any]) -> None:
        """Open the run: a new one, or the one whose id the checkpoint kept."""
        import wandb
        from wandb.errors import Error

        online = self.settings.mode == "online"
        try:
            self.run = wandb.init(
                project=self.settings.project,
                entity=self.settings.entity,
                name=self.settings.name or self.folder.name,
                id=state.get("id"),
                resume="allow" if online else None,
                dir=str(self.folder),
                mode="online" if online else "offline",
                config=self.config,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, reinit="create_new"),
            )
        except Error as error:
            raise UserError(
                f"Weights & Biases could not be reached ({error}); use wandb.mode=offline, or log in with `wandb login`"
            ) from error

    def log(self, step: int, values: dict[str, float], histograms: dict[str, "Tensor"]) -> None:
        """Send one line of metrics."""
        import wandb

        drawn = {name: wandb.Histogram(tensor.tolist()) for name, tensor in histograms.items()}
        self.run.log({**values, **drawn}, step=step)

    def state(self) -> dict[str, Any]:
        """What resuming needs: the run's id."""
        return {"id": self.run.id}

    def close(self, summary: dict[str, float]) -> None:
        """Keep the last figures, and end."""
        self.run.summary.update(summary)
        self.run.finish()


def trackers(settings: WandbSettings, folder: Path, config: dict[str, Any]) -> list[WandbTracker]:
    """The trackers that the settings ask for."""
    return [] if settings.mode == "disabled" else [WandbTracker(settings, folder, config)]
