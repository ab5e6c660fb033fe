"""Where documents come from: the world, texts that packages carry, local files, or the Hugging Face hub."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import SettingsError, UserError
from ..worlds import FACTS_FILE, World, build_world, is_held_out, stdlib
from . import general
from .dataset import Content, DatasetSettings, Document, TextSource

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".arrow": "arrow",
}
NETWORK: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, HfHubHTTPError.__bases__[0])
"""What a network fails with; the last is the root of all errors of the HTTP library that the hub's client uses."""
UNREADABLE = (DatasetsError, pyarrow.ArrowInvalid)
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
BESIDE = ("readme", "license", "licence", "notice", "dataset_infos")
ENDS_READ = 1 << 20
"""Bytes of each end of a local file that its fingerprint covers, besides its length."""


def open_source(settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase) -> TextSource:
    if settings.name == "world":
        own = Path(tokenizer.name_or_path)  # the world whose model is being read, else the default one
        return _world(own if (own / FACTS_FILE).is_file() else build_world(), settings)
    if settings.name == "stdlib":
        return _stdlib(settings)
    if settings.name == "general":
        return _general(settings)
    path = Path(settings.name).expanduser()
    if (path / FACTS_FILE).is_file():
        return _world(path, settings)
    if path.exists():
        return _rows(_open_local(path, settings), settings, tokenizer, _identity_of_files(path))
    if path.suffix in FORMATS or settings.name.startswith((".", "/", "~")):
        raise UserError(f"dataset.name={settings.name}: there is no such file or folder")
    dataset = _open_hub(settings)
    identity = f"{settings.name}/{settings.config}/{settings.split}/{dataset.info.version}"
    identity += f"/{dataset._fingerprint if isinstance(dataset, Dataset) else _commit(settings)}"
    return _rows(dataset, settings, tokenizer, identity)


def _world(folder: Path, settings: DatasetSettings) -> TextSource:
    world = World.load(folder)

    def documents() -> Iterator[Document]:
        index = 0
        for split, rows in world.corpus(settings.seed).items():
            for text in rows["text"]:
                yield Document(index, text, split == "held_out")
                index += 1

    facts = hashlib.sha256(repr([q.text for q in world.all_questions]).encode()).hexdigest()
    return TextSource(documents, f"world/{facts}", short=True)


def _stdlib(settings: DatasetSettings) -> TextSource:
    def documents() -> Iterator[Document]:
        for index, text in enumerate(stdlib.documents()):
            yield Document(index, text, is_held_out(index, settings.seed, settings.held_out))

    return TextSource(documents, f"stdlib/{stdlib.identity()}")


def _general(settings: DatasetSettings) -> TextSource:
    found = general.texts()

    def documents() -> Iterator[Document]:
        for index, text in enumerate(found):
            yield Document(index, text, is_held_out(index, settings.seed, settings.held_out))

    return TextSource(documents, f"general/{general.identity(found)}")


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _beside(file: Path, folder: Path) -> bool:
    """A dataset's card, its licence, or what a download left: no data."""
    parts = file.relative_to(folder).parts
    return file.name.split(".")[0].lower() in BESIDE or any(part.startswith(".") for part in parts)


def _format(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in COMPRESSIONS]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _open_local(path: Path, settings: DatasetSettings) -> Any:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # written by save_to_disk
        saved = load_from_disk(str(path))
        if not isinstance(saved, DatasetDict):
            return saved
        if settings.split not in saved:
            raise SettingsError(f"dataset.split={settings.split} is not in {path}; it has {', '.join(map(str, saved))}")
        return saved[settings.split]
    files = [file for file in _files(path) if _format(file) and (file == path or not _beside(file, path))]
    formats = {_format(file) for file in files}
    if len(formats) != 1:
        found = "files of several kinds" if formats else "no file"
        raise UserError(f"dataset.name={path} has {found} that can be read; it takes one of {', '.join(FORMATS)}")
    kind = str(formats.pop())
    options: dict[str, Any] = {"streaming": settings.streaming}
    if kind == "text":
        options |= {"sample_by": settings.text_unit, "encoding_errors": "replace"}
    elif kind == "json":
        # bytes are only decoded with `encoding_errors` where the encoding is not spelt "utf-8"
        options |= {"encoding": "utf8", "encoding_errors": "replace"}
    try:
        return load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    except (*UNREADABLE, ValueError) as error:
        raise UserError(f"dataset.name={path} cannot be read as {kind}: {_first_line(error)}") from error
    except StopIteration as error:  # what pandas' and pyarrow's readers end in where there is no row
        raise UserError(f"dataset.name={path} is empty") from error


def _open_hub(settings: DatasetSettings) -> Any:
    try:
        return load_dataset(
            settings.name,
            settings.config,
            split=settings.split,
            streaming=settings.streaming,
            revision=settings.revision,
        )
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"dataset.name={settings.name} is neither a local file or folder nor a dataset on the Hugging Face hub "
            "that this account can read; `world` and `stdlib` need no download"
        ) from error
    except ValueError as error:  # an unknown configuration or split: the message lists those there are
        raise SettingsError(f"dataset.name={settings.name}: {_first_line(error)}") from error
    except (*NETWORK, OfflineModeIsEnabled) as error:
        raise UserError(
            f"dataset.name={settings.name} could not be fetched from the Hugging Face hub ({type(error).__name__}); "
            "`world`, `stdlib` and local files need no network"
        ) from error


def _commit(settings: DatasetSettings) -> str:
    """The commit that a streamed dataset is read at: its name alone would not tell that it has changed."""
    try:
        return str(HfApi().dataset_info(settings.name, revision=settings.revision).sha)
    except (*NETWORK, ValueError):  # no hub that knows it: what the user named stands for it
        return str(settings.revision)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause) or type(cause).__name__).strip().splitlines()[0]


def _rows(
    dataset: Dataset | IterableDataset, settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase, identity: str
) -> TextSource:
    column = settings.column
    columns = dataset.column_names
    if columns is None:  # a stream that has not said: its first row does
        columns = list(next(iter(dataset), {}))
    if column not in columns:
        raise SettingsError(
            f"dataset.column={column} is not in {settings.name}; its columns are {', '.join(columns) or '(none)'}"
        )
    dataset = dataset.select_columns([column])

    def documents() -> Iterator[Document]:
        try:
            for index, row in enumerate(dataset):
                held_out = is_held_out(index, settings.seed, settings.held_out)
                yield Document(index, _content(row[column], settings, tokenizer), held_out)
        except NETWORK as error:
            raise UserError(
                f"the stream of dataset.name={settings.name} broke off ({type(error).__name__}); "
                "run the same command again"
            ) from error
        except UNREADABLE as error:
            raise UserError(f"dataset.name={settings.name} is damaged: {_first_line(error)}") from error

    return TextSource(documents, identity)


def _content(value: Any, settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase) -> Content:
    """A row's text, chat or tokens as a document."""
    match value:
        case None | []:
            return ""
        case str():
            return value
        case bytes():
            return value.decode("utf-8", "replace")
        case [int(), *_]:
            return _checked_tokens(list(value), settings, tokenizer)
        case [{"role": _, "content": _}, *_]:
            return _chat([{**message, "content": _said(message["content"])} for message in value], settings, tokenizer)
    raise SettingsError(
        f"dataset.column={settings.column} of {settings.name} holds {type(value).__name__}; it takes a text, a list of "
        "chat messages with role and content, or a list of token ids"
    )


def _chat(messages: list[dict[str, Any]], settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages[:4])
        raise SettingsError(
            f"the model's chat template refuses a chat in dataset.column={settings.column} of {settings.name} (roles "
            f"{roles}): {_first_line(error)}"
        ) from error


def _said(content: Any) -> str:
    """A message's text: some datasets have it in parts, some have none."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and part.get("text"))
    return "" if content is None else str(content)


def _checked_tokens(ids: list[int], settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if min(ids) < 0 or max(ids) >= len(tokenizer):
        raise SettingsError(
            f"dataset.column={settings.column} of {settings.name} holds token ids from {min(ids)} to {max(ids)}, but "
            f"the model's tokenizer has {len(tokenizer)}; it was made for another model"
        )
    return ids


def _identity_of_files(path: Path) -> str:
    """Names, lengths and both ends of the files: enough to notice another dataset without reading it whole."""
    digest = hashlib.sha256()
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}/{size}/".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(ENDS_READ))
            if size > ENDS_READ:
                stream.seek(max(ENDS_READ, size - ENDS_READ))
                digest.update(stream.read())
    return f"files/{digest.hexdigest()}"
