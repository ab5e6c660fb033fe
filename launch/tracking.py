"""Where metrics go besides `metrics.jsonl`: Weights & Biases, offline unless told otherwise."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.errors import UserError, check_choice

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


class WandbSink:
    """Passes metrics on to Weights & Biases; a resumed run goes on as the same one."""

    def __init__(self, settings: WandbSettings, run: Path, config: dict[str, Any]) -> None:
        import wandb

        run.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or run.name,
                id=_identity(run),
                resume="allow" if settings.mode == "online" else None,
                dir=str(run),
                mode="online" if settings.mode == "online" else "offline",
                config=config,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases could not be reached ({error}); use wandb.mode=offline, or log in with `wandb login`"
            ) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send one line of metrics."""
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def _identity(run: Path) -> str:
    """The id kept beside the run, so that resuming goes on with the same one."""
    from secrets import token_hex

    path = run / "wandb-id"
    if not path.is_file():
        path.write_text(token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def sinks(settings: WandbSettings, run: Path, config: dict[str, Any]) -> list[WandbSink]:
    """The trackers that the settings ask for."""
    return [] if settings.mode == "disabled" else [WandbSink(settings, run, config)]
