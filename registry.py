"""The models, data sets and methods that the programs know by name; add a line below to register another one."""

from datafree.registry import (  # noqa: F401
    DATASETS,
    INCREMENTAL_METHODS,
    METHODS,
    MODELS,
    QUANTIZATION_METHODS,
    get_dataset,
    get_model,
)
