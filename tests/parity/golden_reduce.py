"""Make `tests/parity/fixtures`: python -m tests.parity.golden_reduce GOLDEN_DIR TARGET

Leaves out tensors that no import uses, and recorded values that show the same as others. Long
arrays keep every few rows (`NAME@STEP`, see `tests/golden_dir.py`). All kept data are
bit-identical: sounds are stored as FLAC and arrays with LZMA, which both lose nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.numpy import load_file, save_file

from tests.golden_dir import thin
from tests.parity.golden_cumo import CumoSystem
from tests.parity.golden_system import System

WHOLE = "unimoe-8e"
HEARING = "unimoe-audio"
SEEING = "cumo"
HEARING_ROWS = (0, 2)  # one short sound with an image, and text of two rounds
HEARING_FILES = r".*\.pt|.*-e2/(mm_audio_aligner\.bin|(adapter_)?config\.json)|.*/\w*token\w*\.\w+"
HEARING_KEYS = r"unmerged/audio_(tower_features|aligner_decoder_out|aligner_out)/call(\d+)"

# (pattern of the key, step between the kept rows, or 0 to keep none); the first match counts.
EXPECTED_STEPS = (
    (r"\w+/(logits|logits_sample0)", 64),
    (r"\w+/final_norm_out", 32),
    (r"\w+/layer\d+/(gate_input|moe_out|hidden_out|combine_weights)", 32),
    (r"(un)?merged/layer\d+/(router_logits|selected_experts)", 16),
    (r"noisy/layer\d+/router_logits_returned", 8),
    (r"unmerged/audio_tower_features/.*", 32),
    (r"unmerged/spliced/inputs_embeds", 16),
    (r"unmerged/(vision_tower_features|mm_projector_out)/call\d+", 8),
    (r"unmerged/audio_aligner_(decoder_)?out/call\d+", 4),
)
SEEING_KEYS = r"final/(clip|mlp|aux_unscaled)/.*|final/(vision_tower_features|connector_out)"
SEEING_STEPS = (
    (r".*/pixel_values/.*|.*/clip/hidden/call0", 0),
    (r"final/(vision_tower_features|connector_out)", 2),
    (r".*/clip/hidden/call1", 16),
    (r".*/clip/layer\d+/(router_logits|selected_experts)/call1", 4),
)
PREPROCESSING_STEPS = (
    (r"(a_44k_stereo|b_8k_mono)/.*|.*/padded_uint8_hwc", 0),
    (r".*/336/uint8_chw", 64),
    (r".*/56/pixel_values", 4),
    (r".*/log_mel_first\w+", 8),
    (r"d_16k_beats/fbank_(raw_unpadded|norm_padded30s_first_frames)", 16),
)
ENDS = 500  # number of samples kept at each end of a waveform


def thinned(arrays: Mapping[str, np.ndarray], steps) -> dict[str, np.ndarray]:
    """Arrays by recorded key, with rows left out as `steps` says."""
    kept = {}
    for key, value in arrays.items():
        step = next((step for pattern, step in steps if re.fullmatch(pattern, key)), 1)
        if step:
            kept[key if step == 1 else f"{key}@{step}"] = thin(value, step).copy()
    return kept


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Save arrays like `np.savez`, but compressed with LZMA; `np.load` reads the file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)


def copy_media(source: Path, target: Path) -> None:
    """Copy a media file or a folder of media files; 16-bit sounds become FLAC."""
    if source.is_dir():
        for member in sorted(source.iterdir()):
            copy_media(member, target / member.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix != ".wav":
        shutil.copyfile(source, target)
        return
    wave, rate = soundfile.read(source, dtype="int16")
    target = target.with_suffix(".flac")
    soundfile.write(target, wave, rate, subtype="PCM_16", compression_level=1.0)
    np.testing.assert_array_equal(soundfile.read(target, dtype="float32")[0], wave / 2.0**15)


def write_records(path: Path, records: list[dict]) -> None:
    """Write records as JSON in which sounds are FLAC files."""
    path.write_text(json.dumps(records, indent=1).replace('.wav"', '.flac"') + "\n")


# ---------------------------------------------------------------------------- checkpoints


def used_tensors(system: System) -> set[tuple[Path, str]]:
    """(file, name) of every source tensor that a parameter of either form uses."""
    used = set()
    for form in ("unmerged", "merged"):
        resolution = system.resolution(form)
        for target in resolution.targets.values():
            for copy in target.fills.values():
                halves = (copy.adapter.a, copy.adapter.b) if copy.adapter else ()
                for src in (copy.src, *halves):
                    tensor = resolution.plan.tensor(src)
                    used.add((tensor.file, tensor.name))
    return used


def reduce_checkpoint(system: System, target: Path, files: str = ".*") -> None:
    """Copy the checkpoint folders with the used tensors only; shards become one file."""
    used = used_tensors(system)
    for path in sorted((system.folder / "checkpoint").rglob("*")):
        out = target / path.relative_to(system.folder)
        if not path.is_file() or path.name.endswith(".index.json"):
            continue
        if not re.fullmatch(files, path.relative_to(system.folder / "checkpoint").as_posix()):
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix not in (".bin", ".pt"):
            shutil.copyfile(path, out)
            continue
        content = torch.load(path, weights_only=True)
        state = content.get("model", content)
        kept = {name: value for name, value in state.items() if (path, name) in used}
        if path.name.startswith("pytorch_model-"):
            out = out.with_name("pytorch_model.bin")
            kept |= torch.load(out, weights_only=True) if out.is_file() else {}
        if kept:
            torch.save({**content, "model": kept} if "model" in content else kept, out)


# -------------------------------------------------------------------------------- folders


def reduce_whole(system: System, target: Path) -> None:
    """Keep checkpoint, inputs, media and expected values: all that the tests of a system check."""
    reduce_checkpoint(system, target)
    for name in ("grad_norms.json", "info.json"):
        shutil.copyfile(system.folder / name, target / name)
    for name in ("data.json", "generate_queries.json"):
        write_records(target / name, json.loads((system.folder / name).read_text()))
    copy_media(system.folder / "media", target / "media")
    save_npz(target / "inputs.npz", system.inputs)
    expected = load_file(system.folder / "expected.safetensors")
    save_file(thinned(expected, EXPECTED_STEPS), target / "expected.safetensors")


def reduce_hearing(system: System, target: Path) -> None:
    """Keep encoder and reader of sounds, a few records, all prompts; no decoder, no vision."""
    reduce_checkpoint(system, target, HEARING_FILES)
    inputs, rows = system.inputs, list(HEARING_ROWS)
    kept = {k: inputs[k][rows] for k in inputs.files if not k.startswith("generate/")}
    kept |= {k: inputs[k] for k in inputs.files if re.fullmatch(r"generate/\d+/input_ids", k)}
    save_npz(target / "inputs.npz", kept)
    records = json.loads((system.folder / "data.json").read_text())
    records = [records[row] for row in rows]
    write_records(target / "data.json", records)
    queries = json.loads((system.folder / "generate_queries.json").read_text())
    write_records(target / "generate_queries.json", queries)
    media = [r[k] for r in records for k in ("image", "voice", "video") if k in r]
    for name in (
        name for given in media for name in ([given] if isinstance(given, str) else given)
    ):
        copy_media(system.folder / name, target / name)
    # Calls are numbered by the chunks in use, in the order of the batch.
    owner = [row for row, mask in enumerate(inputs["features_mask"]) for _ in mask[mask > 0]]
    calls = [call for row in rows for call, of in enumerate(owner) if of == row]
    expected = {}
    for key, value in load_file(system.folder / "expected.safetensors").items():
        match = re.fullmatch(HEARING_KEYS, key)
        if match and int(match[2]) in calls:
            expected[f"{key.rpartition('/')[0]}/call{calls.index(int(match[2]))}"] = value
    save_file(thinned(expected, EXPECTED_STEPS), target / "expected.safetensors")


def reduce_seeing(system: CumoSystem, target: Path) -> None:
    """Keep records, prompts, and encoder and connector of the last stage; no decoder."""
    path = system.paths["final"]
    out = target / "checkpoint" / path.name
    out.mkdir(parents=True)
    marks = ("model.vision_tower.", "model.mm_projector.")
    shards = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    kept = {k: v for shard in shards for k, v in shard.items() if k.startswith(marks)}
    save_file(kept, out / "model.safetensors")
    tower = system.settings("final")["mm_vision_tower"]
    for file in (path / "config.json", path.with_name(tower) / "config.json"):
        copy = target / "checkpoint" / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    for file in sorted(path.glob("*token*")):
        shutil.copyfile(file, out / file.name)
    for name in ("data.json", "generate_queries.json"):
        shutil.copyfile(system.folder / name, target / name)
    copy_media(system.folder / "media", target / "media")
    kept = {k: v for k, v in system.inputs.items() if not re.fullmatch(r"generate/.*/images", k)}
    save_npz(target / "inputs.npz", kept)
    kept = {k: v for k, v in system.expected.items() if re.fullmatch(SEEING_KEYS, k)}
    save_file(thinned(kept, SEEING_STEPS), target / "expected.safetensors")


def reduce_preprocessing(source: Path, target: Path) -> None:
    """Keep front ends and templates, without values that the media of the systems show as well."""
    target.mkdir(parents=True)
    with np.load(source / "expected_uni.npz") as file:
        arrays = thinned(file, PREPROCESSING_STEPS)
    for key in [key for key in arrays if key.endswith("/waveform16k")]:
        wave = arrays.pop(key)
        arrays[f"{key}_len"] = np.array(len(wave))
        arrays[f"{key}_head_tail"] = np.concatenate([wave[:ENDS], wave[-ENDS:]])
    save_npz(target / "expected_uni.npz", arrays)
    names = {key.split("/")[0] for key in arrays}
    for path in sorted((source / "media").iterdir()):
        if path.stem in names:
            copy_media(path, target / "media" / path.name)
    (target / "templates_cumo.json").write_text(reduced_templates(source / "templates_cumo.json"))
    shutil.copyfile(source / "templates_uni.json", target / "templates_uni.json")
    shutil.copytree(source / "tokenizers", target / "tokenizers", copy_function=shutil.copyfile)


def reduced_templates(source: Path) -> str:
    """The templates that only CuMo has, one dialogue per line, with the fields that tests read."""
    kept = {
        "plain": ("after_preprocess_multimodal", "input_ids", "labels"),
        "mistral_instruct": ("conversations", "input_ids", "labels"),
        "mistral_instruct_system": ("conversations", "input_ids", "labels"),
    }
    lines = []
    for key, value in json.loads(source.read_text()).items():
        if key.startswith("cumo/") and (fields := kept.get(key.split("/")[1])):
            content = {name: value[name] for name in fields}
            lines.append(f"{json.dumps(key)}: {json.dumps(content, separators=(',', ':'))}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` with the digest of every recorded file."""
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    lines = []
    for path in files:
        path.chmod(0o644)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


def main(golden: Path, target: Path) -> None:
    reduce_preprocessing(golden / "preprocessing", target / "preprocessing")
    reduce_whole(System(golden / WHOLE), target / WHOLE)
    reduce_hearing(System(golden / HEARING), target / HEARING)
    reduce_seeing(CumoSystem(golden / SEEING), target / SEEING)
    write_sums(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
