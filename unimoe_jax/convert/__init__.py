"""Checkpoints of the PyTorch originals in and out. Imports config, models, checkpoints and below.

__main__           the command line: import, export, inspect, verify
source_tensor      one tensor of a source file, and ConvertError
torch_file         files of torch, read without executing anything
reader             safetensors files and folders, tensor by tensor; config.json
source_names       tensors of the fine-tune's files under the names that the tables use
recognise          paths -> source folders with roles, by config.json and tensor names
processor_checks   preprocessor_config.json must ask for the features that data/ makes
options            choices of an import: adapters, routers, rounding, layers of CLIP
entry              one row of a conversion table, and its expansion into single copies
tables/            which source tensor becomes which parameter, one file per family or encoder
branches           encoders and connectors: their settings, and the copies that fill them
unimoe_plan        the folders of a Uni-MoE -> a conversion plan
family_plans       the folders of any family -> a conversion plan
plan               every tensor has a place, checked before any tensor is read
importing          source folders -> a checkpoint of this package, slice by slice
writer             the arrays of that checkpoint, written in parts
opening            any checkpoint, of this package or of an original, read lazily
layouts            which file of an exported folder holds which tensors
exporting          a checkpoint -> folders that the originals load
inspecting         the names, shapes and sizes that a checkpoint holds
verifying          whether two checkpoints are equal, by parameters and by logits
"""
