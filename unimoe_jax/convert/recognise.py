"""Find out which part of which model each source folder is.

`recognise` reads config.json, the names of files and the names of tensors, but never the names of
folders, because users rename those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unimoe_jax.checkpoints.locate import is_checkpoint
from unimoe_jax.convert.reader import (
    ConvertError,
    JsonSettings,
    Tensors,
    open_file,
    open_folder,
    read_json,
    weight_files,
)
from unimoe_jax.convert.source_names import ALIGNER, NON_LORA, PROJECTOR, tensors_by_table
from unimoe_jax.convert.torch_file import TORCH_SUFFIXES, load_torch, open_torch

Role = Literal["clip", "whisper", "beats", "decoder", "base", "tuned", "experts", "cumo"]
DECODERS = ("llama", "mistral", "mixtral")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
PROCESSOR_FILE = "preprocessor_config.json"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclass(frozen=True)
class SourceFolder:
    """One recognised folder or file.

    Attributes:
        role: the part that it plays in a model.
        config: its config.json; for BEATs, the `cfg` in its file.
        groups: group name -> tensors; the modules in `tables` list the groups of each family.
        files: name -> tokenizer or processor file in the folder.
    """

    role: Role
    path: Path
    config: Mapping[str, Any]
    groups: Mapping[str, Tensors]
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def weights(self) -> Tensors:
        """The tensors of a source that has one group."""
        (tensors,) = self.groups.values()
        return tensors


def recognise(paths: Sequence[Path]) -> list[SourceFolder]:
    """Recognise every path. A folder that holds other folders stands for all of them.

    Raises:
        ConvertError: a path is missing or cannot be recognised, or two sources have one role.
    """
    sources: list[SourceFolder] = []
    for path in paths:
        if not path.exists():
            raise ConvertError(f"{path}: no such file or folder")
        sources += _recognise(path)
    roles = [source.role for source in sources]
    for source in sources:
        if roles.count(source.role) > 1:
            where = ", ".join(str(other.path) for other in sources if other.role == source.role)
            raise ConvertError(f"two sources are {source.role}: {where}")
    return sources


def _recognise(path: Path) -> list[SourceFolder]:
    """The sources at one path; the first rule that fits decides."""
    # A file: only BEATs is released as one.
    if path.is_file():
        return [_beats(path)]
    # A fine-tune of Uni-MoE has a config.json as well, so look for its weight files first.
    if any((path / f"{stem}{end}").is_file() for stem in TUNED_MARKS for end in SUFFIXES):
        return [_tuned(path)]
    config_file = path / "config.json"
    if config_file.is_file():
        return [_hugging_face(path, read_json(config_file))]
    # The experts folder of 8e has no config.json.
    experts = sorted(file for file in path.glob("mlp_*") if file.suffix in SUFFIXES)
    if experts:
        groups = {file.stem: open_file(file) for file in experts}
        return [SourceFolder("experts", path, {}, groups)]
    if is_checkpoint(path):
        raise ConvertError(
            f"{path}: is a checkpoint of this package, not a PyTorch folder; it needs no import"
        )
    # A folder of folders.
    members = [member for member in sorted(path.iterdir()) if not member.name.startswith(".")]
    known = [m for m in members if m.is_dir() or m.suffix in TORCH_SUFFIXES]
    if not known:
        raise ConvertError(
            f"{path}: not recognised: the folder holds no config.json, no adapters and no experts"
        )
    return [source for member in known for source in _recognise(member)]


def _hugging_face(path: Path, config: JsonSettings) -> SourceFolder:
    """A folder with a config.json, by its `model_type`.

    Raises:
        ConvertError: a model type or architecture that is not supported.
    """
    kind = str(config.get("model_type", ""))
    files = side_files(path)
    if kind.startswith("clip"):
        # A folder without weights is fine: its config.json describes the encoder in CuMo's shards.
        has_weights = any(file.suffix in SUFFIXES for file in path.iterdir())
        return SourceFolder(
            "clip", path, config, {"clip": open_folder(path) if has_weights else {}}, files
        )
    if kind == "whisper":
        return SourceFolder("whisper", path, config, {"whisper": open_folder(path)}, files)
    # The config.json of a multimodal model names its encoders; it is not that of a plain decoder.
    is_multimodal = any(key in config for key in ("mm_vision_tower", "mm_audio_tower"))
    if kind in DECODERS and not is_multimodal:
        return SourceFolder("decoder", path, config, {"base": open_folder(path)}, files)
    is_llava = kind in LLAVA and config.get("architectures") in (None, ["LlavaLlamaForCausalLM"])
    if is_multimodal and is_llava:
        groups = {"base": open_folder(path)}
        groups |= _named_files(path, BASE_FILES)
        return SourceFolder("base", path, config, groups, files)
    if kind in CUMO:
        return SourceFolder("cumo", path, config, _cumo_groups(path), files)
    raise ConvertError(
        f"{path / 'config.json'}: model_type {kind!r}, architectures "
        f"{config.get('architectures')} are not supported"
    )


LLAVA = ("llava", "llava_llama")
CUMO = ("llava_mistral", "llava_mixtral")
CUMO_FILES = {"clip": "clip", "projector": PROJECTOR}


def _cumo_groups(path: Path) -> dict[str, Tensors]:
    """The shards, clip.bin and mm_projector.bin, as far as the folder has them.

    The first stage saves no shards. Without any of these files, `open_folder` says so.
    """
    separate = _named_files(path, CUMO_FILES)
    has_shards = any(path.glob("model*.safetensors*")) or any(path.glob("pytorch_model*.bin*"))
    shards = {"base": open_folder(path)} if has_shards or not separate else {}
    return shards | separate


def _named_files(path: Path, stems: Mapping[str, str]) -> dict[str, Tensors]:
    """Group -> tensors of the file `{stem}.safetensors`, or else of `{stem}.bin`.

    stems: group -> stem. Tensors get the names that the tables use.
    """
    groups: dict[str, Tensors] = {}
    for group, stem in stems.items():
        for suffix in SUFFIXES:
            if (path / (stem + suffix)).is_file():
                groups[group] = tensors_by_table(stem, open_file(path / (stem + suffix)))
                break
    return groups


BASE_FILES = {"base_projector": PROJECTOR, "base_aligner": ALIGNER}
SUFFIXES = (".safetensors", ".bin")
# Weight files by which the folder of a fine-tune of Uni-MoE is recognised.
TUNED_MARKS = ("adapter_model", "mlp_gates", NON_LORA)
TUNED_FILES = {
    "tuned": NON_LORA,
    "peft": "adapter_model",
    "aligner": ALIGNER,
    "gates": "mlp_gates",
    "fm": "fm_adapter",
}


def _tuned(path: Path) -> SourceFolder:
    """The folder of a fine-tune of Uni-MoE.

    Raises:
        ConvertError: expert files of some ranks are missing, or adapter_config.json is.
    """
    groups = _named_files(path, TUNED_FILES)
    # 8e: the experts of rank r are in r_mlp_experts.bin.
    ranks = {
        int(match[1]): file
        for file in path.iterdir()
        if (match := re.fullmatch(r"(\d+)_mlp_experts\.(bin|safetensors)", file.name))
    }
    if sorted(ranks) != list(range(len(ranks))):
        raise ConvertError(
            f"{path}: there are expert files (*_mlp_experts) of the ranks {sorted(ranks)} only; "
            "add those of the other ranks"
        )
    for rank, file in ranks.items():
        groups[f"file{rank}"] = open_file(file)
    # PEFT's settings become part of the settings, so that one mapping describes the folder.
    config = read_json(path / "config.json")
    has_adapters = "peft" in groups or (path / "adapter_config.json").is_file()
    config["_peft"] = read_json(path / "adapter_config.json") if has_adapters else {}
    return SourceFolder("tuned", path, config, groups, side_files(path))


def _beats(path: Path) -> SourceFolder:
    """The file of a BEATs checkpoint.

    Raises:
        ConvertError: the file is of another kind.
    """
    content = load_torch(path) if path.suffix in TORCH_SUFFIXES else {}
    cfg, model = content.get("cfg"), content.get("model")
    if not isinstance(cfg, Mapping) or not isinstance(model, Mapping):
        raise ConvertError(
            f"{path}: not recognised: a single file must be a BEATs checkpoint, a dictionary with "
            "`cfg` and `model`; give folders for all other models"
        )
    return SourceFolder("beats", path, JsonSettings(path, cfg), {"beats": open_torch(path, model)})


def side_files(path: Path) -> dict[str, Path]:
    """Name -> path of the tokenizer and processor files in a folder."""
    names = (*TOKENIZER_FILES, PROCESSOR_FILE)
    return {name: path / name for name in names if (path / name).is_file()}


def copied_files(sources: Sequence[SourceFolder]) -> dict[str, Path]:
    """Name in the import -> tokenizer and processor files that an import copies.

    The decoder does not use the tokenizer files of encoders, so they are left out; among the other
    sources, the last one that has a tokenizer file provides it. The name of a processor file gets
    the role in front, for example `clip_preprocessor_config.json`, because every encoder has one.
    """
    files = {}
    for source in sources:
        for name, path in source.files.items():
            if name not in TOKENIZER_FILES:
                files[f"{source.role}_{name}"] = path
            elif source.role in ("decoder", "base", "tuned", "cumo"):
                files[name] = path
    return files


def licences(path: Path) -> list[str]:
    """Paths of the licence files of a source, and the licence in the front matter of its README."""
    folder = path if path.is_dir() else path.parent
    found = [str(folder / name) for name in LICENCE_FILES if (folder / name).is_file()]
    readme = folder / "README.md"
    if readme.is_file():
        # Front matter is YAML between two lines of dashes at the beginning.
        sections = readme.read_text(errors="replace").split("---")
        front_matter = sections[1] if len(sections) > 2 else ""
        named = re.search(r"^license:\s*(\S+)", front_matter, re.MULTILINE)
        found += [named[1]] if named else []
    return found


def source_files(source: SourceFolder) -> list[Path]:
    """Every weight file of a source."""
    if source.role in ("clip", "whisper", "decoder") and source.weights:
        return weight_files(source.path)
    files = {tensor.file for group in source.groups.values() for tensor in group.values()}
    return sorted(files)
