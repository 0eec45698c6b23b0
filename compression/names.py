"""Names on disk."""

FORMAT = "deltamux"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
# One file of weights, of a checkpoint or an artifact, and the index of several.
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "delta_config.json"
RECIPE_FILE = "recipe.yaml"
