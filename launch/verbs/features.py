"""`crosslace features`: dashboards of a run's features, names for them, and what the names are worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal import Closing, table
from ..workspace import Job, open_corpus, open_replacement, runs, world_of

if TYPE_CHECKING:
    from ...circuit.labelling import EndpointJudge, LabelSettings, LocalJudge, Study
    from ...train.parallel import Collectives

KEPT = ("features", "dataset", "model")


def remember(run: Path, job: Job) -> None:
    """Keep beside the dashboards what they were made with."""
    runs.write_yaml(run / "features" / "config.yaml", {name: job.config.values[name] for name in KEPT})


def run(job: Job) -> Closing:
    """Several processes share the layers; names and scores are the first one's."""
    from ...train.parallel import ParallelSettings, processes

    with processes(ParallelSettings.as_started(), job.process.device) as comm:
        closing = described(job, comm)
        comm.barrier()
    return closing


def described(job: Job, comm: "Collectives") -> Closing:
    """Describe every feature; name and judge them where that is asked for."""
    from ...circuit.features import DashboardWriter, Labels, build_features

    folder, settings = Path(job.top.run), job.section("labels")
    runs.writable(folder)
    asked = {name: job.config.values[name] for name in KEPT}
    home = folder / "features"
    known = runs.saved_settings(home) or None
    runs.refuse_other(home / "index.json.gz", known, asked, job.top.overwrite)
    judge = open_judge(settings, folder) if comm.is_main else None
    model = open_replacement(job, folder)
    world = world_of(model.lm)
    if comm.is_main:
        if known != asked or (home / "index.json.gz").is_file():
            DashboardWriter(home, model.lm.n_layers).forget()
        if world is not None:
            from ..known_world import label_features

            labels = Labels.load(folder)
            labels.update(label_features(model, world, job.top.seed, job.progress))
            labels.save(folder)
        remember(folder, job)
    comm.barrier()
    corpus = open_corpus(job, model.lm)
    build_features(model, corpus, folder, job.section("features"), job.progress, comm)
    if not comm.is_main:
        return Closing("described")
    found = (
        named(job, settings, model, corpus, folder, judge) if settings.score or settings.explainer != "tokens" else None
    )
    sources = [label.source for _, label in Labels.load(folder).items()]
    counts = ", ".join(f"{sources.count(source)} by {source}" for source in sorted(set(sources)))
    return Closing(
        "described",
        tables=[] if found is None else [scores_table(found)],
        notes=[f"names: {counts}", *([] if found is None else remarks(found, judge))],
        wrote=[(str(folder / "features"), "a dashboard a feature, and names")],
        next=[f'crosslace trace run={folder} prompt="..."', f"crosslace view run={folder}"],
    )


def open_judge(settings: "LabelSettings", folder: Path) -> "LocalJudge | EndpointJudge | None":
    """Whoever is asked, before any work: a key that is missing or a model that is not there ends it here."""
    from ...circuit.labelling import AnswerFile, Budget, EndpointJudge, LocalJudge

    asked = {settings.explainer, settings.judge}
    answers = AnswerFile(folder / "features" / "answers.jsonl")
    if "endpoint" in asked:
        budget = Budget(settings.budget_tokens, settings.budget_money, settings.price_in, settings.price_out)
        return EndpointJudge(
            settings.url, settings.model, settings.key, answers, budget, concurrency=settings.concurrency
        )
    if "local" in asked:
        from ...data.models import ModelSettings, load_model

        chat = load_model(ModelSettings(name=settings.model))
        return LocalJudge(chat.model, chat.tokenizer, settings.model, answers)
    return None


def named(job: Job, settings: "LabelSettings", model: Any, corpus: Any, folder: Path, judge: Any) -> "Study":
    """Name, judge, and keep both beside the dashboards."""
    from ...circuit.features import DashboardReader, Labels
    from ...circuit.labelling import View, explain_by_judge, explain_by_tokens, load_prompts, study

    prompts, words = load_prompts(settings.prompts or None), model.lm.token_strings
    if settings.explainer == "tokens":
        explain = explain_by_tokens(words)
    else:
        explain = explain_by_judge(judge, prompts, words, job.progress)
    labels, dashboards = Labels.load(folder), DashboardReader(folder / "features")
    found = study(
        View(model),
        corpus,
        settings,
        explain,
        words,
        judge if settings.judge != "none" else None,
        prompts,
        labels,
        lambda key: dashboards.record(*key)["top_logits"],
        job.progress,
    )
    for key, label in found.labels.items():
        labels.set(*key, label)
    labels.save(folder)
    runs.write_json(folder / "features" / "scores.json", found.as_dict())
    return found


def scores_table(found: "Study") -> Any:
    """The transcoder's labels beside the controls."""
    columns = ("labels of", "features", "simulation", "area", "detection", "fuzzing", "no answer")
    rows = []
    for row in found.table:
        scores = map(_shown, (row.simulation, row.area, row.detection, row.fuzzing))
        rows.append([row.name, row.labelled, *scores, row.nonsense + row.unanswered])
    return table("labels on held-out text", columns, rows)


def _shown(value: float | None) -> float | str:
    return "" if value is None else round(value, 3)


def remarks(found: "Study", judge: Any) -> list[str]:
    """What a random dictionary gets too, how truth ranks the features, and what stayed without an answer."""
    notes = [f"a random dictionary gets {share:.0%} of {name} too" for name, share in found.share_by_chance().items()]
    for name, truth in found.beside_truth().items():
        notes.append(
            f"{name} ranks {truth['features']} features of known truth as their F1 does to {truth['spearman']:.2f}"
        )
    notes += [f"{count} questions without an answer: {why}" for why, count in getattr(judge, "failures", {}).items()]
    return notes
