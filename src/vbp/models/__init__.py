"""From a name to a classifier with its preprocessing: timm, Hugging Face, Facebook's ConvNeXt files."""
