"""Every setting: frozen, checked when it is read, with its default. Imports nothing of the package.

base             the base class of all settings; number types, regular expressions, module names
media            the one table of media: names, record keys, placeholders, pools, numbers
errors           ConfigError, which every refused setting raises
cache            the folder for files that are made once and used again
modules          settings of experts, routers, adapters, decoder, encoders and connectors
model            settings of a whole model: a decoder and a branch per medium
data             settings of data sources, loader and template
stage            settings of one stage: rules, origins, optimizer, router losses
run              settings of a run: stages, mesh, precision, checkpoints, logging
stage_settings   one stage together with everything that it takes from its run
yaml_dialect     YAML 1.2 scalars, without duplicate keys
merge            included files and overrides merged, and which of them set which key
problems         one line per wrong key: file, key, value and what is allowed
describe         what a settings class allows, for `--help` and for messages
load             files and overrides -> RunConfig, and back to YAML

The settings classes can be imported from here; functions come from their own module.
"""

from unimoe_jax.config.base import (
    MODULES,
    AttentionProgram,
    Config,
    FloatType,
    Fraction,
    ModuleName,
    NonNegative,
    Positive,
    Regex,
)
from unimoe_jax.config.data import DataConfig, LoaderConfig, SourceConfig, TemplateName
from unimoe_jax.config.errors import ConfigError
from unimoe_jax.config.media import MEDIA, MediaName
from unimoe_jax.config.model import AudioConfig, ModelConfig, SpeechConfig, VisionConfig
from unimoe_jax.config.modules import (
    BeatsConfig,
    ClipConfig,
    DecoderConfig,
    LoRARule,
    MlpConnectorConfig,
    MoEConfig,
    QueryConnectorConfig,
    RouterConfig,
    WhisperConfig,
)
from unimoe_jax.config.run import (
    CheckpointConfig,
    LogConfig,
    MeshConfig,
    PrecisionConfig,
    RunConfig,
)
from unimoe_jax.config.stage import (
    AuxLossConfig,
    ModalityLossConfig,
    OptimConfig,
    RouterLossConfig,
    Rule,
    StageConfig,
    Take,
)

__all__ = [
    "MEDIA",
    "MODULES",
    "AttentionProgram",
    "AudioConfig",
    "AuxLossConfig",
    "BeatsConfig",
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "FloatType",
    "Fraction",
    "LoRARule",
    "LoaderConfig",
    "LogConfig",
    "MediaName",
    "MeshConfig",
    "MlpConnectorConfig",
    "MoEConfig",
    "ModalityLossConfig",
    "ModelConfig",
    "ModuleName",
    "NonNegative",
    "OptimConfig",
    "Positive",
    "PrecisionConfig",
    "QueryConnectorConfig",
    "Regex",
    "RouterConfig",
    "RouterLossConfig",
    "Rule",
    "RunConfig",
    "SourceConfig",
    "SpeechConfig",
    "StageConfig",
    "Take",
    "TemplateName",
    "VisionConfig",
    "WhisperConfig",
]
